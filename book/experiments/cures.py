"""Which cures help a small ViT that has a thousand digits? (Training)"""

import math

import torch
import torch.nn.functional as F
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


def run(seed, names=None):
    """Train with each recipe, and measure on images that were held out."""
    train, val = data.split(*data.load_digits(), val_size=0.25, seed=seed)
    figures = {}
    for name, recipe in recipes().items():
        if names and name not in names:
            continue
        model, _ = train_vit(train, seed=seed, **recipe)
        found = minivit.evaluate(model, val)
        figures[f"{name}: loss"] = found["loss"]
        figures[f"{name}: accuracy"] = 100 * found["accuracy"]
        known = minivit.evaluate(model, train)["accuracy"]
        figures[f"{name}: training accuracy"] = 100 * known
        if "transform" in recipe and recipe["transform"] is not mixup:
            right = vote(model, val[0]) == val[1]
            figures[f"{name}: voted accuracy"] = (
                100 * right.float().mean().item()
            )
    return figures
