"""Training for hours: on one device or many, and through interruptions.

All that is random in an update depends on the seed and the number of the update alone.
So whatever moment a run is killed at, the last checkpoint leads to the same weights.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .. import checkpoint
from ..images import OnDisk, load_pictures, normalise, seed_from, statistics
from ..plots import learning_curves
from ..vit import ViT
from .augment import Augment, crop_file, random_crop
from .loop import parameter_groups, warmup_cosine
from .recipe import Recipe

__all__ = ["run"]

History = dict[str, list[float]]

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


class Place(NamedTuple):
    """Where this process computes, and which of how many it is."""

    device: torch.device
    rank: int
    size: int


def run(
    recipe: Recipe, *, resume: bool = False, progress: bool | None = None
) -> History:
    """Train a ViT as the recipe says, and write all of it into the recipe's folder.

    The folder gets `run.json` (recipe, command, hardware), `metrics.jsonl` (a line an
    epoch), `checkpoint.pt`, and at the end `model.safetensors` (the averaged weights if
    there are any) and `learning_curves.png`. SIGTERM and Ctrl-C stop after the current
    update, with a checkpoint. Under torchrun every process works on its share of each
    batch, and the first one writes.

    Args:
        recipe: all settings.
        resume: go on from the folder's checkpoint; start if there is none.
        progress: show a bar with images a second and the time left; by default in
            terminals only.

    Returns:
        Lists with one entry an epoch: "epoch", "step", "lr", "train_loss",
        "train_accuracy", "val_loss", "val_accuracy", "seconds", "images_per_second",
        and on CUDA "memory", the peak in bytes. If the run was stopped, it ends early.

    Raises:
        ValueError: settings that do not fit each other or the data; a damaged
            checkpoint; a loss that is no longer finite.
        FileExistsError: the folder holds a run, and `resume` was not asked for.
        OSError: the folder cannot be written; the last checkpoint is untouched.
    """
    with _placed(recipe.device) as place, _signals() as stop:
        return _Run(recipe, place, stop, resume).train(progress)


class _Run:
    """A run from data to weights; `train` is the loop, `_update` one step of it."""

    def __init__(
        self, recipe: Recipe, place: Place, stop: list[int], resume: bool
    ) -> None:
        self.recipe, self.place, self.stop = recipe, place, stop
        self.path = recipe.folder / "checkpoint.pt"
        if self.path.exists() and not resume:
            raise FileExistsError(
                f"{recipe.folder} holds a run already: go on with it (--resume), "
                "or name another folder (--out)"
            )
        self._load_data()
        self._build_model()
        self.history: History = {}
        self.step = 0  # updates done
        self.seconds = 0.0
        self.totals = torch.zeros(3, device=place.device)  # loss, hits, images
        if self.path.exists():
            self._resume()
        if place.rank == 0:
            self._write_about()

    def _load_data(self) -> None:
        recipe, place = self.recipe, self.place
        with _first_alone(place):  # it downloads, the others find the files
            self.pictures = load_pictures(
                recipe.data,
                image_size=recipe.image_size,
                val_size=recipe.val_size,
                seed=recipe.split_seed,
                max_train_images=recipe.max_train_images,
                cache=recipe.cache,
                num_workers=recipe.num_workers,
                data_dir=recipe.data_dir,
            )
        train, val, self.classes = self.pictures
        if recipe.batch_size > len(train):
            raise ValueError(
                f"batch_size={recipe.batch_size} is more than the {len(train)} images "
                "to train on"
            )
        if recipe.batch_size < place.size * recipe.grad_accum_steps:
            raise ValueError(
                f"batch_size={recipe.batch_size} cannot be divided among {place.size} "
                f"processes in {recipe.grad_accum_steps} pieces each"
            )
        self.per_epoch = len(train) // recipe.batch_size  # what is left waits
        self.steps = recipe.epochs * self.per_epoch
        images, _ = next(val.batches([torch.tensor([0])]))
        self.channels, self.image_size = images.size(1), images.size(3)
        self.mean, self.std = statistics(train)
        self.normalise = normalise(self.mean, self.std)
        crop = random_crop(self.image_size) if recipe.crop else None
        if crop and isinstance(train, OnDisk):  # from the whole picture
            train.transform, crop = crop_file(self.image_size), None
        self.augment = Augment(recipe, self.mean, self.std, len(self.classes), crop)
        self.train_set, self.val_set = train.to(place.device), val.to(place.device)

    def _build_model(self) -> None:
        recipe, place = self.recipe, self.place
        torch.manual_seed(recipe.seed)
        self.vit = recipe.vit(self.image_size, self.channels, len(self.classes))
        self.model = ViT(**self.vit).to(place.device)
        self.ema = None
        if recipe.ema_decay:
            average = get_ema_multi_avg_fn(recipe.ema_decay)
            self.ema = AveragedModel(self.model, multi_avg_fn=average)
        self.result = self.ema.module if self.ema else self.model
        self.optimizers = _optimizers(self.model, recipe)
        self.precision = _precision(recipe.precision, place.device)
        self.scaler = torch.amp.GradScaler(
            place.device.type, enabled=self.precision == torch.float16
        )
        self.shared = None
        if place.size > 1:
            self.shared = DistributedDataParallel(self.model)
        network = self.shared or self.model
        self.network = torch.compile(network) if recipe.compile else network

    # --- the loop -------------------------------------------------------------------

    def train(self, progress: bool | None) -> History:
        """Do what is left to do."""
        from tqdm import tqdm

        disable = None if progress is None else not progress

        with tqdm(
            total=self.steps * self.recipe.batch_size,
            initial=self.step * self.recipe.batch_size,
            unit="img",
            unit_scale=True,
            disable=disable if self.place.rank == 0 else True,
        ) as bar:
            while self.step < self.steps and not self._epoch(bar):
                pass
        if self.step == self.steps and self.place.rank == 0:
            self._finish()
        return self.history

    def _epoch(self, bar: Any) -> bool:
        """Do what is left of an epoch; say whether somebody asked to stop."""
        size = self.recipe.batch_size
        began = saved = time.perf_counter()
        first, before, stop = self.step, self.seconds, False
        for pieces in self._batches():
            stop = self._update(pieces)
            bar.update(size)
            now = time.perf_counter()
            self.seconds = before + now - began
            inside = self.step % self.per_epoch > 0
            if inside and (stop or now - saved > self.recipe.save_every_seconds):
                self._save()
                saved = now
            if inside and stop:
                return True
            if self.step % 50 == 0:
                self._check_finite()
                bar.set_postfix(loss=f"{self._mean()[0]:.3f}")
        trained = time.perf_counter() - began
        train_loss, train_accuracy = self._mean()
        val_loss, val_accuracy = self._evaluate()
        self.seconds = before + time.perf_counter() - began
        row = {
            "epoch": self.step // self.per_epoch,
            "step": self.step,
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "seconds": round(self.seconds, 3),
            "images_per_second": round((self.step - first) * size / trained, 1),
        }
        if self.place.device.type == "cuda":
            row["memory"] = torch.cuda.max_memory_allocated()
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)
        self._check_finite()
        self.totals.zero_()
        self._save()
        bar.set_postfix(val_accuracy=f"{val_accuracy:.4f}")
        return stop

    def _batches(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield this process's share of each batch, in pieces, from the step on."""
        recipe, place = self.recipe, self.place
        epoch, done = divmod(self.step, self.per_epoch)
        seed = seed_from(recipe.seed, epoch)
        order = torch.randperm(
            len(self.train_set), generator=torch.Generator().manual_seed(seed)
        )
        batches = order.split(recipe.batch_size)[done : self.per_epoch]
        shares = [batch[place.rank :: place.size] for batch in batches]
        rows = [
            rows
            for share in shares
            for rows in share.tensor_split(recipe.grad_accum_steps)
        ]
        pieces = iter(self.train_set.batches(rows, seed))
        for _ in batches:
            yield list(itertools.islice(pieces, recipe.grad_accum_steps))

    def _update(self, pieces: list[tuple[Tensor, Tensor]]) -> bool:
        """Learn from one batch; say whether somebody asked to stop."""
        recipe, place = self.recipe, self.place
        torch.manual_seed(seed_from(recipe.seed, self.step, place.rank))
        rate = _rate(self.step, self.steps, recipe)
        mix = self.step < self.steps - recipe.mixup_off_epochs * self.per_epoch
        found = torch.zeros(4, device=place.device)  # loss, hits, images, stop
        self.model.train()
        for i, (images, labels) in enumerate(pieces):
            images, targets = self.augment(
                images.to(place.device), labels.to(place.device), mix=mix
            )
            with self._alone(i < len(pieces) - 1):
                with self._compute():
                    logits = self.network(images)  # (B, K)
                loss = F.cross_entropy(
                    logits.float(),
                    targets,
                    label_smoothing=recipe.label_smoothing,
                    reduction="sum",
                )
                # Processes are averaged, pieces added: this makes the batch's mean.
                share = loss * (place.size / recipe.batch_size)
                self.scaler.scale(share).backward()
            likeliest = targets.argmax(1) if targets.is_floating_point() else targets
            hits = (logits.detach().argmax(1) == likeliest).sum()
            found[:3] += torch.stack(
                [loss.detach(), hits, hits.new_tensor(len(images))]
            )
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        if recipe.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_grad)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * rate
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update_parameters(self.model)
        stop = bool(self.stop)
        if place.size > 1:
            found[3] = float(stop)
            dist.all_reduce(found)
            stop = bool(found[3] > 0)
        self.totals += found[:3]
        self.step += 1
        return stop

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        """Measure loss and accuracy on what is held out; each process takes a share."""
        found = torch.zeros(3, device=self.place.device)
        rows = torch.arange(len(self.val_set))[self.place.rank :: self.place.size]
        self.result.eval()
        for images, labels in self.val_set.batches(rows.split(500)):
            labels = labels.to(self.place.device)
            with self._compute():
                logits = self.result(self.normalise(images.to(self.place.device)))
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            hits = (logits.argmax(1) == labels).sum()
            found += torch.stack([loss, hits, hits.new_tensor(len(labels))])
        if self.place.size > 1:
            dist.all_reduce(found)
        loss_sum, hits, count = found.tolist()
        return loss_sum / count, hits / count

    def _alone(self, alone: bool) -> contextlib.AbstractContextManager:
        """Keep gradients in this process until the last piece of a batch."""
        if alone and self.shared is not None:
            return self.shared.no_sync()
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _compute(self) -> Iterator[None]:
        """Compute matrix products in the recipe's precision."""
        kind = self.place.device.type
        with contextlib.ExitStack() as stack:
            if self.precision != torch.float32:
                stack.enter_context(torch.autocast(kind, dtype=self.precision))
                if kind == "cpu":  # the fused kernel's way back is slow there
                    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                    reduced = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed
                    allow = torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp
                    stack.callback(allow, reduced())
                    allow(True)  # no detour through float32
            yield

    def _mean(self) -> tuple[float, float]:
        loss_sum, hits, count = self.totals.tolist()
        return loss_sum / count, hits / count

    def _check_finite(self) -> None:
        if not self.totals.isfinite().all():
            raise ValueError(
                f"the loss is no longer finite at update {self.step} (epoch "
                f"{1 + (self.step - 1) // self.per_epoch}): lower "
                f"lr={self.recipe.lr}. The last checkpoint is untouched"
            )

    # --- what is written ------------------------------------------------------------

    def _parts(self) -> dict[str, Any]:
        """Name all that changes in training."""
        parts: dict[str, Any] = {"model": self.model, "scaler": self.scaler}
        if self.ema:
            parts["ema"] = self.ema
        for optimizer in self.optimizers:
            parts[type(optimizer).__name__.lower()] = optimizer
        return parts

    def _save(self) -> None:
        self._check_finite()
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise ValueError(
                f"the weights are no longer finite at update {self.step}: lower "
                f"lr={self.recipe.lr}. The last checkpoint is untouched"
            )
        if self.place.rank > 0:
            return
        extra = {
            "recipe": dataclasses.asdict(self.recipe),
            "images": [len(self.train_set), len(self.val_set)],
            "step": self.step,
            "seconds": self.seconds,
            "totals": self.totals,
            "history": self.history,
        }
        checkpoint.save(self.path, extra=extra, **self._parts())
        self._write_metrics()

    def _resume(self) -> None:
        extra = checkpoint.load(self.path)
        now = {
            "recipe": dataclasses.asdict(self.recipe),
            "images": [len(self.train_set), len(self.val_set)],
        }
        for name, value in now["recipe"].items():
            before = extra["recipe"].get(name, getattr(Recipe, name))  # a new option
            if name not in MAY_CHANGE and value != before:
                raise ValueError(
                    f"{self.path} was made with {name}={before!r}, got {value!r}"
                )
        if now["images"] != extra["images"]:
            raise ValueError(
                f"{self.path} was made with {extra['images']} images to train on and "
                f"to measure with, {self.recipe.data} has {now['images']}"
            )
        if extra["step"] > self.steps:
            raise ValueError(
                f"{self.path} is {extra['step'] // self.per_epoch} epochs old already, "
                f"got epochs={self.recipe.epochs}"
            )
        checkpoint.load(self.path, **self._parts())
        self.step, self.seconds = extra["step"], extra["seconds"]
        self.history = extra["history"]
        self.totals.copy_(extra["totals"])
        if self.place.rank == 0:
            self._write_metrics()

    def _write_metrics(self) -> None:
        rows = zip(*self.history.values(), strict=True)
        lines = [json.dumps(dict(zip(self.history, row, strict=True))) for row in rows]
        text = "".join(f"{line}\n" for line in lines)
        checkpoint.write(self.recipe.folder / "metrics.jsonl", text.encode())

    def _write_about(self) -> None:
        about = {
            "command": self.recipe.command(self.place.size),
            "hardware": _hardware(self.place),
            "recipe": dataclasses.asdict(self.recipe),
            "vit": self.vit,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "images": [len(self.train_set), len(self.val_set)],
        }
        self.recipe.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(about, indent=2) + "\n"
        checkpoint.write(self.recipe.folder / "run.json", text.encode())

    def _finish(self) -> None:
        import matplotlib.pyplot as plt

        recipe = self.recipe
        about = {
            "vit": self.vit,
            "classes": self.classes,
            "mean": self.mean,
            "std": self.std,
            "val_size": recipe.val_size,
            "split_seed": recipe.split_seed,
            "mark": self.pictures.mark,
            "data": Path(recipe.data).name,
            "val_accuracy": self.history["val_accuracy"][-1],
        }
        checkpoint.save_weights(
            recipe.folder / "model.safetensors",
            self.result.state_dict(),
            about,
            dtype=getattr(torch, recipe.weights_dtype),
        )
        figure = learning_curves(self.history)
        picture = io.BytesIO()
        figure.savefig(picture, dpi=150)
        plt.close(figure)
        checkpoint.write(recipe.folder / "learning_curves.png", picture.getbuffer())


def _optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, if asked for; AdamW for all else."""
    groups = parameter_groups(model, recipe.weight_decay)
    optimizers: list[torch.optim.Optimizer] = []
    if recipe.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(
                "optimizer='muon' needs torch 2.9 or newer, "
                f"this is {torch.__version__}"
            )
        blocks = [
            p
            for name, p in model.named_parameters()
            if name.startswith("encoder.") and p.ndim == 2
        ]
        # With this choice the steps are as large as AdamW's: one rate serves both.
        muon = torch.optim.Muon(
            blocks,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers.append(muon)
        taken = {id(p) for p in blocks}
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in taken]
    optimizers.append(torch.optim.AdamW(groups, lr=recipe.lr, fused=True))
    return optimizers


def _rate(step: int, steps: int, recipe: Recipe) -> float:
    if recipe.lr_schedule == "cosine":
        return warmup_cosine(step, steps, recipe.warmup_ratio)
    return min(1.0, (step + 1) / max(round(steps * recipe.warmup_ratio), 1))


def _precision(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float16


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextlib.contextmanager
def _placed(device_name: str) -> Iterator[Place]:
    """Find the device, and under torchrun the other processes."""
    device = _device(device_name)
    if "WORLD_SIZE" not in os.environ:
        yield Place(device, 0, 1)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Place(device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _first_alone(place: Place) -> Iterator[None]:
    if place.size > 1 and place.rank > 0:
        dist.barrier()
    yield
    if place.size > 1 and place.rank == 0:
        dist.barrier()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect requests to stop; a second one acts at once, as without us."""
    came: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        came.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    try:
        yield came
    finally:
        restore()


def _hardware(place: Place) -> dict[str, Any]:
    """Say what computed, for the record."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        names = [line.partition(":")[2] for line in lines if "model name" in line]
        name = names[0].strip() if names else name
    found = {
        "device": place.device.type,
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": place.size,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if place.device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(place.device)
    return found
