"""Trained models: the shipped one, those of users, and the command line."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minivit
from minivit import checkpoint, predict
from minivit.images import load_pictures, load_test
from minivit.predict import WEIGHTS, measure
from minivit.predict.__main__ import main
from minivit.train import Recipe, run

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


@pytest.fixture(scope="module")
def red_or_blue(tmp_path_factory):
    """A model that tells red from blue, trained by the engine in a second."""
    path = tmp_path_factory.mktemp("trained")
    draw = np.random.default_rng(0)
    for name, channel in (("blue", 2), ("red", 0)):
        (path / "set" / name).mkdir(parents=True)
        for i in range(30):
            pixels = draw.integers(0, 100, (8, 8, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(path / "set" / name / f"{i}.png")
    recipe = Recipe(
        data=str(path / "set"),
        out=str(path / "run"),
        image_size=8,
        patch_size=4,
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        epochs=5,
        batch_size=9,
        lr=3e-3,
        val_size=0.2,
        split_seed=3,
        device="cpu",
    )
    history = run(recipe)
    assert history["val_accuracy"][-1] == 1.0
    return path


# --- the model that travels with the package ----------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_small_and_says_what_it_is(name):
    file = WEIGHTS / f"{name}.safetensors"
    assert file.stat().st_size <= 12_000_000
    trained = minivit.load(name)
    assert trained.model.pool == "cls"
    assert not trained.model.training
    assert len(trained.classes) == trained.model.head.out_features
    card = (WEIGHTS / f"{name}.md").read_text("utf-8")
    assert f"{trained.about['val_accuracy']:.2%}" in card
    count = sum(p.numel() for p in trained.model.parameters())
    assert f"{count:,} parameters" in card


def test_the_card_tells_what_the_log_tells():
    """Command, accuracy, time and hardware are those of the run that is on record."""
    card = (WEIGHTS / "vit_cifar10.md").read_text("utf-8")
    log = ROOT / "book" / "logs" / "vit_cifar10"
    about = json.loads((log / "run.json").read_text("utf-8"))
    last = json.loads((log / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert about["command"] in " ".join(card.replace("\\\n", " ").split())
    assert f"{last['val_accuracy']:.2%}" in card
    assert f"{last['seconds'] / 60:.0f} minutes" in card
    assert about["hardware"]["processor"] in card
    shipped = minivit.load("vit_cifar10").about
    assert shipped["val_accuracy"] == last["val_accuracy"]
    assert shipped["vit"] == about["vit"]


def test_a_cat_is_a_cat():
    """A photograph that was in no training set, as a whole and mirrored."""
    from skimage.data import chelsea

    model, classes, preprocess, _ = minivit.load("vit_cifar10")
    picture = Image.fromarray(chelsea())
    both = [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    with torch.no_grad():
        logits = model(torch.stack([preprocess(one) for one in both]))
    best = logits.argmax(1).tolist()
    assert [classes[i] for i in best] == ["cat", "cat"]


def test_a_run_is_shipped_with_a_card_that_says_what_its_log_says(
    red_or_blue, tmp_path, monkeypatch
):
    tool = runpy.run_path(str(ROOT / "tools" / "ship.py"))
    monkeypatch.setitem(tool["main"].__globals__, "ROOT", tmp_path)
    arguments = [str(red_or_blue / "run"), "red_or_blue"]
    assert tool["main"]([*arguments, "--data", str(red_or_blue / "set")]) == 0
    weights = tmp_path / "minivit" / "weights"
    card = (weights / "red_or_blue.md").read_text("utf-8")
    assert "**100.00%**: 12 of 12 validation images" in card
    assert "48 images, 5 epochs" in card
    assert "blue, red" in card
    assert minivit.load(weights / "red_or_blue.safetensors").classes == ["blue", "red"]
    log = tmp_path / "book" / "logs" / "red_or_blue"
    for name in ("run.json", "metrics.jsonl"):
        assert (log / name).read_bytes() == (red_or_blue / "run" / name).read_bytes()


# --- models of users ----------------------------------------------------------------


def test_what_is_loaded_answers_as_what_was_trained(red_or_blue):
    model, classes, preprocess, about = minivit.load(
        red_or_blue / "run/model.safetensors"
    )
    assert classes == ["blue", "red"]
    assert about["val_accuracy"] == 1.0
    images = [Image.new("RGB", (50, 40), colour) for colour in ("#c81414", "#1414c8")]
    with torch.no_grad():
        logits = model(torch.stack([preprocess(image) for image in images]))
    assert logits.argmax(1).tolist() == [1, 0]


def test_preprocessing_is_that_of_training(red_or_blue):
    """An image of the set gives what the held-out images gave: same pixels."""
    trained = minivit.load(red_or_blue / "run/model.safetensors")
    _, val, _ = load_pictures(
        red_or_blue / "set", image_size=8, val_size=0.2, seed=3, cache="disk"
    )
    with Image.open(val.files[0]) as image:
        found = trained.preprocess(image)
    pixels = np.asarray(Image.open(val.files[0])) / 255
    expected = (pixels - trained.about["mean"]) / trained.about["std"]
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_measuring_takes_what_was_held_out(red_or_blue, monkeypatch):
    trained = minivit.load(red_or_blue / "run/model.safetensors")
    asked = {}
    real = predict.load_pictures

    def keep(data, **options):
        asked.update(options)
        return real(data, **options)

    monkeypatch.setattr(predict, "load_pictures", keep)
    found = measure(trained, red_or_blue / "set")
    assert found == {"hits": 12, "images": 12, "accuracy": 1.0}
    assert (asked["val_size"], asked["seed"]) == (0.2, 3)
    (red_or_blue / "set" / "blue").rename(red_or_blue / "set" / "azure")
    with pytest.raises(ValueError, match=r"has classes \['azure', 'red'\], expected"):
        measure(trained, red_or_blue / "set")
    (red_or_blue / "set" / "azure").rename(red_or_blue / "set" / "blue")


def test_images_that_the_model_may_know_are_refused(red_or_blue, tmp_path):
    trained = minivit.load(red_or_blue / "run/model.safetensors")
    for name in ("blue", "red"):
        (tmp_path / name).mkdir()
        for i in range(40):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    with pytest.raises(ValueError, match="is not what the model was trained on"):
        measure(trained, tmp_path)


def test_the_test_part_is_another_part(monkeypatch):
    """What torchvision would be asked for; nothing is downloaded here."""
    asked = []

    class FashionMNIST:
        def __init__(self, root, train, download):
            asked.append((train, download))
            self.data = torch.zeros(200, 28, 28, dtype=torch.uint8)
            self.targets, self.classes = torch.arange(200) % 10, list("abcdefghij")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", FashionMNIST)
    images, classes = load_test("fashion-mnist")
    assert images.images.shape == (200, 1, 28, 28)
    assert classes == list("abcdefghij")
    assert len(load_pictures("fashion-mnist").train) == 180
    assert asked == [(False, True), (True, True)]
    with pytest.raises(ValueError, match="only cifar10 and fashion-mnist have a test"):
        load_test("digits")


# --- the command line ---------------------------------------------------------------


def test_the_likeliest_classes_are_printed(red_or_blue, tmp_path, capsys):
    weights = str(red_or_blue / "run/model.safetensors")
    Image.new("RGB", (30, 20), "#c81414").save(tmp_path / "a.png")
    Image.new("L", (30, 20), 90).save(tmp_path / "b.png")
    files = [str(tmp_path / name) for name in ("a.png", "b.png")]
    assert main([weights, *files]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{re.escape(files[0])}: red \d+\.\d%  blue \d+\.\d%", first)
    assert second.startswith(files[1])
    assert main([weights, files[0], "--top", "1"]) == 0
    assert "blue" not in capsys.readouterr().out


def test_accuracy_is_printed(red_or_blue, capsys):
    weights = str(red_or_blue / "run/model.safetensors")
    assert main([weights, "--data", str(red_or_blue / "set")]) == 0
    out = capsys.readouterr().out
    assert out == ("12 of 12 images right, none of which it was trained on: 100.00%\n")


def test_one_bad_picture_does_not_hide_the_others(red_or_blue, tmp_path, capsys):
    weights = str(red_or_blue / "run/model.safetensors")
    (tmp_path / "bad.png").write_text("no picture", "utf-8")
    Image.new("RGB", (30, 20), "#c81414").save(tmp_path / "good.png")
    names = ("bad.png", "missing.png", "good.png")
    assert main([weights, *(str(tmp_path / name) for name in names)]) == 2
    out, err = capsys.readouterr()
    assert "good.png: red" in out
    assert "bad.png cannot be read as a picture" in err
    assert "missing.png" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit_cifar11", "a.png"], "there is no file vit_cifar11, and no such name in"),
        (["vit_cifar10"], "give pictures, or --data"),
        (["vit_cifar10", "a.png", "--data", "x"], "give pictures, or --data"),
        (["vit_cifar10", "a.png", "--top", "0"], "--top must be at least 1, got 0"),
        (
            ["vit_cifar10", "--data", "nowhere"],
            "nowhere is neither a folder nor one of",
        ),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("about", "state"),
    [({}, {}), ({"vit": {"depth": 3}}, {}), (None, {"head.weight": torch.ones(2, 2)})],
)
def test_weights_that_do_not_fit_are_refused(red_or_blue, tmp_path, about, state):
    known = minivit.load(red_or_blue / "run/model.safetensors").about
    checkpoint.save_weights(tmp_path / "w", state, known if about is None else about)
    with pytest.raises(ValueError, match="does not fit this version of minivit"):
        minivit.load(tmp_path / "w")
