"""A Transformer that reads one sequence and writes another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .modules import Model
from .properties import (
    always_differ,
    batch_leak,
    cached_decoding,
    cannot_overfit,
    in_double,
    leak_finding,
    moved_copy,
    not_repeatable,
    place_finding,
    size_of,
    unreached,
    wrong_shape,
)
from .report import MASK_LINE, Finding, Report, checker, close
from .subject import check, expect


@checker
def transformer(
    model: nn.Module,
    *,
    src_vocab_size: int | None = None,
    tgt_vocab_size: int | None = None,
    pad_id: int = 0,
    fresh: bool = True,
    cached: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Report:
    """Check a sequence-to-sequence Transformer, any class.

    Args:
        model: called as model(src, tgt) with token ids (B, S) and (B, L); returns
            logits (B, L, V), alone, first in a tuple, or as `.logits`.
        src_vocab_size: number of source tokens; an attribute of the model if not given.
        tgt_vocab_size: V; an attribute of the model if not given.
        pad_id: id of the padding.
        fresh: the model is not trained yet, so that its loss should be near ln V;
            judged by its weights as they are.
        cached: called as cached(src, tgt), returns the logits (B, L, V) as step-by-step
            decoding with the model's cache computes them. Models with `encode`,
            `decode(…, cache=…)` and `new_cache` like minivit's need none.

    Returns:
        The report.

    Raises:
        TypeError: the model is no `nn.Module`.
        ValueError: a size that is needed is neither given nor an attribute.
    """
    return Seq2Seq(
        model,
        fresh=fresh,
        src_vocab_size=src_vocab_size,
        tgt_vocab_size=tgt_vocab_size,
        pad_id=pad_id,
        cached=cached,
    ).report()


@dataclass
class Seq2Seq(Model):
    """The model, and sequences `src` (3, 6) and `tgt` (3, 5) of `usable` tokens."""

    src_vocab_size: int | None
    tgt_vocab_size: int | None
    pad_id: int
    cached: Callable[[Tensor, Tensor], Tensor] | None
    name = "transformer"

    def __post_init__(self) -> None:
        sources = size_of(self.module, "src_vocab_size", self.src_vocab_size)
        self.vocab = size_of(self.module, "tgt_vocab_size", self.tgt_vocab_size)
        own = moved_copy(self.module)
        both = range(min(sources, self.vocab))
        self.usable = torch.tensor([i for i in both if i != self.pad_id])
        self.generator = torch.Generator().manual_seed(0)
        src, tgt = self.ids(3, 6), self.ids(3, 5)
        src[:, 1:3] = self.usable[1:3]  # what is exchanged must differ
        tgt[:, :3] = self.usable[:3]
        self.inputs = self.src, self.tgt = src, tgt
        self.read = tgt
        (self.own,) = in_double(own, self.trial)

    def trial(self, m: Any) -> list[Tensor]:
        """Call a copy in every way that the checks will."""
        longer = self.filled(self.src, self.pad_id)
        return [self.on(m, self.src, self.tgt), self.on(m, longer, self.tgt)]

    def ids(self, *shape: int) -> Tensor:
        """Draw tokens, others each time."""
        places = torch.randint(len(self.usable), shape, generator=self.generator)
        return self.usable[places]

    def shifted(self, tokens: Tensor, column: int) -> Tensor:
        """Put other tokens into a column."""
        other = tokens.clone()
        place = torch.searchsorted(self.usable, other[:, column].contiguous())
        other[:, column] = self.usable[(place + 1) % len(self.usable)]
        return other

    def filled(self, tokens: Tensor, token: int) -> Tensor:
        """Append a token twice."""
        return torch.cat([tokens, torch.full((3, 2), token)], dim=1)

    def encoded(self, src: Tensor) -> Tensor | None:
        """What the encoder makes of a source, if the model shows it."""
        try:
            return self.own.encode(src)
        except (AttributeError, TypeError):
            return None  # no such method, or one with other arguments

    @check("shape")
    def shape(self) -> Finding | None:
        """One row of logits comes out for each target token."""
        return wrong_shape(self.logits(), (3, 5, self.vocab))

    @check("repeatable")
    def repeatable(self) -> Finding | None:
        """The same again gives the same, also after another target."""
        return not_repeatable(
            self.logits, lambda: self.call(self.src, self.ids(3, 5)), self.own
        )

    @check("causality")
    def causality(self) -> Finding | None:
        """Logits change with earlier targets, not with later ones."""
        for training in (False, True):
            for t in (4, 2):

                def past(m: Any, tgt: Tensor, t: int = t) -> Tensor:
                    return self.on(m, self.src, tgt)[:, :t]

                other = self.shifted(self.tgt, t)
                if always_differ(past, self.own, self.tgt, other, training):
                    return leak_finding(training)
        late = self.call(self.src, self.shifted(self.tgt, 1))[:, -1]
        expect(
            not close(late, self.logits()[:, -1], 1e-6),
            "the last logits do not change with an earlier target token",
            "the mask hides the past (inverted polarity), or targets do not attend",
            MASK_LINE,
        )

    @check("source")
    def source(self) -> None:
        """The logits change with the source, its tokens with later ones."""
        other = self.shifted(self.src, 3)
        expect(
            not close(self.logits(), self.call(other, self.tgt), 1e-6),
            "the logits do not change with the source",
            "there is no cross-attention, or its mask hides everything",
            "the decoder's second attention",
        )
        a, b = self.encoded(self.src), self.encoded(other)
        expect(
            a is None or b is None or not close(a[:, 0], b[:, 0], 1e-6),
            "what the encoder says of a token does not change with a later one",
            "the encoder is causal, or its tokens do not look at each other",
            "the mask that the encoder gets",
        )

    @check("source order")
    def source_order(self) -> None:
        """Exchanging two source tokens changes the logits."""
        swapped = self.call(self.src[:, [0, 2, 1, 3, 4, 5]], self.tgt)
        expect_order("source", self.logits(), swapped)

    @check("target order")
    def target_order(self) -> None:
        """Exchanging two target tokens changes later logits."""
        swapped = self.call(self.src, self.tgt[:, [0, 2, 1, 3, 4]])
        expect_order("target", self.logits()[:, -1], swapped[:, -1])

    @check("padding")
    def padding(self) -> Finding | None:
        """Padding after the source changes nothing."""
        plain = self.logits()

        def ignores(token: int) -> bool:
            longer = self.filled(self.src, token)
            return close(plain, self.call(longer, self.tgt), 1e-4)

        if ignores(self.pad_id):
            return None
        other = next((i for i in self.usable.tolist()[:40] if ignores(i)), None)
        expect(
            other is None,
            f"token {other} is ignored, padding (pad_id={self.pad_id}) is not",
            "the mask compares with the wrong id",
            "where the padding mask is made",
        )
        return Finding(
            "padding",
            "appending padding to the source changes the logits",
            self.who_sees_padding(),
            "the padding mask and where it is handed over",
        )

    def who_sees_padding(self) -> str:
        """Say it of the encoder, of the decoder or, if that is not seen, of both."""
        memory = self.encoded(self.src)
        longer = self.encoded(self.filled(self.src, self.pad_id))
        if memory is None or longer is None:
            return "padding in the source is not hidden from the encoder or the decoder"
        if close(memory, longer[:, : self.src.size(1)], 1e-4):
            return "the cross-attention looks at the source's padding"
        return (
            "the encoder looks at the source's padding (or the mask hides rows instead "
            "of columns)"
        )

    @check("target padding")
    def target_padding(self) -> None:
        """Padding after the target changes no logits before it."""
        longer = self.call(self.src, self.filled(self.tgt, self.pad_id))
        expect(
            close(self.logits(), longer[:, : self.tgt.size(1)], 1e-4),
            "appending padding to the target changes the logits before it",
            "earlier positions see the padding",
            "the target's masks",
        )

    @check("batch")
    def batch(self) -> Finding | None:
        """A sample depends on no other, nor on its place."""
        src, tgt = self.inputs
        alike = self.call(src[:1].expand_as(src), tgt[:1].expand_as(tgt))
        if not close(alike, alike[:1].expand_as(alike), 1e-4):
            return place_finding()
        return batch_leak(
            lambda t: self.call(src, t), tgt, self.shifted(tgt, 1), alone=False
        ) or batch_leak(
            lambda s: self.call(s, tgt), src, self.shifted(src, 1), alone=False
        )

    scores = Model.scores

    @check("cache")
    def cache(self) -> None:
        """Token by token, with a cache, the logits are the same."""
        step = self.cached or cached_decoding(self.own)
        if step is None:
            return
        got, want = step(*self.inputs), self.logits()
        first = close(got[:, 0], want[:, 0], 1e-4)
        expect(
            close(got, want, 1e-4),
            "cached decoding gives other logits than reading the whole target"
            + (", from the second token on" if first else ""),
            "each new token is put at position 0, or the cache misses keys"
            if first
            else "the cached path computes something else",
            "the position of the new token, and what the cache keeps",
        )

    plain_logits, layers = Model.plain_logits, Model.layers

    @check("gradients")
    def gradients(self) -> Finding | None:
        """Every weight gets a gradient."""

        def on_other_tokens(number: int) -> Tensor:
            if number == 0:
                return self.logits()
            return self.call(self.ids(32, 6), self.ids(32, 5))

        return unreached(self.own, on_other_tokens, tables=False)

    first_loss = Model.first_loss

    @check("overfit")
    def overfit(self) -> Finding | None:
        """The model can learn three sequences by heart."""
        return cannot_overfit(self.module, self.inputs, self.ids(3, 5))


def expect_order(which: str, plain: Tensor, swapped: Tensor) -> None:
    """Expect that it matters which of two tokens comes first."""
    expect(
        not close(plain, swapped, 1e-6),
        f"exchanging two {which} tokens changes nothing",
        "positions are missing, the same for all tokens, or run over the batch",
        f"where positions are added to the {which}",
    )
