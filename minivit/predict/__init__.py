"""A trained model at work; also `python -m minivit.predict vit_cifar10 picture.jpg`.

Copy this folder together with checkpoint.py, images.py, data.py, vit.py, encoder.py,
attention.py and layers.py into one folder, and weights/
for the models that travel with it; it needs torchvision and safetensors beside torch,
and scikit-learn and tqdm to measure.

Letters for shapes: B batch, C channels, K classes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import load_weights
from ..images import InMemory, OnDisk, load_pictures, load_test, normalise, square
from ..vit import ViT

__all__ = ["Trained", "load", "measure"]

# Models that travel with the package.
WEIGHTS = Path(__file__).parent.parent / "weights"


class Trained(NamedTuple):
    """A model and what it takes to use it.

    Attributes:
        model: in eval mode.
        classes: K names.
        preprocess: from a PIL image of any size to (C, height, width) float32, as the
            model expects it.
        about: how it was trained and how good it is.
    """

    model: ViT
    classes: list[str]
    preprocess: Callable[[Any], Tensor]
    about: dict[str, Any]


def load(name: str | Path) -> Trained:
    """Load a trained model: one that travels with minivit, or a file.

    Args:
        name: "vit_cifar10", or the path of a `model.safetensors` that training wrote.

    Returns:
        model, classes, preprocess, about.

    Raises:
        FileNotFoundError: no such name and no such file.
        ValueError: a file that is damaged, or that minivit did not write.

    Example:
        import minivit
        from PIL import Image

        model, classes, preprocess, about = minivit.load("vit_cifar10")
        logits = model(preprocess(Image.open("photograph.jpg"))[None])  # (1, K)
    """
    from torchvision.transforms import v2

    file = WEIGHTS / f"{name}.safetensors"
    if not file.is_file():
        file = Path(name)
    if not file.is_file():
        shipped = sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))
        raise FileNotFoundError(
            f"there is no file {name}, and no such name in {shipped}"
        )
    state_dict, about = load_weights(file)
    try:
        model = ViT(**about["vit"])
        model.load_state_dict(state_dict)
        height, _ = model.patch_embed.image_size
        preprocess = v2.Compose(
            [
                square(height, model.patch_embed.in_channels),
                normalise(about["mean"], about["std"]),
            ]
        )
        return Trained(model.eval(), about["classes"], preprocess, about)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{file} does not fit this version of minivit: {error}"
        ) from error


@torch.no_grad()
def measure(
    trained: Trained,
    data: str | Path,
    *,
    test: bool = False,
    data_dir: str | Path = "data",
) -> dict[str, float]:
    """Measure a model on images that it was not trained on.

    Args:
        trained: from `load`; it knows how its images were divided.
        data: the same data as in training, as in `load_pictures`, of which the part is
            taken that was held out then, `val`.
        test: take the test part of "cifar10" or "fashion-mnist" instead.
        data_dir: where downloads are kept.

    Returns:
        "hits", "images" and "accuracy".

    Raises:
        ValueError: the data has other classes, or another part was held out.
    """
    if test:
        pictures, classes = load_test(str(data), data_dir=data_dir)
    else:
        pictures, classes = _val(trained, data, data_dir)
    if classes != trained.classes:
        raise ValueError(f"{data} has classes {classes}, expected {trained.classes}")
    to_input = normalise(trained.about["mean"], trained.about["std"])
    rows = torch.arange(len(pictures)).split(500)
    hits = sum(
        int((trained.model(to_input(images)).argmax(1) == labels).sum())
        for images, labels in pictures.batches(rows)
    )
    return {"hits": hits, "images": len(pictures), "accuracy": hits / len(pictures)}


def _val(
    trained: Trained, data: str | Path, data_dir: str | Path
) -> tuple[InMemory | OnDisk, list[str]]:
    """Load what was held out in training, and the names of the classes."""
    about = trained.about
    _, val, classes = pictures = load_pictures(
        data,
        image_size=trained.model.patch_embed.image_size[0],
        val_size=about["val_size"],
        seed=about["split_seed"],
        data_dir=data_dir,
    )
    if classes == trained.classes and pictures.mark != about["mark"]:
        raise ValueError(
            f"{data} is not what the model was trained on: the images held out "
            "would be others, and it may know them"
        )
    return val, classes
