"""Modules with the user's weights: checked by properties that hold for any weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attention import causal_mask as _causal_mask
from .properties import (
    Masking,
    always_differ,
    another,
    batch_leak,
    bounded,
    broken_residual,
    cannot_overfit,
    changed_at,
    changed_in_place,
    check_means,
    dtype_of,
    eval_copy,
    future_leak,
    half_overflow,
    hidden_in_maps,
    house_cached,
    in_double,
    large_first_loss,
    leak_finding,
    lost_branch,
    moved_copy,
    not_repeatable,
    order_matters,
    place_finding,
    probabilities,
    random_input,
    repeated_layer,
    size_of,
    tensor_in,
    unnormalised,
    unreached,
    width_of,
    wrong_shape,
)
from .report import (
    MASK_LINE,
    Finding,
    Report,
    checker,
    close,
    differs,
    run,
)
from .scores import wrong_scores
from .subject import Check, Subject, check, expect


@dataclass
class ModuleSubject(Subject):
    """A module under test, and a copy of it, with which checks do as they like.

    Attributes:
        module: the user's, which stays as it is.
        own: the copy, with other weights, in float64 where that can be.
        needs: names of checks, and the option without which they are left out.
        last: names of checks that run only if nothing was found before.
    """

    module: Any
    own: Any = field(init=False)
    needs: ClassVar[dict[str, str]] = {}
    last: ClassVar[tuple[str, ...]] = ()

    def on(self, m: Any, *inputs: Any, **options: Any) -> Tensor:
        """Call a copy of the module."""
        raise NotImplementedError

    def call(self, *inputs: Any, **options: Any) -> Tensor:
        return self.on(self.own, *inputs, **options)

    def report(self) -> Report:
        """Run all checks that the options allow."""
        checks = [
            (c.name, partial(c.finding, self))
            for c in vars(type(self)).values()
            if isinstance(c, Check)
            and getattr(self, self.needs.get(c.name, "name")) is not None
        ]
        last = [row for row in checks if row[0] in self.last]
        return run(self.name, [row for row in checks if row not in last], last)


@dataclass
class Layer(ModuleSubject):
    """A layer that turns tokens (B, L, E) into tokens, by attention.

    Checks that several layers share stand here; each layer lists those that it takes.

    Attributes:
        x: tokens (3, 5, E).
        memory: other tokens (3, 7, E).
    """

    embed_dim: int | None
    mask_name: str | None
    mask_means: str
    mask_dims: int
    batch_first: bool
    causal: bool = False
    maps: Callable[..., Tensor] | None = None
    needs: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("mask", "causality", "half", "map"), "mask_name"),
        "padding": "padding_name",
        "memory mask": "memory_mask_name",
    }
    part: ClassVar[int] = 4  # of the rows of a map, 1 / part may get no gradient

    def __post_init__(self) -> None:
        check_means(self.mask_means)
        own = moved_copy(self.module)
        self.dim = self.embed_dim or width_of(self.module)
        self.masking = Masking(self.mask_means, self.mask_dims)
        inputs = random_input(3, 5, self.dim), random_input(3, 7, self.dim)
        self.own, self.x, self.memory = in_double(own, self.trial, *inputs)

    def trial(self, m: Any, x: Tensor, memory: Tensor) -> list[Tensor]:
        """Call a copy in every way that the checks will."""
        return [self.on(m, x), self.on(m, x, _causal_mask(5))]

    def masked(self, m: Any, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Make the argument for a mask of tokens that look at each other."""
        return self.masking.argument(self.mask_name, mask, m, x, x.size(1))

    def shown(self, masked: dict[str, Tensor]) -> Tensor | None:
        """The maps (B, H, L, L) that a layer shows without being told how."""
        return None

    @check("shape")
    def shape(self) -> Finding | None:
        """Tokens come out as wide as they went in."""
        return wrong_shape(self.call(self.x), (3, 5, self.dim))

    @check("in place")
    def untouched(self) -> Finding | None:
        """The input stays as it is."""
        return changed_in_place(self.call, self.x)

    @check("repeatable")
    def repeatable(self) -> Finding | None:
        """The same again gives the same, also after another call."""
        x = self.x
        return not_repeatable(lambda: self.call(x), lambda: self.call(x * 2), self.own)

    @check("residual")
    def residual(self) -> Finding | None:
        """The input passes, and what each branch makes is added to it."""
        return (
            broken_residual(self.own, self.on, self.x)
            or lost_branch(self.own, self.on, self.x)
            or unnormalised(self.own, self.on, self.x)
        )

    @check("scores")
    def scores(self) -> Finding | None:
        """Scores are divided by the root of a head's width; keys share the weights."""
        return wrong_scores(lambda: self.call(self.x))

    @check("batch")
    def batch(self) -> Finding | None:
        """A sample depends on no other, nor on its place."""
        return batch_leak(self.call, self.x)

    @check("order")
    def order(self) -> Finding | None:
        """Reordering the tokens reorders the output, and does no more."""
        return order_matters(self.call, self.x)

    @check("gradients")
    def gradients(self) -> Finding | None:
        """Every weight gets a gradient."""
        x = self.x
        return unreached(self.own, lambda n: self.call(another(x, n)), part=self.part)

    @check("causality")
    def causality(self) -> Finding | None:
        """Under a causal mask the past does not change with the future."""
        return future_leak(self.own, self.on, self.x)

    @check("half")
    def half(self) -> Finding | None:
        """In half precision a masked output stays finite."""
        return half_overflow(self.own, self.on, self.x)

    @check("map")
    def map(self) -> Finding | None:
        """Maps, if it shows them, are zero where the mask hides."""
        masked = self.masked(self.own, self.x, _causal_mask(5))
        if self.maps is None:
            return hidden_in_maps(self.shown(masked))
        return hidden_in_maps(self.maps(self.x, *masked.values()))

    @torch.no_grad()
    def see_all(self) -> None:
        """The first tokens see the last, unless the layer is causal."""
        sees = changed_tokens(
            self.call(self.x), self.call(changed_at(self.x, slice(3, None)))
        )[:3]
        expect(
            not bool(sees.any()) if self.causal else bool(sees.all()),
            "a token sees later ones"
            if self.causal
            else "tokens do not see all later ones",
            "the mask that should hide the future does not"
            if self.causal
            else "a mask is built in although none was asked for (or say causal=True)",
            MASK_LINE,
            check="built-in mask",
        )

    @torch.no_grad()
    def own_masks(self) -> None:
        """A sample with a mask of its own gives the same in a batch as alone."""
        x, mask = self.x, torch.ones(3, 5, 5, dtype=torch.bool)
        mask[0, :, 3:], mask[1, :, :2] = False, False
        together = self.call(x, mask)
        alone = [self.call(x[b : b + 1], mask[b : b + 1])[0] for b in range(3)]
        expect(
            close(together, torch.stack(alone), 1e-4),
            "with a mask of its own a sample gives something else in a batch than "
            "alone",
            "masks meet heads of other samples (repeat where repeat_interleave "
            "belongs), or all use one sample's mask",
            "where the mask is expanded over the heads",
        )


def changed_tokens(before: Tensor, after: Tensor) -> Tensor:
    """Which tokens (L,) of outputs (B, L, E) differ in any sample and feature."""
    return differs(before, after).any(-1).any(0)


@dataclass
class Model(ModuleSubject):
    """A model that turns its `inputs` into logits.

    Checks that several models share stand here; each model lists those that it takes.

    Attributes:
        inputs: what it is called with.
        fresh: it is not trained yet.
        read: the tokens among the inputs that it reads before it says the next.
    """

    fresh: bool
    inputs: tuple[Tensor, ...] = field(init=False)
    read: Tensor | None = field(init=False, default=None)
    last = ("overfit",)

    def on(self, m: Any, *inputs: Tensor) -> Tensor:
        return tensor_in(m(*inputs))

    def logits(self) -> Tensor:
        return self.call(*self.inputs)

    @check("scores")
    def scores(self) -> Finding | None:
        """Scores are divided by the root of a head's width; keys share the weights."""
        return wrong_scores(self.logits)

    @check("logits")
    def plain_logits(self) -> Finding | None:
        """No softmax, nor anything else, squashes the logits."""
        return probabilities(self.logits()) or bounded(
            self.own, lambda m: self.on(m, *self.inputs)
        )

    @check("layers")
    def layers(self) -> Finding | None:
        """Each layer of a list has weights of its own."""
        return repeated_layer(self.own)

    @check("first loss")
    def first_loss(self) -> Finding | None:
        """Before training, the loss is near that of guessing."""
        fresh = eval_copy(self.module, dtype_of(self.own))
        return large_first_loss(self.on(fresh, *self.inputs), self.fresh, self.read)


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
            `decode(…, cache=…)` and `new_cache` as the house's need none.

    Returns:
        The report.

    Raises:
        ValueError: a size that is needed is neither given nor an attribute.
    """
    src_vocab = size_of(model, "src_vocab_size", src_vocab_size)
    vocab = size_of(model, "tgt_vocab_size", tgt_vocab_size)
    own = moved_copy(model)
    usable = torch.tensor([i for i in range(min(src_vocab, vocab)) if i != pad_id])
    g = torch.Generator().manual_seed(0)

    def ids(*shape: int) -> Tensor:
        return usable[torch.randint(len(usable), shape, generator=g)]

    src, tgt = ids(3, 6), ids(3, 5)
    src[:, 1] = usable[1]
    src[:, 2] = usable[2]
    tgt[:, 0], tgt[:, 1], tgt[:, 2] = usable[0], usable[1], usable[2]

    def trial(m: Any) -> list[Tensor]:
        longer = torch.cat([src, torch.full((3, 2), pad_id)], dim=1)
        return [tensor_in(m(src, tgt)), tensor_in(m(longer, tgt))]

    (own,) = in_double(own, trial)

    def call(src: Tensor, tgt: Tensor) -> Tensor:
        return tensor_in(own(src, tgt))

    def shifted(tokens: Tensor, column: int) -> Tensor:
        other = tokens.clone()
        place = torch.searchsorted(usable, other[:, column].contiguous())
        other[:, column] = usable[(place + 1) % len(usable)]
        return other

    def causality() -> Finding | None:
        for training in (False, True):
            for t in (4, 2):

                def past(m: Any, tgt: Tensor, t: int = t) -> Tensor:
                    return tensor_in(m(src, tgt))[:, :t]

                if always_differ(past, own, tgt, shifted(tgt, t), training):
                    return leak_finding(training)
        late = call(src, shifted(tgt, 1))[:, -1]
        if close(late, call(src, tgt)[:, -1], 1e-6):
            return Finding(
                "causality",
                "the last logits do not change with an earlier target token",
                "the mask hides the past (inverted polarity), or targets do not attend",
                MASK_LINE,
            )
        return None

    def order(which: str) -> Finding | None:
        swapped = [0, 2, 1, 3, 4]
        if which == "target":
            a, b = call(src, tgt)[:, -1], call(src, tgt[:, swapped])[:, -1]
        else:
            a, b = call(src, tgt), call(src[:, [*swapped, 5]], tgt)
        if not close(a, b, 1e-6):
            return None
        return Finding(
            f"{which} order",
            f"exchanging two {which} tokens changes nothing",
            "positions are missing, the same for all tokens, or run over the batch",
            f"where positions are added to the {which}",
        )

    def encoded(src: Tensor) -> Tensor | None:
        try:
            return own.encode(src)
        except (AttributeError, TypeError):
            return None  # no such method, or one with other arguments

    def source_used() -> Finding | None:
        if not close(call(src, tgt), call(shifted(src, 3), tgt), 1e-6):
            a, b = encoded(src), encoded(shifted(src, 3))
            if a is None or b is None or not close(a[:, 0], b[:, 0], 1e-6):
                return None
            return Finding(
                "source",
                "what the encoder says of a token does not change with a later one",
                "the encoder is causal, or its tokens do not look at each other",
                "the mask that the encoder gets",
            )
        return Finding(
            "source",
            "the logits do not change with the source",
            "there is no cross-attention, or its mask hides everything",
            "the decoder's second attention",
        )

    def padding() -> Finding | None:
        plain = call(src, tgt)

        def with_fill(token: int) -> Tensor:
            return torch.cat([src, torch.full((3, 2), token)], dim=1)

        if close(plain, call(with_fill(pad_id), tgt), 1e-4):
            return None
        for other in usable.tolist()[:40]:
            if close(plain, call(with_fill(other), tgt), 1e-4):
                return Finding(
                    "padding",
                    f"token {other} is ignored, padding (pad_id={pad_id}) is not",
                    "the mask compares with the wrong id",
                    "where the padding mask is made",
                )
        cause = "padding in the source is not hidden from the encoder or the decoder"
        memory, longer = encoded(src), encoded(with_fill(pad_id))
        if memory is not None and longer is not None:
            longer = longer[:, : src.size(1)]
            cause = (
                "the cross-attention looks at the source's padding"
                if close(memory, longer, 1e-4)
                else "the encoder looks at the source's padding (or the mask hides "
                "rows instead of columns)"
            )
        return Finding(
            "padding",
            "appending padding to the source changes the logits",
            cause,
            "the padding mask and where it is handed over",
        )

    def target_padding() -> Finding | None:
        longer = torch.cat([tgt, torch.full((3, 2), pad_id)], dim=1)
        if close(call(src, tgt), call(src, longer)[:, : tgt.size(1)], 1e-4):
            return None
        return Finding(
            "target padding",
            "appending padding to the target changes the logits before it",
            "earlier positions see the padding",
            "the target's masks",
        )

    def batch() -> Finding | None:
        alike = call(src[:1].expand_as(src), tgt[:1].expand_as(tgt))
        if not close(alike, alike[:1].expand_as(alike), 1e-4):
            return place_finding()
        return batch_leak(
            lambda t: call(src, t), tgt, shifted(tgt, 1), alone=False
        ) or batch_leak(lambda s: call(s, tgt), src, shifted(src, 1), alone=False)

    def decoding() -> Finding | None:
        step = cached or house_cached(own)
        if step is None or close(step(src, tgt), call(src, tgt), 1e-4):
            return None
        got, want = step(src, tgt), call(src, tgt)
        first = bool(close(got[:, 0], want[:, 0], 1e-4))
        return Finding(
            "cache",
            "cached decoding gives other logits than reading the whole target"
            + (", from the second token on" if first else ""),
            "each new token is put at position 0, or the cache misses keys"
            if first
            else "the cached path computes something else",
            "the position of the new token, and what the cache keeps",
        )

    def labels() -> Tensor:
        return ids(3, 5)

    def on_other_tokens(number: int) -> Tensor:
        return call(src, tgt) if number == 0 else call(ids(32, 6), ids(32, 5))

    return run(
        "transformer",
        [
            ("shape", lambda: wrong_shape(call(src, tgt), (3, 5, vocab))),
            (
                "repeatable",
                lambda: not_repeatable(
                    lambda: call(src, tgt), lambda: call(src, labels()), own
                ),
            ),
            ("causality", causality),
            ("source", source_used),
            ("source order", lambda: order("source")),
            ("target order", lambda: order("target")),
            ("padding", padding),
            ("target padding", target_padding),
            ("batch", batch),
            ("scores", lambda: wrong_scores(lambda: call(src, tgt))),
            ("cache", decoding),
            (
                "logits",
                lambda: (
                    probabilities(call(src, tgt))
                    or bounded(own, lambda m: tensor_in(m(src, tgt)))
                ),
            ),
            ("layers", lambda: repeated_layer(own)),
            ("gradients", lambda: unreached(own, on_other_tokens, tables=False)),
            (
                "first loss",
                lambda: large_first_loss(
                    tensor_in(eval_copy(model, dtype_of(own))(src, tgt)), fresh, tgt
                ),
            ),
        ],
        last=[("overfit", lambda: cannot_overfit(model, (src, tgt), labels()))],
    )
