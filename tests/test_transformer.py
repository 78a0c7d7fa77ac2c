"""The whole model; parity of its parts is in test_parity.py."""

import math

import pytest
import torch

from minivit import Encoder, EncoderLayer, Transformer, causal_mask


def model(**changes):
    arguments = {
        "src_vocab_size": 11,
        "tgt_vocab_size": 9,
        "embed_dim": 8,
        "num_heads": 2,
        "num_layers": 2,
        "mlp_dim": 12,
        "max_len": 10,
    }
    return Transformer(**{**arguments, **changes})


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_embeddings_are_tied_and_shared_on_request():
    tied = model()
    assert tied.head.weight is tied.tgt_embed.weight
    assert tied.src_embed is not tied.tgt_embed
    assert count(model(tie_embeddings=False)) == count(tied) + 9 * 8
    shared = model(src_vocab_size=9, share_embeddings=True)
    assert shared.src_embed is shared.tgt_embed
    assert shared.head.weight is shared.src_embed.weight
    assert count(shared) == count(tied) - 11 * 8


def test_number_of_parameters_by_the_formula():
    e, mlp, layers, vocab = 8, 12, 2, 9
    attention, norm = 4 * e * e + 4 * e, 2 * e
    feed_forward = 2 * e * mlp + mlp + e
    encoder = layers * (attention + feed_forward + 2 * norm) + norm
    decoder = layers * (2 * attention + feed_forward + 3 * norm) + norm
    assert count(model()) == encoder + decoder + (11 + vocab) * e


def test_embeddings_enter_as_loud_as_positions():
    """√E times a table with variance 1/E: variance one, beside sines and cosines."""
    large = model(embed_dim=256, src_vocab_size=500, dropout=0.0)
    seen = []
    large.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    src = torch.arange(1, 11)[None]
    large.encode(src)
    added = large.positions.table[:10]
    expected = large.src_embed.weight[1:11] * math.sqrt(256) + added
    torch.testing.assert_close(seen[0][0], expected)
    assert (seen[0][0] - added).std().item() == pytest.approx(1.0, abs=0.1)


def test_logits_begin_small():
    """The first loss is about ln V: no token is preferred without a reason."""
    big = model(embed_dim=64, src_vocab_size=200, tgt_vocab_size=200).eval()
    src, tgt, following = torch.randint(1, 200, (3, 8, 9))
    logits = big(src, tgt)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())
    assert abs(loss.item() - math.log(200)) < 2.0
    assert logits.std() < 2.0


@pytest.mark.parametrize("pad_id", [0, 4])
def test_pad_id_decides_what_is_padding(pad_id):
    net = model(pad_id=pad_id).eval()
    src, tgt = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7]])
    padding = torch.full((1, 2), pad_id)
    longer = net(torch.cat([src, padding], 1), tgt)
    torch.testing.assert_close(longer, net(src, tgt))
    other = torch.full((1, 2), 4 - pad_id)
    assert not torch.allclose(net(torch.cat([src, other], 1), tgt), net(src, tgt))


def test_decoder_reads_the_whole_source():
    net, tgt = model().eval(), torch.tensor([[1, 2]])
    src = torch.tensor([[3, 4, 5, 6]])
    for position in range(4):
        other = src.clone()
        other[0, position] = 9
        assert not torch.allclose(net(src, tgt), net(other, tgt), atol=1e-5)


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


def test_one_step_of_training_lowers_the_loss_of_a_copy_task():
    net = model(src_vocab_size=9, share_embeddings=True, dropout=0.0)
    src = torch.randint(3, 9, (32, 5))
    tgt = torch.cat([torch.ones(32, 1, dtype=torch.long), src[:, :-1]], dim=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        logits = net(src, tgt)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), src.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_max_len_is_the_last_that_fits():
    net = model().eval()
    ids = torch.ones(1, 10, dtype=torch.long)
    assert net(ids, ids).shape == (1, 10, 9)


def test_layers_take_masks_by_head():
    layer = EncoderLayer(8, 2, 12).eval()
    x, mask = torch.randn(2, 4, 8), causal_mask(4)
    by_head = mask.expand(2, 2, 4, 4)
    torch.testing.assert_close(layer(x, mask=by_head), layer(x, mask=mask))
