"""The benchmarks are fair, count rightly, and the page says what the log says.

How fast minivit is, only `make bench` measures; here everything is tiny.
"""

import json
import runpy
from pathlib import Path

import pytest
import torch
from benchmarks import race as racing
from benchmarks import test_speed as speed
from benchmarks.peers import Shape, translators, vits
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
TOOL = runpy.run_path(str(ROOT / "tools/benchmarks.py"))
TINY = Shape(8, 4, 16, 2, 2, 10)


class Recorder:
    """The part of pytest-benchmark's fixture that the benchmarks use."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, function, *, rounds, warmup_rounds):
        for _ in range(warmup_rounds + rounds):
            function()

    def report(self):
        return {
            "benchmarks": [{"extra_info": self.extra_info}],
            "machine_info": {"cpu": {"brand_raw": "abacus"}, "python_version": "3.14"},
            "commit_info": {"id": "0123456789abcdef"},
            "datetime": "2026-01-02T03:04:05",
        }


@pytest.fixture
def recorder():
    return Recorder()


def cost(model, *inputs):
    """Count trained parameters and floating-point operations."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.train()(*inputs)  # eval mode may take paths that are not counted
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return parameters, counter.get_total_flops()


@pytest.mark.parametrize("title", speed.VITS)
def test_vits_do_the_same_work(title):
    shape = speed.VITS[title][0]
    with torch.device("meta"):
        images = torch.empty(2, 3, shape.image_size, shape.image_size)
        costs = {name: cost(model, images) for name, model in vits(shape).items()}
    assert len(costs) == 6
    assert set(costs.values()) == {costs["minivit"]}
    assert min(costs["minivit"]) > 1e6


def test_translators_do_the_same_work():
    sizes = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 32}
    models = translators(vocab_size=50, max_len=8, **sizes)
    src, tgt = torch.randint(3, 50, (2, 7)), torch.randint(3, 50, (2, 5))
    theirs = models["Hugging Face"]
    ours = cost(models["minivit"], src, tgt)
    assert ours == cost(theirs, src, None, tgt)
    assert min(ours) > 1000


def test_attentions_agree():
    x = torch.randn(1, 9, 16)
    outputs = [function(x) for function in speed.attentions(16, 2).values()]
    assert len(outputs) == 4
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-5)


def test_race_takes_turns(recorder, monkeypatch):
    """With a clock that only the contestants move."""
    now, calls = [0.0], []
    monkeypatch.setattr(racing.time, "perf_counter", lambda: now[0])

    def runner(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds * (1 + len(calls) // 4)  # the machine gets slower

        return run

    contestants = {name: runner(name, s) for name, s in {"a": 1, "b": 2}.items()}
    racing.race(recorder, "row", contestants, rounds=8, goals={"a": 0.5})
    (row,) = recorder.extra_info["rows"]
    assert {name: len(times) for name, times in row["samples"].items()} == {
        "a": 8,
        "b": 8,
    }
    turns = [calls[i : i + 2] for i in range(4, len(calls), 2)]
    assert len(turns) == 8 + racing.WARM_UP
    assert {tuple(turn) for turn in turns} == {("a", "b"), ("b", "a")}
    (result,) = TOOL["split"](row)
    assert 0.45 < result["ratios"]["b"][1] < 0.55


def test_race_repeats_what_is_short(recorder, monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(racing.time, "perf_counter", lambda: now[0])

    def run():
        calls.append(1)
        now[0] += racing.MIN_TURN / 4.5

    racing.race(recorder, "row", {"a": run}, rounds=3, goals={})
    assert len(calls) == 2 + 5 * (3 + racing.WARM_UP)
    samples = recorder.extra_info["rows"][0]["samples"]["a"]
    assert samples == pytest.approx([racing.MIN_TURN / 4.5] * 3)


@pytest.mark.skipif(racing.DEVICE.type == "cuda", reason="a GPU rounds sizes up")
def test_peak_memory_is_exact():
    floats = 2**18  # 1 MiB

    def one_after_the_other():
        a = torch.empty(floats)
        del a
        torch.empty(2 * floats)

    def both_at_once():
        a = torch.empty(floats)
        return a, torch.empty(2 * floats)

    assert racing.peak_memory(one_after_the_other) == 2 * 2**20
    assert racing.peak_memory(both_at_once) == 3 * 2**20


def test_rows_run(recorder, monkeypatch):
    """Every kind of row, at its smallest."""
    monkeypatch.setenv("ROUNDS", "1")
    monkeypatch.setattr(racing, "MIN_TURN", 1e-9)
    sizes = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
    for work in ("forward", "training step"):
        speed.vit_row(recorder, f"ViT: {work}", TINY, work, 2, compiled=False)
    for work in ("forward", "training"):
        speed.attention_row(recorder, "attention", 8, work, embed_dim=16, heads=2)
    speed.decoding_row(recorder, "writing", 3, 2, sizes)
    speed.test_import(recorder)
    log = TOOL["gist"](recorder.report(), load=0.0)
    assert len(log["rows"]) == 2 + 2 * 2 + 1 + 1
    for row in log["rows"]:
        assert row["rounds"] == 1
        assert row["minivit"] > 0
        assert min(row["peers"].values()) > 0
    memory = [row for row in log["rows"] if row["unit"] == "B"]
    assert [row["ratios"]["fused kernel"][1] for row in memory] == [1.0, 1.0]


def test_a_miss_is_shown(recorder, tmp_path):
    """The best peer counts, round by round; another one that is slow does not help."""
    samples = {"minivit": [2.0, 3.0, 4.0], "fast": [1.0, 2.0, 4.0], "slow": [9.0] * 3}
    for title, goal in (("lost", 1.03), ("won", 1.5)):
        racing.record(recorder, title, "s", samples, {"minivit": goal})
    log = TOOL["gist"](recorder.report(), load=0.04)
    assert log["rows"][0]["ratios"]["fast"] == [1.25, 1.5, 1.75]
    text = TOOL["results"]("cpu", log)
    row = "| 3.00 s | fast, 2.00 s | 1.500 (1.250 to 1.750) |"
    assert f"| lost {row} ≤ 1.03 | **missed** |" in text
    assert f"| won {row} ≤ 1.50 | met |" in text
    assert "**1 of 2 rows met their goal.** Missed: lost." in text
    assert "| lost | 3 | fast 1.500 · slow 0.333 |" in text

    TOOL["picture"](log, tmp_path / "first.svg")
    TOOL["picture"](log, tmp_path / "second.svg")
    first = (tmp_path / "first.svg").read_bytes()
    assert first == (tmp_path / "second.svg").read_bytes()
    assert first.count(b"<!-- missed -->") == 1


def test_compiled_has_a_row_of_its_own(recorder):
    samples = {"minivit": [2.0], "minivit, compiled": [1.0], "peer": [2.0]}
    goals = {"minivit": 1.03, "minivit, compiled": 1 / 1.2}
    racing.record(recorder, "ViT: forward", "s", samples, goals)
    eager, compiled = TOOL["gist"](recorder.report(), load=0.0)["rows"]
    assert eager["title"] == "ViT: forward"
    assert compiled["title"] == "ViT: forward, compiled"
    assert (eager["ratios"], compiled["ratios"]) == (
        {"peer": [1.0] * 3},
        {"peer": [0.5] * 3},
    )


def test_page_says_what_the_logs_say():
    logs = TOOL["read_logs"]()
    assert "cpu" in logs
    text = (ROOT / "book/benchmarks.md").read_text("utf-8")
    assert TOOL["page"](text, logs) == text, "python tools/benchmarks.py --write"
    for name, log in logs.items():
        picture = (ROOT / f"book/figures/benchmarks-{name}.svg").read_text("utf-8")
        missed = sum(not TOOL["is_met"](row) for row in log["rows"])
        assert picture.count("<!-- missed -->") == missed
        for row in log["rows"]:
            assert f"<!-- {row['title']} -->" in picture
        json.dumps(log, allow_nan=False)
