"""The README's table of what to copy holds: each row is copied out and run.

A process that cannot import minivit, nor any library that the row does not name, gets
the files of the row and does something real with them. Then the same without one of
the files, for each file: it must fail, or the row names too many. Every library that
one of the files imports is named; in brackets if that something needs none of it.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minivit import vit_ti_16

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "minivit"
SECTION = re.search(
    r"^## Copying$(.*?)^## ", (ROOT / "README.md").read_text("utf-8"), re.M | re.S
)[1]
ROWS = {
    cells[0]: cells[1:]
    for cells in (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in SECTION.splitlines()
        if line.startswith("|")
    )
    if cells[0] != "what you want" and not cells[0].startswith("-")
}
MODULES = {"scikit-learn": "sklearn"}  # whose name on import is another
LIBRARIES = {"matplotlib", "safetensors", "sklearn", "timm", "torchvision", "tqdm"}
NOT_NAMED = {*sys.stdlib_module_names, "torch", "PIL"}  # torchvision brings PIL

SMALL = "embed_dim=8, num_layers=1, num_heads=2, mlp_dim=16"
DIGITS = "image_size=8, patch_size=4, in_channels=1, num_classes=10"

# What is done with the files of each row; MODULE is what the row imports from.
USES = {
    "attention": """
from MODULE import MultiHeadAttention
layer, x = MultiHeadAttention(8, 2), torch.randn(3, 5, 8)
output, weights = layer.attend(x, x, x)
torch.testing.assert_close(layer(x, x, x), output)
torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 5))
""",
    "positions": """
from MODULE import sinusoidal_positions
assert sinusoidal_positions(3, 4)[0].tolist() == [0, 1, 0, 1]
""",
    "layers": """
from MODULE import FeedForward
layer, x = FeedForward(8, 16).eval(), torch.randn(2, 3, 8)
torch.testing.assert_close(layer(x)[1], layer(x[1]))
""",
    "generation": """
from MODULE import greedy_search

class Counting(torch.nn.Module):
    pad_id, max_len, tgt_vocab_size = 0, 9, 9
    encode = staticmethod(lambda src: src)
    new_cache = staticmethod(list)

    def decode(self, tgt, memory, src, cache=None):
        return F.one_hot(tgt + 1, 9).float()



ids = greedy_search(Counting(), torch.ones(1, 1).long(), bos_id=1, eos_id=5, max_len=8)
assert ids.tolist() == [[2, 3, 4, 5]], ids
""",
    "weights of other libraries": """
from MODULE import from_torchvision, to_torchvision

ours = torch.load("vit.pt")
again = from_torchvision(to_torchvision(ours))
assert ours.keys() == again.keys()
assert all(torch.equal(ours[name], again[name]) for name in ours)
""",
    "data": """
from MODULE import load_digits
images, labels = load_digits()
assert images.shape == (1347, 1, 8, 8) and labels.max() == 9
""",
    "files of weights": """
from MODULE import load_weights, save_weights

save_weights("a.safetensors", {"x": torch.arange(3.0)}, {"classes": ["a"]})
weights, about = load_weights("a.safetensors")
assert weights["x"].tolist() == [0, 1, 2] and about["classes"] == ["a"]
""",
    "figures": """
from MODULE import heatmap
assert heatmap(torch.rand(2, 3), title="a").axes[0].get_title() == "a"
""",
    "Transformer": f"""
from MODULE import Transformer
model = Transformer(src_vocab_size=9, tgt_vocab_size=7, max_len=9, {SMALL}).eval()
src, tgt = torch.randint(1, 9, (2, 5)), torch.randint(1, 7, (2, 4))
logits = model(src, tgt)
logits.sum().backward()
torch.testing.assert_close(logits[:, :2], model(src, tgt[:, :2]))  # causal
""",
    "ViT": f"""
from MODULE import ViT
model = ViT({DIGITS}, {SMALL})
loss = F.cross_entropy(model(torch.rand(4, 1, 8, 8)), torch.arange(4))
loss.backward()
assert model.head.weight.grad.abs().sum() > 0
""",
    "a look inside": f"""
from MODULE import attention_maps
from net.vit import ViT

(weights,) = attention_maps(ViT({DIGITS}, {SMALL}).eval(), torch.rand(3, 1, 8, 8))
torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 5))
""",
    "weights from ImageNet": """
from MODULE import pretrained
import torchvision.models._api
from torchvision.models.vision_transformer import vit_b_16

published = vit_b_16().state_dict()  # nothing is downloaded in a test
published["heads.head.weight"].normal_()
torchvision.models._api.load_state_dict_from_url = lambda *a, **b: dict(published)
model = pretrained("vit_b_16", image_size=32)
assert torch.equal(model.head.weight, published["heads.head.weight"])
assert model(torch.rand(1, 3, 32, 32)).shape == (1, 1000)
""",
    "pictures": """
from MODULE import load_pictures
from pathlib import Path
from PIL import Image

for colour in ("red", "blue"):
    for number in range(4):
        Path("photographs", colour).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), colour).save(f"photographs/{colour}/{number}.png")
pictures = load_pictures("photographs", image_size=8, val_size=0.5)
assert pictures.classes == ["blue", "red"] and len(pictures.val) == 4
""",
    "training, a loop to read": """
from MODULE import fit
x = torch.randn(256, 4)
model = torch.nn.Linear(4, 2)
history = fit(model, (x, (x.sum(1) > 0).long()), epochs=8, lr=0.1)
assert history["train_accuracy"][-1] > 0.9, history
""",
    "training, the engine": f"""
from MODULE import Recipe, run
size = dict(patch_size=4, {SMALL})
run(Recipe(data="digits", out="run", epochs=1, device="cpu", **size))
assert {{"model.safetensors", "metrics.jsonl"}} <= {{*os.listdir("run")}}
""",
    "a trained model": """
from MODULE import load
from PIL import Image

model, classes, preprocess, about = load("vit_cifar10")
logits = model(preprocess(Image.new("RGB", (50, 40), "blue"))[None])
assert logits.shape == (1, len(classes)) == (1, 10)
""",
    "the checker": """
import MODULE as check
def mine(query, key, value, mask=None):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

def unscaled(query, key, value, mask=None):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)

check.attention(mine).raise_if_failed()
assert "scale" in str(check.attention(unscaled))
from net.vit import ViT
small = dict(embed_dim=16, num_layers=2, num_heads=2, mlp_dim=32, num_classes=10)
model = ViT(image_size=32, patch_size=8, **small)
check.vit(model, image_size=32, num_classes=10).raise_if_failed()
""",
}

PROCESS = """
import json, os, sys

folders, code, own, refused, wanted = json.loads(sys.argv[1])

sys.modules.update(dict.fromkeys(refused))  # as if they were not installed
import torch
import torch.nn.functional as F

superfluous = []
for left_out, folder in folders.items():
    os.chdir(folder)
    sys.path.insert(0, folder)
    try:
        torch.manual_seed(0)
        exec(code, {"F": F, "os": os, "torch": torch})
    except (ImportError, FileNotFoundError):
        if not left_out:
            raise
    else:
        superfluous += [left_out] if left_out else set(wanted) - set(sys.modules)
    sys.path.remove(folder)
    for name in list(sys.modules):
        if name.partition(".")[0] in own:
            del sys.modules[name]
print(json.dumps(superfluous))
"""


def copy(files, folder):
    for name in files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(PACKAGE / name, target, ignore=ignore)
        else:
            shutil.copy(PACKAGE / name, target)


def test_all_rows_are_used():
    assert ROWS.keys() == USES.keys()


def parse(row):
    """The module of a row, its files, and the libraries before and in brackets."""
    module, files, libraries = ROWS[row]
    always, sometimes = re.fullmatch(r"(.*?)(?: ?\((.*)\))?", libraries).groups("")
    named = [
        {MODULES.get(name, name) for name in text.split(", ") if name}
        for text in (always, sometimes)
    ]
    return module.strip("`"), re.findall(r"`([\w./]+)`", files), *named


def imported(path):
    """The first names of all that a file imports, wherever in it it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return {name.partition(".")[0] for name in found}


@pytest.mark.parametrize("row", ROWS)
def test_all_libraries_are_named(row):
    _, files, always, sometimes = parse(row)
    paths = [PACKAGE / name for name in files]
    paths = [file for path in paths for file in (path, *path.rglob("*.py"))]
    found = set().union(*(imported(path) for path in paths if path.is_file()))
    assert not always & sometimes
    assert always | sometimes == found - NOT_NAMED


@pytest.mark.parametrize("row", ROWS)
def test_row(row, tmp_path):
    module, files, libraries, _ = parse(row)
    assert libraries <= LIBRARIES
    above = module.startswith("net.")  # floor 0

    folders = {}
    for left_out in [*files, ""]:
        folder = folders[left_out] = tmp_path / (left_out or "all").replace("/", "_")
        folder.mkdir()
        copy(
            [file for file in files if file != left_out],
            folder / ("net" if above else ""),
        )
        if row == "weights of other libraries":
            torch.save(vit_ti_16(image_size=32).state_dict(), folder / "vit.pt")
    given = (
        {left_out: str(folder) for left_out, folder in folders.items()},
        USES[row].replace("MODULE", module),
        ["net", *(file.removesuffix(".py") for file in files)],
        ["minivit", *(LIBRARIES - libraries)],
        [*libraries],
    )
    command = [sys.executable, "-I", "-c", PROCESS, json.dumps(given)]
    run = subprocess.run(
        command,
        env={**os.environ, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    superfluous = json.loads(run.stdout.splitlines()[-1])
    assert not superfluous, f"{row} works without {superfluous}"
