"""The checker finds every planted mistake, names it, and never cries wolf."""

import contextlib
import json
import random
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mutants import MUTANTS
from right import STYLES
from right.libraries import LIBRARIES, sdpa, shape, small
from torch import nn

import minivit
from minivit import check
from minivit.attention import attention

# Mistakes: all must be caught, and named where they can be ----------------------------


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.checker}-{m.name}")
def test_mutants_are_caught_and_named(mutant, record_property):
    record_property("checker", "mutants caught and named")
    report = getattr(check, mutant.checker)(mutant.make(), **mutant.options)
    assert not report, f"{mutant.name} passed"
    found = [f for f in report.findings if re.fullmatch(mutant.finding, f.check)]
    assert found, report
    said = [f"{f.symptom}: {f.cause}" for f in found]
    assert any(
        mutant.cause in text or re.search(mutant.cause, text) for text in said
    ), report
    assert all(f.symptom and f.cause and f.look_at for f in report.findings)


def test_there_are_enough_mutants():
    assert len(MUTANTS) >= 190
    assert len({(m.checker, m.name) for m in MUTANTS}) == len(MUTANTS)
    checkers = {name for name in check.__all__ if name.islower()}
    assert {m.checker for m in MUTANTS} == checkers


# Right ones: all must pass ------------------------------------------------------------


@pytest.mark.parametrize(
    "row", range(len(LIBRARIES)), ids=lambda i: f"{i}-{LIBRARIES[i][0]}"
)
def test_right_ones_pass(row, record_property):
    passes(*LIBRARIES[row], 0, record_property)


@pytest.mark.parametrize(
    "row", range(len(STYLES)), ids=lambda i: f"{STYLES[i][0]}-{STYLES[i][1].__name__}"
)
def test_other_styles_pass(row, record_property):
    passes(*STYLES[row], row, record_property)


def passes(checker, make, options, seed, record_property):
    record_property("checker", "right implementations passed")
    torch.manual_seed(seed)
    report = getattr(check, checker)(make(), **options)
    assert report, str(report)


@pytest.mark.slow
def test_a_base_model_at_full_size_takes_less_than_a_minute():
    import time

    model = minivit.vit_b_16()
    start = time.perf_counter()
    report = check.vit(model)
    seconds = time.perf_counter() - start
    assert report, str(report)
    assert seconds < 60, seconds


# What the reader meets ----------------------------------------------------------------


def times_root(q, k, v, mask=None):
    scores = q @ k.mT * q.size(-1) ** 0.5
    if mask is None:
        return scores.softmax(-1) @ v
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(~mask, 0.0) @ v


def test_report_reads_as_promised():
    report = check.attention(times_root)
    assert str(report) == (
        "attention: 1 of 12 checks failed\n"
        "  x scale        outputs match softmax(Q Kᵀ · √d): the scores are multiplied "
        "by √d, not divided\n"
        "                 look at: the line that computes the scores"
    )
    assert not report
    (finding,) = report.findings
    assert finding.check == "scale"
    page = report._repr_html_()
    assert "<table>" in page
    assert "√d" in page
    with pytest.raises(AssertionError, match="multiplied by √d"):
        report.raise_if_failed()


def test_report_of_something_right():
    report = check.attention(attention)
    assert report
    assert str(report) == "attention: all 12 checks passed"
    assert "<table>" not in report._repr_html_()
    report.raise_if_failed()


def test_html_is_escaped():
    def raises(q, k, v, mask=None):
        raise ValueError("<script>")

    assert "<script>" not in check.attention(raises)._repr_html_()


def test_exceptions_are_findings_that_say_where():
    def broken(q, k, v, mask=None):
        return q @ k

    report = check.attention(broken)
    assert not report
    assert "RuntimeError" in report.findings[0].symptom
    assert "broken, line" in report.findings[0].look_at


def test_the_users_module_is_left_as_it_was():
    model = minivit.ViT(**small, **shape, dropout=0.1).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    assert check.vit(model)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_users_generators_are_left_as_they_were():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    before = states()
    assert check.multi_head_attention(minivit.MultiHeadAttention(8, 2))
    assert states() == before


class HeadInAClosure(minivit.ViT):
    """A copy of the module still holds the lambda, and the lambda this module."""

    def __init__(self):
        super().__init__(**small, **shape)
        self.classify = lambda x: self.head(self.features(x)[:, 0])

    def forward(self, x):
        return self.classify(x)


EMBEDDED = torch.randn(10, 48) * 0.1


class HeadOfGlobals(nn.Module):
    """Compares images with a fixed table, as CLIP with its embedded texts."""

    def __init__(self):
        super().__init__()
        self.vit = minivit.ViT(**small, **shape)
        self.vit.head = nn.Identity()

    def forward(self, x):
        return F.linear(self.vit.features(x)[:, 0], EMBEDDED)


@pytest.mark.parametrize("make", [HeadInAClosure, HeadOfGlobals])
def test_weights_that_a_copy_does_not_own_are_left_as_they_were(make):
    model, table = make(), EMBEDDED.clone()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    report = check.vit(model, image_size=32, in_channels=3, num_classes=10)
    assert report, report
    assert torch.equal(EMBEDDED, table)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


# What the caller has set --------------------------------------------------------------


@contextlib.contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "surroundings",
    [
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.device("meta"),
        float64_by_default(),
    ],
    ids=["no_grad", "inference_mode", "autocast", "device", "dtype"],
)
def test_what_surrounds_the_call_changes_no_verdict(surroundings):
    model, layer = minivit.ViT(**small, **shape), minivit.EncoderLayer(24, 4, 48)
    norm = nn.LayerNorm(6)
    before = torch.is_grad_enabled(), torch.get_default_dtype()
    with surroundings:
        inside = torch.is_grad_enabled(), torch.get_default_dtype()
        reports = check.vit(model), check.encoder_layer(layer)
        functions = check.attention(times_root), check.layer_norm(norm)
        assert (torch.is_grad_enabled(), torch.get_default_dtype()) == inside
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == before
    assert all(reports), reports
    assert functions[0].findings == check.attention(times_root).findings
    assert functions[1], functions[1]


# What cannot be checked ---------------------------------------------------------------


class Uncopied(minivit.EncoderLayer):
    def __deepcopy__(self, memo):
        return self


def without_numbers(layer):
    return layer.to("meta")


def not_called_yet(layer):
    layer.net = nn.Sequential(nn.LazyLinear(24))
    return layer


def locked(layer):
    layer.lock = threading.Lock()
    return layer


def one_nan(layer):
    next(layer.parameters()).data[0] = torch.nan
    return layer


@pytest.mark.parametrize(
    ("spoil", "check_name", "words"),
    [
        (lambda layer: Uncopied(24, 4, 48).train(), "copy", "shares weights"),
        (without_numbers, "copy", "meta"),
        (not_called_yet, "copy", "uninitialized"),
        (locked, "copy", "lock"),
        (one_nan, "weights", "holds NaN or infinite numbers"),
    ],
)
def test_what_cannot_be_checked_is_one_finding(spoil, check_name, words):
    layer = spoil(minivit.EncoderLayer(24, 4, 48).train())
    report = check.encoder_layer(layer)
    (finding,) = report.findings
    assert finding.check == check_name
    assert words in f"{finding.symptom}: {finding.cause}"
    assert report.checks == [check_name]
    assert layer.training


def test_tensors_kept_in_nested_lists_can_be_copied():
    class Kept(minivit.MultiHeadAttention):
        def forward(self, *inputs, mask=None):
            out = super().forward(*inputs, mask=mask)
            self.past = [{"layer": (out, out * 2)}]
            return out

    module = Kept(8, 2)
    x = torch.randn(2, 5, 8)
    module(x, x, x)
    past = module.past[0]["layer"][0].clone()
    assert check.multi_head_attention(module)
    assert torch.equal(module.past[0]["layer"][0], past)


def test_integers_among_the_parameters_are_left_alone():
    class Numbered(minivit.ViT):
        def __init__(self):
            super().__init__(**small, **shape)
            self.numbers = nn.Parameter(torch.arange(5), requires_grad=False)

    report = check.vit(Numbered())
    assert report, report


def test_frozen_and_half_precision_modules_can_be_checked():
    model = minivit.ViT(**small, **shape).requires_grad_(False).bfloat16()
    report = check.vit(model)
    assert report, str(report)


def test_a_layer_normalisation_in_half_precision_can_be_checked():
    report = check.layer_norm(nn.LayerNorm(6).bfloat16())
    assert report, report


def test_another_eps_is_called_that():
    def of_bert(x):
        return F.layer_norm(x, (6,), eps=1e-12)

    (finding,) = check.layer_norm(of_bert).findings
    assert "eps is smaller than 1e-7, not 1e-05" in finding.cause
    assert check.layer_norm(of_bert, eps=1e-12)


def test_a_trained_model_is_not_blamed_for_its_loss():
    model = minivit.ViT(**small, **shape)
    with torch.no_grad():
        model.head.weight.normal_(std=3.0)
    assert [f.check for f in check.vit(model).findings] == ["first loss"]
    assert check.vit(model, fresh=False)


def test_polarity_is_an_option():
    def hides(q, k, v, mask=None):
        return attention(q, k, v, mask=None if mask is None else ~mask)

    assert not check.attention(hides)
    assert check.attention(hides, mask_means="hide")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: check.attention(sdpa, mask_means="show"), "'look' or 'hide'"),
        (lambda: check.vit(nn.Linear(3, 3)), "image_size is needed"),
        (lambda: check.transformer(nn.Linear(3, 3)), "src_vocab_size is needed"),
        (lambda: check.encoder_layer(nn.ReLU()), "embed_dim is needed"),
        (lambda: check.multi_head_attention(nn.ReLU()), "embed_dim is needed"),
    ],
)
def test_what_is_missing_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_command_line(tmp_path, monkeypatch, capsys):
    from minivit.check.__main__ import main

    (tmp_path / "mine.py").write_text(
        "def attend(q, k, v, mask=None):\n    return (q @ k.mT).softmax(-1) @ v\n",
        "utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["mine:attend", "--as", "attention"]) == 1
    assert "not divided by √d" in capsys.readouterr().out
    kwargs = json.dumps({**small, **shape})
    assert main(["minivit:ViT", "--as", "vit", "--kwargs", kwargs]) == 0
    assert "vit: all" in capsys.readouterr().out
    shape_of_8 = '{"image_size": 8, "num_classes": 3}'
    polarity = '{"mask_name": "attn_mask"}'
    oracle = "torch.nn.functional:scaled_dot_product_attention"
    assert main([oracle, "--as", "attention", "--options", polarity]) == 0
    linear = ["torch.nn:Linear", "--as", "multi_head_attention", "--kwargs"]
    for wrong, message in (
        (["mine:nothing", "--as", "attention"], "has no attribute 'nothing'"),
        (["nowhere:attend", "--as", "attention"], "No module named 'nowhere'"),
        (["mine:attend", "--as", "attention", "--kwargs", "{"], "--kwargs is no JSON"),
        (["mine:attend", "--as", "attention", "--options", "[]"], "be a JSON object"),
        (["mine:attend", "--as", "nonsense"], "invalid choice"),
        (["mine:attend", "--as", "vit", "--options", shape_of_8], "an nn.Module, got"),
        ([*linear, '{"in_features": 3, "out_features": 3}'], "embed_dim is needed"),
        ([*linear, '{"colour": 3}'], "unexpected keyword argument 'colour'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_command_line_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "minivit.check", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "package.module:Name" in done.stdout


# What is said of sizes and of functions -----------------------------------------------


def test_sizes_that_are_given_win_over_those_of_the_model():
    model = minivit.ViT(**small, **shape | {"in_channels": 1})
    assert check.vit(model)
    wrong = check.vit(model, num_classes=7)
    assert [f.check for f in wrong.findings] == ["shape"], wrong
    assert check.vit(
        model, image_size=model.patch_embed.image_size
    )  # its channel is found


@pytest.mark.parametrize(
    "checker", ["multi_head_attention", "encoder_layer", "decoder_layer", "vit"]
)
def test_a_function_is_no_module(checker):
    """Most checks change the weights; a function has none that they could find."""
    sizes = {"vit": {"image_size": 8, "num_classes": 3}}
    sizes["multi_head_attention"] = {"embed_dim": 8, "num_heads": 2}
    options = sizes.get(checker, {"embed_dim": 8})
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got function: put"):
        getattr(check, checker)(lambda x, *_, **__: x, **options)


def test_hidden_rows_are_left_out_if_nobody_hides_them():
    def strict(query, key, value, mask=None):
        if mask is not None and not mask.any(-1).all():
            raise ValueError("a query may look nowhere")
        return attention(query, key, value, mask=mask)

    assert check.attention(strict, hidden_rows=False)
    assert not check.attention(strict)


def test_masks_that_are_added():
    def added(n):
        return torch.zeros(n, n).masked_fill(~minivit.causal_mask(n), -torch.inf)

    assert check.causal_mask(added, mask_means="add")


def test_the_first_loss_is_the_mean_over_all_answers():
    from minivit.check.properties import large_first_loss

    logits = 3 * torch.randn(4, 6, 50)
    answers = torch.arange(50).expand(4, 6, 50)
    every = logits[:, :, None].expand(-1, -1, 50, -1)
    loss = F.cross_entropy(every.reshape(-1, 50), answers.reshape(-1)).item()
    assert f"{loss:.2g}" in large_first_loss(logits).symptom
    assert large_first_loss(torch.zeros(8, 100, 30_000)) is None  # in memory for it
