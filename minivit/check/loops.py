"""Functions that loop: over the tokens to write, over micro-batches, over texts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..generation import greedy_search
from ..transformer import Transformer
from .properties import changed_in_place, random_input
from .report import Finding, Report, checker, close, seed_all
from .subject import Mistake, Subject, check, expect

PAD, BOS, EOS = 0, 1, 2


@checker
def generate(
    fn: Callable[..., Tensor], *, includes_bos: bool = False, max_len: int = 8
) -> Report:
    """Check a greedy decoder on small minivit Transformers, whatever its insides.

    Args:
        fn: called as fn(model, src, bos_id=…, eos_id=…, max_len=…) with a
            `minivit.Transformer`; returns (B, L) ids, filled up with `pad_id`.
        includes_bos: what is returned begins with the start token.
        max_len: longest sequence to write, the end token included.

    Returns:
        The report.
    """
    return Generate(fn, includes_bos, max_len).report()


def small_model(seed: int, dropout: float = 0.0) -> Transformer:
    seed_all(seed)
    sizes: dict[str, Any] = {"embed_dim": 16, "num_layers": 1, "num_heads": 2}
    sizes |= {"src_vocab_size": 9, "tgt_vocab_size": 9, "mlp_dim": 16}
    model = Transformer(**sizes, dropout=dropout, tie_embeddings=False)
    nn.init.normal_(model.head.weight, std=1.0)
    return model.eval()


def same(a: Tensor, b: Tensor) -> bool:
    """Whether ids agree, padding at the end left aside."""
    length = max(a.size(1), b.size(1))
    a, b = (F.pad(ids, (0, length - ids.size(1)), value=PAD) for ids in (a, b))
    return torch.equal(a, b)


@dataclass
class Generate(Subject):
    """The function, its options, and six sources to write from."""

    fn: Callable[..., Tensor]
    includes_bos: bool
    max_len: int
    name = "generate"

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.src = torch.randint(3, 9, (6, 5), generator=g)
        ids = {"bos_id": BOS, "eos_id": EOS}
        self.options: dict[str, Any] = {**ids, "max_len": self.max_len}

    def write(self, model: nn.Module, src: Tensor | None = None) -> Tensor:
        src = self.src if src is None else src
        ids = self.fn(model, src.clone(), **self.options)
        return ids[:, 1:] if self.includes_bos else ids

    def right(self, model: Transformer) -> Tensor:
        return greedy_search(model, self.src, **self.options)

    @check("values")
    def values(self) -> None:
        """It writes what greedy search writes, for several models."""
        for seed in range(4):
            model = small_model(seed)
            got, want = self.write(model), self.right(model)
            if same(got, want):
                continue
            expect(
                not bool((got[:, 0] == BOS).all()),
                "the output begins with the start token",
                "it is not cut off (or say includes_bos=True)",
                "the return statement",
            )
            self.ends(got, want)
            self.continues(got, want)

    def ends(self, got: Tensor, want: Tensor) -> None:
        expect(
            got.size(1) <= self.max_len,
            f"{got.size(1)} tokens are written where max_len={self.max_len}",
            "the loop runs too long",
            "the loop's condition",
            check="length",
        )
        ended = (want == EOS).cumsum(1).roll(1, 1)
        ended[:, 0] = 0
        expect(
            got.size(1) < want.size(1)
            or not torch.equal(got[:, : want.size(1)][ended == 0], want[ended == 0]),
            "after its end token a sequence goes on",
            "what follows is not replaced by pad_id",
            "what happens once a sequence has ended",
            check="end",
        )
        shorter = min(got.size(1), want.size(1))
        expect(
            not torch.equal(got[:, :shorter], want[:, :shorter]),
            f"{got.size(1)} tokens are written, {want.size(1)} expected",
            "the loop stops too early, when the first sequence has ended or one token "
            "before max_len",
            "the loop's condition",
            check="length",
        )

    def continues(self, got: Tensor, want: Tensor) -> None:
        expect(
            not torch.equal(got[:, 0], want[:, 0]),
            "the first token is right, later ones are not",
            "the model is not given all tokens so far, at their positions",
            "what is handed to the decoder at each step",
        )
        expect(
            same(got, want),
            "the tokens are not the most probable ones",
            "another position's logits are read, or another token chosen",
            "the arg-max over the last position",
        )

    @check("eval mode")
    def eval_mode(self) -> None:
        """It writes without dropout, whatever the mode of the model."""
        model = small_model(0, dropout=0.5)
        want = self.right(model)
        model.train()
        results = [self.write(model) for _ in range(3)]
        expect(
            all(same(got, want) for got in results),
            "a model in train mode writes something else, with dropout active",
            "the model is not switched to eval mode while it writes",
            "model.eval() before, the old mode restored after",
        )

    @check("mode kept")
    def mode_kept(self) -> None:
        """A model that came in train mode goes in train mode."""
        model = small_model(0).train()
        self.write(model)
        expect(
            model.training,
            "the model comes back in eval mode although it came in train mode",
            "the mode is not restored",
            "model.train(...) at the end",
        )

    @check("batch")
    def batch(self) -> None:
        """A sequence is written alone as it is among others."""
        model = small_model(1)
        together = self.write(model)
        for b in range(3):
            expect(
                same(self.write(model, self.src[b : b + 1]), together[b : b + 1]),
                "a sequence is written differently alone and in a batch",
                "sequences influence each other",
                "what ends the loop, and every reshape",
            )

    @check("no grad")
    def no_graph(self) -> None:
        """No graph is kept for gradients that nobody wants."""
        model = small_model(0)
        seen: list[bool] = []
        hook = model.head.register_forward_hook(
            lambda module, args, out: seen.append(out.requires_grad)
        )
        self.write(model)
        hook.remove()
        expect(
            not any(seen),
            "a graph for gradients is kept while writing",
            "memory grows with every token",
            "torch.no_grad() around the loop",
        )

    @check("in place")
    def untouched(self) -> Finding | None:
        """The source stays as it is."""
        return changed_in_place(
            lambda src: self.fn(small_model(0), src, **self.options), self.src
        )


@checker
def accumulation(fn: Callable[..., Any]) -> Report:
    """Check a function that makes one update from several micro-batches.

    Args:
        fn: called as fn(model, batches, loss_fn, optimizer, scheduler), where batches
            is a list of (inputs, targets); makes one update of the model.

    Returns:
        The report.
    """
    return Accumulation(fn).report()


@checker
def vocabulary(fn: Callable[..., Iterable[str]]) -> Report:
    """Check that a vocabulary is made of the training texts only.

    Args:
        fn: called as fn(train, val, test), each a list of sentences; returns the tokens
            of the vocabulary (any collection of strings, or a dict with such keys).

    Returns:
        The report.
    """
    return Vocabulary(fn).report()


def whole(model: Any, batches: Any, loss_fn: Any, optimizer: Any, _: Any) -> None:
    """Make the update that is right: of all micro-batches as one batch."""
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loss_fn(model(inputs), targets).backward()
    optimizer.step()


def undivided(
    model: Any, batches: Any, loss_fn: Any, optimizer: Any, scheduler: Any
) -> None:
    for inputs, targets in batches:
        loss_fn(model(inputs), targets).backward()
    optimizer.step()
    scheduler.step()


ACCUMULATION_MISTAKES = [
    Mistake(
        "gradient",
        "the update is 4 times as large for 4 micro-batches",
        "the loss is not divided by the number of micro-batches",
        "the line before backward()",
        undivided,
    ),
]


@dataclass
class Accumulation(Subject):
    """The function, to be given four micro-batches."""

    fn: Callable[..., Any]
    name = "accumulation"

    def update(self, fn: Callable[..., Any]) -> tuple[Tensor, int]:
        """Return how the weight changed, and how far the schedule moved."""
        x, y = random_input(8, 4), torch.arange(8) % 3
        batches = list(zip(x.split(2), y.split(2), strict=True))
        seed_all(0)
        model = nn.Linear(4, 3)
        before = model.weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on the order of the steps
            fn(model, batches, F.cross_entropy, optimizer, scheduler)
        return model.weight.detach() - before, scheduler.last_epoch

    @check("gradient")
    def gradient(self) -> None:
        """The update is that of the whole batch."""
        got, want = self.update(self.fn)[0], self.update(whole)[0]
        made = (m for m in ACCUMULATION_MISTAKES if close(got, self.update(m.fn)[0]))
        expect(
            close(got, want),
            "the update differs from that of the whole batch",
            "gradients are reset between micro-batches, or the optimiser steps in each",
            "zero_grad() and step()",
            known=made,
        )

    @check("schedule")
    def schedule(self) -> None:
        """The schedule moves one step."""
        _, steps = self.update(self.fn)
        expect(
            steps == 1,
            f"the scheduler moved {steps} steps in one update",
            "it is stepped once a micro-batch, not once an update",
            "scheduler.step()",
        )


@dataclass
class Vocabulary(Subject):
    """The function that counts words."""

    fn: Callable[..., Iterable[str]]
    name = "vocabulary"

    @check("leak")
    def leak(self) -> None:
        """Words of the training texts are known, and no others."""
        texts = ["the cat sat"] * 3, ["a dogfish ran"] * 3, ["one zebra"] * 3
        known = set(self.fn(*texts))
        expect(
            "cat" in known,
            "a training word is missing",
            "nothing is counted",
            "the loop",
            check="words",
        )
        extra = sorted(known & {"dogfish", "ran", "zebra"})
        expect(
            not extra,
            f"the vocabulary holds {', '.join(extra)}, never seen in training",
            "it is built on validation or test texts too",
            "the texts that are counted",
        )
