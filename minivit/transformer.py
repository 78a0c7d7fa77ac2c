"""The Transformer: an encoder reads the source, a decoder writes the target.

Copy this file together with encoder.py, decoder.py, attention.py, positions.py and
layers.py into one folder.

Letters for shapes: B batch, L target length, S source length, E embed, V vocabulary.
"""

import math
from typing import Any

from torch import Tensor, nn

from .attention import causal_mask
from .decoder import Decoder, LayerCache
from .encoder import Encoder
from .positions import SinusoidalPositions

__all__ = ["Transformer"]


class Transformer(nn.Module):
    """Read a source sequence, write a target sequence.

    Args:
        src_vocab_size: number of source tokens.
        tgt_vocab_size: V, number of target tokens.
        embed_dim: E, width of the tokens; even.
        num_layers: depth of the encoder, and of the decoder.
        num_heads: H, must divide E.
        mlp_dim: width inside the feed-forward networks.
        dropout: probability, on embeddings and as in the layers.
        pad_id: id that fills up short sequences; nobody looks at it.
        norm_first: pre-norm (trains without warm-up) or post-norm (as the paper).
        tie_embeddings: the output layer uses the target embedding's matrix.
        share_embeddings: source and target use one embedding (one vocabulary).
        activation: "relu" or "gelu".
        final_norm: as `Encoder`, for both stacks.
        max_len: longest source or target.
        gradient_checkpointing: as `Encoder`, for both stacks.

    Raises:
        ValueError: `pad_id` outside a vocabulary, vocabularies of different size that
            are to be shared, or as the layers.

    Source:
        Vaswani et al. 2017; tied embeddings: section 3.4, Press and Wolf 2017.
    """

    def __init__(
        self,
        *,
        src_vocab_size: int,
        tgt_vocab_size: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        dropout: float = 0.1,
        pad_id: int = 0,
        norm_first: bool = True,
        tie_embeddings: bool = True,
        share_embeddings: bool = False,
        activation: str = "relu",
        final_norm: bool | None = None,
        max_len: int = 512,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= pad_id < min(src_vocab_size, tgt_vocab_size):
            sizes = f"of {src_vocab_size} and {tgt_vocab_size} tokens"
            raise ValueError(f"{pad_id=} must lie in both vocabularies, {sizes}")
        if share_embeddings and src_vocab_size != tgt_vocab_size:
            sizes = f"{src_vocab_size=} and {tgt_vocab_size=}"
            raise ValueError(f"share_embeddings needs one vocabulary, got {sizes}")
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

        sizes = (embed_dim, num_layers, num_heads, mlp_dim)
        options: dict[str, Any] = {
            "dropout": dropout,
            "activation": activation,
            "norm_first": norm_first,
            "final_norm": final_norm,
            "gradient_checkpointing": gradient_checkpointing,
        }
        self.encoder = Encoder(*sizes, **options)
        self.decoder = Decoder(*sizes, **options)
        self.head = nn.Linear(embed_dim, tgt_vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.tgt_embed.weight
            self.register_load_state_dict_post_hook(_tie)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """Score, at each target position, every token that may come next.

        Args:
            src: (B, S) token ids.
            tgt: (B, L) token ids, beginning with the start token.

        Returns:
            (B, L, V) logits; those at position l see target tokens 0 … l only.

        Raises:
            ValueError: ids outside the vocabulary (on a GPU torch's own assertion), or
                more than `max_len`.
        """
        return self.decode(tgt, self.encode(src), src)

    def encode(self, src: Tensor) -> Tensor:
        """Read the source.

        Args:
            src: (B, S) token ids.

        Returns:
            memory: (B, S, E).

        Raises:
            ValueError: as `forward`.
        """
        x = self._embed(src, self.src_embed)
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
            ValueError: as `forward`.
        """
        seen = cache[0]["self"]["key"].size(-2) if cache and cache[0]["self"] else 0
        new = tgt[:, seen:]  # (B, new)
        x = self._embed(new, self.tgt_embed, start=seen)
        look_back = causal_mask(new.size(1), tgt.size(1), device=tgt.device)
        x = self.decoder(
            x,
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

    def _embed(self, ids: Tensor, table: nn.Embedding, start: int = 0) -> Tensor:
        try:
            x = table(ids) * self.scale  # (B, L, E)
        except IndexError:
            came = f"token ids from {int(ids.min())} to {int(ids.max())}"
            raise ValueError(
                f"{came}, but the vocabulary has {table.num_embeddings} tokens"
            ) from None
        return self.dropout(self.positions(x, start=start))


def _tie(model: Transformer, _: object) -> None:
    """Make one again of what `to_empty` or `assign=True` has made two."""
    model.head.weight = model.tgt_embed.weight
