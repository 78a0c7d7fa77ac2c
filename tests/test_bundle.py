"""A bundle is carried out of the repository and run there, beside torch alone."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import IMAGES, SEQ2SEQ, images, tokens
from test_size import code_lines

import minivit
from minivit import bundle as bundle_module
from minivit.bundle import MODULES, bundle

EACH = pytest.mark.parametrize("module", MODULES)
HOW = pytest.mark.parametrize("bare", [False, True], ids=["whole", "bare"])

# What is built of a module, and what it is given.
BUILD = {
    "attention": ("MultiHeadAttention(8, 2)", lambda: (torch.randn(2, 5, 8),) * 3),
    "layers": ("FeedForward(8, 12)", lambda: (torch.randn(2, 5, 8),)),
    "positions": ("LearnedPositions(5, 8)", lambda: (torch.randn(2, 5, 8),)),
    "encoder": (
        "Encoder(8, 2, 2, 12, layer_scale=0.1, drop_path=0.1)",
        lambda: (torch.randn(2, 5, 8),),
    ),
    "decoder": (
        "Decoder(8, 2, 2, 12, norm_first=False)",
        lambda: (torch.randn(2, 4, 8), torch.randn(2, 5, 8)),
    ),
    "transformer": (f"Transformer(**{SEQ2SEQ})", lambda: (tokens(2, 5), tokens(2, 4))),
    "vit": (f"ViT(**{IMAGES})", lambda: (images(2),)),
}

RUN = """
import importlib, json, sys
sys.modules.update(dict.fromkeys(["minivit", "torchvision", "safetensors"]))
sys.path.insert(0, ".")
import torch

for name, build in json.loads(sys.argv[1]).items():
    module = importlib.import_module(name)
    torch.manual_seed(0)
    model = eval(build, vars(module))
    inputs = torch.load(name + ".inputs", weights_only=True)
    output = model(*inputs)
    output.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    torch.save([output.detach(), *grads], name + ".outputs")
"""


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory):
    """Run all bundles in a folder without other files, in a Python without minivit."""
    folder, builds = tmp_path_factory.mktemp("elsewhere"), {}
    for module, (build, make) in BUILD.items():
        for bare in (False, True):
            name = f"{module}_{'bare' if bare else 'whole'}"
            builds[name] = build
            (folder / f"{name}.py").write_text(bundle(module, bare=bare), "utf-8")
            torch.save(make(), folder / f"{name}.inputs")
    command = [sys.executable, "-I", "-c", RUN, json.dumps(builds)]
    subprocess.run(command, cwd=folder, check=True)
    return folder


@HOW
@EACH
def test_the_same_bits_as_the_package(module, bare, carried_out):
    name = f"{module}_{'bare' if bare else 'whole'}"
    inputs = torch.load(carried_out / f"{name}.inputs", weights_only=True)
    found = torch.load(carried_out / f"{name}.outputs", weights_only=True)
    torch.manual_seed(0)
    model = eval(BUILD[module][0], vars(minivit))
    output = model(*inputs)
    output.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == 1 + len(grads) > 1
    for a, b in zip(found, [output, *grads], strict=True):
        assert torch.equal(a, b)


@HOW
@EACH
def test_it_imports_torch_alone_and_nothing_in_vain(module, bare):
    tree = ast.parse(bundle(module, bare=bare))
    mentioned = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert getattr(node, "level", 0) == 0
            module = getattr(node, "module", None) or node.names[0].name
            top = module.split(".")[0]
            assert top == "torch" or top in sys.stdlib_module_names
            for alias in node.names:
                assert (alias.asname or alias.name) in mentioned, alias.name


@EACH
def test_a_whole_bundle_has_all_that_the_module_offers(module):
    found = {}
    exec(bundle(module), found)
    original = importlib.import_module(f"minivit.{module}")
    for name in original.__all__:
        assert found[name].__doc__ == getattr(original, name).__doc__


@EACH
def test_it_says_where_it_comes_from(module):
    for bare in (False, True):
        first = bundle(module, bare=bare).splitlines()[0]
        assert "minivit" in first
        assert "MIT" in first
    assert "Copy this file" not in bundle(module)


def test_a_bare_vit_is_short():
    source = bundle("vit", bare=True)
    assert len(code_lines(source)) <= 200
    assert len(bundle("vit").splitlines()) > 3 * len(source.splitlines())
    for line in ('"""', "# (B", "->", ": Tensor"):
        assert line not in source


@pytest.mark.parametrize(
    ("module", "name"),
    [("attention", "causal_mask"), ("positions", "rotate"), ("vit", "vit_b_16")],
)
def test_bare_leaves_out_what_no_class_calls(module, name):
    """The README says so."""
    assert f"def {name}(" in bundle(module)
    assert name not in bundle(module, bare=True)


def test_comments_travel_with_what_they_explain():
    assert "# Queries, keys and values of all heads come from one matrix" in bundle(
        "vit"
    )
    assert "# What one decoder layer keeps between the steps" in bundle("decoder")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_said_in_words():
    command = [sys.executable, "-m", "minivit.bundle", "attention"]
    with Path("/dev/full").open("wb") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 2
    assert run.stderr == "error: [Errno 28] No space left on device\n"


def test_lines_are_broken_between_arguments_only():
    """Not at a hyphen of a text, and not inside one that follows a letter like ᵀ."""
    code = f"raise ValueError('{'pre-norm ' * 9}', f'Kᵀ {'a, ' * 20}', {'x, ' * 9}y)"
    wrapped = bundle_module._wrapped(code)
    assert "\n" in wrapped
    assert ast.dump(ast.parse(wrapped)) == ast.dump(ast.parse(code))


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "minivit.bundle", "attention"]
    run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert run.stdout == bundle("attention")
    spaced = {**os.environ, "PYTHONIOENCODING": "cp1252"}  # as on Windows
    run = subprocess.run(command, capture_output=True, env=spaced, check=True)
    assert run.stdout.decode("utf-8") == bundle("attention")
    with pytest.raises(ValueError, match=r"one of attention, .*, got 'gpt2'"):
        bundle("gpt2")
