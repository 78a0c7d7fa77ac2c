"""Layers of an encoder and of a decoder, with residuals around their branches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import causal_mask as _causal_mask
from .modules import Layer, changed_tokens
from .properties import (
    another,
    batch_leak,
    change_of,
    changed_at,
    flip,
    mask_finding,
    no_activation,
    tensor_in,
    unreached,
)
from .report import Finding, Report, checker, close, differs
from .subject import check, expect


@checker
def encoder_layer(
    layer: nn.Module,
    *,
    embed_dim: int | None = None,
    mask_name: str | None = "mask",
    mask_means: str = "look",
    mask_dims: int = 2,
    padding_name: str | None = None,
    causal: bool = False,
    batch_first: bool = True,
    maps: Callable[..., Tensor] | None = None,
) -> Report:
    """Check an encoder layer, pre- or post-norm, any class with any weights.

    Args:
        layer: called with (B, L, E), returns the same, alone or first in a tuple.
        embed_dim: E; found in its parameters if not given.
        mask_name: name of its mask argument; None if it has none.
        mask_means: "look" if True lets a query see a key, "hide" if it hides it, "add"
            for a float mask, 0 or -inf, that is added to the scores.
        mask_dims: 2 for a mask (L, L), 3 for (B, L, L), 4 for (B, 1, L, L).
        padding_name: name of its argument for a bool mask (B, L), True = padding.
        causal: it hides the future by itself.
        batch_first: False if it takes (L, B, E).
        maps: called as maps(x, mask), returns its attention maps (B, H, L, L).

    Returns:
        The report.

    Raises:
        TypeError: the layer is no `nn.Module`.
        ValueError: E is neither given nor to be found.
    """
    return EncoderLayer(
        layer,
        embed_dim=embed_dim,
        mask_name=mask_name,
        mask_means=mask_means,
        mask_dims=mask_dims,
        padding_name=padding_name,
        causal=causal,
        batch_first=batch_first,
        maps=maps,
    ).report()


@dataclass
class EncoderLayer(Layer):
    """A layer whose tokens look at each other; `pads` (3, 5) are padding."""

    padding_name: str | None = None
    name = "encoder_layer"

    def __post_init__(self) -> None:
        self.pads = torch.zeros(3, 5, dtype=torch.bool)
        self.pads[0, 3:], self.pads[1, 4:] = True, True
        super().__post_init__()

    def on(self, m: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        masked = self.masked(m, x, mask)
        return flip(tensor_in(m(flip(x, self.batch_first), **masked)), self.batch_first)

    def padded_on(self, m: Any, x: Tensor) -> Tensor:
        padded = {self.padding_name or "": self.pads}
        return flip(tensor_in(m(flip(x, self.batch_first), **padded)), self.batch_first)

    def trial(self, m: Any, x: Tensor, memory: Tensor) -> list[Tensor]:
        padded = [] if self.padding_name is None else [self.padded_on(m, x)]
        return [*super().trial(m, x, memory), *padded]

    shape, untouched, repeatable = Layer.shape, Layer.untouched, Layer.repeatable

    @check("attention")
    def attention(self) -> None:
        """A change of one token reaches the others."""
        changed = changed_tokens(self.call(self.x), self.call(changed_at(self.x, 3)))
        expect(
            bool(changed[4:].all()),
            "a token does not change when another one changes",
            "tokens do not look at each other",
            "the call of the attention",
        )
        self.see_all()

    residual = Layer.residual

    @check("activation")
    def activation(self) -> Finding | None:
        """The layer is no odd function."""
        return no_activation(self.own, lambda m, sign: self.on(m, sign * self.x))

    scores, batch, order = Layer.scores, Layer.batch, Layer.order
    gradients = Layer.gradients

    @check("mask")
    def mask(self) -> Finding | None:
        """Tokens that may look at themselves alone see no other, and the reverse."""
        other = changed_at(self.x, 3)

        def reaches_others(mask: Tensor) -> Tensor:
            changed = changed_tokens(self.call(self.x, mask), self.call(other, mask))
            return changed[[0, 1, 2, 4]].any()

        only_self = torch.eye(5, dtype=torch.bool)
        hidden = ~reaches_others(only_self)
        finding = mask_finding(hidden, reaches_others(~only_self))
        if finding is None and self.mask_dims > 2:
            self.own_masks()
        return finding

    causality, half, map = Layer.causality, Layer.half, Layer.map

    @check("padding")
    def padding(self) -> Finding | None:
        """Padding changes no other token, and what is no padding does."""
        x, pads = self.x, self.pads
        other = torch.where(pads[..., None], x + change_of(x), x)
        out = self.padded_on(self.own, x)
        hidden = close(out[~pads], self.padded_on(self.own, other)[~pads], 1e-4)
        changes = differs(out, self.padded_on(self.own, changed_at(x, 0)))
        seen = changes[:, 1:3].flatten(1).any(1)  # (B,)
        finding = mask_finding(torch.tensor(hidden), seen)
        return finding and replace(finding, check="padding")


@checker
def decoder_layer(
    layer: nn.Module,
    *,
    embed_dim: int | None = None,
    mask_name: str | None = "mask",
    memory_mask_name: str | None = "memory_mask",
    mask_means: str = "look",
    mask_dims: int = 2,
    arguments: str = "x memory",
    batch_first: bool = True,
) -> Report:
    """Check a decoder layer, pre- or post-norm, any class with any weights.

    Args:
        layer: called with x (B, L, E) and memory (B, S, E); returns (B, L, E), alone or
            first in a tuple.
        embed_dim: E; found in its parameters if not given.
        mask_name: name of the argument for the mask (L, L) of the self-attention.
        memory_mask_name: the same for the mask (L, S) of the cross-attention.
        mask_means: "look" if True lets a query see a key, "hide" if it hides it, "add"
            for a float mask, 0 or -inf, that is added to the scores.
        mask_dims: 2 for masks (L, S), 3 for (B, L, S), 4 for (B, 1, L, S).
        arguments: order of its inputs.
        batch_first: False if it takes (L, B, E).

    Returns:
        The report.

    Raises:
        TypeError: the layer is no `nn.Module`.
        ValueError: E is neither given nor to be found.
    """
    return DecoderLayer(
        layer,
        embed_dim=embed_dim,
        arguments=arguments.split(),
        mask_name=mask_name,
        mask_means=mask_means,
        mask_dims=mask_dims,
        memory_mask_name=memory_mask_name,
        batch_first=batch_first,
    ).report()


@dataclass
class DecoderLayer(Layer):
    """A layer whose tokens look back and at a memory; `some` of it (5, 7) is seen."""

    memory_mask_name: str | None = None
    arguments: list[str] = field(default_factory=list)
    name = "decoder_layer"

    def __post_init__(self) -> None:
        self.some = torch.ones(5, 7, dtype=torch.bool)
        self.some[:, 4] = False
        super().__post_init__()

    def on(
        self,
        m: Any,
        x: Tensor,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        seen: Tensor = self.memory if memory is None else memory
        masked = self.masked(m, x, mask) | self.masking.argument(
            self.memory_mask_name, memory_mask, m, x, seen.size(1)
        )
        given = {"x": x, "memory": seen.to(x.dtype)}
        inputs = [flip(given[name], self.batch_first) for name in self.arguments]
        return flip(tensor_in(m(*inputs, **masked)), self.batch_first)

    def trial(self, m: Any, x: Tensor, memory: Tensor) -> list[Tensor]:
        masked = self.on(m, x, _causal_mask(5), memory, self.some)
        return [self.on(m, x, memory=memory), masked]

    shape, untouched, repeatable = Layer.shape, Layer.untouched, Layer.repeatable

    @check("memory")
    def reads_memory(self) -> None:
        """A change of one token of the memory reaches every output."""
        other = self.call(self.x, memory=changed_at(self.memory, 4))
        expect(
            bool(changed_tokens(self.call(self.x), other).all()),
            "not every output changes with the memory",
            "there is no cross-attention, its keys come from the target, or it is "
            "causal",
            "the second attention: queries from x, keys and values from memory",
        )

    @check("memory order")
    def memory_order(self) -> None:
        """Reordering the memory changes nothing."""
        turned = self.call(self.x, memory=self.memory.flip(1))
        expect(
            close(self.call(self.x), turned, 1e-4),
            "reordering the memory changes the output",
            "a reshape mixes positions",
            "every reshape of the second attention",
        )

    residual = Layer.residual

    @check("activation")
    def activation(self) -> Finding | None:
        """The layer is no odd function."""
        x, memory = self.x, self.memory
        return no_activation(
            self.own, lambda m, sign: self.on(m, sign * x, memory=sign * memory)
        )

    scores = Layer.scores

    @check("batch")
    def batch(self) -> Finding | None:
        """A sample depends on no other; its place decides which memory it reads."""
        return batch_leak(self.call, self.x, alone=False)

    order = Layer.order

    @check("gradients")
    def gradients(self) -> Finding | None:
        """Every weight gets a gradient."""

        def on_other_tokens(number: int) -> Tensor:
            memory = another(self.memory, number)
            return self.call(another(self.x, number), memory=memory)

        return unreached(self.own, on_other_tokens, part=self.part)

    causality, half = Layer.causality, Layer.half

    @check("memory mask")
    def memory_mask(self) -> Finding | None:
        """A hidden token of the memory reaches no output, a visible one does."""

        def changes(place: int) -> Tensor:
            """Whether anything changes with that token of the memory."""
            before, after = (
                self.call(self.x, memory=memory, memory_mask=self.some)
                for memory in (self.memory, changed_at(self.memory, place))
            )
            return differs(before, after).any()

        finding = mask_finding(~changes(4), changes(2))
        return finding and replace(
            finding, check="memory mask", look_at="the mask of the second attention"
        )
