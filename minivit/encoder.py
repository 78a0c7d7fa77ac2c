"""The encoder: layers in which tokens look at each other, then think each for itself.

Copy this file together with attention.py and layers.py into one folder.

Letters for shapes: B batch, L length, E embed, H heads.
"""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import MultiHeadAttention
from .layers import DropPath, FeedForward, LayerNorm, LayerScale

__all__ = ["Encoder", "EncoderLayer"]


class EncoderLayer(nn.Module):
    """Self-attention, then a feed-forward network, each beside a residual connection.

    Args:
        embed_dim: E, width of the tokens.
        num_heads: H, must divide E.
        mlp_dim: width inside the feed-forward network.
        dropout: probability, on attention weights, inside and after each branch.
        activation: "relu" or "gelu".
        norm_first: normalise before each branch (pre-norm) or after each sum.
        norm_eps: eps of the layer normalisations.
        drop_path: probability of dropping a whole branch of a sample.
        layer_scale: first value of a learned factor on each branch; none if not given.

    Raises:
        ValueError: as `MultiHeadAttention` and `FeedForward`.

    Source:
        Vaswani et al. 2017, section 3.1; pre-norm: Xiong et al. 2020, figure 1.
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
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.self_attention = MultiHeadAttention(embed_dim, num_heads, dropout=dropout)
        self.feed_forward = FeedForward(
            embed_dim, mlp_dim, activation=activation, dropout=dropout
        )
        self.norm1 = LayerNorm(embed_dim, eps=norm_eps)
        self.norm2 = LayerNorm(embed_dim, eps=norm_eps)
        self.dropout1 = nn.Sequential(nn.Dropout(dropout), DropPath(drop_path))
        self.dropout2 = nn.Sequential(nn.Dropout(dropout), DropPath(drop_path))
        self.scale1 = self.scale2 = nn.Identity()
        if layer_scale is not None:
            self.scale1 = LayerScale(embed_dim, layer_scale)
            self.scale2 = LayerScale(embed_dim, layer_scale)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Let the tokens look at each other, then think each for itself.

        Args:
            x: (B, L, E).
            mask: bool, broadcastable to (B, H, L, L); True = may look.

        Returns:
            (B, L, E).
        """
        if self.norm_first:  # the stream x itself is never normalised
            x = x + self._attend(self.norm1(x), mask)
            x = x + self._think(self.norm2(x))
        else:
            x = self.norm1(x + self._attend(x, mask))
            x = self.norm2(x + self._think(x))
        return x

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.dropout1(self.scale1(self.self_attention(x, x, x, mask=mask)))

    def _think(self, x: Tensor) -> Tensor:
        return self.dropout2(self.scale2(self.feed_forward(x)))


class Encoder(nn.Module):
    """A stack of encoder layers.

    Args:
        embed_dim: E, width of the tokens.
        num_layers: depth of the stack.
        num_heads: H, must divide E.
        mlp_dim: width inside the feed-forward networks.
        dropout: as `EncoderLayer`.
        activation: "relu" or "gelu".
        norm_first: pre-norm or post-norm.
        norm_eps: eps of the layer normalisations.
        drop_path: probability in the last layer; grows linearly from zero in the first;
            a single layer drops nothing.
        layer_scale: as `EncoderLayer`.
        final_norm: normalise what leaves the stack; if not given, exactly when
            `norm_first` leaves it unnormalised.
        gradient_checkpointing: keep only what enters each layer and compute the rest
            again on the way back: less memory, for one more forward pass.

    Raises:
        ValueError: as `EncoderLayer`.
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
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        final_norm: bool | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.layers = nn.ModuleList(
            EncoderLayer(
                embed_dim,
                num_heads,
                mlp_dim,
                dropout=dropout,
                activation=activation,
                norm_first=norm_first,
                norm_eps=norm_eps,
                drop_path=drop_path * depth / max(num_layers - 1, 1),
                layer_scale=layer_scale,
            )
            for depth in range(num_layers)
        )
        final_norm = norm_first if final_norm is None else final_norm
        self.norm = LayerNorm(embed_dim, eps=norm_eps) if final_norm else nn.Identity()

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Run the tokens through all layers.

        Args:
            x: (B, L, E).
            mask: bool, broadcastable to (B, H, L, L); True = may look.

        Returns:
            (B, L, E).
        """
        for layer in self.layers:
            if self.gradient_checkpointing:
                x = checkpoint(layer, x, mask=mask, use_reentrant=False)
            else:
                x = layer(x, mask=mask)
        return self.norm(x)
