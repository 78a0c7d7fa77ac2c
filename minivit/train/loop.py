"""One loop for every model of the book: data in memory, one device, AdamW.

Copy this file, as train/loop.py, and data.py into one folder; it needs tqdm beside
torch.

Letters for shapes: B batch, K classes.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import check_finite

__all__ = ["evaluate", "fit", "parameter_groups", "warmup_cosine"]

Data = Sequence[Tensor]

# What is measured in training: for each figure, such as "val_loss", a list with one
# entry an epoch.
History = dict[str, list[float]]


def fit(
    model: nn.Module,
    train: Data,
    *,
    epochs: int,
    val: Data | None = None,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    warmup_ratio: float = 0.1,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    clip_grad: float = 1.0,
    transform: Callable[..., Data] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> History:
    """Train a classifier, of images or of next tokens, in place.

    AdamW; the learning rate rises linearly, then falls as a half cosine to zero.

    Args:
        model: called with all tensors of a batch but the last; returns logits
            (B, ..., K).
        train: tensors of equal length, inputs first and the targets last: integers
            (B, ...).
        epochs: how often every sample is seen.
        val: data of the same form, evaluated after each epoch.
        batch_size: B.
        lr: highest learning rate.
        weight_decay: AdamW's, on the weights of maps and embeddings only (not on
            biases, norms, positions).
        warmup_ratio: share of all steps in which the learning rate rises.
        label_smoothing: share of the target spread over all classes.
        ignore_index: target that does not count (padding).
        clip_grad: largest norm of the gradient; 0 for no limit.
        transform: called with the tensors of a training batch, returns such tensors
            (augmentation; targets may become probabilities (B, K)).
        seed: of the shuffling, and of all randomness inside.
        progress: show a progress bar; by default in terminals only.

    Returns:
        Lists with one entry an epoch: "epoch", "lr", "train_loss", "train_accuracy",
        and with `val` "val_loss" and "val_accuracy". Training figures are means over
        the epoch's batches, as they were met.

    Raises:
        ValueError: an argument out of range, data of unequal length or not finite,
            targets none of which counts, or a loss that is no longer finite.

    Source:
        Loshchilov and Hutter 2019 (AdamW); 2017, equation 5 (cosine).
    """
    from tqdm import tqdm  # .auto warns in notebooks without widgets

    _check_data("train", train)
    if val is not None:
        _check_data("val", val)
    _check_settings(epochs, batch_size, label_smoothing)
    steps = epochs * math.ceil(len(train[0]) / batch_size)
    groups = parameter_groups(model, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, steps, warmup_ratio)
    )
    device = next(model.parameters()).device
    history: History = {}
    disable = None if progress is None else not progress
    with torch.random.fork_rng(), tqdm(total=steps, disable=disable) as bar:
        torch.manual_seed(seed)
        for epoch in range(1, epochs + 1):
            model.train()
            totals = torch.zeros(3, device=device)  # loss, hits, targets
            for rows in torch.randperm(len(train[0])).split(batch_size):
                batch = [x[rows].to(device) for x in train]
                *inputs, targets = transform(*batch) if transform else batch
                logits = model(*inputs)
                loss = sum_loss(logits, targets, ignore_index, label_smoothing)
                found = count(loss, logits, targets, ignore_index)
                _check_loss(found, epoch, lr, ignore_index)
                optimizer.zero_grad(set_to_none=True)
                (loss / found[2]).backward()
                if clip_grad:
                    nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
                optimizer.step()
                scheduler.step()
                totals += found
                bar.update()
            row = {"epoch": epoch, "lr": float(scheduler.get_last_lr()[0])}
            row["train_loss"], row["train_accuracy"] = means(totals)
            if val is not None:
                found = evaluate(model, val, ignore_index=ignore_index)
                row |= {f"val_{name}": value for name, value in found.items()}
            for name, value in row.items():
                history.setdefault(name, []).append(value)
            bar.set_postfix({k: f"{v:.4g}" for k, v in row.items()})
    return history


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int = 256,
    ignore_index: int = -100,
) -> dict[str, float]:
    """Measure loss and accuracy in eval mode; the model's mode is restored.

    Args:
        model: as `fit`.
        data: as `fit`.
        batch_size: samples at a time.
        ignore_index: target that does not count (padding).

    Returns:
        "loss", the mean cross-entropy, and "accuracy", between 0 and 1, both over all
        targets that count.

    Raises:
        ValueError: `batch_size` is below one; data of unequal length, empty, not
            finite, or without a target that counts.
    """
    _check_data("data", data)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    totals = torch.zeros(3, device=device)  # loss, hits, targets
    model.eval()
    try:
        for start in range(0, len(data[0]), batch_size):
            batch = [x[start : start + batch_size].to(device) for x in data]
            *inputs, targets = batch
            logits = model(*inputs)
            loss = sum_loss(logits, targets, ignore_index)
            totals += count(loss, logits, targets, ignore_index)
    finally:
        for module, training in modes:  # parts may be frozen in eval mode
            module.training = training
    if totals[2] == 0:
        raise ValueError(f"all targets are {ignore_index}, which does not count")
    loss, accuracy = means(totals)
    return {"loss": loss, "accuracy": accuracy}


def warmup_cosine(step: int, steps: int, warmup_ratio: float = 0.1) -> float:
    """Say which share of the highest learning rate a step uses.

    Args:
        step: 0 to `steps`.
        steps: number of updates in all.
        warmup_ratio: share of the steps in which the rate rises.

    Returns:
        A factor between 0 and 1.

    Raises:
        ValueError: `warmup_ratio` is not in [0, 1).

    >>> [round(warmup_cosine(step, 10, 0.2), 2) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if not 0.0 <= warmup_ratio < 1.0:
        raise ValueError(f"warmup_ratio must lie in [0, 1), got {warmup_ratio}")
    rising = round(steps * warmup_ratio)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay the weights of maps and embeddings; leave all else alone.

    Args:
        model: whose parameters.
        weight_decay: of the first group.

    Returns:
        Two groups, for an optimizer.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no parameter that requires a gradient")
    weights = [p for name, p in named if "weight" in name and p.ndim >= 2]
    others = [p for name, p in named if "weight" not in name or p.ndim < 2]
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def sum_loss(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Sum the cross-entropy over all targets that count, in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if targets.is_floating_point():  # probabilities, from mixup
        return F.cross_entropy(
            logits, targets, label_smoothing=label_smoothing, reduction="sum"
        )
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    return F.cross_entropy(
        logits.flatten(0, -2),
        targets.flatten(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
    )


def count(
    loss: Tensor, logits: Tensor, targets: Tensor, ignore_index: int = -100
) -> Tensor:
    """Put the sum of the losses beside the numbers of hits and of targets."""
    if targets.is_floating_point():
        targets = targets.argmax(dim=-1)
    counts = targets != ignore_index
    hits = (logits.detach().argmax(dim=-1) == targets) & counts
    return torch.stack([loss.detach(), hits.sum(), counts.sum()])


def means(totals: Tensor) -> tuple[float, float]:
    """Loss and accuracy of what `count` counted."""
    loss, hits, number = totals.tolist()
    return loss / number, hits / number


def _check_settings(epochs: int, batch_size: int, label_smoothing: float) -> None:
    if epochs < 1 or batch_size < 1:
        raise ValueError(
            f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}"
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")


def _check_loss(found: Tensor, epoch: int, lr: float, ignore_index: int) -> None:
    loss, _, number = found.tolist()
    if number == 0:
        raise ValueError(
            f"all targets of a batch are {ignore_index}, which does not count: "
            "nothing can be learnt from it"
        )
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss is {loss} in epoch {epoch}: "
            f"lower lr={lr} or look for NaN in the model"
        )


def _check_data(name: str, data: Data) -> None:
    lengths = [len(x) for x in data]
    if len(lengths) < 2 or len(set(lengths)) != 1 or lengths[0] == 0:
        raise ValueError(
            f"{name} must hold inputs and targets of one length above zero, "
            f"got lengths {lengths}"
        )
    for x in data:
        check_finite(x)
