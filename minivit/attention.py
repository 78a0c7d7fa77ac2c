"""Attention: every query looks at every key and takes a mixture of the values.

Copy this file: it works alone and needs torch only.

Masks are bool, True = may look, and broadcast to (..., L, S). That is the rule of
`torch.nn.functional.scaled_dot_product_attention`, and the opposite of the
`attn_mask` and `key_padding_mask` of `torch.nn.MultiheadAttention`.

Letters for shapes: B batch, L queries, S keys, E embed, H heads, D head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MultiHeadAttention", "attention", "causal_mask", "padding_mask"]


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mix the values by how well each query matches each key.

    softmax(Q Kᵀ / √D) V. A query that may look nowhere gets zeros.

    Args:
        query: (..., L, D) what is looked for.
        key: (..., S, D) what each position offers.
        value: (..., S, Dv) what each position hands over.
        mask: bool, broadcastable to (..., L, S); True = may look.

    Returns:
        output: (..., L, Dv) one mixture of values a query.
        weights: (..., L, S) the mixing weights; each row sums to one.

    Raises:
        TypeError: the mask is not bool.
        ValueError: the shapes do not fit.

    Source:
        Vaswani et al. 2017, "Attention Is All You Need", equation 1.
    """
    _check_shapes(query, key, value)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))  # (..., L, S)
    if mask is None:
        weights = scores.softmax(dim=-1)
    else:
        _check_mask(mask, scores.shape)
        # The lowest finite number rather than -inf: a row in which everything is
        # hidden stays free of NaN, and the second fill then turns it into zeros.
        lowest = torch.finfo(scores.dtype).min
        weights = scores.masked_fill(~mask, lowest).softmax(dim=-1)
        weights = weights.masked_fill(~mask, 0.0)
    return weights @ value, weights


def causal_mask(
    query_len: int,
    key_len: int | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Let each query look at itself and at what came before it.

    The last query is aligned with the last key, so that the mask is right when the
    queries are only the newest tokens of a longer sequence (cached decoding).

    Args:
        query_len: L, number of queries.
        key_len: S, number of keys; as many as queries if not given.
        device: where the mask is made.

    Returns:
        (L, S) bool, True = may look.

    Raises:
        ValueError: a length is below one, or there are fewer keys than queries.

    >>> causal_mask(2, 3)
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    """
    key_len = query_len if key_len is None else key_len
    if not 1 <= query_len <= key_len:
        raise ValueError(
            f"causal_mask needs 1 <= query_len <= key_len, "
            f"got query_len={query_len} and key_len={key_len}"
        )
    look = torch.ones(query_len, key_len, dtype=torch.bool, device=device)
    return look.tril(diagonal=key_len - query_len)


def padding_mask(lengths: Tensor, max_len: int | None = None) -> Tensor:
    """Let every query look at the first `lengths[b]` keys of its sequence only.

    Args:
        lengths: (B,) integers, the number of real tokens of each sequence.
        max_len: S, the padded length; the longest of `lengths` if not given.

    Returns:
        (B, 1, 1, S) bool, True = may look; broadcasts over heads and queries.

    Raises:
        TypeError: the lengths are not integers.
        ValueError: no sequence, a negative length, or one beyond `max_len`.

    >>> padding_mask(torch.tensor([1, 3])).squeeze()
    tensor([[ True, False, False],
            [ True,  True,  True]])
    """
    lengths = torch.as_tensor(lengths)
    if (
        lengths.is_floating_point()
        or lengths.is_complex()
        or lengths.dtype == torch.bool
    ):
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.dim() != 1 or lengths.numel() == 0:
        raise ValueError(
            f"lengths must have shape (B,) with B >= 1, got {tuple(lengths.shape)}"
        )
    shortest, longest = int(lengths.min()), int(lengths.max())
    max_len = longest if max_len is None else max_len
    if max_len < 1:
        raise ValueError(f"max_len must be at least 1, got {max_len}")
    if shortest < 0 or longest > max_len:
        raise ValueError(
            f"lengths must lie between 0 and max_len={max_len}, "
            f"got {shortest} to {longest}"
        )
    look = torch.arange(max_len, device=lengths.device) < lengths[:, None]  # (B, S)
    return look[:, None, None, :]  # (B, 1, 1, S)


class MultiHeadAttention(nn.Module):
    """Several attentions side by side, each on its own share of the width.

    Args:
        embed_dim: E, width of the tokens.
        num_heads: H, must divide E; each head works on D = E / H features.
        dropout: probability of dropping an attention weight while training.
        bias: whether the four projections have a bias.

    Raises:
        ValueError: `num_heads` does not divide `embed_dim`, or `dropout` is no share.

    Source:
        Vaswani et al. 2017, section 3.2.2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim={embed_dim} must be divisible by num_heads={num_heads}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        # Queries, keys and values of all heads come from one matrix: one product.
        self.in_proj = nn.Linear(embed_dim, 3 * embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        nn.init.xavier_uniform_(self.in_proj.weight)
        if bias:
            nn.init.zeros_(self.in_proj.bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        *,
        mask: Tensor | None = None,
        cache: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Attend with torch's fused kernel, which never stores the weights.

        Args:
            query: (B, L, E).
            key: (B, S, E); None if a cache holds all keys already.
            value: (B, S, E); None likewise.
            mask: bool, broadcastable to (B, H, L, S); True = may look.
            cache: keys and values of earlier calls, see `project`; S counts them too.

        Returns:
            (B, L, E).

        Raises:
            TypeError: the mask is not bool.
            ValueError: a shape does not fit, or there are no keys anywhere.
        """
        q, k, v = self.project(query, key, value, cache=cache)
        self._check_mask(mask, q, k)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out_proj(self._merge(mixed))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Do the same with the weights in sight (without dropout): for looking.

        Args:
            query: (B, L, E).
            key: (B, S, E).
            value: (B, S, E).
            mask: bool, broadcastable to (B, H, L, S); True = may look.

        Returns:
            output: (B, L, E).
            weights: (B, H, L, S).

        Raises:
            TypeError: the mask is not bool.
            ValueError: a shape does not fit.
        """
        q, k, v = self.project(query, key, value)
        self._check_mask(mask, q, k)
        mixed, weights = attention(q, k, v, mask=mask)
        return self.out_proj(self._merge(mixed)), weights

    def project(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        *,
        cache: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Make queries, keys and values, and split each into heads.

        Args:
            query: (B, L, E).
            key: (B, S, E); None if a cache holds all keys already.
            value: (B, S, E); None likewise.
            cache: a dict that lives as long as one decoding, empty at first. New keys
                and values are appended to what it holds, and all of it is returned.
                Self-attention hands over the newest tokens at each step;
                cross-attention hands over the memory once, and None from then on (the
                memory again would stand in the cache twice).

        Returns:
            (B, H, L, D), (B, H, S, D) and (B, H, S, D); with a cache, S counts all
            that it holds.

        Raises:
            ValueError: a shape does not fit, or there are no keys anywhere.
        """
        if key is None or value is None:
            if key is not value or not cache:
                raise ValueError(
                    "key and value may only be None together, and with a cache that "
                    "holds earlier ones"
                )
            self._check_input(cache, query=query)
            return self._linear(query, 0), cache["key"], cache["value"]
        self._check_input(cache, query=query, key=key, value=value)
        if query is key and key is value:  # one product instead of three
            q, k, v = map(self._split, self.in_proj(query).chunk(3, dim=-1))
        else:
            q, k, v = map(self._linear, (query, key, value), range(3))
        if cache is not None:
            if cache:
                k = torch.cat([cache["key"], k], dim=2)  # (B, H, S, D)
                v = torch.cat([cache["value"], v], dim=2)  # (B, H, S, D)
            cache.update(key=k, value=v)
        return q, k, v

    def _linear(self, x: Tensor, part: int) -> Tensor:
        """Apply the rows of `in_proj` that make queries (0), keys (1) or values (2)."""
        rows = slice(part * self.embed_dim, (part + 1) * self.embed_dim)
        bias = None if self.in_proj.bias is None else self.in_proj.bias[rows]
        return self._split(F.linear(x, self.in_proj.weight[rows], bias))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, L, D)

    def _merge(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)  # (B, L, E)

    def _check_input(self, cache: dict[str, Tensor] | None, **inputs: Tensor) -> None:
        for name, x in inputs.items():
            if x.dim() != 3 or x.size(-1) != self.embed_dim or 0 in x.shape:
                raise ValueError(
                    f"{name} must have shape (batch, length, {self.embed_dim}) "
                    f"with nothing empty, got {tuple(x.shape)}"
                )
        sizes = [x.size(0) for x in (*inputs.values(), *(cache or {}).values())]
        if any(size != sizes[0] for size in sizes):
            raise ValueError(
                f"query, key, value and what a cache holds must share the batch size, "
                f"got {', '.join(map(str, sizes))}"
            )
        lengths = [inputs[name].size(1) for name in ("key", "value") if name in inputs]
        if any(length != lengths[0] for length in lengths):
            raise ValueError(
                f"key and value must have the same length, "
                f"got {lengths[0]} and {lengths[1]}"
            )

    @staticmethod
    def _check_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> None:
        if mask is None:
            return
        shape = torch.Size([q.size(0), q.size(1), q.size(2), k.size(2)])
        if mask.dim() == 3:  # (B, L, S) would broadcast its batch over the heads
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}: with three dimensions the batch "
                f"would be taken for the heads; expected (L, S) or (B, 1, L, S)"
            )
        _check_mask(mask, shape)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2 or 0 in x.shape:
            raise ValueError(
                f"{name} must have shape (..., length, width) with nothing empty, "
                f"got {tuple(x.shape)}"
            )
    if query.size(-1) != key.size(-1):
        raise ValueError(
            f"query and key must have the same width, "
            f"got {query.size(-1)} and {key.size(-1)}"
        )
    if key.size(-2) != value.size(-2):
        raise ValueError(
            f"key and value must have the same length, "
            f"got {key.size(-2)} and {value.size(-2)}"
        )
    fronts = [x.shape[:-2] for x in (query, key, value)]
    try:
        torch.broadcast_shapes(*fronts)
    except RuntimeError:
        raise ValueError(
            f"query, key and value must agree before the last two dimensions, "
            f"got {', '.join(str(tuple(front)) for front in fronts)}"
        ) from None


def _check_mask(mask: Tensor, shape: torch.Size) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = may look), got {mask.dtype}")
    missing = len(shape) - mask.dim()  # dimensions that broadcasting puts in front
    fits = missing >= 0 and all(
        have in (1, want) for have, want in zip(mask.shape, shape[missing:])
    )
    if not fits:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not broadcast to {tuple(shape)}"
        )
