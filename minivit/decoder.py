"""The decoder: layers that look at the target so far, then at the encoder's memory.

Copy this file together with attention.py and layers.py into one folder.

Letters for shapes: B batch, L target length, S source length, E embed, H heads.
"""

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import MultiHeadAttention
from .layers import FeedForward, LayerNorm

__all__ = ["Decoder", "DecoderLayer", "LayerCache"]

# What one decoder layer keeps between the steps of cached decoding: the projected
# keys and values of its "self"-attention and of its attention to the "memory".
LayerCache = dict[str, dict[str, Tensor]]


class DecoderLayer(nn.Module):
    """An encoder layer that also looks at the memory, between its two branches.

    Args:
        embed_dim: E, width of the tokens.
        num_heads: H, must divide E.
        mlp_dim: width inside the feed-forward network.
        dropout: probability, on attention weights, inside and after each branch.
        activation: "relu" or "gelu".
        norm_first: normalise before each branch (pre-norm) or after each sum.
        norm_eps: eps of the layer normalisations.

    Raises:
        ValueError: as `MultiHeadAttention` and `FeedForward`.

    Source:
        Vaswani et al. 2017, section 3.1.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        dropout: float = 0.0,
        activation: str = "relu",
        norm_first: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.self_attention = MultiHeadAttention(embed_dim, num_heads, dropout=dropout)
        self.cross_attention = MultiHeadAttention(embed_dim, num_heads, dropout=dropout)
        self.feed_forward = FeedForward(
            embed_dim, mlp_dim, activation=activation, dropout=dropout
        )
        self.norm1 = LayerNorm(embed_dim, eps=norm_eps)
        self.norm2 = LayerNorm(embed_dim, eps=norm_eps)
        self.norm3 = LayerNorm(embed_dim, eps=norm_eps)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Look at the target so far, then at the memory, then think.

        Args:
            x: (B, L, E) target tokens; with a cache, the new ones only.
            memory: (B, S, E) output of the encoder.
            mask: bool, broadcastable to (B, H, L, target length); usually causal.
            memory_mask: bool, broadcastable to (B, H, L, S); hides source padding.
            cache: `{"self": {}, "memory": {}}`, filled and used step by step.

        Returns:
            (B, L, E).
        """
        if self.norm_first:
            x = x + self._attend(self.norm1(x), mask, cache)
            x = x + self._read(self.norm2(x), memory, memory_mask, cache)
            x = x + self._think(self.norm3(x))
        else:
            x = self.norm1(x + self._attend(x, mask, cache))
            x = self.norm2(x + self._read(x, memory, memory_mask, cache))
            x = self.norm3(x + self._think(x))
        return x

    def _attend(
        self, x: Tensor, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        part = None if cache is None else cache["self"]
        return self.dropout1(self.self_attention(x, x, x, mask=mask, cache=part))

    def _read(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        part = None if cache is None else cache["memory"]
        new = None if part else memory  # a cache has it from the first step on
        return self.dropout2(self.cross_attention(x, new, new, mask=mask, cache=part))

    def _think(self, x: Tensor) -> Tensor:
        return self.dropout3(self.feed_forward(x))


class Decoder(nn.Module):
    """A stack of decoder layers.

    Args:
        embed_dim: E, width of the tokens.
        num_layers: depth of the stack.
        num_heads: H, must divide E.
        mlp_dim: width inside the feed-forward networks.
        dropout: as `DecoderLayer`.
        activation: "relu" or "gelu".
        norm_first: pre-norm or post-norm.
        norm_eps: eps of the layer normalisations.
        final_norm: normalise what leaves the stack; if not given, exactly when
            `norm_first` leaves it unnormalised.
        gradient_checkpointing: keep only what enters each layer and compute the rest
            again on the way back: less memory, for one more forward pass.

    Raises:
        ValueError: as `DecoderLayer`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        *,
        dropout: float = 0.0,
        activation: str = "relu",
        norm_first: bool = True,
        norm_eps: float = 1e-5,
        final_norm: bool | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.layers = nn.ModuleList(
            DecoderLayer(
                embed_dim,
                num_heads,
                mlp_dim,
                dropout=dropout,
                activation=activation,
                norm_first=norm_first,
                norm_eps=norm_eps,
            )
            for _ in range(num_layers)
        )
        final_norm = norm_first if final_norm is None else final_norm
        self.norm = LayerNorm(embed_dim, eps=norm_eps) if final_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: list[LayerCache] | None = None,
    ) -> Tensor:
        """Run the target through all layers, each of which looks at the memory.

        Args:
            x: (B, L, E) target tokens; with a cache, the new ones only.
            memory: (B, S, E).
            mask: bool, broadcastable to (B, H, L, target length).
            memory_mask: bool, broadcastable to (B, H, L, S).
            cache: one entry a layer, from `Transformer.new_cache`.

        Returns:
            (B, L, E).
        """
        masks: dict[str, Any] = {"mask": mask, "memory_mask": memory_mask}
        for i, layer in enumerate(self.layers):
            if cache is not None:
                x = layer(x, memory, **masks, cache=cache[i])
            elif self.gradient_checkpointing:
                x = checkpoint(layer, x, memory, **masks, use_reentrant=False)
            else:
                x = layer(x, memory, **masks)
        return self.norm(x)
