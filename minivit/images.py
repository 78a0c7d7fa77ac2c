"""Labelled pictures for training: in memory where they fit, else read as needed.

Copy this file together with data.py into one folder; it needs torchvision,
scikit-learn and tqdm beside torch.

Letters for shapes: B batch or number of pictures, C channels.
"""

import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .data import load_digits, split

__all__ = [
    "InMemory",
    "OnDisk",
    "Pictures",
    "load_pictures",
    "load_test",
    "normalise",
    "read",
    "seed_from",
    "square",
    "statistics",
]

MEMORY = 2 * 2**30  # bytes of pixels that we keep at most

Part = tuple[list[str], Tensor]  # files and their labels


class InMemory:
    """Pictures of one size, kept as bytes.

    Args:
        images: (B, C, height, width) uint8.
        labels: (B,) integers.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        """Count the pictures."""
        return len(self.labels)

    def to(self, device: torch.device) -> "InMemory":
        """Move the pictures: small ones are augmented where the model is."""
        return InMemory(self.images.to(device), self.labels.to(device))

    def batches(self, rows: Iterable[Tensor], seed: int = 0) -> Iterator[tuple]:
        """Yield (images, labels) for each tensor of row numbers."""
        for batch in rows:
            batch = batch.to(self.images.device)
            yield self.images[batch], self.labels[batch]


class OnDisk(Dataset):
    """Pictures in files, decoded batch by batch.

    Args:
        files: B paths.
        labels: (B,) integers.
        transform: from a PIL image to (C, height, width) uint8. What it draws at random
            depends on the seed and the picture alone, not on the number of processes.
        num_workers: processes that decode while the model computes; 0: this one.
    """

    def __init__(
        self,
        files: Sequence[str],
        labels: Tensor,
        transform: Callable[[Any], Tensor],
        num_workers: int = 0,
    ) -> None:
        self.files = files
        self.labels = labels
        self.transform = transform
        self.num_workers = num_workers
        self.seed = 0

    def __len__(self) -> int:
        """Count the pictures."""
        return len(self.labels)

    def to(self, device: torch.device) -> "OnDisk":
        """Stay: they are moved batch by batch."""
        return self

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """Decode one picture."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_from(self.seed, row))
            return self.transform(read(self.files[row])), self.labels[row]

    def batches(self, rows: Iterable[Tensor], seed: int = 0) -> Iterator[tuple]:
        """Yield (images, labels) for each tensor of row numbers."""
        self.seed = seed
        loader = DataLoader(
            self,
            batch_sampler=[batch.tolist() for batch in rows],
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        try:
            yield from loader
        except ValueError as error:  # without the trace of another process
            raise ValueError(str(error).rpartition("ValueError: ")[2].strip()) from None


class Pictures(NamedTuple):
    """What a model learns from, and what it is measured with.

    Attributes:
        train: pictures to learn from.
        val: pictures to measure with, of the same classes.
        classes: their names; a label is a place in this list.
    """

    train: InMemory | OnDisk
    val: InMemory | OnDisk
    classes: list[str]

    @property
    def mark(self) -> int:
        """A number made of the labels of `val`, in order: it tells divisions apart."""
        return zlib.crc32(self.val.labels.cpu().numpy().tobytes())


def load_pictures(
    name: str | Path,
    *,
    image_size: int | None = None,
    val_size: float = 0.1,
    seed: int = 0,
    max_train_images: int | None = None,
    cache: str = "auto",
    num_workers: int = 0,
    data_dir: str | Path = "data",
) -> Pictures:
    """Load a set by its name, or any folder with one folder of pictures a class.

    If the folder holds `train` and `val`, they are used as they are; otherwise a part
    of each class is held out. Of "cifar10" and "fashion-mnist", which torchvision
    downloads and checks, the training part is divided; the test part stays untouched.

    Args:
        name: "digits", "cifar10", "fashion-mnist", or the path of a folder.
        image_size: side to which files are resized (shorter side, then the centre is
            cut out); by default 224. The three sets have their own size.
        val_size: share of each class that is not trained on.
        seed: of the division.
        max_train_images: number of images to train on, each class in its proportion.
        cache: "memory", "disk", or "auto": memory if all fits into 2 GiB.
        num_workers: processes that decode files, if they stay on disk.
        data_dir: where downloads are kept.

    Returns:
        train, val and the names of the classes.

    Raises:
        ValueError: no such set or folder, a class without pictures, a file that is no
            picture (named), or an argument out of range.
    """
    if cache not in ("auto", "memory", "disk"):
        raise ValueError(f"cache must be 'auto', 'memory' or 'disk', got {cache!r}")
    if name in SETS:
        images, labels, classes = SETS[str(name)](data_dir, train=True)
        _check_image_size(name, images.size(-1), image_size)
        rows, val_rows = _divide(labels, val_size, seed)
        rows = rows[_at_most(max_train_images, labels[rows], seed)]
        train, val = (InMemory(images[i], labels[i]) for i in (rows, val_rows))
        return Pictures(train, val, classes)
    (files, labels), val, classes = _list_parts(Path(name), val_size, seed)
    rows = _at_most(max_train_images, labels, seed)
    train = [files[row] for row in rows], labels[rows]
    size = image_size or 224
    parts = [OnDisk(*part, square(size), num_workers) for part in (train, val)]
    needed = 3 * size**2 * sum(map(len, parts))
    if cache == "memory" or (cache == "auto" and needed <= MEMORY):
        parts = [_into_memory(part) for part in parts]
    return Pictures(*parts, classes)


def load_test(
    name: str, *, data_dir: str | Path = "data"
) -> tuple[InMemory, list[str]]:
    """Load the part of a set that nobody trains on.

    Args:
        name: "cifar10" or "fashion-mnist", which torchvision downloads and checks.
        data_dir: where downloads are kept.

    Returns:
        10,000 pictures and the names of the classes.

    Raises:
        ValueError: a set without such a part.
    """
    if name not in ("cifar10", "fashion-mnist"):
        raise ValueError(f"only cifar10 and fashion-mnist have a test part, not {name}")
    images, labels, classes = SETS[name](data_dir, train=False)
    return InMemory(images, labels), classes


def square(image_size: int, channels: int = 3) -> Callable[[Any], Tensor]:
    """Make the transform from a PIL image to a square of bytes.

    Args:
        image_size: the shorter side is resized to it, then the centre is cut out.
        channels: 3 for colour, 1 for grey.

    Returns:
        A function to (C, image_size, image_size) uint8.
    """
    from torchvision.transforms import v2

    return v2.Compose(
        [
            # Before the pixels are numbers: those of a palette are no colours.
            v2.Grayscale() if channels == 1 else v2.RGB(),
            v2.PILToTensor(),
            v2.Resize(image_size, antialias=True),
            v2.CenterCrop(image_size),
        ]
    )


def normalise(
    mean: Sequence[float], std: Sequence[float]
) -> Callable[[Tensor], Tensor]:
    """Make the transform from bytes to floats of mean 0 and variance 1.

    Args:
        mean: of each channel, of pixels from 0 to 1.
        std: standard deviation of each channel.

    Returns:
        A function from (..., C, height, width) uint8 to float32.
    """
    from torchvision.transforms import v2

    return v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    )


def statistics(
    pictures: InMemory | OnDisk, sample: int = 5000
) -> tuple[list[float], list[float]]:
    """Measure mean and standard deviation of each channel, of pixels from 0 to 1.

    Args:
        pictures: of which a sample is read.
        sample: how many at most, drawn with a fixed seed.

    Returns:
        C means and C standard deviations (1 for a channel that is constant).
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(pictures), generator=generator)[:sample]
    batches = pictures.batches(rows.split(100))
    counts = torch.stack([_histogram(images) for images, _ in batches]).sum(0)
    share = counts / counts.sum(dim=1, keepdim=True)  # (C, 256)
    levels = torch.arange(256) / 255.0
    mean = share @ levels  # (C,)
    std = (share * (levels - mean[:, None]).square()).sum(dim=1).sqrt()  # (C,)
    return mean.tolist(), torch.where(std > 0, std, 1.0).tolist()


def seed_from(*numbers: int) -> int:
    """Mix numbers into a seed: the same on every machine, another for neighbours.

    Args:
        numbers: such as the seed of a run and the number of an update.

    Returns:
        An integer from 0 to 2⁶³ - 1.
    """
    return random.Random(repr(numbers)).getrandbits(63)


def read(file: str | Path) -> Any:
    """Open a picture and decode it whole.

    Args:
        file: in any format that Pillow knows.

    Returns:
        A PIL image in RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture, or cut short.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as a picture: {error}") from error


def _divide(labels: Tensor, val_size: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw rows to train on and rows to measure with, each class in its proportion."""
    if not 0.0 < val_size < 1.0:
        raise ValueError(f"val_size must lie between 0 and 1, got {val_size}")
    (train, _), (val, _) = split(
        torch.arange(len(labels)), labels, val_size=val_size, seed=seed
    )
    return train, val


def _at_most(number: int | None, labels: Tensor, seed: int) -> Tensor:
    """Draw so many rows, each class in its proportion."""
    rows, classes = torch.arange(len(labels)), len(labels.unique())
    if number is None or number >= len(rows):
        return rows
    if not classes <= number <= len(rows) - classes:
        raise ValueError(
            f"max_train_images={number} must lie between the {classes} classes and "
            f"{len(rows) - classes} (one image less of each), or be {len(rows)} or more"
        )
    return split(rows, labels, val_size=number, seed=seed)[1][0]


def _histogram(images: Tensor) -> Tensor:
    """Count the levels of each channel: (B, C, height, width) bytes to (C, 256)."""
    channels = images.transpose(0, 1).flatten(1)  # (C, pixels)
    return torch.stack([channel.bincount(minlength=256) for channel in channels])


def _check_image_size(name: str | Path, size: int, image_size: int | None) -> None:
    if image_size not in (None, size):
        raise ValueError(
            f"{name} has images of {size} pixels, got image_size={image_size}"
        )


def _list_parts(folder: Path, val_size: float, seed: int) -> tuple[Part, Part, list]:
    """List what a folder has to train on and to measure with, and its classes."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is neither a folder nor one of {sorted(SETS)}")
    if not ((folder / "train").is_dir() and (folder / "val").is_dir()):
        files, labels, classes = _list(folder)
        parts = _divide(labels, val_size, seed)
        train, val = [([files[i] for i in rows], labels[rows]) for rows in parts]
        return train, val, classes
    files, labels, classes = _list(folder / "train")
    val_files, val_labels, val_classes = _list(folder / "val")
    if val_classes != classes:
        raise ValueError(
            f"{folder / 'train'} and {folder / 'val'} must have the same classes, "
            f"got {classes} and {val_classes}"
        )
    return (files, labels), (val_files, val_labels), classes


def _list(folder: Path) -> tuple[list[str], Tensor, list[str]]:
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:  # no class at all, or one that is empty
        raise ValueError(str(error)) from error
    if len(found.classes) < 2:
        raise ValueError(f"{folder} has one class only, {found.classes}")
    files, labels = zip(*found.samples, strict=True)
    return list(files), torch.tensor(labels), found.classes


def _into_memory(pictures: OnDisk) -> InMemory:
    from tqdm import tqdm

    rows = torch.arange(len(pictures)).split(256)
    batches = tqdm(
        pictures.batches(rows), "reading", len(rows), leave=False, disable=None
    )
    images, labels = zip(*batches, strict=True)
    return InMemory(torch.cat(images), torch.cat(labels))


def _digits(folder: str | Path, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    images, labels = load_digits()
    return (images * 255).round().byte(), labels, [str(i) for i in range(10)]


def _cifar10(folder: str | Path, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    from torchvision.datasets import CIFAR10

    found = CIFAR10(str(folder), train=train, download=True)
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(found.targets), found.classes


def _fashion_mnist(folder: str | Path, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    from torchvision.datasets import FashionMNIST

    found = FashionMNIST(str(folder), train=train, download=True)
    return found.data[:, None], found.targets, found.classes


SETS = {"digits": _digits, "cifar10": _cifar10, "fashion-mnist": _fashion_mnist}
