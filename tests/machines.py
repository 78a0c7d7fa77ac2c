"""The other machines that one machine can play, by what is set in the environment.

The bits of a float depend on the instructions that torch's own kernels use
(ATEN_CPU_CAPABILITY), those of oneDNN (ONEDNN_MAX_CPU_ISA) and of MKL (MKL_CBWR), and
on the number of threads that share a sum. They choose separately: only "no AVX" keeps
all three from it. The order of a set of strings depends on PYTHONHASHSEED.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MACHINES = {
    "as it is": {},
    "no AVX": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
    },
    "ATen plain": {"ATEN_CPU_CAPABILITY": "default"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "AVX-512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "oneDNN AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "oneDNN AVX-512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "oneDNN bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "oneDNN AMX": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
    "MKL compatible": {"MKL_CBWR": "COMPATIBLE"},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "hash seed": {"PYTHONHASHSEED": "1"},
    # No library's setting: elsewhere/sitecustomize.py rounds all weights otherwise.
    "other updates": {"PYTHONPATH": str(HERE / "elsewhere")},
}
# What the user has set of all this is left out: a machine is what is written above.
SETTINGS = ("ATEN_", "DNNL_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "PYTHONHASHSEED")
# Machines that are tried even if a look at their arithmetic shows nothing new.
ALWAYS = {"two threads", "hash seed", "other updates"}

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
    torch.optim.SGD([w]).step()
    for t in [*out, x.grad, w.grad, w]:
        digest.update(t.detach().double().numpy().tobytes())
print(digest.hexdigest())
"""


def environment(machine: str) -> dict[str, str]:
    """All variables of a process on that machine; one thread if it does not say."""
    changes = {"OMP_NUM_THREADS": "1"} | MACHINES[machine]
    if "PYTHONPATH" in changes and "PYTHONPATH" in os.environ:
        changes["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    own = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS)}
    return own | changes


@functools.cache
def arithmetic(machine: str) -> str:
    """A checksum of what comes out of some operations, empty if they cannot run.

    A processor that lacks the instructions dies of them: on POSIX systems of a signal,
    on Windows of an exception with a number above 0xC0000000.
    """
    done = subprocess.run(
        [sys.executable, "-c", ARITHMETIC],
        env=environment(machine),
        capture_output=True,
        text=True,
    )
    if done.returncode < 0 or done.returncode >= 0xC0000000:
        return ""
    done.check_returncode()
    return done.stdout.strip()


def can_be_played(machine: str) -> bool:
    """Whether this processor has the instructions."""
    return arithmetic(machine) != ""


def twin(machine: str) -> str | None:
    """An earlier machine on which those operations give the same bits, if there is one.

    Larger or other operations might tell the two apart.
    """
    if machine in ALWAYS:
        return None
    earlier = list(MACHINES)[: list(MACHINES).index(machine)]
    return next((m for m in earlier if arithmetic(m) == arithmetic(machine)), None)
