"""Multi-head attention, a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .identity import wrong_heads
from .modules import Layer, changed_tokens
from .properties import (
    change_of,
    changed_at,
    flip,
    mask_finding,
    shown_weights,
    size_of,
    tensor_in,
    wrong_shape,
)
from .report import SOFTMAX_LINE, Finding, Report, checker, close, differs
from .scores import positions_inside, without_projection
from .subject import check, expect


@checker
def multi_head_attention(
    module: nn.Module,
    *,
    embed_dim: int | None = None,
    num_heads: int | None = None,
    arguments: str = "query key value",
    mask_name: str | None = "mask",
    mask_means: str = "look",
    mask_dims: int = 2,
    causal: bool = False,
    batch_first: bool = True,
    maps: Callable[..., Tensor] | None = None,
) -> Report:
    """Check a multi-head attention, any class with any weights.

    Args:
        module: called with (B, L, E), (B, S, E), (B, S, E); returns (B, L, E), alone
            or first in a tuple.
        embed_dim: E; read from the module's attribute if not given.
        num_heads: H; read from the module's attribute if not given.
        arguments: order of its inputs, as "query key value"; "x" for self-attention.
        mask_name: name of its mask argument; None if it has none.
        mask_means: "look" if True lets a query see a key, "hide" if it hides it, "add"
            for a float mask, 0 or -inf, that is added to the scores.
        mask_dims: 2 for a mask (L, S), 3 for (B, L, S), 4 for (B, 1, L, S).
        causal: it hides the future by itself.
        batch_first: False if it takes (L, B, E).
        maps: called as maps(x, mask), returns its attention maps (B, H, L, L); by
            default its method `attend`, if it has one like minivit's.

    Returns:
        The report.

    Raises:
        TypeError: the module is no `nn.Module`.
        ValueError: a size that is needed is neither given nor an attribute.
    """
    return Heads(
        module,
        embed_dim=embed_dim,
        num_heads=num_heads,
        arguments=arguments.split(),
        mask_name=mask_name,
        mask_means=mask_means,
        mask_dims=mask_dims,
        causal=causal,
        batch_first=batch_first,
        maps=maps,
    ).report()


@dataclass
class Heads(Layer):
    """The module; most checks let tokens look at each other, some at a memory.

    `cross` is whether they can: whether keys and values are inputs of their own.
    """

    num_heads: int | None = None
    arguments: list[str] = field(default_factory=list)
    name = "multi_head_attention"
    part = 16

    def __post_init__(self) -> None:
        self.embed_dim = size_of(self.module, "embed_dim", self.embed_dim)
        self.heads = size_of(self.module, "num_heads", self.num_heads)
        self.cross = "key" in self.arguments
        super().__post_init__()

    def on(self, m: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attend_on(m, x, x, x, mask)

    def attend_on(
        self, m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        given = {"query": q, "key": k, "value": v, "x": q}
        inputs = [flip(given[name], self.batch_first) for name in self.arguments]
        masked = self.masking.argument(self.mask_name, mask, m, q, k.size(1))
        return flip(tensor_in(m(*inputs, **masked)), self.batch_first)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend_on(self.own, q, k, v)

    def shown(self, masked: dict[str, Tensor]) -> Tensor | None:
        if self.arguments != ["query", "key", "value"] or not self.batch_first:
            return None
        return shown_weights(self.own, self.x, masked)

    shape, untouched, repeatable = Layer.shape, Layer.untouched, Layer.repeatable

    @check("values")
    def values(self) -> Finding | None:
        """With identity matrices as projections, the answer is known."""
        return wrong_heads(self.own, self.attend_on, self.dim, self.heads)

    @check("projection")
    def projection(self) -> None:
        """Heads are mixed at the end; a single one needs no such projection."""
        expect(
            self.heads == 1 or not without_projection(lambda: self.call(self.x)),
            "no product comes after the weights have met the values",
            "the output projection is missing: heads never mix",
            "the last line of forward",
        )

    scores = Layer.scores

    @check("softmax")
    def softmax(self) -> None:
        """A mean over the keys stays as it is when all keys are there twice."""
        x, memory = self.x, self.memory
        twice = torch.cat([memory, memory], dim=1)
        if self.cross:
            a, b = self.attend(x, memory, memory), self.attend(x, twice, twice)
        else:
            a, b = self.call(memory), self.call(twice)[:, : memory.size(1)]
        expect(
            close(a, b, 1e-4) or positions_inside(lambda: self.call(x)) or self.causal,
            "giving every key and value twice changes the output",
            "the weights of a query do not sum to one over the keys: no softmax, or "
            "over another axis than the keys",
            SOFTMAX_LINE,
        )

    @check("queries")
    def queries(self) -> Finding | None:
        """A query does not depend on the others."""
        if not self.cross:
            return None
        x, memory = self.x, self.memory
        before = self.attend(x, memory, memory)
        after = self.attend(changed_at(x, slice(2, None)), memory, memory)
        if before.shape != x.shape:
            return wrong_shape(before, tuple(x.shape))
        expect(
            close(before[:, :2], after[:, :2]),
            "a query's output changes when another query changes",
            "the softmax runs over the queries, or a reshape mixes positions",
            SOFTMAX_LINE + ", and every reshape",
        )
        return None if self.causal else self.roles()

    @torch.no_grad()
    def roles(self) -> None:
        """Query, key and value each do what they are for."""
        if sorted(self.arguments) != ["key", "query", "value"]:
            return
        x, memory = self.x, self.memory
        other = memory + change_of(memory)
        base = self.attend(x, memory, memory)
        others = (
            self.attend(x + change_of(x), memory, memory),
            self.attend(x, other, memory),
            self.attend(x, memory, other),
        )
        expect(
            all(bool(differs(base, new).any()) for new in others),
            "one of query, key and value changes nothing",
            "one argument is read twice, another never",
            "the three projections at the start of forward",
            check="roles",
        )
        alike = memory[:, :1].expand_as(memory)
        expect(
            close(self.attend(x, memory, alike), self.attend(x, other, alike), 1e-4),
            "with all values alike, the output still changes with the keys",
            "keys and values are exchanged, or the weights do not sum to one",
            "the three projections at the start of forward",
            check="roles",
        )

    batch, order = Layer.batch, Layer.order

    @check("built-in mask")
    def built_in_mask(self) -> None:
        """No mask is built in, unless it is causal by itself."""
        self.see_all()

    gradients = Layer.gradients

    @check("mask")
    def mask(self) -> Finding | None:
        """A hidden key reaches no query; one that may look there sees it."""
        mask = torch.ones(5, 5, dtype=torch.bool)
        mask[:, 3] = torch.arange(5) == 3
        before = self.call(self.x, mask)
        changed = changed_tokens(before, self.call(changed_at(self.x, 3), mask))
        finding = mask_finding(~changed[[0, 1, 2, 4]], changed[3])
        if finding is None and self.mask_dims > 2:
            self.own_masks()
        return finding

    causality, half, map = Layer.causality, Layer.half, Layer.map
