"""The decoder's own; parity with torch's is in test_parity.py."""

import pytest
import torch
from models import randomise, sequence

from minivit import Decoder, DecoderLayer, causal_mask


def decoder(**changes):
    return randomise(Decoder(8, 2, 2, 12, **changes)).eval()


def new_cache():
    return [{"self": {}, "memory": {}} for _ in range(2)]


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_layer_written_out(norm_first):
    layer = randomise(DecoderLayer(8, 2, 12, norm_first=norm_first)).eval()
    x, memory, mask = sequence(4), sequence(), causal_mask(4)

    def look(x):
        return layer.self_attention(x, x, x, mask=mask)

    def read(x):
        return layer.cross_attention(x, memory, memory)

    norms = [layer.norm1, layer.norm2, layer.norm3]
    expected = x
    for norm, branch in zip(norms, [look, read, layer.feed_forward], strict=True):
        if norm_first:
            expected = expected + branch(norm(expected))
        else:
            expected = norm(expected + branch(expected))
    torch.testing.assert_close(layer(x, memory, mask=mask), expected)


@pytest.mark.parametrize("steps", [[1, 1, 1, 1], [3, 1], [2, 2]])
def test_steps_with_a_cache_equal_one_pass(steps):
    model, x, memory = decoder(), sequence(4), sequence()
    expected = model(x, memory, mask=causal_mask(4))
    cache, found, seen = new_cache(), [], 0
    for step in steps:
        new = x[:, seen : seen + step]
        seen += step
        mask = causal_mask(step, seen)
        found.append(model(new, memory, mask=mask, cache=cache))
    torch.testing.assert_close(torch.cat(found, dim=1), expected)


def test_a_cache_reads_the_memory_once():
    """Its keys and values come from the first step, whatever is given later."""
    model, x, memory = decoder(), sequence(2), sequence()
    expected = model(x, memory, mask=causal_mask(2))[:, 1:]
    cache = new_cache()
    model(x[:, :1], memory, cache=cache)
    found = model(x[:, 1:], torch.full_like(memory, torch.nan), cache=cache)
    torch.testing.assert_close(found, expected)
    assert cache[0]["memory"]["key"].shape == (2, 2, 5, 4)
    assert cache[0]["self"]["key"].shape == (2, 2, 2, 4)
