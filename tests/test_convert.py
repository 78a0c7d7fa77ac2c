"""Weights cross over from three libraries with the same answers, or not at all."""

import functools

import pytest
import torch
from models import randomise
from torch import nn

from minivit import ViT, resample_positions
from minivit.convert import (
    from_huggingface,
    from_timm,
    from_torchvision,
    to_torchvision,
)

NUM_CLASSES = 7
# The sizes by name, and timm's names of them.
SIZES = {
    "vit_ti_16": dict(patch_size=16, embed_dim=192, num_heads=3),
    "vit_s_16": dict(patch_size=16, embed_dim=384, num_heads=6),
    "vit_b_16": dict(patch_size=16, embed_dim=768, num_heads=12),
    "vit_b_32": dict(patch_size=32, embed_dim=768, num_heads=12),
}
TIMM_NAMES = {
    "vit_ti_16": "vit_tiny_patch16_224",
    "vit_s_16": "vit_small_patch16_224",
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
}
TINY = dict(image_size=32, patch_size=16, embed_dim=24, num_layers=2, num_heads=3)


def ours(*, embed_dim, image_size=224, num_layers=12, norm_eps=1e-6, **sizes):
    return ViT(
        image_size=image_size,
        num_classes=NUM_CLASSES,
        embed_dim=embed_dim,
        num_layers=num_layers,
        mlp_dim=4 * embed_dim,
        norm_eps=norm_eps,
        **sizes,
    )


def torchvision_vit(*, embed_dim, num_heads, patch_size, image_size=224, num_layers=12):
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        num_layers=num_layers,
        num_heads=num_heads,
        hidden_dim=embed_dim,
        mlp_dim=4 * embed_dim,
        num_classes=NUM_CLASSES,
    )


def timm_vit(*, num_layers=12, image_size=224, **sizes):
    from timm.models import VisionTransformer

    return VisionTransformer(
        img_size=image_size, depth=num_layers, num_classes=NUM_CLASSES, **sizes
    )


def huggingface_vit(*, embed_dim, num_heads, patch_size, image_size=224, num_layers=12):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=embed_dim,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=4 * embed_dim,
        image_size=image_size,
        patch_size=patch_size,
        num_labels=NUM_CLASSES,
        attn_implementation="sdpa",
    )
    return ViTForImageClassification(config)


LIBRARIES = {
    "torchvision": (torchvision_vit, from_torchvision),
    "timm": (timm_vit, from_timm),
    "huggingface": (huggingface_vit, from_huggingface),
}
library = pytest.mark.parametrize("library", LIBRARIES)


@torch.no_grad()
def build(make, **sizes):
    """Build without the slow initialisation that is overwritten anyway."""
    with torch.device("meta"):
        model = make(**sizes)
    return randomise(model.to_empty(device="cpu")).eval()


def converted(state_dict, convert, **sizes):
    with torch.device("meta"):
        model = ours(**sizes)
    model.load_state_dict(convert(state_dict), assign=True)
    return model.eval()


def logits(model, images):
    with torch.no_grad():
        out = model(images)
    return out if isinstance(out, torch.Tensor) else out.logits


@functools.cache
def tiny(name):
    return build(LIBRARIES[name][0], **TINY)


def tiny_weights(name):
    return dict(tiny(name).state_dict())


# --- the same answers ------------------------------------------------------------


@library
@pytest.mark.parametrize("size", SIZES)
def test_logits_are_equal(library, size):
    make, convert = LIBRARIES[library]
    if library == "timm":
        import timm

        def make(**sizes):
            return timm.create_model(TIMM_NAMES[size], num_classes=NUM_CLASSES)

    theirs = build(make, **SIZES[size])
    eps = 1e-12 if library == "huggingface" else 1e-6
    # Equal in 64 bits to 1e-10 leaves no room for another eps, GELU or order.
    images = torch.randn(1, 3, 224, 224)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        theirs = theirs.to(dtype)
        mine = converted(theirs.state_dict(), convert, norm_eps=eps, **SIZES[size])
        expected = logits(theirs, images.to(dtype))
        assert expected.std() > 0.1, "logits that hardly differ would prove nothing"
        difference = (mine(images.to(dtype)) - expected).abs().max().item()
        assert difference <= tolerance


def test_logits_of_wide_images_are_equal():
    """Rows and columns of the patches are not confused. The others want squares."""
    sizes = TINY | dict(image_size=(32, 64))
    theirs = build(timm_vit, **sizes)
    mine = converted(theirs.state_dict(), from_timm, **sizes)
    images = torch.randn(2, 3, 32, 64)
    torch.testing.assert_close(mine(images), theirs(images), atol=1e-4, rtol=0)


def test_reads_the_old_names_of_torchvision():
    """torchvision's downloads carry them; its own loader says what they mean."""
    old = {
        name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): x
        for name, x in tiny_weights("torchvision").items()
    }
    theirs = torchvision_vit(**TINY).eval()
    theirs.load_state_dict(dict(old))
    mine = converted(old, from_torchvision, **TINY)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(mine(images), theirs(images), atol=1e-4, rtol=0)


def test_reads_the_file_that_huggingface_writes(tmp_path):
    """Its names are those of transformers 4, whichever version wrote it."""
    from safetensors.torch import load_file
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tiny("huggingface").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "vit.encoder.layer.0.attention.attention.query.weight" in weights
    expected = from_huggingface(tiny_weights("huggingface"))
    result = from_huggingface(weights)
    assert result.keys() == expected.keys()
    assert all(result[name].equal(expected[name]) for name in expected)


def test_round_trip_is_bitwise():
    weights = torchvision_weights = tiny_weights("torchvision")
    back = to_torchvision(from_torchvision(weights))
    assert back.keys() == torchvision_weights.keys()
    for name, x in weights.items():
        assert back[name].dtype == x.dtype
        assert back[name].shape == x.shape
        assert back[name].equal(x), name
    again = torchvision_vit(**TINY)
    again.load_state_dict(back)


def test_round_trip_from_here_is_bitwise():
    weights = randomise(ours(**TINY)).state_dict()
    back = from_torchvision(to_torchvision(weights))
    assert back.keys() == weights.keys()
    assert all(back[name].equal(weights[name]) for name in weights)


@library
def test_keeps_precision_and_input(library):
    convert = LIBRARIES[library][1]
    weights = {k: x.bfloat16() for k, x in tiny_weights(library).items()}
    before = {k: x.clone() for k, x in weights.items()}
    result = convert(weights)
    assert {x.dtype for x in result.values()} == {torch.bfloat16}
    assert weights.keys() == before.keys()
    assert all(weights[k].equal(before[k]) for k in before)


def test_resampled_positions_equal_timm():
    from timm.layers import resample_abs_pos_embed

    pos_embed = torch.randn(1, 1 + 14 * 14, 32)
    for grid in (24, 7, (10, 20)):
        size = [grid, grid] if isinstance(grid, int) else list(grid)
        torch.testing.assert_close(
            resample_positions(pos_embed, grid),
            resample_abs_pos_embed(pos_embed, new_size=size),
            atol=1e-6,
            rtol=0,
        )


# --- or not at all ---------------------------------------------------------------


def refusal(convert, weights):
    with pytest.raises(ValueError) as caught:
        convert(weights)
    return str(caught.value)


@library
def test_every_missing_name_is_refused(library):
    weights = tiny_weights(library)
    for name in weights:
        rest = {k: x for k, x in weights.items() if k != name}
        message = refusal(LIBRARIES[library][1], rest)
        assert "missing (1):" in message
        assert f"\n  {name}" in message
        assert "unexpected" not in message


@library
def test_every_wrong_shape_is_refused(library):
    weights = tiny_weights(library)
    for name, x in weights.items():
        if name in ("heads.head.bias", "head.bias", "classifier.bias"):
            continue  # the head's weight against its bias, a tie: the next test
        wrong = torch.zeros(*x.shape[:-1], x.shape[-1] + 1)
        message = refusal(LIBRARIES[library][1], weights | {name: wrong})
        assert "wrong shape (1):" in message
        expected = f"{name}: came {tuple(wrong.shape)}, expected {tuple(x.shape)}"
        assert expected in message
        assert "missing" not in message


@library
def test_head_and_bias_of_two_lengths_are_refused(library):
    weights = tiny_weights(library)
    (name,) = {"heads.head.bias", "head.bias", "classifier.bias"} & weights.keys()
    message = refusal(LIBRARIES[library][1], weights | {name: torch.zeros(3)})
    assert "wrong shape (1):" in message
    assert f"{name}: came (3,), expected ({NUM_CLASSES},)" in message


def test_all_faults_come_in_one_error():
    weights = tiny_weights("torchvision")
    del weights["class_token"]
    weights["encoder.ln.bias"] = torch.zeros(25)
    weights["encoder.register"] = torch.zeros(1, 4, 24)
    weights["conv_proj.bias"] = "not a tensor"
    message = refusal(from_torchvision, weights)
    assert "missing (1):\n  class_token" in message
    assert "unexpected (1):\n  encoder.register" in message
    assert "wrong shape (2):" in message
    assert "encoder.ln.bias: came (25,), expected (24,)" in message
    assert "conv_proj.bias: came str, expected (24,)" in message


def resnet():
    from torchvision.models import resnet18

    return resnet18()


def timm_with(**options):
    return lambda: timm_vit(**TINY, **options)


OTHERS = {
    "resnet": (resnet, from_torchvision, ["class_token", "layer1.0.conv1.weight"]),
    "resnet for timm": (resnet, from_timm, ["blocks.0.attn.qkv.weight", "fc.bias"]),
    "timm for torchvision": (
        lambda: tiny("timm"),
        from_torchvision,
        ["conv_proj.weight", "blocks.1.attn.qkv.weight"],
    ),
    "torchvision for timm": (
        lambda: tiny("torchvision"),
        from_timm,
        ["patch_embed.proj.weight", "conv_proj.weight"],
    ),
    "registers": (timm_with(reg_tokens=4), from_timm, ["reg_token"]),
    "q/k norms": (timm_with(qk_norm=True), from_timm, ["blocks.1.attn.q_norm.weight"]),
    "layer scale": (timm_with(init_values=0.1), from_timm, ["blocks.0.ls1.gamma"]),
    "no class token": (
        timm_with(class_token=False, global_pool="avg"),
        from_timm,
        ["cls_token", "fc_norm.weight"],
    ),
    "no bias of q, k, v": (timm_with(qkv_bias=False), from_timm, ["attn.qkv.bias"]),
    "no head": (lambda: tiny("huggingface").vit, from_huggingface, ["classifier.bias"]),
    "mean pooling": (
        lambda: ours(**TINY, pool="mean"),
        to_torchvision,
        ["missing (1):\n  cls_token"],
    ),
    "layer scale here": (
        lambda: ours(**TINY, layer_scale=0.1),
        to_torchvision,
        ["encoder.layers.0.scale1.weight"],
    ),
    "grey images": (
        lambda: ours(**TINY, in_channels=1),
        to_torchvision,
        ["patch_embed.proj.weight has shape (24, 256)", "three channels"],
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_architecture_is_refused(case):
    make, convert, named = OTHERS[case]
    message = refusal(convert, make().state_dict())
    for name in named:
        assert name in message


def test_a_distillation_token_is_refused():
    import timm

    with torch.device("meta"):
        model = timm.create_model("deit_tiny_distilled_patch16_224")
    message = refusal(from_timm, model.state_dict())
    assert "dist_token" in message
    assert "head_dist.weight" in message


def test_a_gap_between_layers_is_refused():
    weights = {
        name: x
        for name, x in tiny_weights("torchvision").items()
        if "encoder_layer_0." not in name
    }
    assert "missing (12):" in refusal(from_torchvision, weights)


def test_nonsense_is_refused():
    assert "missing (20):" in refusal(from_torchvision, {})
    huge = {"blocks.999999999.norm1.weight": torch.zeros(3)}
    assert "unexpected (1):" in refusal(from_timm, huge)
    for value in (None, nn.Linear(2, 2), [("cls_token", torch.zeros(1, 1, 4))]):
        with pytest.raises(TypeError, match=r"expected a state dict .*got "):
            from_timm(value)


def test_a_checkpoint_with_weights_inside_is_refused():
    message = refusal(from_timm, {"model": tiny_weights("timm"), "epoch": 3})
    assert "unexpected (2):\n  model\n  epoch" in message


def test_a_model_of_another_size_refuses_the_weights():
    """One error of torch's, which names every tensor that does not fit."""
    weights = from_torchvision(tiny_weights("torchvision"))
    with pytest.raises(RuntimeError) as caught:
        ours(**TINY | dict(image_size=64)).load_state_dict(weights)
    assert "size mismatch for pos_embed" in str(caught.value)
    assert "[1, 5, 24]" in str(caught.value)
    assert "[1, 17, 24]" in str(caught.value)
    with pytest.raises(RuntimeError, match=r"Missing key.*encoder\.layers\.2"):
        ours(**TINY | dict(num_layers=3)).load_state_dict(weights)
