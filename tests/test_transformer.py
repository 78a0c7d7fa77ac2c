"""The whole model; parity of its parts is in test_parity.py."""

import math

import pytest
import torch
from models import seq2seq


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_embeddings_are_tied_and_shared_on_request():
    tied = seq2seq()
    assert tied.head.weight is tied.tgt_embed.weight
    assert tied.src_embed is not tied.tgt_embed
    assert count(seq2seq(tie_embeddings=False)) == count(tied) + 9 * 8
    shared = seq2seq(src_vocab_size=9, share_embeddings=True)
    assert shared.src_embed is shared.tgt_embed
    assert shared.head.weight is shared.src_embed.weight
    assert count(shared) == count(tied) - 11 * 8


def test_number_of_parameters_by_the_formula():
    e, mlp, layers, vocab = 8, 12, 2, 9
    attention, norm = 4 * e * e + 4 * e, 2 * e
    feed_forward = 2 * e * mlp + mlp + e
    encoder = layers * (attention + feed_forward + 2 * norm) + norm
    decoder = layers * (2 * attention + feed_forward + 3 * norm) + norm
    assert count(seq2seq()) == encoder + decoder + (11 + vocab) * e


def test_embeddings_enter_as_loud_as_positions():
    """√E times a table with variance 1/E: variance one, beside sines and cosines."""
    large = seq2seq(embed_dim=256, src_vocab_size=500, dropout=0.0)
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
    big = seq2seq(embed_dim=64, src_vocab_size=200, tgt_vocab_size=200).eval()
    src, tgt, following = torch.randint(1, 200, (3, 8, 9))
    logits = big(src, tgt)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())
    assert abs(loss.item() - math.log(200)) < 2.0
    assert logits.std() < 2.0


@pytest.mark.parametrize("pad_id", [0, 4])
def test_pad_id_decides_what_is_padding(pad_id):
    net = seq2seq(pad_id=pad_id).eval()
    src, tgt = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7]])
    padding = torch.full((1, 2), pad_id)
    longer = net(torch.cat([src, padding], 1), tgt)
    torch.testing.assert_close(longer, net(src, tgt))
    other = torch.full((1, 2), 4 - pad_id)
    assert not torch.allclose(net(torch.cat([src, other], 1), tgt), net(src, tgt))


def test_decoder_reads_the_whole_source():
    net, tgt = seq2seq().eval(), torch.tensor([[1, 2]])
    src = torch.tensor([[3, 4, 5, 6]])
    for position in range(4):
        other = src.clone()
        other[0, position] = 9
        assert not torch.allclose(net(src, tgt), net(other, tgt), atol=1e-5)


def test_one_step_of_training_lowers_the_loss_of_a_copy_task():
    net = seq2seq(src_vocab_size=9, share_embeddings=True, dropout=0.0)
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
    net = seq2seq().eval()
    ids = torch.ones(1, 10, dtype=torch.long)
    assert net(ids, ids).shape == (1, 10, 9)
