"""The Transformer: encoder, decoder, and both together for sequence to sequence.

Copy this file together with attention.py, positions.py and layers.py into one folder.

Letters for shapes: B batch, L target length, S source length, E embed, V vocabulary.
"""

import math

import torch
from torch import Tensor, nn

from .attention import MultiHeadAttention, causal_mask
from .layers import DropPath, FeedForward, LayerNorm, LayerScale
from .positions import SinusoidalPositions

__all__ = ["Decoder", "DecoderLayer", "Encoder", "EncoderLayer", "Transformer"]

# What one decoder layer keeps between the steps of cached decoding: the projected
# keys and values of its "self"-attention and of its attention to the "memory".
LayerCache = dict[str, dict[str, Tensor]]


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
        self.branch1 = _branch_end(embed_dim, dropout, drop_path, layer_scale)
        self.branch2 = _branch_end(embed_dim, dropout, drop_path, layer_scale)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Let the tokens look at each other, then think each for itself.

        Args:
            x: (B, L, E).
            mask: bool, broadcastable to (B, H, L, L); True = may look.

        Returns:
            (B, L, E).
        """
        if self.norm_first:  # the stream x itself is never normalised
            x = x + self.branch1(self._attend(self.norm1(x), mask))
            x = x + self.branch2(self.feed_forward(self.norm2(x)))
        else:
            x = self.norm1(x + self.branch1(self._attend(x, mask)))
            x = self.norm2(x + self.branch2(self.feed_forward(x)))
        return x

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.self_attention(x, x, x, mask=mask)


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
        self.branch1 = nn.Dropout(dropout)
        self.branch2 = nn.Dropout(dropout)
        self.branch3 = nn.Dropout(dropout)

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
            x = x + self.branch1(self._attend(self.norm1(x), mask, cache))
            x = x + self.branch2(
                self._attend_memory(self.norm2(x), memory, memory_mask, cache)
            )
            x = x + self.branch3(self.feed_forward(self.norm3(x)))
        else:
            x = self.norm1(x + self.branch1(self._attend(x, mask, cache)))
            x = self.norm2(
                x + self.branch2(self._attend_memory(x, memory, memory_mask, cache))
            )
            x = self.norm3(x + self.branch3(self.feed_forward(x)))
        return x

    def _attend(
        self, x: Tensor, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        part = None if cache is None else cache["self"]
        return self.self_attention(x, x, x, mask=mask, cache=part)

    def _attend_memory(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        part = None if cache is None else cache["memory"]
        new = None if part else memory  # read once, at the first step
        return self.cross_attention(x, new, new, mask=mask, cache=part)


class Encoder(nn.Module):
    """A stack of encoder layers.

    Args:
        embed_dim: E, width of the tokens.
        num_heads: H, must divide E.
        mlp_dim: width inside the feed-forward networks.
        num_layers: depth of the stack.
        dropout: as `EncoderLayer`.
        activation: "relu" or "gelu".
        norm_first: pre-norm or post-norm.
        norm_eps: eps of the layer normalisations.
        drop_path: probability in the last layer; grows linearly from zero in the first.
        layer_scale: as `EncoderLayer`.
        final_norm: normalise what leaves the stack; if not given, exactly when
            `norm_first` leaves it unnormalised.

    Raises:
        ValueError: `num_layers` is below one, or as `EncoderLayer`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        num_layers: int,
        dropout: float = 0.0,
        activation: str = "relu",
        norm_first: bool = True,
        norm_eps: float = 1e-5,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        final_norm: bool | None = None,
    ) -> None:
        super().__init__()
        _check_depth(num_layers)
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
            x = layer(x, mask=mask)
        return self.norm(x)


class Decoder(nn.Module):
    """A stack of decoder layers.

    Args:
        embed_dim: E, width of the tokens.
        num_heads: H, must divide E.
        mlp_dim: width inside the feed-forward networks.
        num_layers: depth of the stack.
        dropout: as `DecoderLayer`.
        activation: "relu" or "gelu".
        norm_first: pre-norm or post-norm.
        norm_eps: eps of the layer normalisations.
        final_norm: as `Encoder`.

    Raises:
        ValueError: `num_layers` is below one, or as `DecoderLayer`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        num_layers: int,
        dropout: float = 0.0,
        activation: str = "relu",
        norm_first: bool = True,
        norm_eps: float = 1e-5,
        final_norm: bool | None = None,
    ) -> None:
        super().__init__()
        _check_depth(num_layers)
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
        for i, layer in enumerate(self.layers):
            x = layer(
                x,
                memory,
                mask=mask,
                memory_mask=memory_mask,
                cache=None if cache is None else cache[i],
            )
        return self.norm(x)


class Transformer(nn.Module):
    """Read a source sequence, write a target sequence.

    Args:
        src_vocab_size: number of source tokens.
        tgt_vocab_size: V, number of target tokens.
        embed_dim: E, width of the tokens; even.
        num_heads: H, must divide E.
        num_layers: depth of the encoder, and of the decoder.
        mlp_dim: width inside the feed-forward networks.
        dropout: probability, on embeddings and as in the layers.
        pad_id: id that fills up short sequences; nobody looks at it.
        norm_first: pre-norm (trains without warm-up) or post-norm (as the paper).
        tie_embeddings: the output layer uses the target embedding's matrix.
        share_embeddings: source and target use one embedding (one vocabulary).
        activation: "relu" or "gelu".
        final_norm: as `Encoder`, for both stacks.
        max_len: longest source or target.

    Raises:
        ValueError: a size below one, `pad_id` outside a vocabulary, vocabularies of
            different size that are to be shared, or as the layers.

    Source:
        Vaswani et al. 2017; tied embeddings: section 3.4, Press and Wolf 2017.
    """

    def __init__(
        self,
        *,
        src_vocab_size: int,
        tgt_vocab_size: int,
        embed_dim: int,
        num_heads: int,
        num_layers: int,
        mlp_dim: int,
        dropout: float = 0.1,
        pad_id: int = 0,
        norm_first: bool = True,
        tie_embeddings: bool = True,
        share_embeddings: bool = False,
        activation: str = "relu",
        final_norm: bool | None = None,
        max_len: int = 512,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or max_len < 1:
            raise ValueError(
                f"embed_dim and max_len must be at least 1, "
                f"got embed_dim={embed_dim} and max_len={max_len}"
            )
        if not 0 <= pad_id < min(src_vocab_size, tgt_vocab_size):
            raise ValueError(
                f"pad_id={pad_id} must lie in both vocabularies, "
                f"of {src_vocab_size} and {tgt_vocab_size} tokens"
            )
        if share_embeddings and src_vocab_size != tgt_vocab_size:
            raise ValueError(
                f"share_embeddings needs one vocabulary, got src_vocab_size="
                f"{src_vocab_size} and tgt_vocab_size={tgt_vocab_size}"
            )
        self.pad_id = pad_id
        self.max_len = max_len
        self.src_vocab_size = src_vocab_size
        self.tgt_vocab_size = tgt_vocab_size
        self.scale = math.sqrt(embed_dim)

        self.tgt_embed = nn.Embedding(tgt_vocab_size, embed_dim)
        nn.init.normal_(self.tgt_embed.weight, std=embed_dim**-0.5)
        if share_embeddings:
            self.src_embed = self.tgt_embed
        else:
            self.src_embed = nn.Embedding(src_vocab_size, embed_dim)
            nn.init.normal_(self.src_embed.weight, std=embed_dim**-0.5)
        self.positions = SinusoidalPositions(max_len, embed_dim)
        self.dropout = nn.Dropout(dropout)

        shape = (embed_dim, num_heads, mlp_dim)
        self.encoder = Encoder(
            *shape,
            num_layers=num_layers,
            dropout=dropout,
            activation=activation,
            norm_first=norm_first,
            final_norm=final_norm,
        )
        self.decoder = Decoder(
            *shape,
            num_layers=num_layers,
            dropout=dropout,
            activation=activation,
            norm_first=norm_first,
            final_norm=final_norm,
        )
        self.head = nn.Linear(embed_dim, tgt_vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.tgt_embed.weight

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """Score, at each target position, every token that may come next.

        Args:
            src: (B, S) token ids.
            tgt: (B, L) token ids, beginning with the start token.

        Returns:
            (B, L, V) logits; those at position l see target tokens 0 … l only.

        Raises:
            TypeError: ids that are not integers.
            ValueError: ids outside the vocabulary, nothing to read, or too long.
        """
        return self.decode(tgt, self.encode(src), src)

    def encode(self, src: Tensor) -> Tensor:
        """Read the source.

        Args:
            src: (B, S) token ids.

        Returns:
            memory: (B, S, E).

        Raises:
            TypeError: as `forward`.
            ValueError: as `forward`.
        """
        self._check_ids("src", src, self.src_vocab_size)
        x = self.dropout(self.positions(self.src_embed(src) * self.scale))
        return self.encoder(x, mask=self._not_padding(src))

    def decode(
        self,
        tgt: Tensor,
        memory: Tensor,
        src: Tensor,
        *,
        cache: list[LayerCache] | None = None,
    ) -> Tensor:
        """Score the next tokens, given the memory.

        Args:
            tgt: (B, L) token ids, all from the start token on.
            memory: (B, S, E) from `encode`.
            src: (B, S) the source ids; they tell which of the memory is padding.
            cache: from `new_cache`: of `tgt`, only what the cache has not yet seen is
                computed, and its keys and values are added to the cache.

        Returns:
            (B, L, V) logits; with a cache, of the new positions only.

        Raises:
            TypeError: as `forward`.
            ValueError: as `forward`, or the shapes do not fit, or nothing is new.
        """
        self._check_ids("tgt", tgt, self.tgt_vocab_size)
        if memory.shape[:2] != src.shape or src.size(0) != tgt.size(0):
            raise ValueError(
                f"memory, src and tgt must belong together, got shapes "
                f"{tuple(memory.shape)}, {tuple(src.shape)} and {tuple(tgt.shape)}"
            )
        seen = cache[0]["self"]["key"].size(2) if cache and cache[0]["self"] else 0
        new = tgt[:, seen:]  # (B, new)
        if new.size(1) == 0:
            raise ValueError(f"the cache has seen all {tgt.size(1)} tokens of tgt")
        x = self.positions(self.tgt_embed(new) * self.scale, start=seen)
        look_back = causal_mask(new.size(1), tgt.size(1), device=tgt.device)
        x = self.decoder(
            self.dropout(x),
            memory,
            mask=look_back & self._not_padding(tgt),
            memory_mask=self._not_padding(src),
            cache=cache,
        )
        return self.head(x)

    def new_cache(self) -> list[LayerCache]:
        """Make an empty cache for `decode`: one entry a decoder layer."""
        return [{"self": {}, "memory": {}} for _ in self.decoder.layers]

    def _not_padding(self, ids: Tensor) -> Tensor:
        return (ids != self.pad_id)[:, None, None, :]  # (B, 1, 1, S)

    def _check_ids(self, name: str, ids: Tensor, vocab_size: int) -> None:
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"{name} must hold integer token ids, got {ids.dtype}")
        if ids.dim() != 2 or 0 in ids.shape:
            raise ValueError(
                f"{name} must have shape (batch, length) with nothing empty, "
                f"got {tuple(ids.shape)}"
            )
        if ids.size(1) > self.max_len:
            raise ValueError(
                f"{name} has {ids.size(1)} tokens, but max_len={self.max_len}"
            )
        if torch.compiler.is_compiling():  # a look at the values would break the graph
            return
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= vocab_size:
            raise ValueError(
                f"{name} holds ids from {lowest} to {highest}, "
                f"but the vocabulary has {vocab_size} tokens"
            )


def _branch_end(
    embed_dim: int, dropout: float, drop_path: float, layer_scale: float | None
) -> nn.Sequential:
    """Everything between a branch and its sum, in order; empty if nothing is asked."""
    steps: list[nn.Module] = []
    if layer_scale is not None:
        steps.append(LayerScale(embed_dim, layer_scale))
    if dropout:
        steps.append(nn.Dropout(dropout))
    if drop_path:
        steps.append(DropPath(drop_path))
    return nn.Sequential(*steps)


def _check_depth(num_layers: int) -> None:
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
