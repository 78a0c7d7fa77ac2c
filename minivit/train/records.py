"""What a run writes into its folder, and what it reads there to go on.

Every file is replaced at once: whatever happens, the old one is there or the new one.
"""

import dataclasses
import io
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..plots import learning_curves
from .loop import History
from .place import Place, hardware
from .recipe import Recipe

__all__ = ["begun", "finish", "resume", "save", "write_about"]

# What may differ between a run and its continuation: where it computes, not what, and
# how long: the schedule then follows the new number of epochs.
MAY_CHANGE = (
    "data",
    "data_dir",
    "device",
    "epochs",
    "num_workers",
    "out",
    "save_every_seconds",
)


def begun(recipe: Recipe) -> bool:
    """Say whether the recipe's folder holds a checkpoint."""
    return (recipe.folder / "checkpoint.pt").exists()


def write_about(
    recipe: Recipe,
    place: Place,
    vit: dict[str, Any],
    parameters: int,
    images: list[int],
) -> None:
    """Write `run.json`: what is done, on what, and by which machine.

    Args:
        recipe: all settings.
        place: where this process computes.
        vit: how to build the model.
        parameters: their number.
        images: how many to train on and to measure with.
    """
    about = {
        "command": recipe.command(place.world_size),
        "hardware": hardware(place),
        "recipe": dataclasses.asdict(recipe),
        "vit": vit,
        "parameters": parameters,
        "images": images,
    }
    recipe.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(about, indent=2) + "\n"
    checkpoint.write(recipe.folder / "run.json", text.encode())


def save(
    recipe: Recipe,
    data: dict[str, Any],
    progress: dict[str, Any],
    parts: Mapping[str, checkpoint.Stateful],
) -> None:
    """Write `checkpoint.pt`, and the epochs so far.

    Args:
        recipe: all settings.
        data: "images", how many to train on and to measure with; "classes", their
            names; "mark", which tells this division from others.
        progress: "step", "seconds", "totals" and "history".
        parts: all else that changes in training.
    """
    extra = {"recipe": dataclasses.asdict(recipe), **data, **progress}
    checkpoint.save(recipe.folder / "checkpoint.pt", extra=extra, **parts)
    _write_metrics(recipe, progress["history"])


def resume(
    recipe: Recipe,
    place: Place,
    data: dict[str, Any],
    parts: Mapping[str, checkpoint.Stateful],
) -> dict[str, Any]:
    """Read `checkpoint.pt`, if it belongs to this recipe, and put the parts back.

    Args:
        recipe: all settings.
        place: where this process computes.
        data: as in `save`.
        parts: as in `save`.

    Returns:
        What `save` was given as progress.

    Raises:
        ValueError: it was made with other settings or data, or is damaged.
    """
    path = recipe.folder / "checkpoint.pt"
    extra = checkpoint.load(path)
    for name, value in dataclasses.asdict(recipe).items():
        before = extra["recipe"].get(name, getattr(Recipe, name))  # a new option
        if name not in MAY_CHANGE and value != before:
            raise ValueError(f"{path} was made with {name}={before!r}, got {value!r}")
    for name, value in data.items():
        before = extra.get(name, value)  # older checkpoints know the images only
        if value != before:
            raise ValueError(
                f"{path} was made with {name} {before}, {recipe.data} has {value}"
            )
    epochs = extra["step"] / (data["images"][0] // recipe.batch_size)
    if epochs > recipe.epochs:
        raise ValueError(
            f"{path} is {int(epochs)} epochs old already, got epochs={recipe.epochs}"
        )
    checkpoint.load(path, **parts)
    if place.rank == 0:  # the checkpoint may be the newer one
        _write_metrics(recipe, extra["history"])
    return extra


def finish(
    recipe: Recipe,
    state_dict: Mapping[str, Tensor],
    about: dict[str, Any],
    history: History,
) -> None:
    """Write `model.safetensors` and `learning_curves.png`.

    Args:
        recipe: all settings.
        state_dict: of the model.
        about: what it takes to use the model.
        history: a list for each figure, with an entry an epoch.
    """
    import matplotlib.pyplot as plt

    path, dtype = recipe.folder / "model.safetensors", recipe.weights_dtype
    checkpoint.save_weights(path, state_dict, about, dtype=getattr(torch, dtype))
    figure = learning_curves(history)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    plt.close(figure)
    checkpoint.write(recipe.folder / "learning_curves.png", picture.getbuffer())


def _write_metrics(recipe: Recipe, history: History) -> None:
    """Write `metrics.jsonl`, a line an epoch."""
    rows = zip(*history.values(), strict=True)
    lines = [json.dumps(dict(zip(history, row, strict=True))) for row in rows]
    text = "".join(f"{line}\n" for line in lines)
    checkpoint.write(recipe.folder / "metrics.jsonl", text.encode())
