"""Rotary positions: the rotation, its properties, where positions start, the table."""

import pytest
import torch
from helpers import TOLERANCE, assert_close

from longscan.ops.norm import rms_norm
from longscan.ops.rotary import rotary, rotary_at, rotary_factors, rotary_heads

F64 = torch.float64
D = 8


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def packing(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def turned(x, **more):
    cos, sin = rotary_factors(x.shape[1], more.pop("dim", D), dtype=x.dtype, **more)
    return rotary(x, cos, sin)


def test_rotary_is_a_rotation_of_complex_pairs():
    x = normal(2, 9, 3, D)
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    angle = torch.arange(9, dtype=F64)[:, None] * 100.0 ** (-torch.arange(0, D, 2, dtype=F64) / D)
    z = z * torch.polar(torch.ones_like(angle), angle)[:, None]
    assert_close(turned(x, theta=100.0), torch.cat([z.real, z.imag], -1), "float64")


def test_scores_depend_on_distance_only():
    q, k = normal(1, 6, 1, D), normal(1, 6, 1, D, seed=1)
    scores = [
        torch.einsum("bihd,bjhd->bhij", turned(q, start=[s]), turned(k, start=[s]))
        for s in (0, 5, 70000)
    ]
    assert_close(scores[1], scores[0], "float64")
    assert_close(scores[2], scores[0], "float64")  # beyond the table


def test_rotary_of_a_part_leaves_the_rest():
    x = normal(1, 5, 2, D)
    y = turned(x, dim=4)
    assert torch.equal(y[..., 4:], x[..., 4:])
    assert_close(y[..., :4], turned(x[..., :4], dim=4), "float64")


def test_rotary_starts_and_packing():
    x = normal(1, 30, 1, D)
    whole = turned(x)
    both = torch.cat([x[:, 3:7], x[:, 20:24]])
    y = turned(both, start=[3, 20])
    assert_close(y, torch.cat([whole[:, 3:7], whole[:, 20:24]]), "float64")
    row = torch.cat([x[:, 3:7], x[:, 20:30], x[:, :2]], 1)
    y = turned(row, start=[3, 20, 0], cu_seqlens=packing([4, 10, 2]))
    want = torch.cat([whole[:, 3:7], whole[:, 20:30], whole[:, :2]], 1)
    assert_close(y, want, "float64")
    y = turned(row, start=[3, 70000, 0], cu_seqlens=packing([4, 10, 2]))  # beyond the table
    assert_close(y[:, :4], whole[:, 3:7], "float64")
    assert (y[:, 4:14] - whole[:, 20:30]).abs().max() > 0.1


def test_rotary_table_equals_computing():
    for dtype in (torch.float32, F64):
        table = rotary_factors(300, 6, 500.0, start=[1000], dtype=dtype)
        direct = rotary_at(torch.arange(1000, 1300), 6, 500.0, dtype)
        for a, b in zip(table, direct, strict=True):
            assert a.dtype == dtype
            assert (a.squeeze(1) - b).abs().max() <= TOLERANCE["float64"] * (
                1 if dtype == F64 else 1e3
            )


def test_rotary_table_of_inference_mode_can_train():
    with torch.inference_mode():
        turned(normal(1, 3, 1, 10), dim=10, theta=77.0)
    x = normal(1, 3, 1, 10).requires_grad_()
    turned(x, dim=10, theta=77.0).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("turns", [False, True])
def test_rotary_heads_are_parts_of_a_projection(turns, normed):
    x = normal(2, 5, (4 + 2 * 2) * D + 3)
    cos, sin = rotary_factors(5, 4, dtype=F64) if turns else (None, None)
    weights = (normal(D, seed=1), normal(D, seed=2)) if normed else None
    q, k, v, rest = rotary_heads(x, cos, sin, weights, heads=4, groups=2, d_head=D, eps=1e-3)
    parts = [p.unflatten(-1, (-1, D)) for p in x[..., :-3].split([4 * D, 2 * D, 2 * D], -1)]
    for i, got in enumerate((q, k)):
        want = rms_norm(parts[i], weights[i], 1e-3) if weights else parts[i]
        assert_close(got, rotary(want, cos, sin) if turns else want, "float64")
    assert torch.equal(v, parts[2])
    assert torch.equal(rest, x[..., -3:])


def test_factors_of_a_packing_are_kept_until_it_changes():
    bounds = packing([4, 10, 2])
    with torch.inference_mode():
        first = rotary_factors(16, D, cu_seqlens=bounds)
    assert rotary_factors(16, D, cu_seqlens=bounds)[0] is first[0]
    assert not first[0].is_inference()
    bounds[1] = 6
    assert not torch.equal(rotary_factors(16, D, cu_seqlens=bounds)[0], first[0])


def test_odd_rotary_dim_is_refused():
    with pytest.raises(ValueError, match="even"):
        rotary_at(torch.arange(3), 5)
