"""Whole sequence-to-sequence models."""

import math

import torch
from torch import nn

from minivit import sinusoidal_positions

from . import right

SRC, TGT, E, H, PAD = 13, 11, 24, 4, 0
sizes = {"src_vocab_size": SRC, "tgt_vocab_size": TGT}


@right("transformer", **sizes)
class AroundTorch(nn.Module):
    """What most people write: nn.Transformer, embeddings times √E, a fixed table."""

    first = False

    def __init__(self):
        super().__init__()
        self.src = nn.Embedding(SRC, E, padding_idx=PAD)
        self.tgt = nn.Embedding(TGT, E, padding_idx=PAD)
        self.core = nn.Transformer(
            E, H, 2, 2, 48, batch_first=True, norm_first=self.first
        )
        self.head = nn.Linear(E, TGT)
        self.register_buffer("pe", sinusoidal_positions(50, E)[None])

    def forward(self, src, tgt):
        s = self.src(src) * math.sqrt(E) + self.pe[:, : src.size(1)]
        t = self.tgt(tgt) * math.sqrt(E) + self.pe[:, : tgt.size(1)]
        hide = torch.ones(tgt.size(1), tgt.size(1), dtype=torch.bool).triu(1)
        pads = src == PAD
        out = self.core(
            s,
            t,
            tgt_mask=hide,
            src_key_padding_mask=pads,
            tgt_key_padding_mask=tgt == PAD,
            memory_key_padding_mask=pads,
        )
        return self.head(out)


@right("transformer", **sizes)
class AroundTorchPreNorm(AroundTorch):
    first = True


@right("transformer", src_vocab_size=12, tgt_vocab_size=12, pad_id=3)
class OneTable(AroundTorch):
    """One table for source, target and head; learned places; log-probabilities out."""

    def __init__(self):
        super().__init__()
        self.src = self.tgt = nn.Embedding(12, E)
        nn.init.normal_(self.src.weight, std=E**-0.5)
        self.head = nn.Linear(E, 12, bias=False)
        self.head.weight = self.src.weight
        self.pe = None
        self.places = nn.Embedding(64, E)

    def forward(self, src, tgt):
        self.pe = self.places.weight[None]
        s = self.src(src) * math.sqrt(E) + self.pe[:, : src.size(1)]
        t = self.tgt(tgt) * math.sqrt(E) + self.pe[:, : tgt.size(1)]
        hide = nn.Transformer.generate_square_subsequent_mask(tgt.size(1))
        pads = torch.zeros(src.shape).masked_fill(src == 3, -torch.inf)
        memory = self.core.encoder(s, src_key_padding_mask=pads)
        out = self.core.decoder(
            t, memory, tgt_mask=hide, memory_key_padding_mask=pads, tgt_is_causal=True
        )
        return {"logits": self.head(out).log_softmax(-1), "memory": memory}


@right("transformer", src_vocab_size=12, tgt_vocab_size=12, pad_id=3)
class EncodesWithMask(OneTable):
    """Its `encode` and `decode` take other arguments than the house's."""

    def encode(self, src, src_mask):
        return self.core.encoder(src, src_mask)
