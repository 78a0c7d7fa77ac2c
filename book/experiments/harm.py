"""What does each mistake of the chapter on bugs cost?

A seed decides the weights, the order of the data, and which data are held out.
The correct model and all broken ones share them.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn

import minivit
from minivit import LayerNorm, MultiHeadAttention, Transformer, ViT, data

PAD, BOS, EOS = 0, 1, 2


def tiny_vit(attention=MultiHeadAttention, vit=ViT, seed=0):
    torch.manual_seed(seed)
    model = vit(
        image_size=8, patch_size=2, in_channels=1, num_classes=10,
        embed_dim=32, num_layers=2, num_heads=4, mlp_dim=64,
    )  # fmt: skip
    for layer in model.encoder.layers:
        layer.self_attention = attention(32, 4)
    return model


def split_digits(seed=0):
    return data.split(*data.load_digits(), seed=seed)


def read_digits(model, seed=0):
    train, _ = split_digits(seed)
    minivit.fit(model, train, epochs=10, lr=4e-3, seed=seed)
    return model


def accuracy(model, seed=0):
    return minivit.evaluate(model, split_digits(seed)[1])["accuracy"]


class WrongScale(MultiHeadAttention):
    def forward(self, query, key, value, *, mask=None, cache=None):
        q, k, v = self.project(query, key, value)
        scores = q @ k.mT / math.sqrt(self.embed_dim)  # the mistake
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        mixed = scores.softmax(dim=-1) @ v  # (B, H, L, D)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class WrongAxis(MultiHeadAttention):
    def forward(self, query, key, value, *, mask=None, cache=None):
        q, k, v = self.project(query, key, value)
        scores = q @ k.mT / math.sqrt(q.size(-1))  # (B, H, L, S)
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e4)
        mixed = scores.softmax(dim=-2) @ v  # the mistake
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Scrambled(MultiHeadAttention):
    def forward(self, query, key, value, *, mask=None, cache=None):
        q, k, v = self.project(query, key, value)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(mixed.reshape(query.shape))  # the mistake


class NoProjection(MultiHeadAttention):
    def __init__(self, embed_dim, num_heads):
        super().__init__(embed_dim, num_heads)
        self.out_proj = nn.Identity()  # the mistake


class RunsOfPixels(ViT):
    def features(self, images):
        runs = images.reshape(len(images), 16, 4)  # the mistake
        x = self.patch_embed.proj(runs)  # (B, N, E)
        cls = self.cls_token.expand(len(x), -1, -1)  # (B, 1, E)
        x = torch.cat([cls, x], dim=1)  # (B, 1+N, E)
        return self.encoder(x + self.pos_embed)


class LateCls(ViT):
    def features(self, images):
        x = self.patch_embed(images)  # (B, N, E)
        x = x + self.pos_embed[:, : x.size(1)]  # too early
        cls = self.cls_token.expand(len(x), -1, -1)  # (B, 1, E)
        return self.encoder(torch.cat([cls, x], dim=1))


class Probabilities(ViT):
    def forward(self, images):
        return super().forward(images).softmax(dim=-1)  # the mistake


class OwnNorm(LayerNorm):
    def forward(self, x):
        centred = x - x.mean(dim=-1, keepdim=True)
        deviation = x.std(dim=-1, keepdim=True)  # unbiased: the mistake
        return self.weight * centred / (deviation + self.eps) + self.bias


class OwnNorms(ViT):
    def __init__(self, **options):
        super().__init__(**options)
        for block in list(self.modules()):
            for name, child in list(block.named_children()):
                if isinstance(child, LayerNorm):
                    setattr(block, name, OwnNorm(32, eps=child.eps))


def words(number, seed):
    """Sources (B, S), target inputs (B, L) and target outputs (B, L)."""
    g = torch.Generator().manual_seed(seed)
    src = torch.randint(3, 13, (number, 6), generator=g)
    lengths = torch.randint(2, 7, (number, 1), generator=g)
    padded = torch.arange(6) >= lengths  # (B, 6)
    src = src.masked_fill(padded, PAD)
    # Reversed, the padding stands in front: roll it to the end.
    back = src.flip(1)
    place = (torch.arange(6) + 6 - lengths) % 6
    back = back.gather(1, place)
    tgt = torch.cat([back, torch.full((number, 1), PAD)], dim=1)
    tgt = tgt.scatter(1, lengths, EOS)  # (B, 7)
    start = torch.full((number, 1), BOS)
    return src, torch.cat([start, tgt[:, :-1]], dim=1), tgt


def tiny_transformer(kind=Transformer, seed=0):
    torch.manual_seed(seed)
    return kind(
        src_vocab_size=13, tgt_vocab_size=13, embed_dim=32, num_layers=1,
        num_heads=4, mlp_dim=64, dropout=0.0, max_len=32,
    )  # fmt: skip


def reverse_words(model, seed=0):
    reading = words(3000, seed=2 * seed)
    minivit.fit(
        model, reading, epochs=10, lr=5e-3, ignore_index=PAD, seed=seed
    )
    return model


def tokens(model, seed=0):
    """Share of tokens that are right, given the right ones before them."""
    writing = words(300, seed=2 * seed + 1)
    found = minivit.evaluate(model, writing, ignore_index=PAD)
    return found["accuracy"]


def exact(model, pads=0, seed=0, **options):
    """Share of words written entirely right, with so much more padding."""
    src, _, want = words(300, seed=2 * seed + 1)
    src = F.pad(src, (0, pads), value=PAD)
    ids = minivit.greedy_search(
        model, src, bos_id=BOS, eos_id=EOS, max_len=7, **options
    )
    ids = F.pad(ids, (0, 7 - ids.size(1)), value=PAD)
    return (ids == want).all(dim=1).float().mean().item()


class SeesTheFuture(Transformer):
    def decode(self, tgt, memory, src, *, cache=None):
        x = self.positions(self.tgt_embed(tgt) * self.scale)
        look = ~minivit.causal_mask(tgt.size(1))  # the mistake
        look = look & (tgt != self.pad_id)[:, None, None, :]
        seen = (src != self.pad_id)[:, None, None, :]
        x = self.decoder(x, memory, mask=look, memory_mask=seen)
        return self.head(x)


class CausalInTraining(Transformer):
    def decode(self, tgt, memory, src, *, cache=None):
        if self.training or cache is not None:
            return super().decode(tgt, memory, src, cache=cache)
        x = self.positions(self.tgt_embed(tgt) * self.scale)
        look = (tgt != self.pad_id)[:, None, None, :]  # not causal
        seen = (src != self.pad_id)[:, None, None, :]
        x = self.decoder(x, memory, mask=look, memory_mask=seen)
        return self.head(x)


class ReadsPadding(Transformer):
    def decode(self, tgt, memory, src, *, cache=None):
        all_real = torch.full_like(src, self.pad_id + 1)  # the mistake
        return super().decode(tgt, memory, all_real, cache=cache)


class AlwaysFirst(Transformer):
    def decode(self, tgt, memory, src, *, cache=None):
        if cache is not None:
            self.positions.forward = lambda x, start=0: (
                x + self.positions.table[: x.size(1)]  # start is ignored
            )
        try:
            return super().decode(tgt, memory, src, cache=cache)
        finally:
            self.positions.__dict__.pop("forward", None)


def accumulate(model, batches, loss_fn, optimizer, scheduler):
    optimizer.zero_grad()
    for inputs, targets in batches:
        loss_fn(model(inputs), targets).backward()  # not divided
        scheduler.step()  # too often
    optimizer.step()


def accumulate_well(model, batches, loss_fn, optimizer, scheduler):
    optimizer.zero_grad()
    for inputs, targets in batches:
        (loss_fn(model(inputs), targets) / len(batches)).backward()
    optimizer.step()
    scheduler.step()


def read_in_pieces(update, kind, seed=0, **options):
    """Read the digits in batches of 128, each in four pieces."""
    (images, labels), _ = split_digits(seed)
    model = tiny_vit(seed=seed)
    optimizer = kind(model.parameters(), **options)
    steps = 10 * math.ceil(len(images) / 128)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(1 - step / steps, 0)
    )
    torch.manual_seed(seed)
    for _ in range(10):  # epochs
        for rows in torch.randperm(len(images)).split(128):
            pieces = [(images[part], labels[part]) for part in rows.chunk(4)]
            update(model, pieces, F.cross_entropy, optimizer, scheduler)
    return model


MISTAKES = {
    "1 divided by the root of E": {"attention": WrongScale},
    "2 softmax over the queries": {"attention": WrongAxis},
    "3 heads merged by reshape": {"attention": Scrambled},
    "4 no output projection": {"attention": NoProjection},
    "5 runs of pixels": {"vit": RunsOfPixels},
    "6 CLS after the positions": {"vit": LateCls},
    "7 softmax before the loss": {"vit": Probabilities},
    "8 own layer normalisation": {"vit": OwnNorms},
}


def harm_to_reading(seed):
    right = read_digits(tiny_vit(seed=seed), seed)
    figures = {"digits: correct": accuracy(right, seed)}
    for name, mistake in MISTAKES.items():
        broken = read_digits(tiny_vit(**mistake, seed=seed), seed)
        figures[f"digits: {name}"] = accuracy(broken, seed)
        broken.load_state_dict(right.state_dict(), strict=False)
        figures[f"exchanged: {name}"] = accuracy(broken, seed)
    return figures


def harm_to_writing(seed):
    writer, cheat, padded, leaky, forgetful = (
        tiny_transformer(kind, seed)
        for kind in (
            Transformer,
            SeesTheFuture,
            ReadsPadding,
            CausalInTraining,
            AlwaysFirst,
        )
    )
    for model in (writer, cheat, padded):
        reverse_words(model, seed)
    for model in (leaky, forgetful):  # these two train like the correct one
        model.load_state_dict(writer.state_dict())
    figures = {
        "tokens: correct": tokens(writer, seed),
        "tokens: 9 mask inverted": tokens(cheat, seed),
        "tokens: 10 causal in training only": tokens(leaky, seed),
        "words: correct": exact(writer, seed=seed),
        "words: 9 mask inverted": exact(cheat, seed=seed, use_cache=False),
        "words: 12 always at position 0": exact(forgetful, seed=seed),
    }
    for pads in (0, 3, 12):
        task = f"words, {pads} pads"
        figures[f"{task}: correct"] = exact(writer, pads, seed)
        figures[f"{task}: 11 looks at padding"] = exact(padded, pads, seed)
    return figures


def harm_of_pieces(seed):
    figures = {}
    for name, kind, options in (
        ("SGD", torch.optim.SGD, {"lr": 0.03, "momentum": 0.9}),
        ("AdamW", torch.optim.AdamW, {"lr": 8e-3}),
    ):
        for which, update in (
            ("correct", accumulate_well),
            ("13 accumulated wrongly", accumulate),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, on too early a step
                model = read_in_pieces(update, kind, seed, **options)
            figures[f"{name}: {which}"] = accuracy(model, seed)
    return figures


def run(seed):
    """Accuracies of the correct models and of the broken ones."""
    return harm_to_reading(seed) | harm_to_writing(seed) | harm_of_pieces(seed)
