"""Where a run computes: on which device, among which processes, until which signal."""

import contextlib
import os
import platform
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = [
    "Place",
    "choose_precision",
    "autocast",
    "find_place",
    "hardware",
    "requests_to_stop",
]


class Place(NamedTuple):
    """Where this process computes, and which of how many it is.

    Attributes:
        device: of this process.
        rank: its number, from 0.
        world_size: how many processes there are.
    """

    device: torch.device
    rank: int
    world_size: int

    def share(self, rows: Tensor) -> Tensor:
        """Take the rows that are this process's."""
        return rows[self.rank :: self.world_size]

    def all_reduce(self, numbers: Tensor) -> None:
        """Add the numbers of all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(numbers)

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """For a `with` block: the first process goes ahead, the others follow."""
        if self.world_size > 1 and self.rank > 0:
            dist.barrier()
        yield
        if self.world_size > 1 and self.rank == 0:
            dist.barrier()


@contextlib.contextmanager
def find_place(device_name: str) -> Iterator[Place]:
    """For a `with` block: find the device, and under torchrun the other processes.

    Args:
        device_name: "cuda", "mps", "cpu", or "auto" for the first of them that is here.

    Yields:
        The place of this process.

    Raises:
        ValueError: this machine has no such device.
    """
    device = _device(device_name)
    if "WORLD_SIZE" not in os.environ:
        yield Place(device, 0, 1)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Place(device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def requests_to_stop() -> Iterator[list[int]]:
    """For a `with` block: collect SIGTERM and Ctrl-C; a second one acts at once.

    Yields:
        A list, to which the number of a signal is added when it comes.
    """
    came: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        came.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    try:
        yield came
    finally:
        restore()


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Choose the dtype of matrix products.

    Args:
        name: of the dtype; "auto" takes half precision with CUDA.
        device: where they are computed.

    Returns:
        bfloat16 where the GPU computes it, or float16; float32 elsewhere.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float16


@contextlib.contextmanager
def autocast(precision: torch.dtype, device: torch.device) -> Iterator[None]:
    """For a `with` block: compute matrix products in a precision.

    Args:
        precision: float32 changes nothing.
        device: where they are computed.
    """
    with contextlib.ExitStack() as stack:
        if precision != torch.float32:
            stack.enter_context(torch.autocast(device.type, dtype=precision))
            if device.type == "cpu":  # the fused kernel's way back is slow there
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                reduced = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed
                allow = torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp
                stack.callback(allow, reduced())
                allow(True)  # no detour through float32
        yield


def hardware(place: Place) -> dict[str, Any]:
    """Say what computes, for the record.

    Args:
        place: of this process.

    Returns:
        Device, processor, threads, processes, versions.
    """
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        names = [line.partition(":")[2] for line in lines if "model name" in line]
        name = names[0].strip() if names else name
    found = {
        "device": place.device.type,
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": place.world_size,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if place.device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(place.device)
    return found


def _device(name: str) -> torch.device:
    here = ["cpu"]
    if torch.backends.mps.is_available():
        here.insert(0, "mps")
    if torch.cuda.is_available():
        here.insert(0, "cuda")
    if name not in ("auto", *here):
        raise ValueError(f"device={name!r} is not here, only {' and '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)
