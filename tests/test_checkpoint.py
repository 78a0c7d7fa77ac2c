"""Checkpoints: complete or absent, exact, and no danger to who opens them."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from minivit import Transformer, checkpoint


def parts(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def learn(model, optimizer, scheduler, steps):
    for _ in range(steps):
        loss = model(torch.randn(4, 3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return [p.detach().clone() for p in model.parameters()]


def test_going_on_gives_the_same_numbers(tmp_path):
    """Model, momentum, rate and randomness: forgetting one would show."""
    straight = parts()
    torch.manual_seed(1)
    expected = learn(**straight, steps=7)

    first = parts()
    torch.manual_seed(1)
    learn(**first, steps=4)
    checkpoint.save(tmp_path / "a.pt", extra={"step": 4}, **first)

    other = parts(seed=5)
    assert checkpoint.load(tmp_path / "a.pt", **other) == {"step": 4}
    found = learn(**other, steps=3)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_extra_can_be_read_alone(tmp_path):
    checkpoint.save(tmp_path / "a.pt", extra=[1, "two", torch.ones(3)], **parts())
    torch.manual_seed(3)
    before = torch.get_rng_state()
    number, text, tensor = checkpoint.load(tmp_path / "a.pt")
    assert (number, text, tensor.tolist()) == (1, "two", [1.0, 1.0, 1.0])
    assert torch.equal(torch.get_rng_state(), before), "reading restores nothing"


@pytest.mark.parametrize("extra", [np.float64(0.5), Path("a"), {"f": print}])
def test_what_could_not_be_read_again_does_not_replace_what_can(tmp_path, extra):
    path = tmp_path / "a.pt"
    checkpoint.save(path, extra=1, **parts())
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"a\.pt was not written, .* plain numbers"):
        checkpoint.save(path, extra=extra, **parts())
    assert path.read_bytes() == before
    assert checkpoint.load(path) == 1


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99, 0.9999])
def test_a_truncated_checkpoint_is_refused(tmp_path, share):
    path = tmp_path / "a.pt"
    checkpoint.save(path, **parts())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="is damaged, or no checkpoint"):
        checkpoint.load(path, **parts())


class Bomb:
    """What a pickle can do to who loads it."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_no_code_from_a_file_is_run(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    content = {"format": checkpoint.FORMAT, "parts": Bomb()}
    if how == "pickle":
        (tmp_path / "a.pt").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, "a.pt")
    with pytest.raises(ValueError, match="damaged, or no checkpoint"):
        checkpoint.load("a.pt")
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "exploded").exists(), "the bomb is real"


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], torch.ones(2)])
def test_a_foreign_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="is no checkpoint of minivit"):
        checkpoint.load(tmp_path / "a.pt", **parts())


def test_other_parts_are_refused(tmp_path):
    checkpoint.save(tmp_path / "a.pt", **parts())
    some = parts()
    del some["scheduler"]
    with pytest.raises(
        ValueError, match=r"holds \['model', 'optimizer', 'scheduler'\]"
    ):
        checkpoint.load(tmp_path / "a.pt", **some)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "b.pt", **some)


# --- what a disk can do -------------------------------------------------------------

SMALL_DISK = """
import resource, signal, sys, torch
from minivit import Transformer, checkpoint

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
big = {"weight": torch.ones(100_000)}
try:
    if sys.argv[2] == "checkpoint":
        checkpoint.save(sys.argv[1], extra=big)
    else:
        checkpoint.save_weights(sys.argv[1], big, {})
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(
    sys.platform == "win32", reason="Windows sets no limit to the size of files"
)
@pytest.mark.parametrize("kind", ["checkpoint", "weights"])
def test_a_disk_that_is_full_destroys_nothing(tmp_path, kind):
    """The limit on the size of files cuts the write short, as a full disk does."""
    path = tmp_path / "a"
    path.write_text("precious", "utf-8")
    output = subprocess.check_output(
        [sys.executable, "-c", SMALL_DISK, path, kind], text=True
    )
    assert f"{path} could not be written" in output
    assert "untouched" in output
    assert path.read_text("utf-8") == "precious"
    assert [file.name for file in tmp_path.iterdir()] == ["a"], "no half file is left"


def test_the_new_file_is_complete_before_the_old_one_goes(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, real=real: (order.append(name), real(*a))
        )
    checkpoint.write(tmp_path / "a", b"new")
    assert order == ["fsync", "replace"]
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.write(tmp_path / "nowhere" / "a", b"")


# --- weights ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_come_back_with_what_is_known(tmp_path, dtype):
    weights = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    about = {"classes": ["cat", "Löwe"], "mean": [0.5]}
    checkpoint.save_weights(tmp_path / "w", weights, about, dtype=dtype)
    found, known = checkpoint.load_weights(tmp_path / "w")
    assert known == about
    for name, weight in weights.items():
        assert torch.equal(found[name], weight.to(dtype).float())


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_come_back_tied(tmp_path, tied):
    """One matrix under three names: safetensors takes no memory twice."""

    def model():
        sizes = {"embed_dim": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 8}
        sizes |= {"src_vocab_size": 9, "tgt_vocab_size": 9}
        options = {"tie_embeddings": tied, "share_embeddings": tied}
        return Transformer(**sizes, **options).eval()

    first, second = model(), model()
    checkpoint.save_weights(tmp_path / "w", first.state_dict(), {})
    second.load_state_dict(checkpoint.load_weights(tmp_path / "w")[0], strict=True)
    src, tgt = torch.randint(1, 9, (2, 3, 5))
    assert torch.equal(second(src, tgt), first(src, tgt))
    assert len(list(second.parameters())) == len(list(first.parameters()))
    assert (second.tgt_embed.weight is second.head.weight) == tied
    assert (second.tgt_embed.weight is second.src_embed.weight) == tied


def test_weights_outlive_their_file(tmp_path):
    """They are copies: a view of the file would change with it, or hold it open."""
    checkpoint.save_weights(tmp_path / "w", {"a": torch.ones(5000)}, {})
    found, _ = checkpoint.load_weights(tmp_path / "w")
    with (tmp_path / "w").open("r+b") as file:
        file.write(bytes((tmp_path / "w").stat().st_size))
    assert torch.equal(found["a"], torch.ones(5000))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_weights_that_float16_cannot_hold_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match="head holds NaN or numbers too large"):
        checkpoint.save_weights(
            tmp_path / "w", {"head": torch.tensor([value])}, {}, dtype=torch.float16
        )
    assert not (tmp_path / "w").exists()


def test_weights_of_others_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, tmp_path / "w")
    with pytest.raises(ValueError, match="minivit did not write it"):
        checkpoint.load_weights(tmp_path / "w")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        checkpoint.load_weights(tmp_path / "x")


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_truncated_weights_are_refused(tmp_path, share):
    checkpoint.save_weights(tmp_path / "w", {"a": torch.ones(300)}, {})
    data = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="w is damaged, or no safetensors file"):
        checkpoint.load_weights(tmp_path / "w")
