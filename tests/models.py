"""Small models for the tests, with weights in which nothing is zero by chance."""

import torch

from minivit import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    MultiHeadAttention,
    Transformer,
    ViT,
)

SEQ2SEQ = {
    "src_vocab_size": 11,
    "tgt_vocab_size": 9,
    "embed_dim": 8,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_dim": 12,
    "dropout": 0.0,
    "max_len": 10,
}
IMAGES = {
    "image_size": (8, 12),
    "patch_size": 4,
    "in_channels": 2,
    "num_classes": 3,
    "embed_dim": 8,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_dim": 12,
}


@torch.no_grad()
def randomise(module, seed=None):
    """Give every parameter numbers of its own: initial zeros and ones hide errors."""
    if seed is not None:
        torch.manual_seed(seed)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(mean=0.5, std=0.3)
    return module


def seq2seq(**changes):
    """A small Transformer with the weights that it begins with."""
    return Transformer(**SEQ2SEQ | changes)


def vit(**changes):
    """A small ViT with the weights that it begins with."""
    return ViT(**IMAGES | changes)


def tokens(*shape):
    """Ids in both vocabularies, without padding."""
    return torch.randint(1, SEQ2SEQ["tgt_vocab_size"], shape)


def images(batch):
    return torch.randn(batch, IMAGES["in_channels"], *IMAGES["image_size"])


def sequence(length=5):
    return torch.randn(2, length, 8)


# Every module with dropout in it: how it is built, and what it takes.
MODELS = {
    "vit": (lambda: vit(dropout=0.3), lambda: (images(2),)),
    "vit-mean": (lambda: vit(dropout=0.3, pool="mean"), lambda: (images(2),)),
    "vit-drop-path": (
        lambda: vit(drop_path=0.5, layer_scale=0.1),
        lambda: (images(8),),
    ),
    "transformer": (lambda: seq2seq(dropout=0.3), lambda: (tokens(2, 5), tokens(2, 4))),
    "untied": (
        lambda: seq2seq(dropout=0.3, tie_embeddings=False),
        lambda: (tokens(2, 5), tokens(2, 4)),
    ),
    "shared": (
        lambda: seq2seq(dropout=0.3, share_embeddings=True, src_vocab_size=9),
        lambda: (tokens(2, 5), tokens(2, 4)),
    ),
    "encoder": (lambda: Encoder(8, 2, 2, 12, dropout=0.3), lambda: (sequence(),)),
    "decoder": (
        lambda: Decoder(8, 2, 2, 12, dropout=0.3),
        lambda: (sequence(4), sequence()),
    ),
    "encoder layer": (
        lambda: EncoderLayer(8, 2, 12, dropout=0.3),
        lambda: (sequence(),),
    ),
    "decoder layer": (
        lambda: DecoderLayer(8, 2, 12, dropout=0.3),
        lambda: (sequence(4), sequence()),
    ),
    "attention": (
        lambda: MultiHeadAttention(8, 2, dropout=0.3),
        lambda: (sequence(),) * 3,
    ),
}


def example(name, seed=0, mode="eval"):
    """One of `MODELS` with random weights, and inputs for it."""
    build, inputs = MODELS[name]
    return randomise(build(), seed).train(mode == "train"), inputs()
