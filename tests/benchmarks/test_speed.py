"""The rows of the page `book/benchmarks.md`, one test each. Run by `make bench`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers import Shape, of_minivit, translators, vits
from benchmarks.race import DEVICE, autocast, limited, peak_memory, race, record
from minivit import MultiHeadAttention, greedy_search

pytestmark = pytest.mark.benchmark

ROOT = Path(__file__).resolve().parent.parent.parent
ON_GPU = DEVICE.type == "cuda"

# As fast as the fastest, with 3 % for the noise; compiled, 1.2 times as fast.
EAGER, COMPILED = 1.03, 1 / 1.2
MEMORY = 1.05

# title: (shape, images on the CPU, images on a GPU)
VITS = {
    "ViT, 32 px, patch 4": (Shape(32, 4, 192, 9, 3, 10), 32, 512),
    "ViT-S/16, 224 px": (Shape(224, 16, 384, 12, 6, 1000), 4, 128),
}


@pytest.mark.parametrize("work", ["forward", "training step"])
@pytest.mark.parametrize("title", VITS)
def test_vit(benchmark, title, work):
    shape, on_cpu, on_gpu = VITS[title]
    vit_row(benchmark, f"{title}: {work}", shape, work, on_gpu if ON_GPU else on_cpu)


def vit_row(benchmark, title, shape, work, batch, rounds=20, compiled=ON_GPU):
    size = (batch, 3, shape.image_size, shape.image_size)
    images = torch.randn(size, device=DEVICE)
    labels = torch.randint(shape.num_classes, (batch,), device=DEVICE)
    models = {name: model.to(DEVICE) for name, model in vits(shape).items()}
    goals = {"minivit": EAGER}
    if compiled:
        models["minivit, compiled"] = torch.compile(
            of_minivit(shape).to(DEVICE), fullgraph=True, dynamic=False
        )
        goals["minivit, compiled"] = COMPILED
    if work == "forward":
        contestants = {n: forward(m.eval(), images) for n, m in models.items()}
    else:
        contestants = {n: training(m, images, labels) for n, m in models.items()}
    race(benchmark, title, contestants, rounds=rounds, goals=goals)


def forward(model, images):
    @torch.no_grad()
    def run():
        with autocast():
            return logits(model, images)

    return run


def training(model, images, labels):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run():
        with autocast():
            loss = F.cross_entropy(logits(model, images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def logits(model, images):
    output = model(images)
    return getattr(output, "logits", output)  # Hugging Face wraps them


@pytest.mark.parametrize("work", ["forward", "training"])
@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_attention(benchmark, length, work):
    """The width and heads of ViT-S, one sequence."""
    rounds = 20 if length < 4096 else 10
    title = f"attention, n = {length}"
    attention_row(benchmark, title, length, work, rounds=rounds)


def attention_row(benchmark, title, length, work, embed_dim=384, heads=6, rounds=20):
    backward = work != "forward"
    x = torch.randn(1, length, embed_dim, device=DEVICE)
    contestants = {
        name: attending(function, x, backward)
        for name, function in attentions(embed_dim, heads).items()
    }
    memory = {name: [peak_memory(run)] for name, run in contestants.items()}
    goals = {"minivit": EAGER}
    race(benchmark, f"{title}: {work}", contestants, rounds=rounds, goals=goals)
    record(benchmark, f"{title}: {work}, memory", "B", memory, {"minivit": MEMORY})


def attentions(embed_dim, heads):
    """Self-attention with the same weights, four times."""
    mine = MultiHeadAttention(embed_dim, heads).to(DEVICE)
    torchs = nn.MultiheadAttention(embed_dim, heads, batch_first=True).to(DEVICE)
    weight, bias = mine.in_proj.weight, mine.in_proj.bias
    torchs.in_proj_weight, torchs.in_proj_bias = weight, bias
    torchs.out_proj.load_state_dict(mine.out_proj.state_dict())

    def fused_kernel(x):
        """Nothing but the kernel between the two projections."""
        qkv = F.linear(x, weight, bias).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, H, L, D)
        return F.linear(
            mixed.transpose(1, 2).flatten(2), mine.out_proj.weight, mine.out_proj.bias
        )

    return {
        "minivit": lambda x: mine(x, x, x),
        "fused kernel": fused_kernel,
        "nn.MultiheadAttention": lambda x: torchs(x, x, x, need_weights=False)[0],
        "explicit weights": lambda x: mine.attend(x, x, x)[0],
    }


def attending(function, x, backward):
    def run():
        with torch.set_grad_enabled(backward), autocast():
            output = function(x)
        if backward:
            output.sum().backward()
        return output

    return run


def test_decoding(benchmark):
    sizes = {"embed_dim": 256, "num_layers": 4, "num_heads": 4, "mlp_dim": 1024}
    decoding_row(benchmark, "writing 64 tokens", 64, 8, sizes)


def decoding_row(benchmark, title, length, batch, sizes, rounds=10):
    models = translators(vocab_size=8000, max_len=2 * length, **sizes)
    mine, theirs = (model.to(DEVICE) for model in models.values())
    src = torch.randint(3, 8000, (batch, length), device=DEVICE)
    ids = {"bos_id": 1, "eos_id": 2, "max_len": length}

    def run(write):
        with autocast():
            written = write()
        assert written.shape == (batch, length)

    contestants = {
        "minivit": lambda: greedy_search(mine, src, **ids),
        "minivit, no cache": lambda: greedy_search(mine, src, **ids, use_cache=False),
        "Hugging Face": lambda: theirs.generate(
            src, max_new_tokens=length, do_sample=False, num_beams=1
        )[:, 1:],
    }
    contestants = {
        name: lambda write=write: run(write) for name, write in contestants.items()
    }
    race(benchmark, title, contestants, rounds=rounds, goals={"minivit": EAGER})


IMPORT = """
import time, torch
start = time.perf_counter()
import minivit
print(time.perf_counter() - start)
"""


def test_import(benchmark):
    """What `import minivit` adds to `import torch`, in a fresh process each time."""
    seconds = []

    def start():
        command = [sys.executable, "-c", IMPORT]
        seconds.append(float(subprocess.check_output(command, cwd=ROOT, text=True)))

    benchmark.pedantic(start, rounds=limited(9), warmup_rounds=1)
    samples = {"minivit": seconds[1:], "limit of 100 ms": [0.1] * (len(seconds) - 1)}
    record(benchmark, "import after torch", "s", samples, {"minivit": 1.0})
