"""Modules with the user's weights: what is done to all layers, and to all models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attention import causal_mask as _causal_mask
from .properties import (
    Masking,
    another,
    batch_leak,
    bounded,
    broken_residual,
    changed_at,
    changed_in_place,
    check_means,
    dtype_of,
    eval_copy,
    future_leak,
    half_overflow,
    hidden_in_maps,
    in_double,
    large_first_loss,
    lost_branch,
    moved_copy,
    not_repeatable,
    order_matters,
    probabilities,
    random_input,
    repeated_layer,
    tensor_in,
    unnormalised,
    unreached,
    width_of,
    wrong_shape,
)
from .report import (
    MASK_LINE,
    Finding,
    close,
    differs,
)
from .scores import wrong_scores
from .subject import Subject, check, expect


@dataclass
class ModuleSubject(Subject):
    """A module under test, and a copy of it, with which checks do as they like.

    Attributes:
        module: the user's, which stays as it is.
        own: the copy, with other weights, in float64 where that can be.
    """

    module: Any
    own: Any = field(init=False)

    def on(self, m: Any, *inputs: Any, **options: Any) -> Tensor:
        """Call a copy of the module."""
        raise NotImplementedError

    def call(self, *inputs: Any, **options: Any) -> Tensor:
        return self.on(self.own, *inputs, **options)


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
        before, after = self.call(self.x), self.call(changed_at(self.x, slice(3, None)))
        sees = changed_tokens(before, after)[:3]
        if self.causal:
            expect(
                not bool(sees.any()),
                "a token sees later ones",
                "the mask that should hide the future does not",
                MASK_LINE,
                check="built-in mask",
            )
        else:
            expect(
                bool(sees.all()),
                "tokens do not see all later ones",
                "a mask is built in although none was asked for (or say causal=True)",
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
        if not self.fresh:
            return None
        fresh = eval_copy(self.module, dtype_of(self.own))
        return large_first_loss(self.on(fresh, *self.inputs), self.read)
