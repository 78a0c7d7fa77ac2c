"""Training for hours: on one device or many, and through interruptions.

All that is random in an update depends on the seed and the number of the update alone.
So whatever moment a run is killed at, the last checkpoint leads to the same weights.
"""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..images import OnDisk, load_pictures, normalise, seed_from, statistics
from ..vit import ViT
from . import records
from .augment import Augment, crop_file, random_crop
from .loop import History, count, means, sum_loss
from .place import Place, autocast, choose_precision, find_place, requests_to_stop
from .recipe import Recipe

__all__ = ["run"]


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
        FileExistsError: the folder holds a run, and `resume` was not asked for; or a
            model whose checkpoint is gone.
        OSError: the folder cannot be written; the last checkpoint is untouched.
    """
    if records.begun(recipe) and not resume:
        raise FileExistsError(
            f"{recipe.folder} holds a run already: go on with it (--resume), "
            "or name another folder (--out)"
        )
    if not records.begun(recipe) and (recipe.folder / "model.safetensors").exists():
        raise FileExistsError(
            f"{recipe.folder} holds a model, and no checkpoint to go on from: name "
            "another folder (--out)"
        )
    with find_place(recipe.device) as place, requests_to_stop() as requests:
        return _Run(recipe, place, requests).train(progress)


class _Run:
    """A run from data to weights; `train` is the loop, `_update` one step of it."""

    def __init__(self, recipe: Recipe, place: Place, requests: list[int]) -> None:
        self.recipe, self.place, self.requests = recipe, place, requests
        self._load_data()
        self._build_model()
        self.step = 0  # updates done
        self.totals = torch.zeros(3, device=place.device)  # loss, hits, images
        self.history: History = {}
        self.began = time.perf_counter()  # pauses left out
        self.stopped = False
        if records.begun(recipe):
            self._resume()
        if place.rank == 0:
            count = sum(p.numel() for p in self.model.parameters())
            images = self.data["images"]
            records.write_about(recipe, place, self.vit_args, count, images)

    def _load_data(self) -> None:
        recipe, place = self.recipe, self.place
        with place.main_process_first():  # it downloads, the others find the files
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
        train, val, classes = self.pictures
        self.data = {
            "images": [len(train), len(val)],
            "classes": classes,
            "mark": self.pictures.mark,
        }
        _check_batch_size(recipe, place, len(train))
        self.per_epoch = len(train) // recipe.batch_size  # what is left waits
        self.steps = recipe.epochs * self.per_epoch
        self.mean, self.std = statistics(train)
        images, _ = next(val.batches([torch.tensor([0])]))
        self.vit_args = recipe.vit(images.size(3), images.size(1), len(classes))
        crop = random_crop(images.size(3)) if recipe.crop else None
        if crop and isinstance(train, OnDisk):  # from the whole picture
            train.transform, crop = crop_file(images.size(3)), None
        self.augment = Augment(recipe, self.mean, self.std, len(classes), crop)
        self.normalise = normalise(self.mean, self.std)
        self.train_set, self.val_set = train.to(place.device), val.to(place.device)

    def _build_model(self) -> None:
        recipe, place = self.recipe, self.place
        torch.manual_seed(recipe.seed)
        self.model = self.result = ViT(**self.vit_args).to(place.device)
        self.optimizers = recipe.optimizers(self.model)
        self.ema = None
        if recipe.ema_decay:
            average = get_ema_multi_avg_fn(recipe.ema_decay)
            self.ema = AveragedModel(self.model, multi_avg_fn=average)
            self.result = self.ema.module
        self.precision = choose_precision(recipe.precision, place.device)
        scaled = self.precision == torch.float16
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=scaled)
        self.ddp = DistributedDataParallel(self.model) if place.world_size > 1 else None
        network = self.ddp or self.model
        self.network = torch.compile(network) if recipe.compile else network

    # --- the loop -------------------------------------------------------------------

    def train(self, progress: bool | None) -> History:
        """Do what is left to do."""
        from tqdm import tqdm

        size = self.recipe.batch_size
        disable = None if progress is None else not progress
        self.saved = time.perf_counter()
        self.epoch_began = (self.step, self.saved)
        with tqdm(
            total=self.steps * size,
            initial=self.step * size,
            unit="img",
            unit_scale=True,
            disable=disable if self.place.rank == 0 else True,
        ) as bar:
            for pieces in self._batches():
                self._update(pieces)
                bar.update(size)
                since = time.perf_counter() - self.saved
                if self.step % self.per_epoch == 0:
                    bar.set_postfix(val_accuracy=f"{self._end_epoch():.4f}")
                elif self.stopped or since > self.recipe.save_every_seconds:
                    self._save()
                elif self.step % 50 == 0:
                    self._check_finite()
                    bar.set_postfix(loss=f"{means(self.totals)[0]:.3f}")
                if self.stopped:
                    break
        if self.step == self.steps and self.place.rank == 0:
            self._finish()
        return self.history

    def _batches(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield this process's share of each batch, in pieces, from the step on."""
        size, number = self.recipe.batch_size, self.recipe.grad_accum_steps
        while self.step < self.steps:
            epoch, done = divmod(self.step, self.per_epoch)
            seed = seed_from(self.recipe.seed, epoch)
            draw = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(self.train_set), generator=draw)
            shares = map(self.place.share, order.split(size)[done : self.per_epoch])
            rows = [piece for share in shares for piece in share.tensor_split(number)]
            pieces = iter(self.train_set.batches(rows, seed))
            for _ in range(done, self.per_epoch):
                yield list(itertools.islice(pieces, number))

    def _update(self, pieces: list[tuple[Tensor, Tensor]]) -> None:
        """Learn from one batch, and hear whether somebody asked to stop."""
        torch.manual_seed(seed_from(self.recipe.seed, self.step, self.place.rank))
        found = torch.zeros(4, device=self.place.device)  # loss, hits, images, stop
        self.model.train()
        for i, (images, labels) in enumerate(pieces):
            if self.ddp:  # the processes meet at the last piece
                self.ddp.require_backward_grad_sync = i == len(pieces) - 1
            found[:3] += self._add_gradient(images, labels)
        self._step()
        self.stopped = bool(self.requests)
        if self.place.world_size > 1:
            found[3] = self.stopped
            self.place.all_reduce(found)
            self.stopped = bool(found[3] > 0)
        self.totals += found[:3]
        self.step += 1

    def _add_gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Add a piece's gradient to that of the batch; count loss, hits and images."""
        recipe, place = self.recipe, self.place
        images, targets = self.augment(
            images.to(place.device),
            labels.to(place.device),
            mix=self.step < self.steps - recipe.mixup_off_epochs * self.per_epoch,
        )
        with autocast(self.precision, place.device):
            logits = self.network(images)  # (B, K)
        smoothing = recipe.label_smoothing
        loss = sum_loss(logits, targets, label_smoothing=smoothing)
        # Processes are averaged, pieces added: this makes the batch's mean.
        share = loss * (place.world_size / recipe.batch_size)
        self.scaler.scale(share).backward()
        return count(loss, logits, targets)

    def _step(self) -> None:
        """Make the step that the gradient tells, at the rate of this update."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        if self.recipe.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.lr_at(self.step, self.steps)
            self.scaler.step(optimizer)
        self.scaler.update()
        self.model.zero_grad()
        if self.ema:
            self.ema.update_parameters(self.model)

    def _end_epoch(self) -> float:
        """Measure, write the epoch down, and return the accuracy."""
        self._check_finite()
        first, began = self.epoch_began
        trained = time.perf_counter() - began
        train_loss, train_accuracy = means(self.totals)
        val_loss, val_accuracy = self._evaluate()
        row = {
            "epoch": self.step // self.per_epoch,
            "step": self.step,
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "seconds": round(time.perf_counter() - self.began, 3),
            "images_per_second": round(
                (self.step - first) * self.recipe.batch_size / trained, 1
            ),
        }
        if self.place.device.type == "cuda":
            row["memory"] = torch.cuda.max_memory_allocated(self.place.device)
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)
        self.totals.zero_()
        self._save()
        self.epoch_began = (self.step, self.saved)
        return val_accuracy

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        """Measure loss and accuracy on `val`; each process takes a share."""
        device = self.place.device
        found = torch.zeros(3, device=device)
        rows = self.place.share(torch.arange(len(self.val_set)))
        self.result.eval()
        for images, labels in self.val_set.batches(rows.split(500)):
            labels = labels.to(device)
            with autocast(self.precision, device):
                logits = self.result(self.normalise(images.to(device)))
            found += count(sum_loss(logits, labels), logits, labels)
        self.place.all_reduce(found)
        return means(found)

    # --- what is kept ---------------------------------------------------------------

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
        if self.place.rank == 0:
            progress = {
                "step": self.step,
                "seconds": time.perf_counter() - self.began,
                "totals": self.totals,
                "history": self.history,
            }
            records.save(self.recipe, self.data, progress, self._parts())
        self.saved = time.perf_counter()

    def _resume(self) -> None:
        done = records.resume(self.recipe, self.place, self.data, self._parts())
        self.step, self.history = done["step"], done["history"]
        self.totals.copy_(done["totals"])
        self.began -= done["seconds"]

    def _finish(self) -> None:
        about = {
            "vit": self.vit_args,
            "classes": self.pictures.classes,
            "mean": self.mean,
            "std": self.std,
            "val_size": self.recipe.val_size,
            "split_seed": self.recipe.split_seed,
            "mark": self.pictures.mark,
            "data": Path(self.recipe.data).name,
            "val_accuracy": self.history["val_accuracy"][-1],
        }
        records.finish(self.recipe, self.result.state_dict(), about, self.history)

    def _check_finite(self) -> None:
        """Refuse to go on, and to keep anything, once a number is lost."""
        numbers = {"loss is": [self.totals], "weights are": self.model.parameters()}
        for what, tensors in numbers.items():
            if not all(x.isfinite().all() for x in tensors):
                epoch = 1 + (self.step - 1) // self.per_epoch
                raise ValueError(
                    f"the {what} no longer finite at update {self.step} (epoch "
                    f"{epoch}): lower lr={self.recipe.lr}. The last checkpoint is "
                    "untouched"
                )


def _check_batch_size(recipe: Recipe, place: Place, images: int) -> None:
    if recipe.batch_size > images:
        raise ValueError(
            f"batch_size={recipe.batch_size} is more than the {images} images "
            "to train on"
        )
    if recipe.batch_size < place.world_size * recipe.grad_accum_steps:
        raise ValueError(
            f"batch_size={recipe.batch_size} cannot be divided among "
            f"{place.world_size} processes in {recipe.grad_accum_steps} pieces each"
        )
