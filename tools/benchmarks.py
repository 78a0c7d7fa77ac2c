"""Measure how fast minivit is, and write it into the book.

    python tools/benchmarks.py            # make bench: measure, then write
    python tools/benchmarks.py --write    # write page and pictures from the logs again

tests/benchmarks/ measures; pytest-benchmark hands over a report; its gist is kept in
book/logs/benchmarks-cpu.json (or -cuda.json, where there is a GPU); and from these logs
come the tables in book/benchmarks.md and the pictures in book/figures/.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "book/benchmarks.md"
LOGS = ROOT / "book/logs"
FIGURES = ROOT / "book/figures"
BEGIN, END = "% what follows is written by `make bench`", "% so far `make bench`"
LIBRARIES = ["torch", "torchvision", "timm", "transformers", "vit-pytorch"]


def measure():
    """Run the benchmarks and return pytest-benchmark's report."""
    environment = {"OMP_NUM_THREADS": "2", **os.environ}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "benchmark",
            "tests/benchmarks",
        ]
        command += ["-v", "--benchmark-disable-gc", f"--benchmark-json={report}"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        return json.loads(report.read_text("utf-8"))


def gist(report, load):
    """Keep of a report what the page tells, rounded."""
    benchmarks = [benchmark["extra_info"] for benchmark in report["benchmarks"]]
    machine, first = report["machine_info"], benchmarks[0]
    return {
        "command": "make bench",
        "date": report["datetime"][:10],
        "commit": report["commit_info"]["id"][:12],
        "device": first["device"],
        "processor": machine["cpu"].get("brand_raw", "unknown processor"),
        "threads": first["threads"],
        "load_before": round(load, 1),
        "python": machine["python_version"],
        "libraries": {name: version(name) for name in LIBRARIES},
        "rows": [
            row for info in benchmarks for raw in info["rows"] for row in split(raw)
        ],
    }


def split(row):
    """Compare each contestant that has a goal with all that have none."""
    samples, goals = row["samples"], row["goals"]
    for name, goal in goals.items():
        ratios = {
            peer: spread([a / b for a, b in zip(samples[name], times, strict=True)])
            for peer, times in samples.items()
            if peer not in goals
        }
        variant = name.partition(", ")[2]  # of "minivit, compiled"
        yield {
            "title": row["title"] + (f", {variant}" if variant else ""),
            "unit": row["unit"],
            "rounds": len(samples[name]),
            "goal": round(goal, 4),
            "minivit": digits(median(samples[name])),
            "peers": {peer: digits(median(samples[peer])) for peer in ratios},
            "ratios": ratios,
        }


def spread(ratios):
    """Lower quartile, median, upper quartile."""
    if len(ratios) == 1:
        return [round(ratios[0], 3)] * 3
    return [round(q, 3) for q in quantiles(ratios, n=4, method="inclusive")]


def digits(x):
    """Round to four significant digits."""
    return float(f"{x:.4g}")


def best_peer(row):
    """The one beside whom minivit looks worst."""
    return max(row["ratios"], key=lambda peer: row["ratios"][peer][1])


def is_met(row):
    return row["ratios"][best_peer(row)][1] <= row["goal"]


def results(name, log):
    """Write the section of one log: machine, picture, two tables."""
    missed = [row["title"] for row in log["rows"] if not is_met(row)]
    total = len(log["rows"])
    verdict = (
        f"**{total - len(missed)} of {total} rows met their goal.** "
        f"Missed: {'; '.join(missed)}."
        if missed
        else f"**All {total} rows met their goal.**"
    )
    on_gpu = log["device"] != "cpu"
    machine = f"{log['device']}, bfloat16 autocast" if on_gpu else "CPU only, float32"
    libraries = ", ".join(f"{n} {v}" for n, v in log["libraries"].items())
    lines = [
        f"## On {'a GPU' if on_gpu else 'the CPU'}",
        "",
        f"{verdict} Measured on {log['date']} by `{log['command']}` at commit "
        f"`{log['commit']}`; {machine}; {log['processor']}, threads: {log['threads']}; "
        f"load of the machine just before: {log['load_before']}. "
        f"Python {log['python']}, {libraries}.",
        "",
        f"```{{figure}} figures/benchmarks-{name}.svg",
        f":alt: {alternative(log)}",
        "",
        "minivit's time or memory over that of each peer; left of 1 is better. "
        "Grey: every peer. In colour: the best peer, with the quartiles of the rounds. "
        "The short upright line is the goal.",
        "```",
        "",
        "| row | minivit | best peer | ratio (quartiles) | goal | |",
        "|---|---|---|---|---|---|",
    ]
    for row in log["rows"]:
        peer = best_peer(row)
        low, middle, high = row["ratios"][peer]
        lines.append(
            f"| {row['title']} | {amount(row['minivit'], row['unit'])} "
            f"| {peer}, {amount(row['peers'][peer], row['unit'])} "
            f"| {middle:.3f} ({low:.3f} to {high:.3f}) | ≤ {row['goal']:.2f} "
            f"| {'met' if is_met(row) else '**missed**'} |"
        )
    lines += ["", "Against everybody, the ratio to the best peer first:", ""]
    lines += ["| row | rounds | median ratios |", "|---|---|---|"]
    for row in log["rows"]:
        order = sorted(row["ratios"].items(), key=lambda item: -item[1][1])
        everybody = " · ".join(f"{peer} {middle:.3f}" for peer, (_, middle, _) in order)
        lines.append(f"| {row['title']} | {row['rounds']} | {everybody} |")
    return "\n".join(lines)


def alternative(log):
    """Say what the picture shows."""
    best = [row["ratios"][best_peer(row)][1] for row in log["rows"]]
    met = sum(map(is_met, log["rows"]))
    return (
        f"Ratios of minivit to the best peer in {len(best)} rows, "
        f"from {min(best):.2f} to {max(best):.2f}; {met} rows meet their goal."
    )


def amount(x, unit):
    """Print seconds or bytes with three digits and a readable unit."""
    scales = {"s": [(1, "s"), (1e-3, "ms"), (1e-6, "µs")], "B": [(1e6, "MB")]}[unit]
    scale, name = next((pair for pair in scales if x >= pair[0]), scales[-1])
    x /= scale
    places = max(0, 2 - math.floor(math.log10(x))) if x > 0 else 0
    return f"{x:.{places}f} {name}"


def page(text, logs):
    """Put the sections of all logs between the two marks of the page."""
    sections = "\n\n".join(results(name, log) for name, log in logs.items())
    pattern = re.compile(f"(?<={re.escape(BEGIN)}\n).*(?={re.escape(END)})", re.S)
    new, count = pattern.subn(lambda _: f"\n{sections}\n\n", text)
    if count != 1:
        raise ValueError(f"{PAGE.name} must hold {BEGIN!r} and {END!r} once")
    return new


def picture(log, path):
    """Draw every row's ratios on one axis, so that a miss is seen at once."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from minivit import plots

    plots.use_style()
    # The same log gives the same file, byte for byte.
    plt.rcParams.update({"svg.hashsalt": "minivit", "axes.grid.axis": "x"})
    rows = log["rows"]
    highest = max(row["ratios"][best_peer(row)][2] for row in rows)
    left, right = 0.5, max(1.15, 1.05 * highest)
    fig, ax = plt.subplots(figsize=(6.4, 0.3 * len(rows) + 0.9))
    for y, row in enumerate(rows):
        for _, middle, _ in row["ratios"].values():
            ax.plot(max(middle, left), y, "o", color="0.75", markersize=4, zorder=2)
        low, middle, high = (max(x, left) for x in row["ratios"][best_peer(row)])
        colour = plots.COLOURS[0 if is_met(row) else 1]
        ax.plot([low, high], [y, y], color=colour, linewidth=2.5, zorder=3)
        ax.plot(middle, y, "o" if is_met(row) else "X", color=colour, zorder=4)
        ax.plot([row["goal"]] * 2, [y - 0.4, y + 0.4], color="black", linewidth=1.2)
        if not is_met(row):
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            ax.annotate("missed", (right, y), **place, color=colour, fontsize=9)
    ax.axvline(1, color="0.5", linewidth=0.8, zorder=1)
    ax.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=9)
    ax.set(xlim=(left, right), ylim=(len(rows) - 0.5, -0.5))
    ax.set_xlabel("minivit / peer (0.5 or less at the left edge)")
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def read_logs():
    """Return {"cpu": log, "cuda": log}, as far as they are there."""
    return {
        path.stem.partition("-")[2]: json.loads(path.read_text("utf-8"))
        for path in sorted(LOGS.glob("benchmarks-*.json"))
    }


def main(arguments):
    if "--write" not in arguments:
        load = os.getloadavg()[0]
        log = gist(measure(), load)
        name = "cpu" if log["device"] == "cpu" else "cuda"
        LOGS.mkdir(exist_ok=True)
        text = json.dumps(log, indent=1, ensure_ascii=False)
        # One line a list of three, not five.
        text = re.sub(
            r"\[\s+([\d.]+),\s+([\d.]+),\s+([\d.]+)\s+\]", r"[\1, \2, \3]", text
        )
        (LOGS / f"benchmarks-{name}.json").write_text(text + "\n", "utf-8")
    logs = read_logs()
    for name, log in logs.items():
        picture(log, FIGURES / f"benchmarks-{name}.svg")
    PAGE.write_text(page(PAGE.read_text("utf-8"), logs), "utf-8")
    for log in logs.values():
        for row in log["rows"]:
            ratio, verdict = row["ratios"][best_peer(row)][1], is_met(row)
            print(f"{row['title']:48} {ratio:.3f}  {'met' if verdict else 'MISSED'}")


if __name__ == "__main__":
    main(sys.argv[1:])
