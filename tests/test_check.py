"""The checker finds every planted mistake, names it, and never cries wolf."""

import json
import re
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
import vit_pytorch
from mutants import MUTANTS
from right import RIGHT as MORE
from torch import nn
from torchvision.models import VisionTransformer
from transformers import ViTConfig, ViTForImageClassification
from vit_pytorch.simple_vit import SimpleViT
from vit_pytorch.simple_vit_with_register_tokens import SimpleViT as RegisterViT

import minivit
from minivit import check

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
    assert len(MUTANTS) >= 40
    assert len({(m.checker, m.name) for m in MUTANTS}) == len(MUTANTS)
    assert {m.checker for m in MUTANTS} == set(check.__all__) - {"Finding", "Report"}


# Right ones: all must pass ------------------------------------------------------------


def sdpa(q, k, v, attn_mask=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)


def triangle(query_len):
    """Hide what is above the diagonal: not a mistake, though reported as one."""
    return torch.ones(query_len, query_len).triu(diagonal=1).bool()


def torch_additive(query_len):
    return nn.Transformer.generate_square_subsequent_mask(query_len)


def unfold(images, patch_size):
    return F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)


def halves(length, dim):
    """All sines before all cosines, as Tensor2Tensor has them."""
    table = minivit.sinusoidal_positions(length, dim)
    return torch.cat([table[:, 0::2], table[:, 1::2]], dim=1)


def accumulate(model, batches, loss_fn, optimizer, scheduler):
    optimizer.zero_grad()
    for inputs, targets in batches:
        (loss_fn(model(inputs), targets) / len(batches)).backward()
    optimizer.step()
    scheduler.step()


torch_mask = {"mask_name": "attn_mask", "mask_means": "hide"}
torch_layer = {"mask_name": "src_mask", "mask_means": "hide"}
torch_decoder = {"mask_name": "tgt_mask", "mask_means": "hide"}
small = {"image_size": 32, "patch_size": 4, "num_classes": 10}
shape = {"embed_dim": 48, "num_layers": 2, "num_heads": 3, "mlp_dim": 96}
house_ids = {"src_vocab_size": 13, "tgt_vocab_size": 11}
lucid = {"dim": 48, "depth": 2, "heads": 3, "mlp_dim": 96}


def timm_vit(name="vit_tiny_patch16_224", **options):
    options = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 10} | options
    return timm.create_model(name, **options)


def hugging_face(**options):
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 96, "image_size": 32, "patch_size": 4}
    return ViTForImageClassification(ViTConfig(num_labels=10, **sizes, **options))


RIGHT = [
    ("attention", lambda: minivit.attention, {}),
    ("attention", lambda: sdpa, {"mask_name": "attn_mask"}),
    ("causal_mask", lambda: minivit.causal_mask, {}),
    ("causal_mask", lambda: triangle, {"mask_means": "hide"}),
    ("causal_mask", lambda: torch_additive, {}),
    ("padding_mask", lambda: minivit.padding_mask, {}),
    ("sinusoidal_positions", lambda: minivit.sinusoidal_positions, {}),
    ("sinusoidal_positions", lambda: halves, {}),
    ("layer_norm", lambda: minivit.LayerNorm(6), {}),
    ("layer_norm", lambda: minivit.LayerNorm(6).explain, {}),
    ("layer_norm", lambda: nn.LayerNorm(6), {}),
    ("layer_norm", lambda: lambda x: F.layer_norm(x, (6,), eps=1e-6), {"eps": 1e-6}),
    ("patchify", lambda: minivit.patchify, {}),
    ("patchify", lambda: unfold, {"channels_first": True}),
    ("generate", lambda: minivit.greedy_search, {}),
    (
        "generate",
        lambda: lambda *a, **k: minivit.greedy_search(*a, use_cache=False, **k),
        {},
    ),
    (
        "generate",
        lambda: lambda *a, **k: minivit.beam_search(*a, beam_size=1, **k),
        {},
    ),
    ("accumulation", lambda: accumulate, {}),
    ("vocabulary", lambda: lambda train, val, test: set(" ".join(train).split()), {}),
    ("multi_head_attention", lambda: minivit.MultiHeadAttention(24, 4), {}),
    ("multi_head_attention", lambda: minivit.MultiHeadAttention(24, 1, bias=False), {}),
    (
        "multi_head_attention",
        lambda: nn.MultiheadAttention(24, 4, batch_first=True, dropout=0.1),
        torch_mask,
    ),
    (
        "multi_head_attention",
        lambda: nn.MultiheadAttention(24, 4),
        {**torch_mask, "batch_first": False},
    ),
    (
        "multi_head_attention",
        lambda: timm.layers.Attention(24, 4, qkv_bias=True),
        {"embed_dim": 24, "arguments": "x", "mask_name": "attn_mask"},
    ),
    (
        "multi_head_attention",
        lambda: timm.layers.Attention(24, 4, qk_norm=True, norm_layer=nn.LayerNorm),
        {"embed_dim": 24, "arguments": "x", "mask_name": None},
    ),
    (
        "encoder_layer",
        lambda: minivit.EncoderLayer(24, 4, 48, dropout=0.1, layer_scale=1e-4),
        {},
    ),
    ("encoder_layer", lambda: minivit.EncoderLayer(24, 4, 48, norm_first=False), {}),
    *(
        (
            "encoder_layer",
            lambda first=first, act=act: nn.TransformerEncoderLayer(
                24, 4, 48, batch_first=True, norm_first=first, activation=act
            ),
            torch_layer,
        )
        for first in (True, False)
        for act in ("relu", "gelu")
    ),
    (
        "encoder_layer",
        lambda: nn.TransformerEncoderLayer(24, 4, 48),
        {**torch_layer, "batch_first": False},
    ),
    (
        "encoder_layer",
        lambda: timm.models.vision_transformer.Block(24, 4, init_values=1e-5),
        {"embed_dim": 24, "mask_name": None},
    ),
    ("decoder_layer", lambda: minivit.DecoderLayer(24, 4, 48, dropout=0.1), {}),
    ("decoder_layer", lambda: minivit.DecoderLayer(24, 4, 48, norm_first=False), {}),
    *(
        (
            "decoder_layer",
            lambda first=first: nn.TransformerDecoderLayer(
                24, 4, 48, batch_first=True, norm_first=first
            ),
            torch_decoder,
        )
        for first in (True, False)
    ),
    *(
        (
            "transformer",
            lambda first=first, tie=tie: minivit.Transformer(
                **house_ids,
                embed_dim=24,
                num_heads=4,
                num_layers=2,
                mlp_dim=48,
                norm_first=first,
                tie_embeddings=tie,
            ),
            {},
        )
        for first in (True, False)
        for tie in (True, False)
    ),
    ("vit", lambda: minivit.ViT(**small, **shape), {"norm_before_pool": True}),
    ("vit", lambda: minivit.ViT(**small, **shape, pool="mean", dropout=0.1), {}),
    (
        "vit",
        lambda: minivit.ViT(**small, **shape, drop_path=0.1, layer_scale=1e-4),
        {},
    ),
    (
        "vit",
        lambda: minivit.ViT(**small | {"image_size": (16, 24)}, **shape, in_channels=1),
        {},
    ),
    (
        "vit",
        lambda: VisionTransformer(
            image_size=32,
            patch_size=4,
            num_layers=2,
            num_heads=3,
            hidden_dim=48,
            mlp_dim=96,
            num_classes=10,
        ),
        {},
    ),
    ("vit", timm_vit, {"image_size": 32}),
    ("vit", lambda: timm_vit("vit_small_patch16_224"), {"image_size": 32}),
    ("vit", lambda: timm_vit(patch_size=4, img_size=16), {"image_size": 16}),
    (
        "vit",
        lambda: timm_vit(class_token=False, global_pool="avg"),
        {"image_size": 32, "norm_before_pool": False},
    ),
    ("vit", lambda: timm_vit(reg_tokens=4), {"image_size": 32}),
    (
        "vit",
        lambda: timm_vit(reg_tokens=4, no_embed_class=True, global_pool="avg"),
        {"image_size": 32},
    ),
    ("vit", lambda: timm_vit(no_embed_class=True), {"image_size": 32}),
    ("vit", lambda: timm_vit(qk_norm=True, init_values=1e-5), {"image_size": 32}),
    ("vit", hugging_face, {"image_size": 32, "num_classes": 10}),
    (
        "vit",
        lambda: hugging_face(attn_implementation="eager"),
        {"image_size": 32, "num_classes": 10},
    ),
    (
        "vit",
        lambda: vit_pytorch.ViT(**small, **lucid, dropout=0.1, emb_dropout=0.1),
        {"image_size": 32, "num_classes": 10},
    ),
    (
        "vit",
        lambda: vit_pytorch.ViT(**small, **lucid, pool="mean"),
        {"image_size": 32, "num_classes": 10},
    ),
    (
        "vit",
        lambda: SimpleViT(**small, **lucid),
        {"image_size": 32, "num_classes": 10},
    ),
    (
        "vit",
        lambda: RegisterViT(**small, **lucid),
        {"image_size": 32, "num_classes": 10},
    ),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("row", range(len(RIGHT)), ids=lambda i: f"{i}-{RIGHT[i][0]}")
def test_right_ones_pass(row, seed, record_property):
    passes(*RIGHT[row], seed, record_property)


@pytest.mark.parametrize(
    "row", range(len(MORE)), ids=lambda i: f"{MORE[i][0]}-{MORE[i][1].__name__}"
)
def test_other_styles_pass(row, record_property):
    passes(*MORE[row], row, record_property)


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
    report = check.attention(minivit.attention)
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


def test_frozen_and_half_precision_modules_can_be_checked():
    model = minivit.ViT(**small, **shape).requires_grad_(False).bfloat16()
    report = check.vit(model)
    assert report, str(report)


def test_a_trained_model_is_not_blamed_for_its_loss():
    model = minivit.ViT(**small, **shape)
    with torch.no_grad():
        model.head.weight.normal_(std=3.0)
    assert [f.check for f in check.vit(model).findings] == ["first loss"]
    assert check.vit(model, fresh=False)


def test_polarity_is_an_option():
    def hides(q, k, v, mask=None):
        return minivit.attention(q, k, v, mask=None if mask is None else ~mask)

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
    polarity = '{"mask_name": "attn_mask"}'
    oracle = "torch.nn.functional:scaled_dot_product_attention"
    assert main([oracle, "--as", "attention", "--options", polarity]) == 0
    for wrong in (
        ["mine:nothing", "--as", "attention"],
        ["nowhere:attend", "--as", "attention"],
        ["mine:attend", "--as", "attention", "--kwargs", "{"],
        ["mine:attend", "--as", "nonsense"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
    assert "cannot use" in capsys.readouterr().err


def test_command_line_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "minivit.check", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "package.module:Name" in done.stdout
