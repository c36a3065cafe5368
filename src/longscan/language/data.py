"""LanguageData: text on disk to training and validation batches, for Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from longscan.language.corpus import SPLITS, Corpus, CorpusError, Split, open_corpus
from longscan.language.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer
from longscan.language.tokens import TokenFile, default_cache, encode_corpus, train_bpe
from longscan.language.windows import Batch, TrainStream, ValidationBatches, Windows

try:
    import lightning
except ImportError as error:
    raise ImportError("training data needs lightning: pip install 'longscan[train]'") from error


class LanguageData(lightning.LightningDataModule):
    """Text to batches for a language model; `longscan.language.windows` says what a batch is.

    Args:
        path: text file, .jsonl, .parquet, or folder of them (default: Python's standard library)
        tokenizer: bpe (learned from the training split), byte, or the path of a tokenizer.json
        vocab_size: of bpe, the 256 bytes and the end of document included
        seq_len: tokens in a row
        batch_size: rows in a batch, on each device or group of devices that share sequences
        seed: of the order of the rows
        val_batches: batches of a validation pass, spread evenly (null: all, 0: none)
        text_field: JSONL field or Parquet column that holds the text
        cache_dir: where tokenizers and tokens are kept (default: the user's cache folder)
        num_workers: processes that read batches ahead; 0 is enough for a local disk
        tokenizer_sample: bytes of the training split that bpe learns from

    Raises: CorpusError (a ValueError) where the text is missing, malformed or too small.
    """

    # Options that leave the sequence of training batches as it is.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("val_batches", "cache_dir", "num_workers")

    def __init__(
        self,
        path: str | None = None,
        tokenizer: str = "bpe",
        vocab_size: int = 4096,
        seq_len: int = 512,
        batch_size: int = 8,
        seed: int = 0,
        val_batches: int | None = 50,
        text_field: str = "text",
        cache_dir: str | None = None,
        num_workers: int = 0,
        tokenizer_sample: int = 16 << 20,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("seq_len", seq_len, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("val_batches", val_batches or 0, 0),
            ("num_workers", num_workers, 0),
            ("tokenizer_sample", tokenizer_sample, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be {least} or more")
        self.path, self.text_field = path, text_field
        self.tokenizer_name, self.vocab_size = tokenizer, vocab_size
        self.tokenizer_sample = tokenizer_sample
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.val_batches, self.num_workers = val_batches, num_workers
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache()
        self._corpus: Corpus | None = None
        self._tokenizer: ByteTokenizer | BPETokenizer | None = None
        self._tokens: dict[Split, TokenFile] = {}

    @property
    def corpus(self) -> Corpus:
        """The documents as bytes."""
        if self._corpus is None:
            self._corpus = open_corpus(self.path, self.text_field)
        return self._corpus

    @property
    def tokenizer(self) -> ByteTokenizer | BPETokenizer:
        """The tokenizer; learned now if it is "bpe" and not in the cache."""
        if self._tokenizer is None:
            if self.tokenizer_name == "byte":
                self._tokenizer = ByteTokenizer()
            elif self.tokenizer_name == "bpe":
                self._tokenizer = train_bpe(
                    self.corpus, self.vocab_size, self.cache_dir, self.tokenizer_sample
                )
            else:
                self._tokenizer = load_tokenizer(self.tokenizer_name)
        return self._tokenizer

    def tokens(self, split: Split) -> TokenFile:
        """The token file of a split; the corpus is encoded now if it is not in the cache."""
        if not self._tokens:
            folder = encode_corpus(self.corpus, self.tokenizer, self.cache_dir)
            self._tokens = {s: TokenFile(folder, s) for s in SPLITS}
        return self._tokens[split]

    def documents(self, split: Split | Literal["all"]) -> Iterator[tuple[Tensor, int]]:
        """Each document as (ids int64 [n + 2], the bytes of its text), for exact evaluation.

        ids start and end with eod: inputs are ids[:-1], targets ids[1:].
        Raises: CorpusError if the split is empty.
        """
        for tokens in map(self.tokens, SPLITS) if split == "all" else [self._filled(split)]:
            for i in range(tokens.n_documents):
                ids = torch.from_numpy(tokens.document(i).astype(np.int64))
                yield ids, int(tokens.byte_counts[i])

    def batch_at(self, i: int, rank: int = 0, world: int = 1) -> Batch:
        """Training batch i of one rank: the same whenever and wherever it is asked for."""
        return TrainStream(self._train_windows(world), self.batch_size, rank, world).batch_at(i)

    def batches_per_epoch(self, world: int = 1) -> float:
        """How many batches see the training split once; the stream itself has no end."""
        return self._train_windows(world).n / (self.batch_size * world)

    def prepare_data(self) -> None:
        """Learn the tokenizer and encode the corpus (Lightning calls this on one rank)."""
        self.tokens("train")

    def setup(self, stage: str | None = None) -> None:
        """Open the token files and see that there is enough text.

        Raises: CorpusError.
        """
        if stage in (None, "fit"):
            self._train_windows(self._shard()[1])
        if self.val_batches != 0 and stage in (None, "fit", "validate"):
            self._filled("valid")

    def train_dataloader(self) -> TrainStream:
        """The training stream of this rank."""
        rank, world = self._shard()
        trained = _batches_trained(self.trainer) if self.trainer is not None else None
        return TrainStream(
            self._train_windows(world), self.batch_size, rank, world, self.num_workers, trained
        )

    def val_dataloader(self) -> ValidationBatches | list[Any]:
        """The validation batches, all of them on every rank."""
        if self.val_batches == 0:
            return []
        return self._pass_over("valid")

    def test_dataloader(self) -> ValidationBatches:
        """Like validation, on the test split."""
        return self._pass_over("test")

    def _pass_over(self, split: Split) -> ValidationBatches:
        windows = Windows(self._filled(split), self.seq_len)
        return ValidationBatches(windows, self.batch_size, self.val_batches or None)

    def _filled(self, split: Split) -> TokenFile:
        tokens = self.tokens(split)
        if tokens.n_documents == 0:
            n = sum(self.tokens(s).n_documents for s in SPLITS)
            raise CorpusError(
                f"the {split} split of {self.corpus.source} is empty: none of its {n} documents "
                "falls into it (2 % of the records do, by the hash of their names). Give some "
                "hundred documents, or one text file, which is cut inside"
                + ("; or train without validation, val_batches=0" if split == "valid" else "")
            )
        return tokens

    def _train_windows(self, world: int) -> Windows:
        tokens = self.tokens("train")
        windows = Windows(tokens, self.seq_len, self.seed)
        rows = self.batch_size * world
        if windows.n < rows:
            raise CorpusError(
                f"{self.corpus.source} is too small for one batch: its training split has "
                f"{windows.n_positions} tokens, and one batch needs {rows * self.seq_len} "
                f"({rows} rows of seq_len {self.seq_len}). Give more text, or lower batch_size or "
                "seq_len"
            )
        return windows

    def _shard(self) -> tuple[int, int]:
        """(rank, world) among the data-parallel ranks; ranks that share sequences share rows."""
        if self.trainer is None:
            return 0, 1
        place = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None)
        return (place["rank"], place["num_replicas"]) if place else (0, 1)


def _batches_trained(trainer: Any) -> Callable[[], int]:
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return lambda: progress.total.processed
