"""Positions against the formula of the paper, and against other libraries."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minivit import (
    LearnedPositions,
    MultiHeadAttention,
    SinusoidalPositions,
    alibi_bias,
    alibi_slopes,
    causal_mask,
    resample_positions,
    rotate,
    rotate_2d,
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


@pytest.mark.parametrize("base", [100.0, 500_000.0])
def test_rotate_with_another_base_equals_llama(base):
    """Llama pairs i with i + D/2: features in the order 0, 2, ... 1, 3, ..."""
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as llama

    config = LlamaConfig(
        hidden_size=16,
        num_attention_heads=2,
        rope_theta=base,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )
    x = torch.randn(2, 2, 9, 8)
    order = torch.cat([torch.arange(0, 8, 2), torch.arange(1, 8, 2)])
    cos, sin = llama.LlamaRotaryEmbedding(config)(x, torch.arange(9)[None])
    expected, _ = llama.apply_rotary_pos_emb(x[..., order], x[..., order], cos, sin)
    found = rotate(x, base=base)[..., order]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# --- rotary on a grid ---------------------------------------------------------------


GRIDS = [(1, 1), (3, 3), (2, 5), (7, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_rotate_2d_equals_timm(dtype, grid, prefix, base):
    """The layout is EVA's too: no feature has to be moved."""
    from timm.layers import RotaryEmbeddingCat, apply_rot_embed_cat

    rope = RotaryEmbeddingCat(8, in_pixels=False, temperature=base)
    table = rope.get_embed(list(grid))  # (N, 2D), sines and cosines in float32
    x = torch.randn(2, 3, prefix + grid[0] * grid[1], 8, dtype=dtype)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = rotate_2d(mine, grid, num_prefix_tokens=prefix, base=base)
    turned = apply_rot_embed_cat(theirs[..., prefix:, :], table.to(dtype))
    expected = torch.cat([theirs[..., :prefix, :], turned], dim=-2)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(x)
    for output in (found, expected):
        (output * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-5)


class GridAttention(MultiHeadAttention):
    def project(self, query, key, value, *, cache=None):
        q, k, v = super().project(query, key, value)
        return rotate_2d(q, (3, 4)), rotate_2d(k, (3, 4)), v


def test_attention_on_a_grid_equals_timm():
    """With a CLS token in front, whose query and key are not turned."""
    from timm.layers import RotaryEmbeddingCat
    from timm.layers.attention import AttentionRope

    mine, theirs = GridAttention(16, 2), AttentionRope(16, 2)
    names = {"in_proj": "qkv", "out_proj": "proj"}
    for own, other in names.items():
        getattr(theirs, other).load_state_dict(getattr(mine, own).state_dict())
    x = torch.randn(2, 13, 16)
    rope = RotaryEmbeddingCat(8, in_pixels=False).get_embed([3, 4])
    found, expected = mine(x, x, x), theirs(x, rope)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for output in (found, expected):
        output.square().sum().backward()
    for own, other in names.items():
        torch.testing.assert_close(
            getattr(mine, own).weight.grad, getattr(theirs, other).weight.grad,
            atol=1e-4, rtol=1e-4,
        )  # fmt: skip


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(0, 2), st.integers(0, 3))
def test_scores_on_a_grid_depend_on_both_differences_only(seed, fours, down, right):
    torch.manual_seed(seed)
    q, k = torch.randn(2, 1, 4 * fours, dtype=torch.float64)
    turned = [rotate_2d(v.expand(20, -1), (4, 5), num_prefix_tokens=0) for v in (q, k)]
    scores = (turned[0] @ turned[1].T).unflatten(0, (4, 5)).unflatten(2, (4, 5))
    moved = scores[down:, right:, down:, right:]
    stayed = scores[: 4 - down, : 5 - right, : 4 - down, : 5 - right]
    torch.testing.assert_close(moved, stayed, atol=1e-9, rtol=1e-9)


def test_rotate_2d_leaves_the_first_patch_and_what_is_in_front():
    x = torch.randn(2, 3 + 16, 8, dtype=torch.float64)
    found = rotate_2d(x, 4, num_prefix_tokens=3)
    assert torch.equal(found[:, :4], x[:, :4])
    assert not (found[:, 4:] == x[:, 4:]).all(dim=-1).any()
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))
    half = rotate_2d(x.bfloat16(), 4, num_prefix_tokens=3)
    assert half.dtype == torch.bfloat16


# --- ALiBi --------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [*range(1, 18), 32, 40])
def test_slopes_equal_bloom(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    table = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # (H, 1, 2)
    torch.testing.assert_close(alibi_slopes(heads), table[:, 0, 1])


def test_slopes_of_the_paper():
    """Section 3: 1/2, 1/4, ... for eight heads, and between them for sixteen."""
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(16)[1::2].tolist() == alibi_slopes(8).tolist()


@pytest.mark.parametrize("heads", [2, 3, 8, 12])
def test_the_bias_equals_mpt(heads):
    """Which gives it for the last query; with twelve heads it orders them otherwise."""
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    expected = build_mpt_alibi_tensor(heads, 7)[:, 0]  # (H, S)
    found = alibi_bias(heads, 1, 7)[:, 0]
    by_slope = [table[table[:, 0].argsort()] for table in (found, expected)]
    torch.testing.assert_close(*by_slope)


@pytest.mark.parametrize("heads", [2, 3])
def test_attention_with_the_bias_equals_bloom(heads):
    from transformers import BloomConfig
    from transformers.models.bloom import modeling_bloom as bloom

    B, L, D = 2, 7, 4
    E = heads * D
    mine = MultiHeadAttention(E, heads)
    config = BloomConfig(hidden_size=E, n_head=heads, attn_implementation="eager")
    theirs = bloom.BloomAttention(config, layer_idx=0).eval()
    with torch.no_grad():  # Bloom keeps query, key and value of a head together
        for own, other in (
            (mine.in_proj.weight, theirs.query_key_value.weight),
            (mine.in_proj.bias, theirs.query_key_value.bias),
        ):
            own.uniform_(-1, 1)
            parts = own.unflatten(0, (3, heads, D))  # (3, H, D, ...)
            other.copy_(parts.transpose(0, 1).flatten(0, 2))
        theirs.dense.load_state_dict(mine.out_proj.state_dict())

    x = torch.randn(B, L, E)
    look = causal_mask(L)
    q, k, v = mine.project(x, x, x)
    bias = alibi_bias(heads, L).masked_fill(~look, -torch.inf)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    found = mine.out_proj(mixed.transpose(1, 2).flatten(2))

    alibi = bloom.build_alibi_tensor(torch.ones(B, L), heads, torch.float32)
    hidden = torch.zeros(L, L).masked_fill(~look, torch.finfo(torch.float32).min)
    expected, *_ = theirs(x, torch.zeros_like(x), alibi, hidden[None, None])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for output in (found, expected):
        output.square().sum().backward()
    gradient = theirs.query_key_value.weight.grad
    gradient = gradient.unflatten(0, (heads, 3, D)).transpose(0, 1).flatten(0, 2)
    torch.testing.assert_close(mine.in_proj.weight.grad, gradient, atol=1e-4, rtol=1e-4)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9))
def test_the_bias_depends_on_the_distance_only(heads, length, before):
    whole = alibi_bias(heads, before + length)
    assert torch.equal(whole, whole.mT)
    assert torch.equal(whole[:, 1:, 1:], whole[:, :-1, :-1])
    assert torch.equal(whole[:, -1].flip(-1), whole[:, 0])
    assert (whole[:, 0].diff(dim=-1) < 0).all()
    # The last queries of a longer sequence, as in cached decoding:
    part = alibi_bias(heads, length, before + length)
    assert torch.equal(part, whole[:, before:])


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
