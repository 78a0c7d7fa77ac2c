"""What does a small ViT gain from its CLS token, and from its positions?"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import minivit
from minivit import data
from minivit.vit import ViT


def uniform(*shape):
    return torch.rand(shape) * 2 - 1  # between -1 and 1


def augment(images, labels):
    n = len(images)
    angle = uniform(n) * math.radians(10)
    scale = 1 + uniform(n) * 0.1
    shift = uniform(n, 2) * 0.5 * 2 / images.size(-1)  # the image is 2 wide
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack(
        [torch.stack([cos, -sin, shift[:, 0]], dim=1),
         torch.stack([sin, cos, shift[:, 1]], dim=1)], dim=1
    )  # (B, 2, 3)  # fmt: skip
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False), labels


def build(seed, patch_size=4, pool="cls"):
    torch.manual_seed(seed)
    return ViT(
        image_size=8, patch_size=patch_size, in_channels=1, num_classes=10,
        embed_dim=64, num_layers=4, num_heads=4, mlp_dim=128, pool=pool,
    )  # fmt: skip


def learn(model, train, seed, **options):
    return minivit.fit(
        model, train, epochs=50, batch_size=64, lr=2e-3,
        transform=augment, seed=seed, progress=False, **options,
    )  # fmt: skip


POSITIONS = {  # deviation of the first table, and whether it is learned
    "none": (0.0, False),
    "frozen": (0.2, False),
    "from 0.02": (0.02, True),
    "from 0.2": (0.2, True),
}


def with_positions(model, std, learned):
    nn.init.normal_(model.pos_embed, std=std)
    model.pos_embed.requires_grad_(learned)
    return model


def percent(model, part):
    return 100 * minivit.evaluate(model, part)["accuracy"]


def run(seed):
    """Train on three quarters of the digits, measure on the others."""
    train, val = data.split(*data.load_digits(), seed=seed)
    figures = {}
    for pool in ("cls", "mean"):
        model = build(seed, pool=pool)
        learn(model, train, seed)
        figures[pool] = percent(model, val)
        figures[f"{pool}, locked"] = percent(
            model, data.load_digits(locked=True)
        )
    for name, (std, learned) in POSITIONS.items():
        model = with_positions(build(seed, patch_size=2), std, learned)
        learn(model, train, seed)
        figures[f"positions {name}"] = percent(model, val)
    return figures
