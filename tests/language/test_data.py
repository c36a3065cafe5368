"""Batches: no document sees another, every window is visited, any run can be taken up again."""

import itertools
import os
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("lightning")

from longscan.language.corpus import CorpusError, open_corpus
from longscan.language.data import LanguageData
from longscan.language.tokens import TokenFile, TokenWriter
from longscan.language.windows import TrainStream, ValidationBatches, Windows, permuted

EOD = 256
DOCUMENTS = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=30), min_size=1, max_size=8)


def write(folder: Path, documents, split="train") -> TokenFile:
    with TokenWriter(folder / "made", 1 << 20, EOD) as writer:
        for ids in documents:
            writer.add(split, np.array(ids), len(ids))
    return TokenFile(folder / "made", split)


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    """A folder of 120 text files, some of them shorter than a row."""
    folder = tmp_path_factory.mktemp("book")
    rng = random.Random(0)
    for i in range(120):
        words = [rng.choice(["alpha", "beta", "gamma", str(i)]) for _ in range(rng.randrange(200))]
        (folder / f"{i}.txt").write_text(" ".join([f"file {i}", *words]))
    return folder


def data_of(book: Path, **options) -> LanguageData:
    options = {"tokenizer": "byte", "seq_len": 16, "batch_size": 4, **options}
    return LanguageData(str(book), cache_dir=str(book.with_name("cache")), **options)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- the order ------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_the_permutation_is_a_bijection(n, seed):
    keys = np.random.SeedSequence(seed).generate_state(6, np.uint64)
    assert sorted(permuted(np.arange(n), n, keys)) == list(range(n))


def test_the_permutation_shuffles():
    n = 10_000
    orders = [
        permuted(np.arange(n), n, np.random.SeedSequence(s).generate_state(6, np.uint64))
        for s in range(8)
    ]
    for order in orders:
        # Neighbours land far apart, and nothing of the old order is left.
        assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.04
        assert abs(np.abs(np.diff(order)).mean() / (n / 3) - 1) < 0.03
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04
        assert (order == np.arange(n)).sum() < 8
    assert len({tuple(order[:5]) for order in orders}) == 8
    huge = 10**15 + 7
    far = permuted(np.arange(1000), huge, np.arange(6, dtype=np.uint64))
    assert len(set(far.tolist())) == 1000
    assert far.min() >= 0
    assert 0.9 * huge < far.max() < huge


# --- batches --------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    documents=DOCUMENTS,
    seq_len=st.integers(1, 12),
    batch_size=st.integers(1, 4),
    i=st.integers(0, 12),
    seed=st.integers(0, 5),
)
def test_batches_against_a_naive_construction(
    tmp_path_factory, documents, seq_len, batch_size, i, seed
):
    file = write(tmp_path_factory.mktemp("naive"), documents)
    # One entry for each input of the ring: (document, input, target, whether a document starts).
    ring = []
    for k, ids in enumerate(documents):
        framed = [EOD, *ids, EOD]
        ring += [(k, a, b, j == 0) for j, (a, b) in enumerate(itertools.pairwise(framed))]
    windows = Windows(file, seq_len, seed)
    assert windows.n == len(ring) // seq_len
    if windows.n == 0:
        return
    stream = TrainStream(windows, batch_size)
    batch = stream.batch_at(i)
    size = batch_size * seq_len
    assert batch["ids"].shape == batch["targets"].shape == (1, size)
    assert {batch[k].dtype for k in batch} == {torch.int64}
    cu = batch["cu_seqlens"].tolist()
    assert cu[0] == 0
    assert cu[-1] == size
    assert cu == sorted(set(cu))
    assert set(range(0, size + 1, seq_len)) <= set(cu)
    ids, targets = batch["ids"][0].tolist(), batch["targets"][0].tolist()
    for row in range(batch_size):
        here = slice(row * seq_len, (row + 1) * seq_len)
        fits = []
        for start in range(len(ring)):
            want = [ring[(start + j) % len(ring)] for j in range(seq_len)]
            edges = [row * seq_len] + [row * seq_len + j for j, w in enumerate(want) if w[3]]
            got = [c for c in cu[:-1] if here.start <= c < here.stop]
            if (
                ids[here] == [w[1] for w in want]
                and targets[here] == [w[2] for w in want]
                and got == sorted(set(edges))
            ):
                fits.append(want)
        assert fits, "the row is no stretch of the ring with its document starts"
    assert same(stream.batch_at(i), batch)


@settings(max_examples=30, deadline=None)
@given(documents=DOCUMENTS, seq_len=st.integers(1, 6), seed=st.integers(0, 3))
def test_each_epoch_visits_each_position_once(tmp_path_factory, documents, seq_len, seed):
    # Tokens that name their place, so that what is visited can be told.
    count = itertools.count(1000)
    documents = [[next(count) for _ in ids] for ids in documents]
    all_named = {t for ids in documents for t in ids}
    windows = Windows(write(tmp_path_factory.mktemp("epoch"), documents), seq_len, seed)
    if windows.n == 0:
        return
    for epoch in range(3):
        batch = windows.batch(np.arange(epoch * windows.n, (epoch + 1) * windows.n))
        ids = batch["ids"][0].tolist()
        assert len(ids) == windows.n * seq_len
        named = [t for t in ids if t != EOD]
        assert len(named) == len(set(named))
        left_out = windows.n_positions - len(ids)
        assert left_out < seq_len
        assert len(all_named - set(named)) <= left_out


def test_segments_are_stretches_of_one_document(book):
    """No input or target of a segment comes from another document than its first token."""
    data = data_of(book, seq_len=64, batch_size=3)
    tokens = data.tokens("train")
    framed = [bytes([0]) + bytes(tokens.document(i)[1:-1].astype(np.uint8)) + bytes([0])
              for i in range(tokens.n_documents)]  # fmt: skip
    for i in range(40):
        batch = data.batch_at(i)
        cu = batch["cu_seqlens"].tolist()
        for a, b in itertools.pairwise(cu):
            segment = [*batch["ids"][0, a:b].tolist(), int(batch["targets"][0, b - 1])]
            assert batch["targets"][0, a : b - 1].tolist() == segment[1:-1]
            assert EOD not in segment[1:-1]
            text = bytes(0 if t == EOD else t for t in segment)
            assert any(text in document for document in framed)
            if a % 64 and segment[0] == EOD:
                assert any(document.startswith(text) for document in framed)


def test_epochs_and_seeds_differ(book):
    data = data_of(book, batch_size=1)
    n = int(data.batches_per_epoch())
    again = sum(torch.equal(data.batch_at(i)["ids"], data.batch_at(n + i)["ids"]) for i in range(n))
    assert again < n / 10
    data = data_of(book)
    assert not same(data.batch_at(0), data_of(book, seed=1).batch_at(0))
    assert same(data.batch_at(5), data_of(book).batch_at(5))
    assert same(data.batch_at(10**9), data_of(book).batch_at(10**9))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_rows_of_a_larger_batch(book, world):
    whole = data_of(book, batch_size=4 * world).batch_at(7)
    parts = [data_of(book).batch_at(7, rank, world) for rank in range(world)]
    for key in ("ids", "targets"):
        assert torch.equal(torch.cat([p[key] for p in parts], 1), whole[key])
    edges = [p["cu_seqlens"][:-1] + i * 64 for i, p in enumerate(parts)]
    assert torch.equal(torch.cat(edges), whole["cu_seqlens"][:-1])


# --- the stream -----------------------------------------------------------------------------


def test_a_stream_is_taken_up_where_it_was_left(book):
    data = data_of(book)
    stream = data.train_dataloader()
    for _ in zip(range(5), stream, strict=False):
        pass
    # zip has taken five and not asked for a sixth.
    state = pickle.loads(pickle.dumps(stream.state_dict()))
    other = data_of(book).train_dataloader()
    other.load_state_dict(state)
    for i, batch in zip(range(5, 9), other, strict=False):
        assert same(batch, data.batch_at(i))
    # Two ranks of half the batch take it up too.
    halves = [TrainStream(Windows(data.tokens("train"), 16), 2, rank, 2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(state)
    rows = torch.cat([next(iter(half))["ids"] for half in halves], 1)
    assert torch.equal(rows, data.batch_at(5)["ids"])


def test_a_stream_over_other_data_is_refused(book):
    state = data_of(book).train_dataloader().state_dict()
    with pytest.raises(ValueError, match="seed 0, now 1"):
        data_of(book, seed=1).train_dataloader().load_state_dict(state)
    with pytest.raises(ValueError, match="seq_len 16, now 8"):
        data_of(book, seq_len=8).train_dataloader().load_state_dict(state)
    with pytest.raises(ValueError, match="12 rows seen, not a multiple of the 5"):
        data_of(book, batch_size=5).train_dataloader().load_state_dict({**state, "rows": 12})
    with pytest.raises(ValueError, match="n_positions 1, now"):
        data_of(book).train_dataloader().load_state_dict({**state, "n_positions": 1})


def test_workers_give_the_same_batches(book):
    stream = data_of(book, num_workers=1).train_dataloader()
    stream.load_state_dict({**stream.state_dict(), "rows": 12})
    for i, batch in zip(range(3, 6), stream, strict=False):
        assert same(batch, data_of(book).batch_at(i))


def test_resuming_a_lightning_run_sees_the_same_batches(book, tmp_path):
    import lightning.pytorch as pl

    class Task(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))
            self.seen, self.losses, self.valid = [], [], []

        def training_step(self, batch, batch_idx):
            self.seen.append(batch)
            self.losses.append(self.loss(batch).item())
            return self.loss(batch)

        def loss(self, batch):
            return (self.weight[batch["ids"] % 8] - batch["targets"] / 256).square().mean()

        def validation_step(self, batch, batch_idx):
            self.valid.append(self.loss(batch).item())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.01)

    class SaveAt(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            path = tmp_path / "three.ckpt"
            if trainer.global_step == 3 and not path.exists():
                trainer.save_checkpoint(path)

    def run(steps, checkpoint=None, callbacks=(), **options):
        task = Task()
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            accumulate_grad_batches=2,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            val_check_interval=4,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            **options,
        )
        with warnings.catch_warnings():
            # Lightning 2.6 makes one leaf of torch 2.13's pytree in the old way.
            warnings.filterwarnings("ignore", r".*LeafSpec", FutureWarning)
            trainer.fit(task, datamodule=data_of(book), ckpt_path=checkpoint)
        return task

    whole = run(8, callbacks=[SaveAt()])
    data = data_of(book)
    assert len(whole.seen) == 16
    assert len(whole.valid) == 4 * len(data.val_dataloader())
    assert all(same(b, data.batch_at(i)) for i, b in enumerate(whole.seen))
    rest = run(8, tmp_path / "three.ckpt")
    assert len(rest.seen) == 10
    assert all(same(b, data.batch_at(i)) for i, b in enumerate(rest.seen, 6))
    assert rest.losses == whole.losses[6:]
    assert data.train_dataloader().position == 0
    # A trainer that cuts the stream into epochs goes on with it at each.
    cut = run(8, limit_train_batches=4)
    assert cut.losses == whole.losses


# --- validation, evaluation, preparation ----------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(documents=DOCUMENTS, seq_len=st.integers(1, 40), batch_size=st.integers(1, 5))
def test_validation_covers_the_split(tmp_path_factory, documents, seq_len, batch_size):
    file = write(tmp_path_factory.mktemp("valid"), documents, "valid")
    windows = Windows(file, seq_len)
    batches = list(ValidationBatches(windows, batch_size))
    assert len(batches) == len(ValidationBatches(windows, batch_size)) >= 1
    ids = torch.cat([b["ids"] for b in batches], 1)[0].tolist()
    targets = torch.cat([b["targets"] for b in batches], 1)[0].tolist()
    assert ids == file[: len(ids)].tolist()
    assert targets == file[1 : len(ids) + 1].tolist()
    assert windows.n_positions - len(ids) < max(batch_size * seq_len, 1)
    starts = set(file.offsets.tolist())
    length = min(seq_len, windows.n_positions)
    at = 0
    for batch in batches:
        size = batch["ids"].numel()
        assert size == batches[0]["ids"].numel()
        want = {j for j in range(size) if at + j in starts or j % length == 0}
        assert batch["cu_seqlens"].tolist() == [*sorted(want), size]
        at += size


def test_validation_may_be_limited_and_is_then_spread(book):
    data = data_of(book, val_batches=None, batch_size=2, seq_len=8)
    everything = data.val_dataloader()
    assert len(everything) > 6
    few = data_of(book, val_batches=3, batch_size=2, seq_len=8).val_dataloader()
    assert len(few) == len(list(few)) == 3
    assert few.starts.reshape(-1)[0] == 0
    assert few.starts.reshape(-1)[-1] > 0.7 * everything.starts.reshape(-1)[-1]
    assert len(data.test_dataloader()) > 0
    assert data_of(book, val_batches=0).val_dataloader() == []


def test_documents_for_evaluation_are_exact(book):
    data = data_of(book)
    for split in ("train", "valid", "test", "all"):
        texts = [d for _, d in open_corpus(book).documents(split)]
        documents = list(data.documents(split))
        assert len(documents) == len(texts) > 0
        decode = data.tokenizer.decode_bytes
        assert sorted(decode(ids) for ids, _ in documents) == sorted(texts)
        for ids, n_bytes in documents:
            assert ids[0] == ids[-1] == EOD
            assert ids.dtype == torch.int64
            assert n_bytes == data.tokenizer.n_bytes(ids) == len(decode(ids))


def test_bpe_from_text_to_batch(book):
    pytest.importorskip("tokenizers")
    data = data_of(book, tokenizer="bpe", vocab_size=300)
    data.prepare_data()
    data.setup("fit")
    batch = data.batch_at(0)
    assert int(batch["ids"].max()) < data.tokenizer.vocab_size <= 300
    data.tokenizer.save(book.with_name("tokenizer.json"))
    again = data_of(book, tokenizer=str(book.with_name("tokenizer.json")))
    assert same(again.batch_at(0), batch)


def test_too_little_text_is_said(tmp_path):
    (tmp_path / "small.txt").write_text("word\n" * 40)
    options = {"tokenizer": "byte", "cache_dir": str(tmp_path / "cache")}
    data = LanguageData(str(tmp_path / "small.txt"), seq_len=64, batch_size=4, **options)
    with pytest.raises(CorpusError, match="has 186 tokens, and one batch needs 256"):
        data.setup("fit")
    fits = LanguageData(str(tmp_path / "small.txt"), seq_len=46, batch_size=4, **options)
    fits.setup("fit")
    assert fits.batch_at(0)["ids"].shape == (1, 184)
    with pytest.raises(CorpusError, match="one batch needs 368"):
        fits.batch_at(0, 0, 2)


def test_an_empty_split_is_said(tmp_path):
    lines = "".join(f'{{"text": "some words {i}"}}\n' for i in range(3))
    (tmp_path / "few.jsonl").write_text(lines)
    options = {"tokenizer": "byte", "cache_dir": str(tmp_path), "seq_len": 8, "batch_size": 1}
    data = LanguageData(str(tmp_path / "few.jsonl"), **options)
    with pytest.raises(CorpusError, match=r"valid split.*is empty: none of its 3.*val_batches=0"):
        data.setup("fit")
    assert len(list(data.documents("all"))) == 3
    with pytest.raises(CorpusError, match="valid split"):
        list(data.documents("valid"))
    LanguageData(str(tmp_path / "few.jsonl"), val_batches=0, **options).setup("fit")
    with pytest.raises(CorpusError, match="no file or folder"):
        LanguageData(str(tmp_path / "none"), **options).prepare_data()


def test_bad_options_are_said():
    for name, value in (("seq_len", 0), ("batch_size", 0), ("seed", -1), ("val_batches", -2)):
        with pytest.raises(ValueError, match=f"{name} is {value}; it must be"):
            LanguageData(**{name: value})
    with pytest.raises(FileNotFoundError, match="no tokenizer file"):
        _ = LanguageData(tokenizer="bqe").tokenizer


def test_without_the_extras_bytes_work_and_the_rest_says_what_to_install(tmp_path):
    (tmp_path / "a.txt").write_text("some words\n" * 100)
    script = f"""
import sys
for name in ("lightning", "tokenizers", "pyarrow"):
    sys.modules[name] = None
from longscan.language.corpus import open_corpus
from longscan.language.tokenizer import BPETokenizer, ByteTokenizer
from longscan.language.tokens import TokenFile, encode_corpus
from longscan.language.windows import TrainStream, Windows
folder = encode_corpus(open_corpus({str(tmp_path / "a.txt")!r}), ByteTokenizer(), "cache")
print(TrainStream(Windows(TokenFile(folder, "train"), 8), 2).batch_at(0)["ids"].shape)
open("b.parquet", "wb").write(b"PAR1")
def data():
    import longscan.language.data
for what in (lambda: BPETokenizer.train([b"x"]), lambda: open_corpus("b.parquet"), data):
    try:
        what()
    except ImportError as error:
        print("longscan[train]" in str(error))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["torch.Size([1, 16])", "True", "True", "True"], done.stderr
