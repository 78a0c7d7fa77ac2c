"""Looking inside: what is shown is what the model used, and it says what it should."""

import math

import models
import pytest
import torch
from models import randomise
from torch import nn

from minivit import MultiHeadAttention, patchify
from minivit.inside import (
    attention_maps,
    cls_attention,
    deletion_curve,
    only_patches,
    patch_filters,
    position_similarity,
    relevance,
    rollout,
)


def vit(**changes):
    sizes = {"image_size": (4, 6), "patch_size": 2, "num_layers": 3}
    return randomise(models.vit(**sizes | changes))


def translator(**changes):
    return randomise(models.seq2seq(**changes))


def softmax_by_hand(module, x):
    """Compute one layer's weights with loops over images, heads, queries."""
    width, heads = module.embed_dim, module.num_heads
    size = width // heads
    out = x.new_zeros(len(x), heads, x.size(1), x.size(1))
    for b in range(len(x)):
        qkv = x[b] @ module.in_proj.weight.T + module.in_proj.bias  # (L, 3·E)
        for h in range(heads):
            mine = slice(h * size, (h + 1) * size)
            q = qkv[:, :width][:, mine]
            k = qkv[:, width : 2 * width][:, mine]
            for i in range(x.size(1)):
                e = torch.exp(k @ q[i] / math.sqrt(size))
                out[b, h, i] = e / e.sum()
    return out


def test_maps_are_those_of_the_layers():
    model, images = vit().double().eval(), torch.randn(2, 2, 4, 6).double()
    maps = attention_maps(model, images)
    assert len(maps) == 3
    with torch.no_grad():
        tokens = model.patch_embed(images)
        x = torch.cat([model.cls_token.expand(2, -1, -1), tokens], dim=1)
        x = x + model.pos_embed
        for layer, weights in zip(model.encoder.layers, maps, strict=True):
            expected = softmax_by_hand(layer.self_attention, layer.norm1(x))
            torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
            x = layer(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_sum_to_one(dtype):
    maps = attention_maps(vit().to(dtype), torch.randn(2, 2, 4, 6, dtype=dtype))
    for weights in maps:
        assert weights.shape == (2, 2, 7, 7)
        assert (weights >= 0).all()
        torch.testing.assert_close(
            weights.sum(dim=-1), torch.ones(2, 2, 7, dtype=dtype)
        )


def test_any_model_with_attention_can_be_read():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.second = MultiHeadAttention(4, 1)  # defined first, run second
            self.first = MultiHeadAttention(4, 2)

        def forward(self, x):
            return self.second(*[self.first(x, x, x)] * 3)

    first, second = attention_maps(Pair(), torch.randn(1, 3, 4))
    assert first.shape == (1, 2, 3, 3)
    assert second.shape == (1, 1, 3, 3)


def test_masks_are_respected():
    model = translator()
    src = torch.tensor([[3, 4, 5, 0, 0], [3, 4, 5, 6, 7]])
    tgt = torch.tensor([[1, 2, 0], [1, 2, 3]])
    maps = attention_maps(model, src, tgt)
    assert [m.shape[-2:] for m in maps] == [
        *[(5, 5)] * 2,  # the encoder's layers
        *[(3, 3), (3, 5)] * 2,  # the decoder's: itself, then the source
    ]
    encoder, itself, source = maps[:2], maps[2::2], maps[3::2]
    for weights in (*encoder, *source):
        assert (weights[0, :, :, 3:] == 0).all()  # padding of the source
        assert (weights[1, :, :, 3:] > 0).all()
    for weights in itself:
        assert (weights.triu(diagonal=1) == 0).all()  # the future
        assert (weights[0, :, :, 2] == 0).all()  # padding of the target
    for weights in maps:
        sums = weights.sum(dim=-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_looking_does_not_change_what_is_computed():
    model, images = vit(dropout=0.5), torch.randn(2, 2, 4, 6)
    model.eval()
    before = model(images)
    first = attention_maps(model, images)
    assert torch.equal(model(images), before)
    model.train()  # dropout must not show in the maps
    for a, b in zip(first, attention_maps(model, images), strict=True):
        assert torch.equal(a, b)
    assert not first[0].requires_grad


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(fails):
    model = vit()
    model.train()
    model.encoder.layers[1].eval()  # frozen by its owner
    modes = [m.training for m in model.modules()]
    if fails:
        with pytest.raises(ValueError, match="images must be"):
            attention_maps(model, torch.randn(2, 2, 5, 5))
    else:
        attention_maps(model, torch.randn(2, 2, 4, 6))
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_arguments_by_name_and_a_cache():
    """What stands in the cache is looked at too, and the call itself is not changed."""

    class Stepwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = MultiHeadAttention(8, 2)

        def forward(self, x):
            cache = {}
            self.attention(query=x[:, :2], key=x[:, :2], value=x[:, :2], cache=cache)
            return self.attention(x[:, 2:], x[:, 2:], x[:, 2:], cache=cache)

    model, x = Stepwise(), torch.randn(2, 3, 8)
    first, second = attention_maps(model, x)
    _, expected = model.attention.attend(x, x, x)
    torch.testing.assert_close(first, model.attention.attend(*[x[:, :2]] * 3)[1])
    torch.testing.assert_close(second, expected[:, :, 2:])


def test_a_model_that_hides_its_attention_is_no_empty_list():
    """Compiled code does not see hooks that come later; the same if no branch runs."""

    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = MultiHeadAttention(8, 2)

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="no attention ran"):
        attention_maps(Skips(), torch.randn(1, 2, 8))


def test_nothing_to_look_at():
    with pytest.raises(ValueError, match="Linear has no MultiHeadAttention"):
        attention_maps(nn.Linear(2, 2), torch.randn(1, 2))


def test_rollout_is_the_product_by_hand():
    maps = [torch.rand(2, 3, 4, 4).softmax(dim=-1).double() for _ in range(3)]
    expected = torch.empty(2, 4, 4, dtype=torch.float64)
    for b in range(2):
        flow = torch.eye(4, dtype=torch.float64)
        for weights in maps:
            mixed = torch.zeros(4, 4, dtype=torch.float64)
            for i in range(4):
                for j in range(4):
                    mixed[i, j] = sum(weights[b, h, i, j] for h in range(3)) / 6
                mixed[i, i] += 0.5
            flow = mixed @ flow  # the later layer stands on the left
        expected[b] = flow
    torch.testing.assert_close(rollout(maps), expected, rtol=0, atol=1e-12)


def test_rollout_rows_sum_to_one():
    flow = rollout(attention_maps(vit(), torch.randn(2, 2, 4, 6)))
    torch.testing.assert_close(flow.sum(dim=-1), torch.ones(2, 7))


def test_rollout_follows_a_chain():
    """Each layer copies from the left: two layers reach two places back."""
    shift = torch.zeros(1, 1, 3, 3)
    shift[..., 0, 0] = shift[..., 1, 0] = shift[..., 2, 1] = 1.0
    assert torch.equal(rollout([shift, shift])[0, 2], torch.tensor([0.25, 0.5, 0.25]))
    first = torch.eye(3)[None, None].clone()
    first[..., 1, :] = torch.tensor([1.0, 0, 0])  # 1 reads 0, then 2 reads 1
    last = torch.eye(3)[None, None].clone()
    last[..., 2, :] = torch.tensor([0.0, 1, 0])
    assert rollout([first, last])[0, 2, 0] == 0.25
    assert rollout([last, first])[0, 2, 0] == 0.0  # the wrong way round


@pytest.mark.parametrize(
    "maps",
    [
        [],
        [torch.rand(2, 3, 3)],
        [torch.rand(1, 2, 3, 4)],
        [torch.rand(1, 2, 3, 3), torch.rand(1, 2, 4, 4)],
    ],
)
def test_rollout_needs_square_maps_of_one_shape(maps):
    with pytest.raises(ValueError, match="maps of one shape"):
        rollout(maps)


def scored(model, images, classes, changed, instead):
    """The classes' scores, by hand, with other weights in one layer."""
    x = model.patch_embed(images)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1) + model.pos_embed
    for number, layer in enumerate(model.encoder.layers):
        attend, z = layer.self_attention, layer.norm1(x)
        weights = instead if number == changed else softmax_by_hand(attend, z)
        value = z @ attend.in_proj.weight[-24:].T + attend.in_proj.bias[-24:]
        mixed = torch.einsum("bhls,bshd->blhd", weights, value.unflatten(2, (-1, 6)))
        x = x + attend.out_proj(mixed.flatten(2))
        x = x + layer.feed_forward(layer.norm2(x))
    logits = model.head(model.encoder.norm(x)[:, 0])
    return logits.gather(1, classes[:, None]).sum()


def test_relevance_is_the_rule_by_hand():
    """The slope of the score against every single weight, by finite differences."""
    model = vit(num_layers=2, embed_dim=24, num_heads=4).double()
    images = torch.rand(2, 2, 4, 6, dtype=torch.float64)
    classes, step = torch.tensor([2, 0]), 1e-6
    maps = attention_maps(model, images)
    expected = torch.eye(7, dtype=torch.float64).repeat(2, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            scored(model, images, classes, 0, maps[0]),
            model(images).gather(1, classes[:, None]).sum(),
        )
        for layer, weights in enumerate(maps):
            slope = torch.zeros_like(weights)
            for index in torch.cartesian_prod(*map(torch.arange, weights.shape)):
                there = torch.zeros_like(weights)
                there[tuple(index)] = step
                up, down = (
                    scored(model, images, classes, layer, weights + change)
                    for change in (there, -there)
                )
                slope[tuple(index)] = (up - down) / (2 * step)
            share = (weights * slope).clamp(min=0).mean(dim=1)
            expected = expected + share @ expected
    found = relevance(model, images, classes)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_relevance_asks_for_the_likeliest_class_and_leaves_the_model_alone():
    model = vit().train().requires_grad_(False)
    images = torch.rand(3, 2, 4, 6)
    best = model.eval()(images).argmax(dim=1)
    model.train()
    assert torch.equal(relevance(model, images), relevance(model, images, best))
    others = relevance(model, images, (best + 1) % 5)
    assert not torch.allclose(relevance(model, images), others)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="Linear runs no MultiHeadAttention"):
        relevance(nn.Linear(2, 2), torch.rand(3, 2))


def test_cls_attention_on_a_wide_grid():
    weights = torch.arange(49.0).view(1, 7, 7)  # CLS looks at 0, 1, …, 6
    picture = cls_attention(weights, (2, 3))
    assert picture.tolist() == [[[1, 2, 3], [4, 5, 6]]]
    with pytest.raises(ValueError, match="9 tokens, got 7"):
        cls_attention(weights, (2, 4))


def test_cls_attention_points_at_the_patch():
    """A patch found by its place in the picture is the one that attention saw."""
    model = vit(num_layers=1)
    images = torch.zeros(1, 2, 4, 6)
    base = cls_attention(attention_maps(model, images)[0], (2, 3))
    images[:, :, 2:4, 4:6] = 3.0  # row 1, column 2
    bright = cls_attention(attention_maps(model, images)[0], (2, 3))
    ratio = (bright / base)[0, 0].flatten()
    others = ratio[:5]  # they keep their proportions
    torch.testing.assert_close(others, others[:1].expand(5))
    assert not torch.isclose(ratio[5], ratio[0])


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_position_similarity(pool):
    model = vit(pool=pool)
    similarity = position_similarity(model)
    assert similarity.shape == (2, 3, 2, 3)
    matrix = similarity.flatten(2).flatten(0, 1)  # (N, N)
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(6))
    a, b = model.pos_embed.detach()[0, -6:][[1, 5]]
    expected = torch.dot(a, b) / (a.norm() * b.norm())
    torch.testing.assert_close(similarity[0, 1, 1, 2], expected)


def test_patch_filters_are_orthonormal_and_in_order():
    model = vit(image_size=6, patch_size=3, embed_dim=32)
    filters = patch_filters(model, 18)
    assert filters.shape == (18, 2, 3, 3)
    flat = patchify(filters, 3)[:, 0]  # (18, P·P·C)
    torch.testing.assert_close(flat @ flat.T, torch.eye(18), rtol=0, atol=1e-5)
    gain = (flat @ model.patch_embed.proj.weight.detach().T).norm(dim=1)
    assert (gain[:-1] >= gain[1:] - 1e-5).all()
    for pattern in flat:
        assert pattern[pattern.abs().argmax()] > 0


def test_patch_filters_recover_a_pattern():
    model = vit(image_size=6, patch_size=3)
    pattern = torch.randn(1, 2, 3, 3)
    pattern = pattern / pattern.norm()
    with torch.no_grad():  # every token is a multiple of one product with the pattern
        rank_one = torch.outer(torch.randn(8), patchify(pattern, 3).flatten())
        model.patch_embed.proj.weight.copy_(rank_one)
    found = patch_filters(model, 1)
    if (found * pattern).sum() < 0:
        pattern = -pattern
    torch.testing.assert_close(found, pattern, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", [0, 9])
def test_patch_filters_has_no_more_than_there_are(number):
    with pytest.raises(ValueError, match=f"between 1 and 8, got {number}"):
        patch_filters(vit(), number)


class ReadsOnePatch(nn.Module):
    """Say 1 if there is anything in the patch at row 1, column 2, else 0."""

    def __init__(self, blank=0.0):
        super().__init__()
        self.blank = blank

    def forward(self, images):
        assert not self.training
        ink = (images[:, :, 2:4, 4:6] != self.blank).any(dim=(1, 2, 3)).float()
        return torch.stack([1 - ink, ink], dim=1)


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("fill", [0.0, 0.5])
def test_deletion_falls_when_the_patch_goes(place, fill):
    images, labels = torch.rand(5, 1, 4, 6) + 0.6, torch.ones(5, dtype=torch.long)
    scores = torch.rand(5, 6)
    scores[:, 5] = -1.0
    order = scores.argsort(dim=1, descending=True)
    # Give the patch that is read the rank `place`.
    ranked = torch.cat([order[:, :place], order[:, 5:], order[:, place:5]], dim=1)
    scores = 6.0 - ranked.argsort(dim=1)
    kept = images.clone()
    curve = deletion_curve(
        ReadsOnePatch(fill), images, labels, scores, patch_size=2, fill=fill
    )
    assert curve.tolist() == [1.0] * (place + 1) + [0.0] * (6 - place)
    assert torch.equal(images, kept)


def test_deletion_takes_a_picture_of_scores():
    images, labels = torch.rand(3, 1, 4, 6) + 0.1, torch.tensor([1, 1, 0])
    scores = torch.zeros(3, 2, 3)
    scores[:2, 1, 2] = 1.0  # the patch that is read goes first in two images
    curve = deletion_curve(ReadsOnePatch(), images, labels, scores, patch_size=2)
    # The third image is right only when its patch, the last of six ties, has gone.
    torch.testing.assert_close(curve, torch.tensor([2, 0, 0, 0, 0, 0, 1]) / 3)


def test_deletion_restores_the_mode():
    model = ReadsOnePatch().train()
    images, labels = torch.rand(2, 1, 4, 6), torch.ones(2, dtype=torch.long)
    deletion_curve(model, images, labels, torch.rand(2, 6), patch_size=2)
    assert model.training
    with pytest.raises(ValueError, match=r"\(2, 6\) .* got \(2, 5\) scores"):
        deletion_curve(model, images, labels, torch.rand(2, 5), patch_size=2)
    with pytest.raises(ValueError, match=r"\(1,\) labels"):
        deletion_curve(model, images, labels[:1], torch.rand(2, 6), patch_size=2)
    with pytest.raises(ValueError, match=r"labels \(2,\), got .* \(2, 1\) labels"):
        deletion_curve(model, images, labels[:, None], torch.rand(2, 6), patch_size=2)
    assert model.training


def test_tokens_are_left_out():
    """The curve is that of encoders that never saw the patch."""
    model = vit().eval()
    images = torch.randn(20, 2, 4, 6)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    scores = torch.rand(20, 6)
    curve = deletion_curve(model, images, labels, scores, patch_size=2, fill=None)
    order = scores.argsort(dim=1, descending=True)
    for step in range(7):
        right = 0
        for image, label, row in zip(images, labels, order):
            kept = [place for place in range(6) if place not in row[:step]]
            x = torch.cat([model.cls_token[0], model.patch_embed(image[None])[0]])
            x = (x + model.pos_embed[0])[[0, *(1 + place for place in kept)]]
            right += model.head(model.encoder(x[None])[0, 0]).argmax() == label
        torch.testing.assert_close(curve[step], right / 20)
    assert curve[0] == 1
    assert not model.encoder._forward_pre_hooks
    for other in (vit(pool="mean"), ReadsOnePatch()):
        with pytest.raises(TypeError, match="needs a ViT with CLS, got"):
            deletion_curve(other, images, labels, scores, patch_size=2, fill=None)
    scores[0, 1] = torch.nan
    with pytest.raises(ValueError, match="1 scores are NaN"):
        deletion_curve(model, images, labels, scores, patch_size=2)
    with pytest.raises(ValueError, match="the model's patch_size is 2, got 4"):
        deletion_curve(
            model, torch.randn(20, 2, 8, 12), labels, scores, patch_size=4, fill=None
        )


@pytest.mark.parametrize(
    "kept", [torch.ones(3, 6, dtype=torch.bool), *torch.tensor([[[-1]], [[6]]])]
)
def test_what_is_no_number_of_a_patch(kept):
    with pytest.raises(ValueError, match="kept must be integers from 0 to 5"):
        with only_patches(vit(), kept):
            pass


def test_nothing_was_left_out():
    """A model that was compiled before runs without what looks inside."""
    with pytest.raises(ValueError, match="no patch was left out"):
        with only_patches(vit(), torch.zeros(1, 1, dtype=torch.long)):
            pass


def test_relevance_needs_a_class_for_each_image():
    images = torch.rand(3, 2, 4, 6)
    with pytest.raises(ValueError, match=r"classes must be \(3,\), got \(1,\)"):
        relevance(vit(), images, torch.tensor([1]))


def test_relevance_with_gradient_checkpointing():
    model, images = vit(), torch.rand(3, 2, 4, 6)
    twin = vit(gradient_checkpointing=True)
    twin.load_state_dict(model.state_dict())
    for mode in (True, False):
        found = relevance(twin.train(mode), images)
        torch.testing.assert_close(found, relevance(model, images))
