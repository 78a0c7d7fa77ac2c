"""The engine: exact through interruptions, equal on many processes, clear in words."""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import minivit
from minivit import ViT, checkpoint, predict
from minivit.images import load_pictures, normalise
from minivit.train import Recipe, engine, run
from minivit.train.__main__ import main
from minivit.train.augment import Augment

# torch has Muon since 2.9; before, the engine is held to the same with AdamW alone.
HAS_MUON = hasattr(torch.optim, "Muon")
OPTIMIZER = "muon" if HAS_MUON else "adamw"

# Everything that carries state through training: averages, momentum, dropout, crops.
TINY = {
    "data": "digits",
    "patch_size": 4,
    "embed_dim": 16,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_dim": 32,
    "epochs": 2,
    "batch_size": 128,
    "max_train_images": 640,
    "lr": 3e-3,
    "warmup_ratio": 0.1,
    "device": "cpu",
}
EVERYTHING = {
    **TINY,
    "optimizer": OPTIMIZER,
    "ema_decay": 0.9,
    "dropout": 0.1,
    "drop_path": 0.1,
    "crop": True,
    "augment_group_size": 64,
    "randaugment": 1,
    "random_erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_off_epochs": 1,
    "label_smoothing": 0.1,
    "save_every_seconds": 0.0,  # a checkpoint after every update
}


def tiny(tmp_path, base=TINY, **changes):
    return Recipe(**{**base, "out": str(tmp_path / "run"), **changes})


def weights(path):
    return checkpoint.load_weights(path / "run" / "model.safetensors")[0]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def trained_model(path):
    return minivit.load(path / "run" / "model.safetensors").model


@torch.no_grad()
def assert_same_answers(a, b):
    """Compare outputs, not weights.

    The gradient of a key's bias is zero but for rounding, and AdamW makes whole steps
    of it: such weights differ between processors, and change no answer.
    """
    images = torch.randn(50, 1, 8, 8)
    torch.testing.assert_close(a(images), b(images), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with everything that nobody interrupted."""
    path = tmp_path_factory.mktemp("finished")
    history = run(tiny(path, EVERYTHING))
    return path, history


# --- what a run writes --------------------------------------------------------------


def test_a_run_leaves_all_that_was_promised(finished):
    path, history = finished
    assert sorted(file.name for file in (path / "run").iterdir()) == [
        "checkpoint.pt",
        "learning_curves.png",
        "metrics.jsonl",
        "model.safetensors",
        "run.json",
    ]
    rows = (path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(row) for row in rows] == [
        {name: values[i] for name, values in history.items()} for i in range(2)
    ]
    assert history["epoch"] == [1, 2]
    assert history["step"] == [5, 10]
    about = json.loads((path / "run" / "run.json").read_text("utf-8"))
    assert Recipe(**about["recipe"]) == tiny(path, EVERYTHING)
    assert about["images"] == [640, 135]
    assert about["hardware"]["torch"] == torch.__version__
    with Image.open(path / "run" / "learning_curves.png") as picture:
        assert picture.size[0] > 500


def test_the_weights_are_the_averaged_ones_and_as_good_as_said(finished):
    path, history = finished
    trained = minivit.load(path / "run" / "model.safetensors")
    assert not trained.model.training
    assert trained.classes == list("0123456789")
    found = predict.measure(trained, "digits")
    assert found["accuracy"] == pytest.approx(history["val_accuracy"][-1])
    assert found["images"] == 135

    _, val, _ = load_pictures("digits")
    pixels = normalise(trained.about["mean"], trained.about["std"])(val.images)
    with torch.no_grad():
        loss = F.cross_entropy(trained.model(pixels), val.labels)
    assert loss.item() == pytest.approx(history["val_loss"][-1], rel=1e-5)


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (None, False)])
def test_the_bar_shows_speed_and_time_left(tmp_path, capsys, progress, shown):
    """On stderr, and only in terminals unless it is asked for."""
    run(tiny(tmp_path), progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("img/s" in err and "val_accuracy" in err) == shown
    if shown:
        assert "1.28k/1.28k" in err, "images, not batches"
    else:
        assert err == ""


def test_it_learns(tmp_path):
    changes = {"max_train_images": None, "patch_size": 2, "embed_dim": 32, "epochs": 20}
    history = run(tiny(tmp_path, optimizer=OPTIMIZER, lr=1e-2, **changes))
    assert history["val_accuracy"][-1] > 0.85  # 0.89 to 0.95 with three seeds
    losses = history["train_loss"][::5]  # neighbours may change places
    assert losses == sorted(losses, reverse=True)


def test_the_command_gives_the_recipe_again(tmp_path, monkeypatch):
    recipe = tiny(tmp_path, EVERYTHING, compile=True, layer_scale=1e-4)
    came = []

    def keep(recipe, *, resume):
        came.append((recipe, resume))
        return {}

    monkeypatch.setattr("minivit.train.__main__.run", keep)
    command = shlex.split(recipe.command())
    assert command[:3] == ["python", "-m", "minivit.train"]
    assert main(command[3:]) == 0
    assert came == [(recipe, False)]
    assert recipe.command(4).startswith("torchrun --nproc-per-node=4 -m minivit.train")


# --- the recipe does what it says ---------------------------------------------------


def test_accumulation_changes_nothing(tmp_path):
    """Five unequal pieces give the weights and the steps of one batch."""
    whole = run(tiny(tmp_path / "whole", batch_size=127))
    pieces = run(tiny(tmp_path / "pieces", batch_size=127, grad_accum_steps=5))
    assert pieces["step"] == whole["step"]
    assert pieces["lr"] == whole["lr"]
    assert pieces["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)
    assert_same_answers(
        trained_model(tmp_path / "whole"), trained_model(tmp_path / "pieces")
    )


def test_one_update_is_the_one_written_out(tmp_path):
    """Against AdamW, clipping and the average by hand, from the same start.

    Gradients grow from 0.43 to 0.59 here: some are clipped, which AdamW cannot undo.
    """
    recipe = tiny(
        tmp_path,
        lr=0.01,
        warmup_ratio=0.0,
        clip_grad=0.5,
        ema_decay=0.5,
        epochs=2,
        max_train_images=256,
    )
    run(recipe)
    found = trained_model(tmp_path)

    train, _, _ = load_pictures("digits", max_train_images=256)
    about = checkpoint.load_weights(tmp_path / "run" / "model.safetensors")[1]
    images = normalise(about["mean"], about["std"])(train.images)
    torch.manual_seed(recipe.seed)
    model = ViT(**about["vit"])
    named = dict(model.named_parameters())
    decayed = [p for n, p in named.items() if "weight" in n and p.ndim >= 2]
    free = [p for n, p in named.items() if not ("weight" in n and p.ndim >= 2)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": free, "weight_decay": 0}]
    )
    average, step = None, 0
    for epoch in range(2):
        generator = torch.Generator().manual_seed(minivit.images.seed_from(0, epoch))
        for rows in torch.randperm(256, generator=generator).split(128):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * minivit.train.warmup_cosine(step, 4, 0.0)
            F.cross_entropy(model(images[rows]), train.labels[rows]).backward()
            norm = torch.stack([p.grad.norm() for p in named.values()]).norm()
            for p in named.values():
                p.grad *= min(1.0, 0.5 / norm.item())
            optimizer.step()
            optimizer.zero_grad()
            now = {name: p.detach().clone() for name, p in named.items()}
            average = average or now
            average = {n: 0.5 * average[n] + 0.5 * now[n] for n in now}
            step += 1
    model.load_state_dict(average)
    assert_same_answers(found, model.eval())


@pytest.mark.skipif(not HAS_MUON, reason="torch.optim.Muon came with torch 2.9")
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = ViT(
        image_size=8,
        patch_size=4,
        num_classes=3,
        embed_dim=8,
        num_layers=2,
        num_heads=2,
        mlp_dim=16,
    )
    muon, adamw = Recipe(optimizer="muon").optimizers(model)
    taken = {id(p) for p in muon.param_groups[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in taken}
    assert len(names) == 2 * 4
    assert all(name.startswith("encoder") and name.endswith("weight") for name in names)
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert not rest & taken
    assert len(rest | taken) == len(list(model.parameters()))


def test_muon_is_missed_in_words(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)  # an old torch has none
    with pytest.raises(ValueError, match=r"needs torch 2\.9 or newer, this is \d"):
        Recipe(optimizer="muon").optimizers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_here(tmp_path, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    recipe = Recipe(out=str(tmp_path / "a"), device=device)
    with pytest.raises(ValueError, match=f"device='{device}' is not here, only cpu"):
        run(recipe)
    with pytest.raises(ValueError, match=r"device must be one of .* got 'cpuu'"):
        Recipe(device="cpuu")


def test_augmentation_differs_between_pieces_and_keeps_shapes():
    recipe = Recipe(randaugment=2, flip=True, random_erasing=1.0, augment_group_size=2)
    augment = Augment(recipe, [0.5] * 3, [0.2] * 3, 10)
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(
        8, -1, -1, -1
    )
    seen, labels = augment(images, torch.arange(8))
    assert seen.shape == images.shape
    assert seen.dtype == torch.float32
    assert torch.equal(labels, torch.arange(8))
    assert torch.equal(seen[0], seen[1]), "neighbours are drawn alike"
    assert len({image.numpy().tobytes() for image in seen}) > 2


def test_mixing_mixes_labels_as_it_mixes_images():
    recipe = Recipe(mixup=1.0)
    augment = Augment(recipe, [0.0], [1.0], 4)
    images = (
        torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(-1, -1, 8, 8) * 60
    )
    mixed, targets = augment(images, torch.arange(4))
    assert targets.shape == (4, 4)
    assert targets.sum(1).tolist() == pytest.approx([1.0] * 4)
    values = targets @ (torch.arange(4.0) * 60 / 255)
    torch.testing.assert_close(mixed[:, 0, 0, 0], values)
    plain, labels = augment(images, torch.arange(4), mix=False)
    assert torch.equal(labels, torch.arange(4))
    assert plain[1].unique().numel() == 1


def test_the_last_epochs_are_not_mixed(tmp_path, monkeypatch):
    asked, real = [], Augment.__call__

    def note(self, images, labels, *, mix):
        asked.append(mix)
        return real(self, images, labels, mix=mix)

    monkeypatch.setattr(Augment, "__call__", note)
    run(tiny(tmp_path, epochs=3, mixup=0.8, mixup_off_epochs=2))
    assert asked == 5 * [True] + 10 * [False]  # 5 updates an epoch


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_learns_the_same(tmp_path, precision):
    """float16 goes through the scaler; on CPU both are slow, but they work."""
    full = run(tiny(tmp_path / "full"))["val_loss"][-1]
    low = run(tiny(tmp_path / "low", precision=precision))["val_loss"][-1]
    assert low == pytest.approx(full, rel=0.02)
    assert low != full


@pytest.mark.slow
def test_compiled_is_the_same(tmp_path):
    run(tiny(tmp_path / "eager"))
    run(tiny(tmp_path / "compiled", compile=True))
    assert_same_answers(
        trained_model(tmp_path / "eager"), trained_model(tmp_path / "compiled")
    )


def test_pictures_on_disk_train_too(tmp_path):
    for name, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
        (tmp_path / name).mkdir()
        for i in range(20):
            Image.new("RGB", (90 + i, 80), colour).save(tmp_path / name / f"{i}.png")
    recipe = tiny(
        tmp_path / "out",
        data=str(tmp_path),
        image_size=72,
        patch_size=24,
        cache="disk",
        num_workers=1,
        crop=True,
        flip=True,
        batch_size=12,
        max_train_images=None,
        epochs=4,
        optimizer=OPTIMIZER,
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out").rename(tmp_path.parent / "out")  # not a class of the set
    recipe = dataclasses.replace(recipe, out=str(tmp_path.parent / "out" / "run"))
    history = run(recipe)
    assert history["val_accuracy"][-1] == 1.0


# --- interruptions ------------------------------------------------------------------


# A forked process has torch loaded already. But it would wait for ever for threads that
# share a sum and were not forked; macOS forks no threads at all, Windows nothing.
CAN_FORK = sys.platform == "linux" and torch.get_num_threads() == 1
PROCESSES = multiprocessing.get_context("fork" if CAN_FORK else "spawn")

# What ends a process at once: on Windows any signal does, and is the exit status.
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


def run_until(owner, name, call, recipe):
    """Go on with a run, and kill ourselves at the n-th call of a function."""
    owner, calls = pkgutil.resolve_name(owner), itertools.count(1)
    real = getattr(owner, name)

    def counting(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), KILL)
        return real(*args, **kwargs)

    setattr(owner, name, counting)
    run(recipe, resume=True)


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        ("minivit.train.engine:_Run", "_update", (1, 4, 6, 8)),  # before an update
        ("os", "fsync", (1, 2, 7, 14)),  # a file is half on the disk
        ("os", "replace", (3, 9)),  # complete, but not in its place
        ("minivit.checkpoint", "save_weights", (1,)),  # trained, but nothing to show
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_killed_at_any_moment_the_end_is_the_same(
    tmp_path, finished, owner, name, calls
):
    """Killed again and again, and resumed: the same weights bit for bit."""
    recipe = tiny(tmp_path, EVERYTHING)
    for call in calls:
        process = PROCESSES.Process(target=run_until, args=(owner, name, call, recipe))
        process.start()
        process.join(120)
        assert process.exitcode in (-KILL, KILL, 0)
    history = run(recipe, resume=True)
    assert_same(weights(tmp_path), weights(finished[0]))
    for key in ("step", "train_loss", "val_loss", "val_accuracy", "lr"):
        assert history[key] == finished[1][key]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == [1, 2]


def command(*options):
    return [sys.executable, "-m", "minivit.train", *map(str, options)]


@pytest.mark.skipif(
    sys.platform == "win32", reason="Windows ends processes without asking them"
)
def test_kill_and_terminate_from_outside(tmp_path):
    """As a user meets it: a process is killed, another asked to stop, a third ends."""
    recipe = tiny(tmp_path, EVERYTHING, epochs=30, batch_size=64, augment_group_size=4)
    arguments = shlex.split(recipe.command())[3:]
    straight = dataclasses.replace(recipe, out=str(tmp_path / "straight" / "run"))
    path = tmp_path / "run" / "checkpoint.pt"

    killed = subprocess.Popen(command(*arguments))
    wait_for(path.exists)
    time.sleep(0.3)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    before = checkpoint.load(path)["step"]

    asked = subprocess.Popen(
        command("--resume", "--out", recipe.out), stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: checkpoint.load(path)["step"] > before)
    asked.send_signal(signal.SIGTERM)
    _, said = asked.communicate(timeout=60)
    assert asked.returncode == 0
    assert "stopped" in said
    assert before < checkpoint.load(path)["step"] < 300
    assert not (tmp_path / "run" / "model.safetensors").exists()

    run(recipe, resume=True)
    run(straight)
    assert_same(weights(tmp_path), weights(tmp_path / "straight"))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def test_a_request_to_stop_is_kept_between_updates(tmp_path):
    recipe = tiny(tmp_path, EVERYTHING)
    real = engine._Run._update

    def update(self, pieces):
        if self.step == 3:
            signal.raise_signal(signal.SIGTERM)
        real(self, pieces)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._Run, "_update", update)
        assert run(recipe) == {}, "no epoch was complete"
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] == 4
    assert (
        signal.getsignal(signal.SIGTERM),
        signal.getsignal(signal.SIGINT),
    ) == handlers


# --- many processes -----------------------------------------------------------------


def test_two_processes_learn_what_one_learns(tmp_path):
    """The same batches, in two halves with unequal pieces: the same curve to 1e-5."""
    changes = {"batch_size": 65, "grad_accum_steps": 2, "ema_decay": 0.9}
    alone = run(tiny(tmp_path / "one", **changes))
    recipe = tiny(tmp_path / "two", **changes)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "win32":  # there torch has no libuv, and torchrun looks for it
        environment["USE_LIBUV"] = "0"
    output = subprocess.check_output(
        [*launcher, *shlex.split(recipe.command(2))[2:]],
        text=True,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert output.count('"epoch"') == 1, "the first process speaks, the other is silent"
    file = tmp_path / "two" / "run" / "metrics.jsonl"
    together = [json.loads(row) for row in file.read_text("utf-8").splitlines()]
    for name in ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "lr"):
        values = [row[name] for row in together]
        assert values == pytest.approx(alone[name], rel=1e-5), name
    assert_same_answers(
        trained_model(tmp_path / "one"), trained_model(tmp_path / "two")
    )
    about = json.loads((tmp_path / "two" / "run" / "run.json").read_text("utf-8"))
    assert about["hardware"]["processes"] == 2
    assert about["command"].startswith("torchrun --nproc-per-node=2")


# --- mistakes -----------------------------------------------------------------------


def test_a_run_is_not_overwritten(finished):
    path, _ = finished
    before = (path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(FileExistsError, match="holds a run already"):
        run(tiny(path, EVERYTHING))
    assert (path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_model_whose_checkpoint_is_gone_is_not_overwritten(
    tmp_path, finished, resume
):
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    with pytest.raises(FileExistsError, match="holds a model, and no checkpoint"):
        run(tiny(tmp_path, EVERYTHING), resume=resume)
    assert_same(weights(tmp_path), weights(finished[0]))


def test_other_classes_cannot_go_on(tmp_path):
    for folder, names in (("pets", "cat dog"), ("fruit", "dog pear")):
        for i, name in enumerate(names.split()):
            (tmp_path / folder / name).mkdir(parents=True)
            for j in range(12):
                picture = Image.new("RGB", (8, 8), (200 * i, 10 * j, 0))
                picture.save(tmp_path / folder / name / f"{j}.png")
    given = {"image_size": 8, "max_train_images": None, "val_size": 0.25, "epochs": 1}
    recipe = tiny(tmp_path, **given, batch_size=4, data=tmp_path / "pets")
    run(recipe)
    other = dataclasses.replace(recipe, data=str(tmp_path / "fruit"), epochs=2)
    with pytest.raises(ValueError, match=r"with classes \['cat', 'dog'\], .* 'pear'"):
        run(other, resume=True)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("epochs", 1.5, "int"),
        ("epochs", True, "int"),
        ("epochs", None, "int"),
        ("lr", "0.1", "float"),
        ("crop", 1, "bool"),
        ("out", 3, "str"),
        ("num_layers", "3", "int"),
    ],
)
def test_settings_of_another_kind(name, value, kind):
    with pytest.raises(TypeError, match=f"{name} must be {kind}, got "):
        Recipe(**{name: value})


def test_numbers_of_numpy_and_paths_become_plain():
    recipe = Recipe(lr=np.float64(0.5), epochs=np.int64(3), out=Path("a"), mixup=1)
    assert recipe == Recipe(lr=0.5, epochs=3, out="a", mixup=1.0)
    kinds = [type(x) for x in (recipe.lr, recipe.epochs, recipe.out, recipe.mixup)]
    assert kinds == [float, int, str, float]


def test_a_finished_run_can_be_resumed_and_stays(finished):
    path, history = finished
    before = weights(path)
    assert run(tiny(path, EVERYTHING), resume=True) == history
    assert_same(weights(path), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-4}, "was made with lr=0.003, got 0.0001"),
        ({"embed_dim": 32}, "was made with embed_dim=16, got 32"),
        ({"max_train_images": 320}, "was made with max_train_images=640, got 320"),
    ],
)
def test_another_recipe_cannot_go_on(finished, changes, message):
    path, _ = finished
    with pytest.raises(ValueError, match=message):
        run(tiny(path, EVERYTHING, **changes), resume=True)


def test_a_run_can_be_made_longer_but_not_shorter_than_it_is(tmp_path):
    run(tiny(tmp_path, epochs=2))
    history = run(tiny(tmp_path, epochs=3), resume=True)
    assert history["epoch"] == [1, 2, 3]
    assert history["step"] == [5, 10, 15]
    with pytest.raises(ValueError, match="is 3 epochs old already, got epochs=1"):
        run(tiny(tmp_path, epochs=1), resume=True)


def test_a_damaged_checkpoint_stops_the_run_and_stays(tmp_path, capsys):
    recipe = tiny(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"PK\x03\x04 half a file")
    arguments = shlex.split(recipe.command())[3:]
    assert main([*arguments, "--resume"]) == 2
    assert "checkpoint.pt is damaged, or no checkpoint" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes().endswith(b"half a file")


def test_nothing_to_go_on_from(tmp_path, capsys):
    assert main(["--resume", "--out", str(tmp_path / "x")]) == 2
    assert "run.json to go on from" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, finished):
    recipe = tiny(tmp_path, EVERYTHING)
    real, count = os.fsync, []

    def full(file):
        count.append(1)
        if len(count) >= 9:
            raise OSError(28, "No space left on device")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            run(recipe)
    assert 0 < checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] < 10
    assert not list((tmp_path / "run").glob("*.part"))
    run(recipe, resume=True)
    assert_same(weights(tmp_path), weights(finished[0]))


def test_a_loss_that_explodes_is_named_and_not_kept(tmp_path):
    recipe = tiny(
        tmp_path, lr=1e30, warmup_ratio=0.0, clip_grad=0.0, save_every_seconds=0.0
    )
    with pytest.raises(ValueError, match=r"no longer finite at update \d.*lr=1e\+30"):
        run(recipe)
    path = tmp_path / "run" / "checkpoint.pt"
    if path.exists():
        assert checkpoint.load(path)["totals"].isfinite().all()


def test_weights_that_explode_do_not_replace_a_checkpoint(tmp_path):
    """The loss of that update is still finite: it was computed before the step."""
    recipe = tiny(tmp_path, save_every_seconds=0.0, epochs=1, warmup_ratio=0.0)
    real = engine._Run._update

    def update(self, pieces):
        real(self, pieces)
        if self.step == 3:
            self.model.head.weight.data[0, 0] = float("inf")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._Run, "_update", update)
        with pytest.raises(
            ValueError, match="weights are no longer finite at update 3"
        ):
            run(recipe)
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] == 2
    assert run(recipe, resume=True)["step"] == [5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5000}, "batch_size=5000 is more than the 640 images"),
        (
            {"grad_accum_steps": 200},
            "batch_size=128 cannot be divided among 1 processes in 200",
        ),
        ({"data": "nowhere"}, "nowhere is neither a folder nor one of"),
        ({"patch_size": 3}, "must be divisible by patch_size=3"),
        ({"num_heads": 3}, "embed_dim=16 must be divisible by num_heads=3"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tiny(tmp_path, **changes))
    assert not (tmp_path / "run").exists(), "nothing is written for a run that is none"


# The nearest values that a field takes, and that it refuses.
POSITIVE = ((1, 10**6), (0, -1))
NOT_NEGATIVE = ((0, 1e6), (-1e-6, float("inf"), float("nan")))
SHARE = ((0.0, 0.999), (-0.001, 1.0, float("nan")))
BOUNDS = {
    "patch_size": POSITIVE,
    "embed_dim": POSITIVE,
    "num_layers": POSITIVE,
    "num_heads": POSITIVE,
    "mlp_dim": POSITIVE,
    "image_size": POSITIVE,
    "epochs": POSITIVE,
    "batch_size": POSITIVE,
    "grad_accum_steps": POSITIVE,
    "lr": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "warmup_ratio": SHARE,
    "clip_grad": NOT_NEGATIVE,
    "ema_decay": SHARE,
    "label_smoothing": SHARE,
    "dropout": SHARE,
    "drop_path": SHARE,
    "layer_scale": NOT_NEGATIVE,
    "randaugment": ((0, 5), (-1,)),
    "randaugment_magnitude": ((0, 30), (-1, 31)),
    "random_erasing": ((0.0, 1.0), (-0.001, 1.001)),
    "mixup": NOT_NEGATIVE,
    "cutmix": NOT_NEGATIVE,
    "mixup_off_epochs": ((0, 5), (-1,)),
    "augment_group_size": POSITIVE,
    "max_train_images": POSITIVE,
    "val_size": ((0.001, 0.999), (0.0, 1.0)),
    "num_workers": ((0, 5), (-1,)),
    "save_every_seconds": NOT_NEGATIVE,
}


@pytest.mark.parametrize("name", BOUNDS)
def test_each_field_has_its_bounds(name):
    """A value inside is taken; one outside is named, with the field and its bounds."""
    inside, outside = BOUNDS[name]
    for value in inside:
        assert getattr(Recipe(**{name: value}), name) == value
    for value in outside:
        message = rf"{name} must lie in [\[(].*, .*[\])], got {re.escape(str(value))}$"
        with pytest.raises(ValueError, match=message):
            Recipe(**{name: value})


def test_no_number_goes_without_bounds():
    hints = typing.get_type_hints(Recipe).items()
    numbers = {n for n, kind in hints if {int, float} & {kind, *typing.get_args(kind)}}
    assert numbers == BOUNDS.keys() | {"seed", "split_seed"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, r"epochs must lie in \[1, inf\), got 0"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), got 1.0"),
        ({"val_size": 0.0}, r"val_size must lie in \(0, 1\), got 0.0"),
        ({"model": "vit_xxl"}, "model must be one of .*vit_s_4.*, got 'vit_xxl'"),
        ({"optimizer": "sgd"}, "optimizer must be one of .*, got 'sgd'"),
        ({"cache": "cloud"}, "cache must be one of .*'disk'.*, got 'cloud'"),
    ],
)
def test_settings_that_cannot_be_meant(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_sizes_of_a_model_can_be_changed_one_by_one():
    """The MLP follows the width, unless it is given too."""
    sizes = {"image_size": 28, "in_channels": 1, "num_classes": 7}
    shape = Recipe(model="vit_ti_16").vit(**sizes)
    assert {**minivit.vit.SIZES["vit_ti_16"], **sizes}.items() <= shape.items()
    narrow = Recipe(model="vit_ti_16", embed_dim=96, num_layers=2).vit(**sizes)
    assert narrow == {**shape, "embed_dim": 96, "num_layers": 2, "mlp_dim": 384}
    assert Recipe(mlp_dim=50).vit(**sizes)["mlp_dim"] == 50
    assert Recipe().vit(**sizes)["patch_size"] == 4


def test_mistakes_on_the_command_line_take_one_line(tmp_path, capsys):
    assert main(["--data", str(tmp_path / "x"), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    with contextlib.suppress(SystemExit):
        main(["--modell", "vit_s_4"])
    assert "unrecognized arguments: --modell" in capsys.readouterr().err
