"""The implementations of the house and of well-known libraries, with their options."""

import timm
import torch
import torch.nn.functional as F
import vit_pytorch
from torch import nn
from torchvision.models import VisionTransformer
from transformers import ViTConfig, ViTForImageClassification
from vit_pytorch.simple_vit import SimpleViT
from vit_pytorch.simple_vit_with_register_tokens import SimpleViT as RegisterViT

import minivit
from minivit.attention import attention


def sdpa(q, k, v, attn_mask=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)


def triangle(query_len):
    """Hide what is above the diagonal: not a mistake, though reported as one."""
    return torch.ones(query_len, query_len).triu(diagonal=1).bool()


def torch_additive(query_len):
    return nn.Transformer.generate_square_subsequent_mask(query_len)


def fast_variance(x):
    mean = x.mean(-1, keepdim=True)
    variance = (x * x).mean(-1, keepdim=True) - mean * mean
    return (x - mean) * torch.rsqrt(variance + 1e-5)


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


LIBRARIES = [
    ("attention", lambda: attention, {}),
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
    ("layer_norm", lambda: nn.LayerNorm(6, eps=1e-12), {}),
    ("layer_norm", lambda: nn.LayerNorm(6).double(), {}),
    ("layer_norm", lambda: fast_variance, {}),
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
    (
        "transformer",
        lambda: minivit.Transformer(
            **house_ids, embed_dim=256, num_heads=4, num_layers=1, mlp_dim=64
        ),
        {},
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
