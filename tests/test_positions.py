"""Positions against the formula of the paper, and against other libraries."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivit import (
    LearnedPositions,
    SinusoidalPositions,
    resample_positions,
    rotate,
    sinusoidal_positions,
    sinusoidal_positions_2d,
)


def paper(length, width):
    """Section 3.5 of Vaswani et al., number by number."""
    table = torch.empty(length, width, dtype=torch.float64)
    for position in range(length):
        for i in range(width // 2):
            angle = position / 10000 ** (2 * i / width)
            table[position, 2 * i] = math.sin(angle)
            table[position, 2 * i + 1] = math.cos(angle)
    return table


@pytest.mark.parametrize(("length", "width"), [(1, 2), (7, 2), (50, 16), (600, 64)])
def test_sinusoids_of_the_paper(length, width):
    found = sinusoidal_positions(length, width)
    assert found.dtype == torch.float32
    # Angles taken in float32 would be wrong in the fourth decimal at position 5,000.
    torch.testing.assert_close(found.double(), paper(length, width), atol=1e-7, rtol=0)


def test_sinusoids_far_out_are_exact():
    found = sinusoidal_positions(100_001, 4)[100_000].tolist()
    expected = [math.sin(1e5), math.cos(1e5), math.sin(1e3), math.cos(1e3)]
    assert found == pytest.approx(expected, abs=1e-7)


def test_sinusoids_follow_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        found = sinusoidal_positions(50, 16)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, paper(50, 16), atol=1e-14, rtol=0)


def test_sinusoids_of_a_grid():
    table = sinusoidal_positions_2d(3, 5, 8)
    assert table.shape == (15, 8)
    for row in range(3):
        for column in range(5):
            expected = torch.cat([paper(3, 4)[row], paper(5, 4)[column]])
            torch.testing.assert_close(
                table[row * 5 + column].double(), expected, atol=1e-7, rtol=0
            )


@pytest.mark.parametrize("make", [SinusoidalPositions, LearnedPositions])
def test_positions_are_added_from_the_start_on(make):
    module, x = make(9, 4), torch.randn(2, 3, 4)
    table = module(torch.zeros(1, 9, 4))[0]
    assert len({tuple(row) for row in table.tolist()}) == 9
    assert torch.equal(module(x), x + table[:3])
    assert torch.equal(module(x, start=6), x + table[6:])
    whole = torch.randn(2, 9, 4)
    parts = torch.cat([module(whole[:, :5]), module(whole[:, 5:], start=5)], dim=1)
    assert torch.equal(parts, module(whole))


def test_the_constant_table_is_not_stored_and_moves_along():
    module = SinusoidalPositions(9, 4)
    assert not module.state_dict()
    assert not list(module.parameters())
    assert module.double()(torch.zeros(1, 2, 4).double()).dtype == torch.float64


def test_learned_positions_learn():
    module = LearnedPositions(9, 4)
    module(torch.zeros(2, 3, 4), start=2).sum().backward()
    rows = module.table.grad.abs().sum(1)
    assert (rows > 0).tolist() == [False, False, True, True, True] + [False] * 4


# --- rotary -------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "width"), [(1, 2), (7, 4), (40, 16)])
@pytest.mark.parametrize("start", [0, 5])
def test_rotate_equals_gpt_j(length, width, start):
    from transformers.models.gptj import modeling_gptj as gptj

    x = torch.randn(2, 3, length, width)
    table = gptj.create_sinusoidal_positions(start + length, width)[None, start:]
    sin, cos = table.chunk(2, dim=-1)
    expected = gptj.apply_rotary_pos_emb(x.transpose(1, 2), sin, cos).transpose(1, 2)
    positions = torch.arange(start, start + length)
    torch.testing.assert_close(rotate(x, positions), expected, atol=1e-5, rtol=1e-5)
    if start == 0:
        assert torch.equal(rotate(x), rotate(x, positions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotate_equals_timm(dtype):
    from timm.layers import apply_rot_embed

    x = torch.randn(2, 3, 9, 8, dtype=dtype)
    angles = [[p / 10000 ** (2 * i / 8) for i in range(4)] for p in range(9)]
    angles = torch.tensor(angles, dtype=torch.float64).repeat_interleave(2, dim=1)
    expected = apply_rot_embed(x, angles.sin().to(dtype), angles.cos().to(dtype))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(rotate(x), expected, atol=tolerance, rtol=tolerance)


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(-500, 500))
def test_rotated_scores_depend_on_the_distance_only(seed, pairs, shift):
    torch.manual_seed(seed)
    q, k = torch.randn(2, 5, 2 * pairs, dtype=torch.float64)
    at_q, at_k = torch.randint(0, 100, (2, 5))
    before = (rotate(q, at_q) * rotate(k, at_k)).sum(-1)
    after = (rotate(q, at_q + shift) * rotate(k, at_k + shift)).sum(-1)
    torch.testing.assert_close(before, after, atol=1e-9, rtol=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 6))
def test_rotation_keeps_lengths(seed, pairs):
    torch.manual_seed(seed)
    x = torch.randn(2, 5, 2 * pairs, dtype=torch.float64)
    torch.testing.assert_close(rotate(x).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(rotate(x), -torch.arange(5)), x)
    assert torch.equal(rotate(x)[:, 0], x[:, 0])


def test_rotate_keeps_half_precision():
    x = torch.randn(2, 9, 4, dtype=torch.bfloat16)
    found = rotate(x, 1000 + torch.arange(9))
    assert found.dtype == torch.bfloat16
    expected = rotate(x.double(), 1000 + torch.arange(9))
    torch.testing.assert_close(found.double(), expected, atol=0.05, rtol=0.02)


# --- resampling ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((4, 4), (6, 6)),
        ((4, 4), (2, 2)),
        ((4, 4), (3, 8)),
        ((3, 5), (6, 4)),
        ((3, 5), (5, 3)),
        ((2, 8), (4, 4)),
    ],
)
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_resampling_equals_timm(dtype, old, new, prefix):
    from timm.layers import resample_abs_pos_embed

    table = torch.randn(1, prefix + old[0] * old[1], 6).to(dtype)
    found = resample_positions(table, new, old_grid_size=old, num_prefix_tokens=prefix)
    expected = resample_abs_pos_embed(
        table, list(new), old_size=list(old), num_prefix_tokens=prefix
    )
    assert found.dtype == dtype
    assert torch.equal(found[:, :prefix], table[:, :prefix])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_resampling_takes_square_grids_by_one_number():
    table = torch.randn(1, 17, 6)
    assert torch.equal(resample_positions(table, 6), resample_positions(table, (6, 6)))
    assert resample_positions(table, 4) is table
    double = table.double()
    assert resample_positions(double, 6).dtype == torch.float64


def test_resampling_keeps_a_slope():
    """A table that rises evenly from left to right still does so on a finer grid."""
    ramp = torch.arange(8.0).repeat(8)[None, :, None]
    fine = resample_positions(ramp, (8, 16), num_prefix_tokens=0).view(8, 16)
    assert torch.allclose(fine, fine[:1].expand(8, 16), atol=1e-5)
    inner = fine[0, 4:12]
    torch.testing.assert_close(inner.diff(), torch.full((7,), 0.5), atol=0.02, rtol=0.0)
