"""How many images does a CNN need, and how many a ViT?"""

import math

import torch
from torch import nn

from minivit import ViT, data, evaluate, fit


def make_cnn(width=38, num_layers=3):
    layers, channels = [], 1
    for _ in range(num_layers):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
    body = nn.Sequential(*layers)  # (B, C, 8, 8)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(body, pool, nn.Linear(width, 10))


def make_vit(image_size=8):
    return ViT(
        image_size=image_size,
        patch_size=2,
        in_channels=1,
        num_classes=10,
        embed_dim=40,
        num_layers=2,
        num_heads=4,
        mlp_dim=80,
    )


MAKERS = {"CNN": make_cnn, "ViT": make_vit}
NUMBERS = (50, 250, 1000)


def trained(make, part, seed, updates=600, lr=5e-3, transform=None):
    torch.manual_seed(seed)
    model = make()
    epochs = round(updates / math.ceil(len(part[1]) / 32))
    fit(
        model,
        part,
        epochs=epochs,
        batch_size=32,
        lr=lr,
        seed=seed,
        progress=False,
        transform=transform,
    )
    return model.eval()


ORDER = torch.randperm(64, generator=torch.Generator().manual_seed(0))


def scrambled(part):
    images, labels = part
    return images.flatten(1)[:, ORDER].reshape(images.shape), labels


def percent(model, part):
    return 100 * evaluate(model, part)["accuracy"]


def run(seed, numbers=NUMBERS):
    """Train both on few and on many images, in order and shuffled."""
    pool, val = data.split(*data.load_digits(), seed=seed)
    figures = {}
    for number in numbers:
        part, _ = data.split(*pool, val_size=len(pool[1]) - number, seed=seed)
        for name, make in MAKERS.items():
            for how, shown, held_out in (
                ("", part, val),
                (", shuffled", scrambled(part), scrambled(val)),
            ):
                model = trained(make, shown, seed)
                key = f"{name}, {number}{how}"
                figures[key] = percent(model, held_out)
                figures[f"{key}: training"] = percent(model, shown)
            lost = (
                figures[f"{name}, {number}"]
                - figures[f"{name}, {number}, shuffled"]
            )
            figures[f"{name}, {number}: lost"] = lost
        lead = figures[f"CNN, {number}"] - figures[f"ViT, {number}"]
        figures[f"lead, {number}"] = lead
    return figures
