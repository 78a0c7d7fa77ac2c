"""Figures show what they are given, and leave matplotlib's settings alone."""

import matplotlib as mpl
import pytest
import torch
from matplotlib.figure import Figure

from minivit import plots


@pytest.fixture(autouse=True)
def untouched():
    """No window, no open figure left, and the same settings before and after."""
    mpl.use("agg")
    import matplotlib.pyplot as plt

    with mpl.rc_context():
        before = dict(mpl.rcParams)
        yield
        after = dict(mpl.rcParams)
        plt.close("all")
    assert after == before


HISTORY = {
    "epoch": [1, 2, 3],
    "train_loss": [3.0, 2.0, 1.0],
    "train_accuracy": [0.2, 0.5, 0.9],
    "lr": [1.0, 0.5, 0.0],
}


def test_images():
    batch = torch.rand(5, 3, 4, 6)
    figure = plots.images(batch, titles=list("abcde"), columns=3)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 6
    shown = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in shown] == list("abcde")
    for ax, image in zip(shown, batch, strict=True):
        found = torch.as_tensor(ax.images[0].get_array())
        torch.testing.assert_close(found, image.permute(1, 2, 0))
    assert not any(ax.axison for ax in figure.axes)


def test_digits_are_ink_on_paper():
    figure = plots.images(torch.tensor([0.0, 1.0]).view(1, 1, 1, 2))
    picture = figure.axes[0].images[0]
    paper, ink = picture.cmap(picture.norm(torch.tensor([0.0, 1.0]).numpy()))
    assert paper[:3].tolist() == [1, 1, 1]
    assert ink[:3].tolist() == [0, 0, 0]


def test_learning_curves():
    figure = plots.learning_curves(HISTORY)
    assert isinstance(figure, Figure)
    loss, accuracy = figure.axes
    assert [ax.get_title() for ax in figure.axes] == ["loss", "accuracy"]
    assert len(loss.lines) == len(accuracy.lines) == 1
    assert list(loss.lines[0].get_ydata()) == HISTORY["train_loss"]
    assert list(loss.lines[0].get_xdata()) == HISTORY["epoch"]
    more = {**HISTORY, "val_loss": [3.0, 2.5, 2.0], "val_accuracy": [0.1, 0.3, 0.4]}
    loss, accuracy = plots.learning_curves(more).axes
    assert list(accuracy.lines[1].get_ydata()) == more["val_accuracy"]
    assert accuracy.lines[1].get_label() == "held out"


def test_heatmap():
    values = torch.tensor([[0.0, 0.25, 1.0], [0.5, 0.75, 0.125]], requires_grad=True)
    figure = plots.heatmap(
        values,
        rows="ab",
        columns="cde",
        numbers=True,
        title="t",
        xlabel="x",
        ylabel="y",
    )
    assert isinstance(figure, Figure)
    ax = figure.axes[0]
    assert torch.equal(torch.as_tensor(ax.images[0].get_array()), values.detach())
    found = {text.get_position(): text.get_text() for text in ax.texts}
    assert found[(2, 0)] == "1.00"
    assert found[(0, 1)] == "0.50"
    assert len(found) == 6
    assert [label.get_text() for label in ax.get_xticklabels()] == list("cde")
    assert [label.get_text() for label in ax.get_yticklabels()] == list("ab")
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("t", "x", "y")


def test_heatmap_of_integers_and_on_given_axes():
    figure = Figure()
    ax = figure.subplots()
    same = plots.heatmap(torch.tensor([[1, 20]]), numbers=True, ax=ax, vmin=0, vmax=20)
    assert same is figure
    assert [text.get_text() for text in ax.texts] == ["1", "20"]
    assert ax.images[0].get_clim() == (0, 20)


def test_numbers_can_be_read_on_their_ground():
    ax = plots.heatmap(torch.tensor([[0.0, 1.0]]), numbers=True).axes[0]
    assert [text.get_color() for text in ax.texts] == ["white", "black"]


def test_attention_maps():
    weights = torch.rand(5, 3, 4).softmax(-1)
    figure = plots.attention_heads(weights, queries="abc", keys="defg", columns=3)
    assert isinstance(figure, Figure)
    maps = [ax for ax in figure.axes if ax.get_title().startswith("head")]
    assert [ax.get_title() for ax in maps] == [f"head {h}" for h in range(1, 6)]
    for ax, expected in zip(maps, weights, strict=True):
        assert torch.equal(torch.as_tensor(ax.images[0].get_array()), expected)
        assert ax.images[0].get_clim() == (0, 1), "one scale for all heads"
    assert [label.get_text() for label in maps[4].get_xticklabels()] == list("defg")
    assert [label.get_text() for label in maps[3].get_yticklabels()] == list("abc")
    titled = plots.attention_heads(weights[:2], titles=["x", "y"])
    assert [ax.get_title() for ax in titled.axes[:2]] == ["x", "y"]


def test_confusion_matrix():
    labels, predictions = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 1, 1, 1])
    figure = plots.confusion_matrix(labels, predictions, names=["cat", "dog"])
    assert isinstance(figure, Figure)
    ax = figure.axes[0]
    assert ax.images[0].get_array().tolist() == [[1, 2], [0, 2]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted", "true")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["cat", "dog"]


def test_band():
    figure = Figure()
    ax = figure.subplots()
    runs = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 7.0]])
    plots.band([0, 1, 2], runs, ax=ax, label="three seeds")
    assert ax.lines[0].get_ydata().tolist() == [2.0, 2.0, 5.0]
    assert ax.lines[0].get_label() == "three seeds"
    lowest, highest = ax.collections[0].get_datalim(ax.transData).intervaly
    assert (lowest, highest) == (1.0, 7.0)


def test_use_style_sets_a_white_ground():
    with mpl.rc_context():
        mpl.rcParams["figure.facecolor"] = "black"
        plots.use_style()
        assert mpl.rcParams["figure.facecolor"] == "white"
        assert mpl.rcParams["savefig.facecolor"] == "white"
        assert mpl.rcParams["font.size"] >= 9
        assert mpl.rcParams["axes.titlesize"] >= 9


def test_figures_can_be_drawn():
    """Layout problems show as warnings when a figure is drawn."""
    import warnings

    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.use_style()
        for figure in (
            plots.images(torch.rand(9, 1, 8, 8), titles=["7 (9)"] * 9),
            plots.learning_curves(HISTORY),
            plots.heatmap(torch.rand(4, 4), numbers=True),
            plots.attention_heads(torch.rand(8, 5, 5), queries="abcde", keys="abcde"),
            plots.confusion_matrix(torch.arange(10), torch.arange(10)),
        ):
            figure.canvas.draw()
