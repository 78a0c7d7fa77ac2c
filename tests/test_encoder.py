"""The encoder's own; parity with torch's is in test_parity.py."""

import pytest
import torch
from models import randomise, sequence

from minivit import Encoder, EncoderLayer, causal_mask


def test_drop_path_grows_with_depth():
    stack = Encoder(8, 5, 2, 12, drop_path=0.4)
    found = []
    for layer in stack.layers:
        one, two = layer.dropout1[1], layer.dropout2[1]
        assert one.p == two.p
        found.append(one.p)
    assert found == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_dropped_paths_leave_the_residual_stream():
    layer = EncoderLayer(8, 2, 12, drop_path=0.999)
    x = torch.randn(20, 5, 8)
    assert (layer(x) == x).flatten(1).all(1).sum() >= 18
    assert not torch.allclose(layer.eval()(x), x)


def test_small_layer_scale_begins_near_the_identity():
    layer, x = EncoderLayer(8, 2, 12, layer_scale=1e-4), torch.randn(2, 5, 8)
    torch.testing.assert_close(layer(x), x, atol=1e-2, rtol=0)
    assert not torch.equal(layer(x), x)


def test_layers_take_masks_by_head():
    layer = EncoderLayer(8, 2, 12).eval()
    x, mask = torch.randn(2, 4, 8), causal_mask(4)
    by_head = mask.expand(2, 2, 4, 4)
    torch.testing.assert_close(layer(x, mask=by_head), layer(x, mask=mask))


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_layer_written_out(norm_first):
    """Both orders, with everything that stands between a branch and its sum."""
    layer = EncoderLayer(8, 2, 12, norm_first=norm_first, layer_scale=0.5)
    x = sequence()
    randomise(layer).eval()

    def look(x):
        return layer.self_attention(x, x, x) * layer.scale1.weight

    def think(x):
        return layer.feed_forward(x) * layer.scale2.weight

    if norm_first:
        expected = x + look(layer.norm1(x))
        expected = expected + think(layer.norm2(expected))
    else:
        expected = layer.norm1(x + look(x))
        expected = layer.norm2(expected + think(expected))
    torch.testing.assert_close(layer(x), expected)
