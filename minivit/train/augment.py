"""From bytes to what the model sees, with torchvision's transforms, on any device."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..images import normalise, square
from .recipe import Recipe

__all__ = ["Augment", "crop_file", "random_crop"]


def random_crop(image_size: int) -> Callable[[Any], Any]:
    """Make the random crop that suits the size.

    Small images are shifted by up to an eighth; of others a part is cut out and
    resized.

    Args:
        image_size: side of the crop.

    Returns:
        A transform of images of that side, or, for large ones, of any.
    """
    from torchvision.transforms import v2

    if image_size <= 64:
        return v2.RandomCrop(image_size, padding=max(1, image_size // 8))
    return v2.RandomResizedCrop(image_size, scale=(0.25, 1.0), antialias=True)


def crop_file(image_size: int) -> Callable[[Any], Tensor]:
    """Make the random crop of a picture of any size, from a PIL image to bytes.

    Args:
        image_size: side of the crop.

    Returns:
        A function to (C, image_size, image_size) uint8.
    """
    from torchvision.transforms import v2

    small = image_size <= 64
    first = square(image_size) if small else v2.PILToTensor()
    return v2.Compose([first, random_crop(image_size)])


class Augment:
    """Show each image differently each time, and mix images if the recipe says so.

    Args:
        recipe: what to do.
        mean: of each channel.
        std: of each channel.
        num_classes: K.
        crop: a random crop of images in memory; files are cropped when they are read.
    """

    def __init__(
        self,
        recipe: Recipe,
        mean: Sequence[float],
        std: Sequence[float],
        num_classes: int,
        crop: Callable[[Any], Any] | None = None,
    ) -> None:
        from torchvision.transforms import v2

        steps: list[Any] = [crop] if crop else []
        if recipe.flip:
            steps.append(v2.RandomHorizontalFlip())
        if recipe.randaugment:
            steps.append(
                v2.RandAugment(recipe.randaugment, recipe.randaugment_magnitude)
            )
        steps.append(normalise(mean, std))
        if recipe.random_erasing:
            steps.append(v2.RandomErasing(recipe.random_erasing))
        self.draw = v2.Compose(steps)
        drawn = len(steps) > 1  # not only normalised
        self.group_size = recipe.augment_group_size if drawn else recipe.batch_size
        mixers = []
        if recipe.mixup:
            mixers.append(v2.MixUp(alpha=recipe.mixup, num_classes=num_classes))
        if recipe.cutmix:
            mixers.append(v2.CutMix(alpha=recipe.cutmix, num_classes=num_classes))
        self.mix = v2.RandomChoice(mixers) if mixers else None

    def __call__(
        self, images: Tensor, labels: Tensor, *, mix: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        torchvision draws once a call and does the same to all images of it, so the
        batch is cut into pieces: one image each, or a few where speed matters.

        Args:
            images: (B, C, height, width) uint8.
            labels: (B,).
            mix: whether to mix images, if the recipe does.

        Returns:
            images: (B, C, height, width) float32.
            targets: (B,), or (B, K) shares if images were mixed.
        """
        pieces = [self.draw(piece) for piece in images.split(self.group_size)]
        images = torch.cat(pieces)  # (B, C, height, width)
        if mix and self.mix is not None:
            return self.mix(images, labels)
        return images, labels
