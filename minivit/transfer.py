"""Transfer: weights that others trained on ImageNet, and what fine-tuning begins with.

Copy this file together with vit.py, encoder.py, attention.py, layers.py, positions.py
and convert.py into one folder; it needs torchvision beside torch.

Letters for shapes: B batch, K classes.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .convert import from_torchvision
from .positions import resample_positions
from .vit import Size, ViT, vit_b_16, vit_b_32, vit_l_16

__all__ = ["freeze_all_but", "new_head", "pretrained"]

# The model, and torchvision's name of its weights.
MODELS = {
    "vit_b_16": (vit_b_16, "ViT_B_16_Weights.IMAGENET1K_V1"),
    "vit_b_32": (vit_b_32, "ViT_B_32_Weights.IMAGENET1K_V1"),
    "vit_l_16": (vit_l_16, "ViT_L_16_Weights.IMAGENET1K_V1"),
}


def pretrained(
    name: str,
    *,
    image_size: Size = 224,
    num_classes: int | None = None,
    progress: bool = True,
) -> ViT:
    """Build a ViT and give it torchvision's weights, trained on ImageNet.

    The first call downloads 330 MB (vit_b_16) to 1.2 GB (vit_l_16) into torch's cache,
    `torch.hub.get_dir()`; the file's SHA-256 is checked then and at every later call.
    Names of the classes and the preprocessing that the weights expect come from
    torchvision:

        >>> from torchvision.models import ViT_B_16_Weights
        >>> weights = ViT_B_16_Weights.IMAGENET1K_V1
        >>> len(weights.meta["categories"])
        1000
        >>> preprocess = weights.transforms()  # resize, crop, normalise
        >>> preprocess(torch.zeros(3, 300, 400)).shape
        torch.Size([3, 224, 224])

    Args:
        name: "vit_b_16", "vit_b_32" or "vit_l_16".
        image_size: side of the images, or (height, width); if it is not 224, the
            positions are resampled.
        num_classes: K of a new head, untrained, for fine-tuning; if not given, the
            head for ImageNet's 1000 classes is kept.
        progress: show a bar while downloading.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: an unknown name, or an image size that patches do not divide.
        OSError: no network, or the server does not answer.
        RuntimeError: the file is not the one that torchvision published.
    """
    from torchvision.models import get_weight

    if name not in MODELS:
        raise ValueError(f"name must be one of {list(MODELS)}, got {name!r}")
    build, weights_name = MODELS[name]
    own_head = {} if num_classes is None else {"num_classes": num_classes}
    model = build(image_size=image_size, **own_head)
    weights = get_weight(weights_name)
    state_dict = from_torchvision(_fetch(weights, progress))
    state_dict["pos_embed"] = resample_positions(
        state_dict["pos_embed"], model.patch_embed.grid_size
    )
    if num_classes is not None:
        state_dict["head.weight"] = model.head.weight
        state_dict["head.bias"] = model.head.bias
    model.load_state_dict(state_dict)
    return model.eval()


def new_head(model: ViT, num_classes: int) -> ViT:
    """Replace the head by one for other classes, all of them equally likely at first.

    Args:
        model: a trained `ViT`; it is changed.
        num_classes: K of the new head.

    Returns:
        The model.
    """
    old = model.head.weight
    model.head = nn.Linear(old.size(1), num_classes).to(old.device, old.dtype)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    return model


def freeze_all_but(model: nn.Module, *parts: nn.Module) -> list[nn.Parameter]:
    """Let some parts of a model learn, and nothing else.

    A linear probe is `freeze_all_but(vit, vit.head)`, partial fine-tuning
    `freeze_all_but(vit, vit.encoder.layers[-1], vit.encoder.norm, vit.head)`, full
    fine-tuning `freeze_all_but(vit, vit)`. Make the optimizer afterwards: one that
    holds a parameter goes on moving it by momentum.

    Args:
        model: it is changed.
        parts: modules of the model, or the model itself.

    Returns:
        The parameters that learn, for the optimizer.

    Raises:
        ValueError: a part is not in the model: of another copy, say.
    """
    inside = list(model.modules())
    for part in parts:
        if not any(part is module for module in inside):
            raise ValueError(f"{type(part).__name__} is no part of this model")
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _fetch(weights: Any, progress: bool) -> dict[str, Tensor]:
    """Load the file from the cache, or else from the network; check its hash."""
    file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    where = f"\n  address: {weights.url}\n  kept at: {file}\n"
    if file.exists():  # torch's loader checks only what it has just downloaded
        expected = file.stem.rpartition("-")[2]
        with file.open("rb") as opened:
            came = hashlib.file_digest(opened, "sha256").hexdigest()
        if not came.startswith(expected):
            raise RuntimeError(
                f"the file of {weights} is damaged: its SHA-256 begins with "
                f"{came[: len(expected)]}, expected {expected}. "
                f"Delete it and try again.{where}"
            )
    try:
        return weights.get_state_dict(
            progress=progress, check_hash=True, map_location="cpu", weights_only=True
        )
    except RuntimeError as error:  # torch's loader deletes what has another hash
        raise RuntimeError(
            f"the download of {weights} was damaged or replaced on its way and was "
            f"not kept: {error}. Try again.{where}"
        ) from error
    except OSError as error:  # what urllib raises when there is no network
        raise OSError(
            f"the weights {weights} could not be downloaded: {error}{where}"
            "Without a network, fetch the file elsewhere and put it there; the "
            "environment variable TORCH_HOME moves the folder."
        ) from error
