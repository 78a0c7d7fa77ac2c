"""All settings of a run, each in one line."""

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..vit import SIZES

__all__ = ["Recipe"]


def _option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(
        default=default, metadata={"help": text, "choices": choices}
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train, on what, and how: the options of `python -m minivit.train`.

    Raises:
        ValueError: a value out of range, an unknown choice.
    """

    data: str = _option(
        "digits",
        "digits, cifar10, fashion-mnist, or a folder with one folder of images a class "
        "(or with train/ and val/)",
    )
    out: str = _option("runs/a", "new folder for all that the run writes")

    model: str = _option("vit_s_4", "size of the model", tuple(SIZES))
    patch_size: int | None = _option(None, "side of a patch, if not the model's")
    embed_dim: int | None = _option(None, "width of the tokens, if not the model's")
    num_layers: int | None = _option(None, "number of layers, if not the model's")
    num_heads: int | None = _option(None, "number of heads, if not the model's")
    mlp_dim: int | None = _option(
        None, "width inside the MLP; 4 embed_dim if not given"
    )
    image_size: int | None = _option(
        None, "side to which a folder's images are resized"
    )
    pool: str = _option("cls", "what the head reads", ("cls", "mean"))

    epochs: int = _option(100, "how often each image is seen")
    batch_size: int = _option(128, "images per update, over all devices")
    accumulate: int = _option(1, "pieces in which a device takes its share of a batch")
    optimizer: str = _option(
        "adamw", "muon: on the blocks' matrices, AdamW elsewhere", ("adamw", "muon")
    )
    lr: float = _option(1e-3, "highest learning rate")
    weight_decay: float = _option(0.05, "on matrices only")
    warmup: float = _option(0.05, "share of the updates in which the rate rises")
    schedule: str = _option(
        "cosine", "of the rate after the warm-up", ("cosine", "constant")
    )
    clip: float = _option(1.0, "largest norm of the gradient; 0 for no limit")
    ema: float = _option(0.0, "decay of the averaged weights, such as 0.998; 0: none")

    label_smoothing: float = _option(0.0, "share of the target given to all classes")
    dropout: float = _option(0.0, "share of the features dropped")
    drop_path: float = _option(
        0.0, "share of the residual branches dropped, at the end"
    )
    layer_scale: float | None = _option(None, "start of LayerScale, such as 1e-4")

    crop: bool = _option(False, "random crops")
    flip: bool = _option(False, "mirror half of the images")
    randaugment: int = _option(0, "operations of RandAugment per image")
    magnitude: int = _option(9, "strength of RandAugment, 0 to 30")
    erasing: float = _option(0.0, "probability of erasing a rectangle")
    mixup: float = _option(0.0, "alpha of mixup; 0: none")
    cutmix: float = _option(
        0.0, "alpha of cutmix; 0: none. With mixup: one or the other"
    )
    unmixed: float = _option(0.0, "share of the epochs, the last, without mixing")
    same_draw: int = _option(
        1, "neighbours in a batch that are augmented alike (speed)"
    )

    limit: int | None = _option(None, "train on so many images only, each class alike")
    held_out: float = _option(0.1, "share of each class held out to measure with")
    split_seed: int = _option(0, "of the division")
    seed: int = _option(0, "of everything else")

    device: str = _option("auto", "auto, cuda, mps or cpu")
    precision: str = _option(
        "auto",
        "of matrix products; auto: bfloat16 or float16 on a GPU, else float32",
        ("auto", "float32", "bfloat16", "float16"),
    )
    compile: bool = _option(False, "use torch.compile")
    keep: str = _option("auto", "where images are kept", ("auto", "memory", "disk"))
    workers: int = _option(2, "processes that decode images kept on disk")
    root: str = _option("data", "folder for downloads")
    save_every: float = _option(300.0, "seconds between checkpoints inside an epoch")
    weights: str = _option(
        "float32", "numbers in model.safetensors", ("float32", "float16")
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(
                    f"{field.name} must be one of {choices}, got {value!r}"
                )
        for name in ("epochs", "batch_size", "accumulate", "same_draw"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )
        for name in ("warmup", "ema", "label_smoothing", "dropout", "drop_path"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"{name} must lie in [0, 1), got {getattr(self, name)}"
                )
        for name in ("erasing", "unmixed"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(
                    f"{name} must lie in [0, 1], got {getattr(self, name)}"
                )
        for name in (
            "lr",
            "weight_decay",
            "clip",
            "mixup",
            "cutmix",
            "randaugment",
            "workers",
            "save_every",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"{name} must not be negative, got {getattr(self, name)}"
                )
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out must lie between 0 and 1, got {self.held_out}")
        if not 0 <= self.magnitude <= 30:
            raise ValueError(f"magnitude must lie in [0, 30], got {self.magnitude}")

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.out)

    def command(self, processes: int = 1) -> str:
        """Write the recipe as a command.

        Args:
            processes: how many work together.

        Returns:
            One line for a shell; what is as by default is left out.
        """
        words = ["python", "-m", "minivit.train"]
        if processes > 1:
            words[:1] = ["torchrun", f"--nproc-per-node={processes}"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            option = field.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            else:
                words += [f"--{option}", str(value)]
        return shlex.join(words)

    def vit(
        self, image_size: int, in_channels: int, num_classes: int
    ) -> dict[str, Any]:
        """Say how to build the model.

        Args:
            image_size: side of the images.
            in_channels: of the images.
            num_classes: K.

        Returns:
            Arguments for `ViT`.
        """
        shape = dict(SIZES[self.model])
        for name in ("patch_size", "embed_dim", "num_layers", "num_heads"):
            if getattr(self, name) is not None:
                shape[name] = getattr(self, name)
        return {
            **shape,
            "mlp_dim": self.mlp_dim or 4 * shape["embed_dim"],
            "image_size": image_size,
            "in_channels": in_channels,
            "num_classes": num_classes,
            "dropout": self.dropout,
            "drop_path": self.drop_path,
            "layer_scale": self.layer_scale,
            "pool": self.pool,
        }
