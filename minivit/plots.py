"""Figures that several chapters draw.

A function that draws a figure of its own returns it.

Copy this file: it works alone; it needs matplotlib when a function is called.

Letters for shapes: B batch, C channels, L queries, S keys, H heads, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = [
    "COLOURS",
    "attention_heads",
    "band",
    "confusion_matrix",
    "heatmap",
    "images",
    "learning_curves",
    "use_style",
]

# Okabe and Ito's colours: told apart with any colour vision, on white.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def use_style() -> None:
    """Set the look of the book's figures: white ground, quiet axes, safe colours."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 3.2),
            "figure.dpi": 150,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "white",
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.prop_cycle": plt.cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "image.cmap": "viridis",
        }
    )


def images(
    batch: Tensor,
    *,
    titles: Sequence[str] | None = None,
    columns: int = 8,
    size: float = 0.8,
) -> Figure:
    """Show images side by side.

    Args:
        batch: (B, C, height, width) in [0, 1], C = 1 (drawn as ink on paper) or 3.
        titles: B texts above the images.
        columns: images a row.
        size: width of an image in inches.

    Returns:
        The figure.

    Raises:
        ValueError: another shape, no image, or a different number of titles.
    """
    import matplotlib.pyplot as plt

    if batch.dim() != 4 or batch.size(1) not in (1, 3) or 0 in batch.shape:
        raise ValueError(
            f"images must have shape (batch, 1 or 3, height, width), "
            f"got {tuple(batch.shape)}"
        )
    if titles is not None and len(titles) != len(batch):
        raise ValueError(f"got {len(batch)} images but {len(titles)} titles")
    columns = min(columns, len(batch))
    rows = math.ceil(len(batch) / columns)
    height = size * batch.size(2) / batch.size(3) + (0.3 if titles else 0.05)
    fig, axes = plt.subplots(
        rows, columns, figsize=(size * columns, height * rows), squeeze=False
    )
    for ax in axes.flat:
        ax.axis("off")
    for i, (ax, image) in enumerate(zip(axes.flat, batch.detach().cpu(), strict=False)):
        pixels = image.permute(1, 2, 0).clamp(0, 1)  # (height, width, C)
        ax.imshow(pixels.numpy(), cmap="gray_r", vmin=0, vmax=1)
        if titles is not None:
            ax.set_title(titles[i], pad=3)
    return fig


def learning_curves(history: Mapping[str, Sequence[float]]) -> Figure:
    """Draw loss and accuracy by epoch, of training and, if it is there, validation.

    Args:
        history: what `minivit.fit` returns.

    Returns:
        The figure.

    Raises:
        ValueError: a list is missing.
    """
    import matplotlib.pyplot as plt

    needed = ("epoch", "train_loss", "train_accuracy")
    if not set(needed) <= set(history):
        raise ValueError(f"history must hold {needed}, got {tuple(history)}")

    fig, axes = plt.subplots(1, 2, figsize=(6.4, 2.6))
    for ax, quantity in zip(axes, ("loss", "accuracy"), strict=True):
        for part, label in (("train", "training"), ("val", "held out")):
            if f"{part}_{quantity}" in history:
                ax.plot(history["epoch"], history[f"{part}_{quantity}"], label=label)
        ax.set(xlabel="epoch", title=quantity)
    axes[0].set_ylim(bottom=0)
    axes[1].legend(loc="lower right")
    return fig


def heatmap(
    values: Tensor,
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    numbers: bool = False,
    ax: Axes | None = None,
    **imshow: Any,
) -> Figure:
    """Draw a matrix as colours.

    Args:
        values: (L, S).
        rows: L labels.
        columns: S labels.
        xlabel: what the columns are.
        ylabel: what the rows are.
        title: above the picture.
        numbers: write each value into its cell.
        ax: where to draw; a new figure if not given.
        imshow: handed to matplotlib's `imshow` (vmin, vmax, cmap, …).

    Returns:
        The figure.

    Raises:
        ValueError: another shape, or a different number of labels.
    """
    import matplotlib.pyplot as plt

    if values.dim() != 2:
        raise ValueError(f"values must have shape (L, S), got {tuple(values.shape)}")
    for name, labels, size in zip(
        ("rows", "columns"), (rows, columns), values.shape, strict=True
    ):
        if labels is not None and len(labels) != size:
            raise ValueError(f"got {size} {name} but {len(labels)} labels")
    if ax is None:
        _, ax = plt.subplots(figsize=(4.6, 3.6))
    picture = ax.imshow(values.detach().cpu().float().numpy(), **imshow)
    ax.grid(False)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if columns is not None:
        turn = 45 if max(map(len, columns)) > 3 else 0
        ax.set_xticks(range(len(columns)), columns, rotation=turn)
    if rows is not None:
        ax.set_yticks(range(len(rows)), rows)
    if numbers:
        _write_numbers(values, picture, ax)
    ax.figure.colorbar(picture, ax=ax, shrink=0.85)
    return ax.figure  # pyright: ignore[reportReturnType]


def _write_numbers(values: Tensor, picture: AxesImage, ax: Axes) -> None:
    """Write each value into its cell, in the colour that can be read there."""
    form = ".2f" if values.is_floating_point() else ".0f"
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            red, green, blue, _ = picture.cmap(picture.norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            ax.text(
                j,
                i,
                f"{value:{form}}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if dark else "black",
            )


def attention_heads(
    weights: Tensor,
    *,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    columns: int = 4,
) -> Figure:
    """Draw the attention weights of several heads on one colour scale.

    Args:
        weights: (H, L, S), rows sum to one.
        queries: L labels of the rows.
        keys: S labels of the columns.
        titles: H texts above the maps; "head 1", … if not given.
        columns: maps a row.

    Returns:
        The figure.

    Raises:
        ValueError: another shape, or a different number of titles.
    """
    import matplotlib.pyplot as plt

    if weights.dim() != 3 or 0 in weights.shape:
        raise ValueError(
            f"weights must have shape (H, L, S), got {tuple(weights.shape)}"
        )
    if titles is not None and len(titles) != weights.size(0):
        raise ValueError(f"got {weights.size(0)} maps but {len(titles)} titles")
    heads = weights.size(0)
    titles = titles or [f"head {h + 1}" for h in range(heads)]
    columns = min(columns, heads)
    rows = math.ceil(heads / columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(6.4, 6.6 / columns * rows + 0.2), squeeze=False
    )
    for ax in axes.flat[heads:]:
        ax.axis("off")
    for h, ax in enumerate(axes.flat[:heads]):
        ax.imshow(weights[h].detach().cpu().float().numpy(), vmin=0, vmax=1)
        ax.grid(False)
        ax.set_title(titles[h])
        ax.set(xticks=[], yticks=[])
        if h + columns >= heads:  # the last of its column
            ax.set_xlabel("key")
            if keys is not None:
                ax.set_xticks(range(len(keys)), keys, rotation=90)
        if h % columns == 0:
            ax.set_ylabel("query")
            if queries is not None:
                ax.set_yticks(range(len(queries)), queries)
    fig.colorbar(axes.flat[0].images[0], ax=axes, shrink=0.7, label="weight")
    return fig


def confusion_matrix(
    labels: Tensor, predictions: Tensor, *, names: Sequence[str] | None = None
) -> Figure:
    """Draw how often each class was taken for each.

    Args:
        labels: (B,) true classes.
        predictions: (B,) predicted classes.
        names: K names of the classes; their numbers if not given.

    Returns:
        The figure.

    Raises:
        ValueError: the two differ in shape.
    """
    import matplotlib.pyplot as plt
    from sklearn.metrics import ConfusionMatrixDisplay

    if labels.dim() != 1 or labels.shape != predictions.shape:
        raise ValueError(
            f"labels and predictions must have one shape (B,), "
            f"got {tuple(labels.shape)} and {tuple(predictions.shape)}"
        )

    fig, ax = plt.subplots(figsize=(4.8, 4.4))
    ConfusionMatrixDisplay.from_predictions(
        labels.cpu().numpy(),
        predictions.cpu().numpy(),
        display_labels=names,
        cmap="Blues",
        ax=ax,
        colorbar=False,
    )
    ax.grid(False)
    ax.set(xlabel="predicted", ylabel="true")
    return fig


def band(x: Sequence[float], runs: Tensor, *, ax: Axes, label: str = "") -> None:
    """Draw the mean of several runs as a line, lowest to highest as a band.

    Args:
        x: positions on the axis, one a column of `runs`.
        runs: (seeds, len(x)) values.
        ax: where to draw.
        label: in the legend.
    """
    runs = runs.detach().cpu().float()
    (line,) = ax.plot(
        x, runs.mean(dim=0).numpy(), marker="o", markersize=3, label=label
    )
    ax.fill_between(
        x,
        runs.amin(dim=0).numpy(),
        runs.amax(dim=0).numpy(),
        color=line.get_color(),
        alpha=0.2,
        linewidth=0,
    )
