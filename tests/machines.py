"""The other machines that one machine can play, by what is set in the environment.

The bits of a float depend on the instructions that torch's own kernels use
(ATEN_CPU_CAPABILITY), those of oneDNN (ONEDNN_MAX_CPU_ISA) and of MKL (MKL_CBWR), and
on the number of threads that share a sum. The order of a set of strings depends on
PYTHONHASHSEED.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MACHINES = {
    "as it is": {},
    "no AVX": {"ATEN_CPU_CAPABILITY": "default"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "AVX-512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "oneDNN AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "oneDNN AVX-512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "oneDNN bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "oneDNN AMX": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
    "another BLAS": {"MKL_CBWR": "COMPATIBLE"},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "hash seed": {"PYTHONHASHSEED": "1"},
    # Not a setting of any library: see elsewhere/sitecustomize.py.
    "other rounding": {"PYTHONPATH": str(HERE / "elsewhere")},
}
# Machines that are tried even if a look at their arithmetic shows nothing new.
ALWAYS = {"two threads", "hash seed", "other rounding"}

ARITHMETIC = """
import hashlib
import torch
import torch.nn.functional as F

torch.manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    x = torch.randn(2, 4, 64, 64, dtype=dtype, requires_grad=True)
    w = torch.randn(8, 4, 3, 3, dtype=dtype, requires_grad=True)
    weights = torch.randn(64, 64, dtype=dtype)
    attended = F.scaled_dot_product_attention(x, x @ weights, x)
    out = [attended, F.conv2d(x, w), F.gelu(x), F.layer_norm(x, x.shape[-1:])]
    out += [x.softmax(-1), x.sum((0, 2)), x.exp(), x.square().mean(1).sqrt()]
    sum(t.square().sum() for t in out).backward()
    for t in [*out, x.grad, w.grad]:
        digest.update(t.detach().double().numpy().tobytes())
print(digest.hexdigest())
"""


def environment(machine: str) -> dict[str, str]:
    """All variables of a process on that machine; one thread if it does not say."""
    changes = {"OMP_NUM_THREADS": "1"} | MACHINES[machine]
    if "PYTHONPATH" in changes and "PYTHONPATH" in os.environ:
        changes["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    return os.environ | changes


@functools.cache
def arithmetic(machine: str) -> str | None:
    """A checksum of what comes out of many operations; None where they cannot run."""
    done = subprocess.run(
        [sys.executable, "-c", ARITHMETIC],
        env=environment(machine),
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() if done.returncode == 0 else None


def twin(machine: str) -> str | None:
    """An earlier machine with the same arithmetic, or "impossible"; None if it is new.

    A processor that lacks the instructions may die of them (SIGILL).
    """
    if machine in ALWAYS:
        return None
    if arithmetic(machine) is None:
        return "impossible"
    earlier = list(MACHINES)[: list(MACHINES).index(machine)]
    return next(
        (
            m
            for m in earlier
            if m not in ALWAYS and arithmetic(m) == arithmetic(machine)
        ),
        None,
    )
