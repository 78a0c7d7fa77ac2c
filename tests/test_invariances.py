"""What must hold for any weights, any input and any size."""

import io

import models
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import MODELS, SEQ2SEQ, example, randomise, tokens
from torch import nn

from minivit import (
    Encoder,
    MultiHeadAttention,
    causal_mask,
    padding_mask,
    patchify,
    unpatchify,
)
from minivit.attention import attention

seeds = st.integers(0, 2**31)
orders = st.booleans()  # pre-norm or post-norm
modes = st.sampled_from(["eval", "train"])


def prepare(module, seed, mode="eval"):
    return randomise(module, seed).train(mode == "train")


def seq2seq(seed=0, mode="eval", **changes):
    return prepare(models.seq2seq(**{"dropout": 0.3} | changes), seed, mode)


def vit(seed=0, mode="eval", **changes):
    return prepare(models.vit(**{"dropout": 0.3} | changes), seed, mode)


def encoder(seed=0, mode="eval", **changes):
    return prepare(Encoder(8, 2, 2, 12, **{"dropout": 0.3} | changes), seed, mode)


def run(module, *inputs, **named):
    """Call with the same dropout each time."""
    torch.manual_seed(1)
    return module(*inputs, **named)


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --- causality ------------------------------------------------------------------


@given(seeds, orders, modes, st.integers(2, 7), st.data())
def test_the_future_does_not_change_the_past(seed, norm_first, mode, length, data):
    model = seq2seq(seed, mode, norm_first=norm_first)
    cut = data.draw(st.integers(1, length - 1))
    src, tgt = tokens(2, 5), tokens(2, length)
    other = tgt.clone()
    highest = SEQ2SEQ["tgt_vocab_size"] - 1
    other[:, cut:] = 1 + tgt[:, cut:] % highest  # another token, never padding
    before, after = run(model, src, tgt), run(model, src, other)
    same(before[:, :cut], after[:, :cut], 1e-6)
    assert not torch.allclose(before[:, cut], after[:, cut], atol=1e-4)


@given(seeds, orders, modes, st.integers(2, 7), st.data())
def test_causal_encoder_in_train_and_eval(seed, norm_first, mode, length, data):
    model = encoder(seed, mode, norm_first=norm_first)
    cut = data.draw(st.integers(1, length - 1))
    x = torch.randn(2, length, 8)
    other = x.clone()
    other[:, cut:] += 3 * torch.randn(2, length - cut, 8)
    mask = causal_mask(length)
    before, after = run(model, x, mask=mask), run(model, other, mask=mask)
    same(before[:, :cut], after[:, :cut], 1e-6)
    free = run(model, other) - run(model, x)
    assert free[:, :cut].abs().max() > 1e-4, "without the mask the past would change"


@given(seeds, st.integers(1, 6), st.integers(0, 4))
def test_causal_mask_lets_the_last_query_see_everything(seed, queries, more):
    mask = causal_mask(queries, queries + more)
    assert mask.shape == (queries, queries + more)
    for i in range(queries):
        assert mask[i].tolist() == [j <= i + more for j in range(queries + more)]


# --- padding ------------------------------------------------------------------------


@given(seeds, orders, st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_padding_changes_nothing(seed, norm_first, source, target, more):
    model = seq2seq(seed, norm_first=norm_first)
    src, tgt = tokens(2, source), tokens(2, target)
    padding = torch.zeros(2, more, dtype=torch.long)
    found = model(torch.cat([src, padding], 1), torch.cat([tgt, padding], 1))
    same(found[:, :target], model(src, tgt))


@given(seeds, orders, modes, st.integers(1, 5), st.integers(1, 4))
def test_what_stands_at_padding_is_not_read(seed, norm_first, mode, length, more):
    model = encoder(seed, mode, norm_first=norm_first)
    lengths = torch.tensor([length, length + more])
    mask = padding_mask(lengths)
    x = torch.randn(2, length + more, 8)
    other = x.clone()
    other[0, length:] = 100 * torch.randn(more, 8)
    before, after = run(model, x, mask=mask), run(model, other, mask=mask)
    same(before[0, :length], after[0, :length])
    same(before[1], after[1])


@given(seeds, st.integers(1, 5), st.integers(1, 4))
def test_memory_at_source_padding_is_not_read(seed, length, more):
    model = seq2seq(seed)
    src, tgt = tokens(2, length + more), tokens(2, 4)
    src[0, length:] = 0
    memory = model.encode(src)
    other = memory.clone()
    other[0, length:] = 100 * torch.randn(more, 8)
    same(model.decode(tgt, memory, src), model.decode(tgt, other, src))


@given(seeds, st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_padding_mask_counts(seed, lengths):
    mask = padding_mask(torch.tensor(lengths), 6)
    assert mask.shape == (len(lengths), 1, 1, 6)
    assert mask.sum(-1).flatten().tolist() == lengths
    assert not (mask[..., 1:] & ~mask[..., :-1]).any(), "the first tokens, not others"


# --- order and batch ----------------------------------------------------------------


@given(seeds, orders, st.integers(2, 7))
def test_without_positions_order_only_travels_along(seed, norm_first, length):
    model = encoder(seed, norm_first=norm_first)
    x, order = torch.randn(2, length, 8), torch.randperm(length)
    same(model(x[:, order]), model(x)[:, order])


@given(seeds, st.integers(1, 4), st.integers(2, 7))
def test_order_of_keys_does_not_matter(seed, queries, keys):
    module = prepare(MultiHeadAttention(8, 2), seed)
    q, k, v = (
        torch.randn(2, queries, 8),
        torch.randn(2, keys, 8),
        torch.randn(2, keys, 8),
    )
    mask, order = torch.rand(2, 1, queries, keys) < 0.6, torch.randperm(keys)
    expected, weights = module.attend(q, k, v, mask=mask)
    found, permuted = module.attend(q, k[:, order], v[:, order], mask=mask[..., order])
    same(found, expected)
    same(permuted, weights[..., order])


@given(seeds, st.sampled_from(["cls", "mean"]))
def test_vit_knows_the_order_of_patches_by_positions_only(seed, pool):
    model = vit(seed, pool=pool)
    images = torch.randn(2, 2, 8, 12)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    moved = unpatchify(patchify(images, 4)[:, order], 4, (8, 12))
    assert not torch.allclose(model(images), model(moved), atol=1e-4)
    nn.init.zeros_(model.pos_embed)
    same(model(images), model(moved))


@given(seeds, orders, st.integers(2, 4))
def test_samples_of_a_batch_do_not_meet(seed, norm_first, batch):
    model = seq2seq(seed, norm_first=norm_first)
    src, tgt = tokens(batch, 5), tokens(batch, 4)
    src[0, 3:] = tgt[1, 2:] = 0
    together, images = model(src, tgt), torch.randn(batch, 2, 8, 12)
    seeing = vit(seed)
    for i in range(batch):
        same(together[i : i + 1], model(src[i : i + 1], tgt[i : i + 1]))
        same(seeing(images)[i : i + 1], seeing(images[i : i + 1]))


@given(seeds, modes)
def test_no_gradient_leaves_a_sample(seed, mode):
    model = vit(seed, mode)
    images = torch.randn(3, 2, 8, 12, requires_grad=True)
    model(images)[1].sum().backward()
    assert (images.grad[[0, 2]] == 0).all()
    assert (images.grad[1] != 0).any()


# --- patches ------------------------------------------------------------------------

sizes = st.integers(1, 4)


@given(seeds, sizes, sizes, sizes, sizes, st.integers(1, 5))
def test_patches_are_cut_and_put_back(seed, batch, rows, columns, side, channels):
    torch.manual_seed(seed)
    images = torch.randn(batch, channels, rows * side, columns * side)
    patches = patchify(images, side)
    assert patches.shape == (batch, rows * columns, side * side * channels)
    for i in range(rows):
        for j in range(columns):
            cut = images[:, :, i * side : (i + 1) * side, j * side : (j + 1) * side]
            expected = cut.permute(0, 2, 3, 1).flatten(1)  # row, column, channel
            assert torch.equal(patches[:, i * columns + j], expected)
    assert torch.equal(unpatchify(patches, side, images.shape[2:]), images)
    if rows == columns:
        assert torch.equal(unpatchify(patches, side, rows * side), images)


# --- nothing to see -----------------------------------------------------------------


def hidden_somewhere(*shape):
    mask = torch.rand(shape) < 0.5
    mask[..., 0, :] = False
    mask[..., -1, 0] = True
    return mask


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds, scale=st.sampled_from([1.0, 30.0]), keys=st.integers(1, 5))
def test_attention_with_nothing_to_see(dtype, seed, scale, keys):
    torch.manual_seed(seed)
    q = (scale * torch.randn(2, 2, 3, 4)).to(dtype).requires_grad_()
    k = (scale * torch.randn(2, 2, keys, 4)).to(dtype).requires_grad_()
    v = torch.randn(2, 2, keys, 4).to(dtype).requires_grad_()
    mask = hidden_somewhere(2, 2, 3, keys)
    output, weights = attention(q, k, v, mask=mask)
    blind = ~mask.any(-1)
    assert (output[blind] == 0).all()
    assert (weights[~mask] == 0).all()
    same(weights.sum(-1).float()[~blind], torch.ones(int((~blind).sum())), 2e-2)
    (output.float().square().sum() + weights.float().square().sum()).backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
    assert (q.grad[blind] == 0).all()
    assert (v.grad != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["forward", "attend"])
@given(seed=seeds, mode=modes, keys=st.integers(1, 5))
def test_multi_head_attention_with_nothing_to_see(dtype, how, seed, mode, keys):
    module = prepare(MultiHeadAttention(8, 2, dropout=0.3), seed, mode).to(dtype)
    q, k, v = (torch.randn(2, n, 8).to(dtype).requires_grad_() for n in (3, keys, keys))
    mask = hidden_somewhere(2, 1, 3, keys)
    output = getattr(module, how)(q, k, v, mask=mask)
    output = output[0] if how == "attend" else output
    blind = ~mask[:, 0].any(-1)
    # Zeros go into the last projection; what comes out is its bias.
    expected = module.out_proj(torch.zeros(int(blind.sum()), 8, dtype=dtype))
    assert torch.equal(output[blind], expected)
    output.float().square().sum().backward()
    for x in (q, k, v, *module.parameters()):
        assert x.grad.isfinite().all()
    assert (q.grad[blind] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_batch_with_an_empty_source(dtype, norm_first):
    """One source is padding from end to end, as when a batch is filled up."""
    model = seq2seq(mode="train", norm_first=norm_first).to(dtype)
    src, tgt = tokens(3, 5), tokens(3, 4)
    src[1] = 0
    logits = model(src, tgt)
    assert logits.isfinite().all()
    logits.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


# --- two ways, one result -----------------------------------------------------------


@given(seeds, st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans())
def test_forward_equals_attend(seed, queries, keys, bias, masked):
    module = prepare(MultiHeadAttention(8, 2, dropout=0.5, bias=bias), seed)
    q, k, v = (torch.randn(2, n, 8) for n in (queries, keys, keys))
    mask = torch.rand(2, 2, queries, keys) < 0.6 if masked else None
    output, weights = module.attend(q, k, v, mask=mask)
    same(module(q, k, v, mask=mask), output)
    assert weights.shape == (2, 2, queries, keys)


@given(seeds, st.integers(1, 5))
def test_one_product_equals_three(seed, length):
    """The short cut for self-attention must not change the result."""
    module, x = prepare(MultiHeadAttention(8, 2), seed), torch.randn(2, length, 8)
    same(module(x, x, x), module(x, x.clone(), x.clone()))


each_model = pytest.mark.parametrize("name", MODELS)


@each_model
@settings(max_examples=5)
@given(seed=seeds)
def test_dropout_is_off_in_eval(name, seed):
    model, x = example(name, seed)
    assert torch.equal(model(*x), model(*x))
    model.train()
    assert not torch.equal(model(*x), model(*x))


@each_model
@settings(max_examples=5)
@given(seed=seeds)
def test_state_dict_carries_a_model(name, seed):
    model, x = example(name, seed)
    other, _ = example(name, seed + 1)
    expected = model(*x)
    assume(not torch.allclose(other(*x), expected, atol=1e-3))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(*x), expected)


@each_model
def test_state_dict_holds_parameters_only(name):
    """Constant tables are made anew: no checkpoint depends on their size."""
    model, _ = example(name)
    parameters = {k for k, _ in model.named_parameters(remove_duplicate=False)}
    assert set(model.state_dict()) == parameters
