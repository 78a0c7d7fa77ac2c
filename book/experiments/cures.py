"""Which cures help a small ViT that has a thousand digits?"""

import math
from collections import defaultdict
from itertools import islice
from statistics import fmean

import torch
import torch.nn.functional as F
from sklearn.model_selection import StratifiedKFold
from torchvision.transforms import v2

import minivit
from minivit import data
from minivit.vit import ViT


def move(images, angle, scale, shift):
    """Turn (radians), scale and shift (pixels) every image by its own."""
    cos, sin = angle.cos() / scale, angle.sin() / scale  # (B,)
    back = torch.stack([cos, sin, -sin, cos], dim=1)  # (B, 4)
    back = back.unflatten(1, (2, 2))  # (B, 2, 2), R(-angle) / scale
    shift = shift[:, :, None] * 2 / images.size(-1)  # (B, 2, 1)
    matrix = torch.cat([back, -back @ shift], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def wobble(images, labels):
    """Change every image by as much as leaves its label certain."""

    def draw(*shape):
        return torch.rand(len(images), *shape) * 2 - 1  # in [-1, 1]

    angle, scale = math.radians(10) * draw(), 1 + 0.1 * draw()
    return move(images, angle, scale, shift=0.5 * draw(2)), labels


def make_vit(seed, dropout=0.0):
    torch.manual_seed(seed)  # the weights
    return ViT(
        image_size=8, patch_size=4, in_channels=1, num_classes=10,
        embed_dim=64, num_layers=2, num_heads=4, mlp_dim=128,
        dropout=dropout,
    )  # fmt: skip


def train_vit(part, *, seed, epochs=40, dropout=0.0, val=None, **recipe):
    model = make_vit(seed, dropout)
    recipe = {"lr": 5e-3, "batch_size": 128, "weight_decay": 0.0} | recipe
    history = minivit.fit(
        model, part, epochs=epochs, val=val, seed=seed, **recipe
    )
    return model, history


@torch.no_grad()
def vote(model, images, copies=16, seed=0):
    """Average what the model says of copies, changed as in training."""
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        looks = [
            model(wobble(images, None)[0]).softmax(-1) for _ in range(copies)
        ]
    return sum(looks).argmax(dim=-1)  # (B,)


mixup = v2.MixUp(num_classes=10, alpha=0.2)
CURES = {
    "weight decay": {"weight_decay": 0.1},
    "dropout": {"dropout": 0.1},
    "label smoothing": {"label_smoothing": 0.1},
    "mixup": {"transform": mixup},
    "augmentation": {"transform": wobble},
}


def recipes():
    """The plain recipe, each cure alone, all cures, all but each."""
    found = {"plain": {}} | CURES
    for left_out in (None, *CURES):
        recipe = {}
        for name, cure in CURES.items():
            if name != left_out:
                recipe |= cure
        if left_out not in ("mixup", "augmentation"):
            recipe["transform"] = lambda *batch: mixup(*wobble(*batch))
        found[f"all but {left_out}" if left_out else "all"] = recipe
    return found


def run(seed, names=None, folds=4):
    """Train with each recipe, leaving out each fold in turn to measure on."""
    images, labels = data.load_digits()
    parts = StratifiedKFold(4, shuffle=True, random_state=seed)
    figures = defaultdict(list)
    for train, val in islice(parts.split(images, labels), folds):
        train, val = ((images[rows], labels[rows]) for rows in (train, val))
        for name, recipe in recipes().items():
            if names and name not in names:
                continue
            model, _ = train_vit(train, seed=seed, **recipe)
            found = minivit.evaluate(model, val)
            known = minivit.evaluate(model, train)
            votes = (vote(model, val[0]) == val[1]).float().mean().item()
            figures[f"{name}: loss"].append(found["loss"])
            figures[f"{name}: accuracy"].append(100 * found["accuracy"])
            figures[f"{name}: training"].append(100 * known["accuracy"])
            figures[f"{name}: votes"].append(100 * votes)
    return {name: fmean(values) for name, values in figures.items()}
