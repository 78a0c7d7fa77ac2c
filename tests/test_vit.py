"""The Vision Transformer; parity with torchvision's is in test_parity.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import randomise, vit

import minivit
from minivit import PatchEmbed, patchify


@pytest.mark.parametrize(("channels", "side"), [(1, 2), (3, 4), (5, 1)])
def test_patchify_equals_unfold(channels, side):
    images = torch.randn(2, channels, 2 * side, 3 * side)
    columns = F.unfold(images, side, stride=side)  # (B, C·P·P, N)
    expected = columns.transpose(1, 2).unflatten(2, (channels, side * side))
    expected = expected.transpose(2, 3).flatten(2)
    assert torch.equal(patchify(images, side), expected)


def test_patch_embedding_is_a_convolution():
    embed = PatchEmbed(image_size=(8, 12), patch_size=4, in_channels=3, embed_dim=5)
    images = torch.randn(2, 3, 8, 12)
    kernel = embed.proj.weight.unflatten(1, (4, 4, 3)).permute(0, 3, 1, 2)
    expected = F.conv2d(images, kernel, embed.proj.bias, stride=4).flatten(2)
    torch.testing.assert_close(embed(images), expected.transpose(1, 2))
    assert embed.grid_size == (2, 3)
    assert embed.num_patches == 6


def test_features_are_cls_and_patches():
    model, images = randomise(vit()), torch.randn(2, 2, 8, 12)
    tokens = model.features(images)
    assert tokens.shape == (2, 7, 8)
    torch.testing.assert_close(model(images), model.head(tokens[:, 0]))


def test_mean_pooling_has_no_cls_token():
    model, images = randomise(vit(pool="mean")), torch.randn(2, 2, 8, 12)
    tokens = model.features(images)
    assert tokens.shape == (2, 6, 8)
    assert not hasattr(model, "cls_token")
    torch.testing.assert_close(model(images), model.head(tokens.mean(1)))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_every_patch_matters(pool):
    model, images = randomise(vit(pool=pool)), torch.randn(1, 2, 8, 12)
    for patch in range(6):
        row, column = divmod(patch, 3)
        other = images.clone()
        other[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
        assert not torch.allclose(model(other), model(images), atol=1e-5)


def test_first_loss_is_ln_k():
    model = vit(num_classes=10)
    loss = F.cross_entropy(model(torch.randn(4, 2, 8, 12)), torch.arange(4))
    assert loss.item() == pytest.approx(math.log(10), abs=1e-6)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_all_parameters_learn(pool):
    model = randomise(vit(pool=pool, layer_scale=0.1)).train()
    model(torch.randn(2, 2, 8, 12)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit_ti_16", 5_717_416),
        ("vit_s_16", 22_050_664),
        ("vit_b_16", 86_567_656),
        ("vit_b_32", 88_224_232),
        ("vit_l_16", 304_326_632),
    ],
)
def test_sizes_of_the_papers(name, parameters):
    """The numbers are those of torchvision and of timm's models of these names."""
    with torch.device("meta"):
        model = getattr(minivit, name)()
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("vit_ti_16", "vit_tiny_patch16_224"),
        ("vit_s_16", "vit_small_patch16_224"),
        ("vit_b_16", "vit_base_patch16_224"),
    ],
)
def test_sizes_of_timm(name, theirs):
    import timm

    with torch.device("meta"):
        ours, reference = getattr(minivit, name)(), timm.create_model(theirs)
    shapes = [sorted(tuple(p.shape) for p in m.parameters()) for m in (ours, reference)]
    number = [sum(p.numel() for p in m.parameters()) for m in (ours, reference)]
    assert number[0] == number[1]
    assert len(shapes[0]) == len(shapes[1])


def test_named_models_take_other_sizes():
    with torch.device("meta"):
        model = minivit.vit_s_4(num_classes=7, image_size=(16, 24), dropout=0.1)
    assert model.patch_embed.grid_size == (4, 6)
    assert model.pos_embed.shape == (1, 25, 384)
    assert model.head.out_features == 7
    assert len(model.encoder.layers) == 9
    assert model.dropout.p == 0.1
    assert model.encoder.layers[0].self_attention.dropout == 0.1
