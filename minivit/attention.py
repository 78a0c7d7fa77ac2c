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
        weights: (..., L, S) the mixing weights; each row sums to one, or to zero where
            the query may look nowhere.

    Raises:
        TypeError: the mask is not bool.
        ValueError: a mask of three dimensions for scores of four.

    Source:
        Vaswani et al. 2017, "Attention Is All You Need", equation 1.
    """
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))  # (..., L, S)
    if mask is None:
        weights = scores.softmax(dim=-1)
    else:
        _check_mask(mask, scores.dim())
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
        ValueError: there are fewer keys than queries.

    >>> causal_mask(2, 3)
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    """
    key_len = query_len if key_len is None else key_len
    if query_len > key_len:
        raise ValueError(f"query_len={query_len} is larger than key_len={key_len}")
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
        TypeError: the lengths are not one integer a sequence.

    >>> padding_mask(torch.tensor([1, 3])).squeeze()
    tensor([[ True, False, False],
            [ True,  True,  True]])
    """
    lengths = torch.as_tensor(lengths)
    if lengths.dim() != 1 or lengths.dtype not in (torch.int32, torch.int64):
        came = f"{lengths.dtype} {tuple(lengths.shape)}"
        raise TypeError(f"lengths must be integers of shape (B,), got {came}")
    max_len = int(lengths.max()) if max_len is None else max_len
    look = torch.arange(max_len, device=lengths.device) < lengths[:, None]  # (B, S)
    return look[:, None, None, :]  # (B, 1, 1, S)


class MultiHeadAttention(nn.Module):
    """Several attentions side by side: each reads all features and makes D of its own.

    Args:
        embed_dim: E, width of the tokens.
        num_heads: H, must divide E; each head works on D = E / H features of its own.
        dropout: probability of dropping an attention weight while training.
        bias: whether the four projections have a bias.

    Raises:
        ValueError: `num_heads` does not divide `embed_dim`.

    A query that may look nowhere gets what the last map makes of zeros. (Not where a
    model runs after an export to ONNX: other kernels give it other numbers.)

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
        if embed_dim % num_heads:
            raise ValueError(f"{embed_dim=} must be divisible by {num_heads=}")
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
        """Attend with torch's kernel, which stores no weights where a fused one fits.

        Args:
            query: (B, L, E).
            key: (B, S, E); None if a cache holds all keys already.
            value: (B, S, E); None likewise.
            mask: bool, of 2 or 4 dimensions, broadcastable to (B, H, L, S); True = may
                look.
            cache: a dict for this module that lives as long as one decoding, empty at
                first. It collects keys and values, and S counts all that it holds.
                Self-attention hands over the newest tokens at each step;
                cross-attention hands over the memory once, and None from then on (the
                memory again would stand in the cache twice).

        Returns:
            (B, L, E).

        Raises:
            TypeError: the mask is not bool.
            ValueError: a mask of three dimensions, keys and values of different shape,
                or as `project`.
        """
        q, k, v = self.project(query, key, value, cache=cache)
        if mask is not None:
            _check_mask(mask, q.dim())
        if k.shape != v.shape:  # the kernel would read memory that is not there
            raise ValueError(f"keys {tuple(k.shape)}, but values {tuple(v.shape)}")
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        if cache is not None:
            cache.update(key=k, value=v)
        return self.out_proj(self._merge(mixed))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Do the same with the weights in sight (without dropout): for looking.

        Args:
            query: (B, L, E).
            key: (B, S, E).
            value: (B, S, E).
            mask: bool, of 2 or 4 dimensions, broadcastable to (B, H, L, S); True = may
                look.

        Returns:
            output: (B, L, E).
            weights: (B, H, L, S).

        Raises:
            TypeError: the mask is not bool.
            ValueError: a mask of three dimensions.
        """
        q, k, v = self.project(query, key, value)
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
            cache: keys and values of earlier calls, which stand before the new ones.

        Returns:
            (B, H, L, D), (B, H, S, D) and (B, H, S, D).

        Raises:
            ValueError: no keys or values, and no cache that holds them.
        """
        if key is None or value is None:
            if not cache or key is not value:
                raise ValueError("None for key and value needs a cache that holds them")
            return self._linear(query, 0), cache["key"], cache["value"]
        if query is key and key is value:  # one product instead of three
            q, k, v = map(self._split, self.in_proj(query).chunk(3, dim=-1))
        else:
            q, k, v = map(self._linear, (query, key, value), range(3))
        if cache:
            k = torch.cat([cache["key"], k], dim=-2)  # (B, H, S, D)
            v = torch.cat([cache["value"], v], dim=-2)  # (B, H, S, D)
        return q, k, v

    def _linear(self, x: Tensor, part: int) -> Tensor:
        """Apply the rows of `in_proj` that make queries (0), keys (1) or values (2)."""
        rows = slice(part * self.embed_dim, (part + 1) * self.embed_dim)
        bias = None if self.in_proj.bias is None else self.in_proj.bias[rows]
        return self._split(F.linear(x, self.in_proj.weight[rows], bias))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)  # (B, H, L, D)

    def _merge(self, x: Tensor) -> Tensor:
        return x.transpose(-3, -2).flatten(-2)  # (B, L, E)


def _check_mask(mask: Tensor, dims: int) -> None:
    """Refuse the two masks that would be taken for something else."""
    if mask.dtype != torch.bool:  # a float mask would be added to the scores
        raise TypeError(f"mask must be bool (True = may look), got {mask.dtype}")
    if mask.dim() == 3 and dims == 4:  # its batch would become the heads
        raise ValueError(
            f"the first of the mask's dimensions {tuple(mask.shape)} would be taken "
            f"for the heads; expected (L, S) or (B, 1, L, S)"
        )
