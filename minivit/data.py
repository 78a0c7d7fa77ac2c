"""Data that needs no download: scanned digits and two photographs.

Copy this file: it works alone; the loaders need scikit-learn, which carries the data.

Letters for shapes: B batch, C channels.
"""

import torch
from torch import Tensor

__all__ = ["check_finite", "load_digits", "load_photograph", "split"]


def load_digits() -> tuple[Tensor, Tensor]:
    """Load the 1,797 scanned digits that travel with scikit-learn.

    Returns:
        images: (1797, 1, 8, 8) float, 0 paper to 1 ink.
        labels: (1797,) integers 0 to 9.

    Raises:
        ValueError: a pixel is not a finite number.

    Source:
        Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI.
    """
    from sklearn.datasets import load_digits as load

    digits = load()
    images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 16.0
    return check_finite(images), torch.as_tensor(digits.target, dtype=torch.long)


def load_photograph(name: str) -> Tensor:
    """Load one of the two photographs that travel with scikit-learn.

    Args:
        name: "china" (a temple) or "flower" (a dahlia).

    Returns:
        (3, 427, 640) float, red, green and blue from 0 to 1.

    Raises:
        ValueError: another name.
    """
    from sklearn.datasets import load_sample_image

    names = ("china", "flower")
    if name not in names:
        raise ValueError(f"name must be one of {names}, got {name!r}")
    pixels = torch.tensor(load_sample_image(f"{name}.jpg"))  # (height, width, 3)
    return pixels.permute(2, 0, 1) / 255.0  # (3, height, width)


def split(
    images: Tensor,
    labels: Tensor,
    *,
    test_size: float | int = 0.25,
    seed: int = 0,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Divide data at random, every class in the same proportion on both sides.

    Args:
        images: (B, ...) inputs.
        labels: (B,) classes.
        test_size: share of the data that is held out, or their number.
        seed: the same seed gives the same division.

    Returns:
        (train_images, train_labels) and (test_images, test_labels).

    Raises:
        ValueError: lengths differ, an input is not finite, or a part would be empty.
    """
    from sklearn.model_selection import train_test_split

    if len(images) != len(labels):
        raise ValueError(f"got {len(images)} images but {len(labels)} labels")
    check_finite(images)
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(),
        test_size=test_size,
        random_state=seed,
        stratify=labels.cpu().numpy(),
    )
    train, test = torch.from_numpy(train), torch.from_numpy(test)
    return (images[train], labels[train]), (images[test], labels[test])


def check_finite(x: Tensor) -> Tensor:
    """Hand x through if every number in it is finite.

    Args:
        x: (B, ...).

    Returns:
        x itself.

    Raises:
        ValueError: it holds NaN or infinity; says how many and where first.
    """
    if x.is_floating_point() and not x.isfinite().all():
        bad = (~x.isfinite()).nonzero()
        raise ValueError(
            f"{len(bad)} of {x.numel()} numbers are NaN or infinite, "
            f"the first at index {tuple(bad[0].tolist())}"
        )
    return x
