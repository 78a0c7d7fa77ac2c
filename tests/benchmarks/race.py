"""Run contestants in turn, in one process, and keep the time of every turn.

The speed of a machine drifts: by its temperature, by what else it does. So nobody runs
alone. Each round gives every contestant one turn, in a new order, and what is compared
is the times of one round.
"""

import json
import math
import os
import random
import tempfile
import time
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIN_TURN = 0.1  # seconds; what is faster is repeated within its turn
WARM_UP = 2  # rounds


def autocast():
    """bfloat16 on a GPU, float32 on the CPU."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda")


def race(benchmark, title, contestants, *, rounds, goals):
    """Time the contestants round by round, and write it into the benchmark's record.

    Args:
        benchmark: the fixture of pytest-benchmark, which counts the rounds.
        title: name of the row.
        contestants: {name: function without arguments}.
        rounds: how many count; $ROUNDS, where set, is an upper limit.
        goals: {name: largest allowed ratio of its time to that of the best peer}.
            Whoever has no goal is a peer.
    """
    rounds = limited(rounds)
    order = random.Random(0)
    for run in contestants.values():
        run()  # the first call may build or compile
    once = min(turn(run, 1) for run in contestants.values())
    repeat = math.ceil(MIN_TURN / max(once, 1e-6))
    samples = {name: [] for name in contestants}

    def one_round():
        for name in order.sample(list(contestants), len(contestants)):
            samples[name].append(turn(contestants[name], repeat))

    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=WARM_UP)
    counted = {name: times[-rounds:] for name, times in samples.items()}
    record(benchmark, title, "s", counted, goals)


def limited(rounds):
    """Let `make bench ROUNDS=3` have a quick look."""
    return min(rounds, int(os.environ.get("ROUNDS") or rounds))


def turn(run, repeat):
    """Return the seconds that one call takes, the GPU's work included."""
    synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    synchronize()
    return (time.perf_counter() - start) / repeat


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def record(benchmark, title, unit, samples, goals):
    """Add a row to what `--benchmark-json` writes; tools/benchmarks.py reads it."""
    benchmark.extra_info.setdefault("device", device_name())
    benchmark.extra_info.setdefault("threads", torch.get_num_threads())
    rows = benchmark.extra_info.setdefault("rows", [])
    rows.append({"title": title, "unit": unit, "samples": samples, "goals": goals})


def device_name():
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"


def peak_memory(run):
    """Return the most bytes that a call holds at once, beyond what was there before.

    On the CPU torch's own record of every allocation is added up. It is exact and the
    same each time. The memory of the process, as the operating system sees it, is
    neither: freed pages are kept and used again.
    """
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    held = peak = 0
    events = [event for event in events if event.get("name") == "[memory]"]
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]  # negative where something is freed
        peak = max(peak, held)
    return peak
