"""Which ranking of patches finds those that the answer rests on?"""

import torch

import minivit
from minivit import data, inside
from minivit.vit import ViT, patchify


def make_vit(seed):
    torch.manual_seed(seed)
    return ViT(
        image_size=8, patch_size=2, in_channels=1, num_classes=10,
        embed_dim=64, num_layers=3, num_heads=4, mlp_dim=128,
    ).eval()  # fmt: skip


def gradient_scores(model, images):
    images = images.clone().requires_grad_()
    model(images).amax(dim=1).sum().backward()
    model.zero_grad(set_to_none=True)
    return patchify(images.grad * images.detach(), 2).sum(dim=-1)  # (B, N)


def cls_row(flow):
    return inside.cls_attention(flow, (4, 4)).flatten(1)  # (B, N)


def rankings(model, twin, images, seed):
    ink = patchify(images, 2).sum(dim=-1)  # (B, N)
    maps = inside.attention_maps(model, images)
    before = inside.attention_maps(twin, images)
    rolled = cls_row(inside.rollout(maps))
    generator = torch.Generator().manual_seed(seed)
    return {
        "relevance": cls_row(inside.relevance(model, images)),
        "rollout": rolled,
        "last layer": cls_row(maps[-1].mean(dim=1)),
        "gradient x input": gradient_scores(model, images),
        "ink": ink,
        "empty first": -ink,
        "rollout, untrained": cls_row(inside.rollout(before)),
        "rollout of another": rolled.roll(1, dims=0),
        "random": torch.rand(len(images), 16, generator=generator),
    }


REMOVALS = {"white": 0.0, "grey": 0.5, "left out": None}


def curves(model, twin, part, seed):
    """The accuracy without 0, 1, ..., N patches, for each way and ranking."""
    images, labels = part
    ranked = rankings(model, twin, images, seed)
    return {
        (way, name): inside.deletion_curve(
            model, images, labels, scores, patch_size=2, fill=fill
        )  # (N + 1,)
        for way, fill in REMOVALS.items()
        for name, scores in ranked.items()
    }


def run(seed):
    """Train a small ViT, take patches away, give the areas under curves."""
    train, val = data.split(*data.load_digits(), seed=seed)
    model, twin = make_vit(seed), make_vit(seed)
    minivit.fit(model, train, epochs=10, lr=3e-3, seed=seed, progress=False)
    found = curves(model, twin, val, seed)
    areas = {
        f"{name}, {way}": c.mean().item() for (way, name), c in found.items()
    }
    return {"accuracy": minivit.evaluate(model, val)["accuracy"], **areas}
