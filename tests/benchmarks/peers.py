"""Models of one shape from several libraries, from their own classes, untrained.

Where a library's design differs, the difference is removed, so that all have the same
parameters and do the same multiplications; `tests/test_benchmarks.py` counts both.
"""

from dataclasses import dataclass

import torch
from torch import nn

import minivit


@dataclass(frozen=True)
class Shape:
    """What makes two Vision Transformers the same."""

    image_size: int
    patch_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_classes: int

    @property
    def mlp_dim(self):
        return 4 * self.embed_dim

    @property
    def num_tokens(self):
        return 1 + (self.image_size // self.patch_size) ** 2


def vits(shape):
    """Build a ViT of this shape with each library."""
    return {
        "minivit": of_minivit(shape),
        "torchvision": of_torchvision(shape),
        "timm": of_timm(shape),
        "Hugging Face": of_hugging_face(shape),
        "vit-pytorch": of_vit_pytorch(shape),
        "nn.TransformerEncoder": OfTransformerEncoder(shape),
    }


def of_minivit(shape):
    return minivit.ViT(
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        num_classes=shape.num_classes,
        embed_dim=shape.embed_dim,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        mlp_dim=shape.mlp_dim,
    )


def of_torchvision(shape):
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        hidden_dim=shape.embed_dim,
        mlp_dim=shape.mlp_dim,
        num_classes=shape.num_classes,
    )


def of_timm(shape):
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=shape.image_size,
        patch_size=shape.patch_size,
        embed_dim=shape.embed_dim,
        depth=shape.num_layers,
        num_heads=shape.num_heads,
        num_classes=shape.num_classes,
    )


def of_hugging_face(shape):
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=shape.image_size,
            patch_size=shape.patch_size,
            hidden_size=shape.embed_dim,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            intermediate_size=shape.mlp_dim,
            num_labels=shape.num_classes,
            attn_implementation="sdpa",
        )
    )


def of_vit_pytorch(shape):
    from vit_pytorch import ViT

    model = ViT(
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        num_classes=shape.num_classes,
        dim=shape.embed_dim,
        depth=shape.num_layers,
        heads=shape.num_heads,
        dim_head=shape.embed_dim // shape.num_heads,
        mlp_dim=shape.mlp_dim,
    )
    # It normalises patches before and after their projection, and its queries, keys
    # and values have no bias. Its attention has no fused kernel; that is its design.
    model.to_patch_embedding[1] = nn.Identity()
    model.to_patch_embedding[3] = nn.Identity()
    for attention, _ in model.transformer.layers:
        qkv = attention.to_qkv
        attention.to_qkv = nn.Linear(qkv.in_features, qkv.out_features)
    return model


class OfTransformerEncoder(nn.Module):
    """What one writes with torch alone."""

    def __init__(self, shape):
        super().__init__()
        E, P = shape.embed_dim, shape.patch_size
        self.patches = nn.Conv2d(3, E, kernel_size=P, stride=P)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, E))
        self.pos_embed = nn.Parameter(torch.randn(1, shape.num_tokens, E))
        layer = nn.TransformerEncoderLayer(
            E,
            shape.num_heads,
            shape.mlp_dim,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(
            layer, shape.num_layers, nn.LayerNorm(E), enable_nested_tensor=False
        )
        self.head = nn.Linear(E, shape.num_classes)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)  # (B, N, E)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return self.head(self.encoder(x + self.pos_embed)[:, 0])


def translators(*, vocab_size, embed_dim, num_heads, num_layers, mlp_dim, max_len):
    """Build the Transformer of 2017 twice: minivit's and Hugging Face's Marian.

    Token 0 is padding, 1 begins, 2 ends. The end has an embedding of zeros, so that
    an untrained model never writes it and all texts become equally long.
    """
    from transformers import MarianConfig, MarianMTModel

    mine = minivit.Transformer(
        src_vocab_size=vocab_size,
        tgt_vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_layers=num_layers,
        mlp_dim=mlp_dim,
        dropout=0.0,
        norm_first=False,
        share_embeddings=True,
        max_len=max_len,
    )
    theirs = MarianMTModel(
        MarianConfig(
            vocab_size=vocab_size,
            d_model=embed_dim,
            encoder_layers=num_layers,
            decoder_layers=num_layers,
            encoder_attention_heads=num_heads,
            decoder_attention_heads=num_heads,
            encoder_ffn_dim=mlp_dim,
            decoder_ffn_dim=mlp_dim,
            activation_function="relu",
            dropout=0.0,
            scale_embedding=True,
            max_position_embeddings=max_len,
            pad_token_id=0,
            decoder_start_token_id=1,
            eos_token_id=2,
            forced_eos_token_id=None,
            attn_implementation="sdpa",
        )
    )
    for embedding in (mine.tgt_embed, theirs.get_input_embeddings()):
        nn.init.zeros_(embedding.weight[2])
    return {"minivit": mine.eval(), "Hugging Face": theirs.eval()}
