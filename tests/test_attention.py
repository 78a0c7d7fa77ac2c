"""Attention and its masks: what the reference implementations do not tell.

Equality with torch's own attention is tested in test_parity.py, properties for any
input in test_properties.py.
"""

import math

import pytest
import torch

from minivit import MultiHeadAttention, causal_mask, padding_mask
from minivit.attention import attention


def test_attention_by_the_definition():
    """Written with loops over single numbers, in Python's own arithmetic."""
    q, k, v = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4, 2)
    output, weights = attention(q, k, v)
    for i in range(2):
        scores = [
            sum(float(q[i, d] * k[j, d]) for d in range(3)) / math.sqrt(3)
            for j in range(4)
        ]
        total = sum(map(math.exp, scores))
        for j in range(4):
            assert float(weights[i, j]) == pytest.approx(
                math.exp(scores[j]) / total, abs=1e-6
            )
        for d in range(2):
            mixed = sum(math.exp(scores[j]) / total * float(v[j, d]) for j in range(4))
            assert float(output[i, d]) == pytest.approx(mixed, abs=1e-6)


def test_hidden_keys_get_no_weight_and_the_rest_sum_to_one():
    q, k, v = torch.randn(3, 5, 4), torch.randn(3, 6, 4), torch.randn(3, 6, 4)
    mask = torch.rand(3, 5, 6) < 0.5
    mask[..., 0] = True
    _, weights = attention(q, k, v, mask=mask)
    assert (weights[~mask] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 5))


def test_hiding_keys_is_the_same_as_leaving_them_out():
    q, k, v = torch.randn(5, 4), torch.randn(6, 4), torch.randn(6, 4)
    look = torch.tensor([True, False, True, True, False, True])
    found, _ = attention(q, k, v, mask=look)
    torch.testing.assert_close(found, attention(q, k[look], v[look])[0])


@pytest.mark.parametrize("shape", [(), (6,), (1, 6), (5, 1), (5, 6), (2, 1, 5, 6)])
def test_masks_broadcast(shape):
    q, k, v = (torch.randn(2, 3, n, 4) for n in (5, 6, 6))
    mask = torch.rand(shape) < 0.7
    found = attention(q, k, v, mask=mask)
    expected = attention(q, k, v, mask=mask.expand(2, 3, 5, 6))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_scores_as_large_as_half_precision_allows():
    """A finite number like -1e9 in place of a hidden score would overflow here."""
    q = torch.full((1, 2), 150.0, dtype=torch.float16)
    k = torch.tensor([[150.0, 150.0], [-150.0, -150.0]], dtype=torch.float16)
    v = torch.tensor([[1.0], [2.0]], dtype=torch.float16)
    for look, expected in (([True, True], 1.0), ([False, True], 2.0)):
        output, weights = attention(q, k, v, mask=torch.tensor([look]))
        assert output.item() == expected
        assert weights.sum() == 1


def test_causal_mask_of_a_cached_step():
    assert causal_mask(1, 4).tolist() == [[True] * 4]
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True] * 4]
    assert causal_mask(3).tolist() == torch.ones(3, 3).tril().bool().tolist()
    assert causal_mask(3, device="meta").device.type == "meta"


def test_padding_mask_takes_lists_and_finds_the_longest():
    assert padding_mask([2, 0, 3]).squeeze().tolist() == [
        [True, True, False],
        [False, False, False],
        [True, True, True],
    ]
    assert padding_mask(torch.tensor([1], dtype=torch.int32), 2).shape == (1, 1, 1, 2)


def test_masks_compose():
    mask = causal_mask(3) & padding_mask([2, 3])
    assert mask.shape == (2, 1, 3, 3)
    assert mask[0, 0].tolist() == [
        [True, False, False],
        [True, True, False],
        [True, True, False],
    ]


def test_heads_work_each_on_its_own_share():
    """With identity projections, head h is attention over its features alone."""
    module = MultiHeadAttention(6, 3, bias=False)
    with torch.no_grad():
        module.in_proj.weight.copy_(torch.eye(6).repeat(3, 1))
        module.out_proj.weight.copy_(torch.eye(6))
    x = torch.randn(2, 4, 6)
    output, weights = module.attend(x, x, x)
    for h in range(3):
        part = x[..., 2 * h : 2 * h + 2]
        expected, its_weights = attention(part, part, part)
        torch.testing.assert_close(output[..., 2 * h : 2 * h + 2], expected)
        torch.testing.assert_close(weights[:, h], its_weights)


@pytest.mark.parametrize("bias", [True, False])
def test_number_of_parameters_does_not_depend_on_the_heads(bias):
    for heads in (1, 2, 8):
        module = MultiHeadAttention(16, heads, bias=bias)
        number = sum(p.numel() for p in module.parameters())
        assert number == 4 * 16 * 16 + (4 * 16 if bias else 0)


def test_dropout_drops_weights_and_keeps_the_mean():
    module = MultiHeadAttention(4, 1, dropout=0.5, bias=False)
    with torch.no_grad():
        module.in_proj.weight.copy_(torch.eye(4).repeat(3, 1))
        module.out_proj.weight.copy_(torch.eye(4))
    x = torch.ones(1, 400, 4)
    values = module(x, x, x)
    assert values.std() > 0.01
    assert values.mean().item() == pytest.approx(1.0, abs=0.05)
    # The weights in sight are those without dropout.
    torch.testing.assert_close(module.attend(x, x, x)[0], x)


@pytest.mark.parametrize("same", [True, False], ids=["one tensor", "clones"])
def test_self_attention_appends_to_its_cache(same):
    """It makes no difference whether the three tensors are one object."""
    module, x = MultiHeadAttention(8, 2).eval(), torch.randn(2, 5, 8)
    expected, cache = module(x, x, x, mask=causal_mask(5)), {}
    for i in range(5):
        query = x[:, i : i + 1]
        new = query if same else query.clone()
        found = module(query, new, new, cache=cache)
        torch.testing.assert_close(found, expected[:, i : i + 1])
        assert cache["key"].shape == cache["value"].shape == (2, 2, i + 1, 4)


def test_cross_attention_fills_its_cache_once():
    module = MultiHeadAttention(8, 2).eval()
    query, memory, cache = torch.randn(2, 3, 8), torch.randn(2, 5, 8), {}
    expected = module(query, memory, memory)
    for new in (memory, None, None):
        found = module(query, new, new, cache=cache)
        torch.testing.assert_close(found, expected)
        assert cache["key"].shape == cache["value"].shape == (2, 2, 5, 4)


def test_a_refused_call_leaves_the_cache_as_it_was():
    """Whoever mends the call and tries again must not find a token there twice."""
    module, x, cache = MultiHeadAttention(8, 2), torch.randn(2, 3, 8), {}
    module(x, x, x, cache=cache)
    new = torch.randn(2, 1, 8)
    too_short = torch.ones(1, 2, dtype=torch.bool)
    for wrong in (
        {"mask": too_short},
        {"mask": too_short.float()},
        {"value": None},
        {"value": new[:1]},
    ):
        arguments = {"query": new, "key": new, "value": new, "cache": cache} | wrong
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            module(**arguments)
        assert cache["key"].shape == cache["value"].shape == (2, 2, 3, 4)


@pytest.mark.parametrize("cache", [None, {}])
def test_without_keys_anywhere_nothing_is_guessed(cache):
    module, x = MultiHeadAttention(8, 2), torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match="needs a cache"):
        module(x, None, None, cache=cache)
    assert not cache
    module(x, x, x, cache=(full := {}))
    with pytest.raises(ValueError, match="needs a cache"):
        module(x, x, None, cache=full)


@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_any_number_of_batch_dimensions(leading):
    """One sequence alone, or a grid of them, as for torch's module."""
    module = MultiHeadAttention(8, 2).eval()
    x = torch.randn(*leading, 5, 8)
    expected = module(*[x.reshape(-1, 5, 8)] * 3, mask=causal_mask(5)).view(x.shape)
    torch.testing.assert_close(module(x, x, x, mask=causal_mask(5)), expected)
    torch.testing.assert_close(module.attend(x, x, x, mask=causal_mask(5))[0], expected)
