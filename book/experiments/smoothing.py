"""What does label smoothing change in a model that is nearly always right?"""

import copy

import torch
import torch.nn.functional as F

import minivit
from minivit.data import Characters, date_pairs

train_pairs, test_pairs = date_pairs(12_000, 1000, seed=0)
vocab = Characters(text for pair in train_pairs for text in pair)
special = dict(bos_id=vocab.bos_id, eos_id=vocab.eos_id)


def tensors(pairs):
    sources, targets = zip(*pairs, strict=True)
    framed = vocab.encode(targets, frame=True)  # (B, L+1)
    return vocab.encode(sources), framed[:, :-1], framed[:, 1:]


def new_model(seed=0, **options):
    torch.manual_seed(seed)
    return minivit.Transformer(
        src_vocab_size=len(vocab),
        tgt_vocab_size=len(vocab),
        pad_id=vocab.pad_id,
        dropout=0.0,
        num_heads=4,
        mlp_dim=128,
        **dict(embed_dim=64, num_layers=2, max_len=64) | options,
    )


def write(model, sources, search=minivit.greedy_search):
    src = vocab.encode(sources)  # (B, S)
    return vocab.decode(search(model, src, max_len=12, **special))


def exact_match(model, pairs, search=minivit.greedy_search):
    sources, targets = zip(*pairs, strict=True)
    written = write(model, sources, search)
    hits = [a == b for a, b in zip(written, targets, strict=True)]
    return sum(hits) / len(hits)


def measured(model, pairs):
    src, tgt, goal = tensors(pairs)
    with torch.no_grad():
        logits = model.eval()(src, tgt)  # (B, L, V)
    right = logits.softmax(dim=-1).gather(-1, goal[..., None])  # (B, L, 1)
    return {
        "probability": right.mean().item(),
        "loss": F.cross_entropy(logits.flatten(0, 1), goal.flatten()).item(),
        "greedy": 100 * exact_match(model, pairs),
        "beam": 100 * exact_match(model, pairs, minivit.beam_search),
    }


def with_and_without(model, train, test_pairs, seed):
    figures = {}
    for name, epsilon in (("plain", 0.0), ("smoothed", 0.1)):
        other = copy.deepcopy(model)
        minivit.fit(
            other, [x[:1920] for x in train], epochs=1, batch_size=32,
            label_smoothing=epsilon, seed=seed, ignore_index=vocab.pad_id,
            progress=False,
        )  # fmt: skip
        for what, value in measured(other, test_pairs).items():
            figures[f"{name}: {what}"] = value
    return figures


def run(seed):
    """Dates and a model of its own; two copies of it, trained further."""
    pairs, held_out = date_pairs(12_000, 1000, seed=seed)
    train, model = tensors(pairs), new_model(seed)
    minivit.fit(
        model, train, epochs=2, batch_size=32, lr=3e-3, seed=seed,
        ignore_index=vocab.pad_id, progress=False,
    )  # fmt: skip
    return with_and_without(model, train, held_out, seed)
