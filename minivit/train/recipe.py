"""All settings of a run, each with its default, its meaning and its bounds."""

import dataclasses
import shlex
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from ..vit import SIZES, ViT
from .loop import parameter_groups, warmup_cosine

__all__ = ["Recipe"]


def _option(
    default: Any,
    text: str,
    within: str = "",
    *,
    choices: tuple[str, ...] = (),
) -> Any:
    """Make a field: its default, a line for --help, the interval or choices it has."""
    metadata = {"help": text, "choices": choices, "within": within}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train, on what, and how: the options of `python -m minivit.train`.

    Raises:
        TypeError: a value of another kind.
        ValueError: a value out of range, an unknown choice.
    """

    data: str = _option(
        "digits",
        "digits, cifar10, fashion-mnist, or a folder with one folder of images a class "
        "(or with train/ and val/)",
    )
    out: str = _option("runs/a", "new folder for all that the run writes")

    model: str = _option("vit_s_4", "size of the model", choices=tuple(SIZES))
    patch_size: int | None = _option(
        None, "side of a patch, if not the model's", "[1, inf)"
    )
    embed_dim: int | None = _option(
        None, "width of the tokens, if not the model's", "[1, inf)"
    )
    num_layers: int | None = _option(
        None, "number of layers, if not the model's", "[1, inf)"
    )
    num_heads: int | None = _option(
        None, "number of heads, if not the model's", "[1, inf)"
    )
    mlp_dim: int | None = _option(
        None, "width inside the MLP; 4 embed_dim if not given", "[1, inf)"
    )
    image_size: int | None = _option(
        None, "side to which a folder's images are resized", "[1, inf)"
    )
    pool: str = _option("cls", "what the head reads", choices=("cls", "mean"))

    epochs: int = _option(100, "how often each image is seen", "[1, inf)")
    batch_size: int = _option(128, "images per update, over all devices", "[1, inf)")
    grad_accum_steps: int = _option(
        1, "pieces in which a device takes its share of a batch", "[1, inf)"
    )
    optimizer: str = _option(
        "adamw",
        "muon: on the blocks' matrices, AdamW elsewhere",
        choices=("adamw", "muon"),
    )
    lr: float = _option(1e-3, "highest learning rate", "[0, inf)")
    weight_decay: float = _option(0.05, "on matrices only", "[0, inf)")
    warmup_ratio: float = _option(
        0.05, "share of the updates in which the rate rises", "[0, 1)"
    )
    lr_schedule: str = _option(
        "cosine", "of the rate after the warm-up", choices=("cosine", "constant")
    )
    clip_grad: float = _option(
        1.0, "largest norm of the gradient; 0 for no limit", "[0, inf)"
    )
    ema_decay: float = _option(
        0.0, "of the averaged weights, such as 0.998; 0: none", "[0, 1)"
    )

    label_smoothing: float = _option(
        0.0, "share of the target given to all classes", "[0, 1)"
    )
    dropout: float = _option(0.0, "share of the features dropped", "[0, 1)")
    drop_path: float = _option(
        0.0, "share of the residual branches dropped, at the end", "[0, 1)"
    )
    layer_scale: float | None = _option(
        None, "start of LayerScale, such as 1e-4", "[0, inf)"
    )

    crop: bool = _option(False, "random crops")
    flip: bool = _option(False, "mirror half of the images")
    randaugment: int = _option(0, "operations of RandAugment per image", "[0, inf)")
    randaugment_magnitude: int = _option(9, "strength of RandAugment", "[0, 30]")
    random_erasing: float = _option(0.0, "probability of erasing a rectangle", "[0, 1]")
    mixup: float = _option(0.0, "alpha of mixup; 0: none", "[0, inf)")
    cutmix: float = _option(
        0.0, "alpha of cutmix; 0: none. With mixup: one or the other", "[0, inf)"
    )
    mixup_off_epochs: int = _option(
        0, "epochs at the end without mixup and cutmix", "[0, inf)"
    )
    augment_group_size: int = _option(
        1, "neighbours in a batch that are augmented alike (speed)", "[1, inf)"
    )

    max_train_images: int | None = _option(
        None, "train on so many images only, each class alike", "[1, inf)"
    )
    val_size: float = _option(
        0.1, "share of each class held out to measure with", "(0, 1)"
    )
    split_seed: int = _option(0, "of the division")
    seed: int = _option(0, "of everything else")

    device: str = _option(
        "auto", "where to compute", choices=("auto", "cuda", "mps", "cpu")
    )
    precision: str = _option(
        "auto",
        "of matrix products; auto: bfloat16 or float16 with CUDA, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    compile: bool = _option(False, "use torch.compile")
    cache: str = _option(
        "auto", "where images are kept", choices=("auto", "memory", "disk")
    )
    num_workers: int = _option(
        2, "processes that decode images kept on disk", "[0, inf)"
    )
    data_dir: str = _option("data", "folder for downloads")
    save_every_seconds: float = _option(
        300.0, "between checkpoints inside an epoch", "[0, inf)"
    )
    weights_dtype: str = _option(
        "float32",
        "of the numbers in model.safetensors",
        choices=("float32", "float16"),
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        kinds = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            name, came = field.name, getattr(self, field.name)
            value = _plain(name, came, kinds[name])
            object.__setattr__(self, name, value)  # the dataclass is frozen
            choices, within = field.metadata["choices"], field.metadata["within"]
            if choices and value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
            if within and value is not None and not _lies_in(within, value):
                raise ValueError(f"{name} must lie in {within}, got {came}")

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
        names = ("patch_size", "embed_dim", "num_layers", "num_heads")
        changes = {name: getattr(self, name) for name in names if getattr(self, name)}
        shape = SIZES[self.model] | changes
        return shape | {
            "mlp_dim": self.mlp_dim or 4 * shape["embed_dim"],
            "image_size": image_size,
            "in_channels": in_channels,
            "num_classes": num_classes,
            "dropout": self.dropout,
            "drop_path": self.drop_path,
            "layer_scale": self.layer_scale,
            "pool": self.pool,
        }

    def optimizers(self, model: ViT) -> list[torch.optim.Optimizer]:
        """Make AdamW, or Muon for the matrices of the encoder and AdamW for all else.

        Args:
            model: whose parameters they take.

        Returns:
            One optimizer or two.

        Raises:
            ValueError: this torch has no Muon.
        """
        groups = parameter_groups(model, self.weight_decay)
        adamw = partial(torch.optim.AdamW, lr=self.lr, fused=True)
        if self.optimizer == "adamw":
            return [adamw(groups)]
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(
                "optimizer='muon' needs torch 2.9 or newer, "
                f"this is {torch.__version__}"
            )
        matrices = [p for p in model.encoder.parameters() if p.ndim == 2]
        taken = set(matrices)
        for group in groups:
            group["params"] = [p for p in group["params"] if p not in taken]
        # With this choice the steps are as large as AdamW's: one rate serves both.
        muon = torch.optim.Muon(
            matrices,
            lr=self.lr,
            weight_decay=self.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        return [muon, adamw(groups)]

    def lr_at(self, step: int, steps: int) -> float:
        """Give the learning rate of an update.

        Args:
            step: updates done.
            steps: updates in all.

        Returns:
            The rate.
        """
        if self.lr_schedule == "cosine":
            return self.lr * warmup_cosine(step, steps, self.warmup_ratio)
        rising = max(round(steps * self.warmup_ratio), 1)
        return self.lr * min(1.0, (step + 1) / rising)


def _plain(name: str, value: Any, kind: Any) -> Any:
    """Make a plain number or text of what others have: of NumPy's, of paths."""
    kind, *none = get_args(kind) or (kind,)  # int | None
    if value is None and none:
        return None
    like = {int: Integral, float: Real, str: str | Path, bool: bool}[kind]
    if not isinstance(value, like) or isinstance(value, bool) is not (kind is bool):
        raise TypeError(f"{name} must be {kind.__name__}, got {value!r}")
    return kind(value)


def _lies_in(interval: str, value: float) -> bool:
    """Read an interval such as "[0, 1)": from 0 on, and below 1."""
    lowest, highest = map(float, interval[1:-1].split(","))
    above = value >= lowest if interval[0] == "[" else value > lowest
    below = value <= highest if interval[-1] == "]" else value < highest
    return above and below
