"""Positions: attention alone does not know the order of its tokens; these tell it.

Copy this file: it works alone and needs torch only.

Letters for shapes: B batch, L length or queries, S keys, E embed, H heads, D head,
N patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "LearnedPositions",
    "SinusoidalPositions",
    "alibi_bias",
    "alibi_slopes",
    "resample_positions",
    "rotate",
    "rotate_2d",
    "sinusoidal_positions",
    "sinusoidal_positions_2d",
]


def sinusoidal_positions(length: int, embed_dim: int) -> Tensor:
    """Give each position a fixed vector of sines and cosines.

    Feature 2i of position p is sin(p / 10000^(2i/E)), feature 2i+1 the cosine of
    the same angle, for i = 0 … E/2 - 1.

    Args:
        length: L, number of positions.
        embed_dim: E, width of each vector; even.

    Returns:
        (L, E), sines and cosines interleaved.

    Raises:
        ValueError: `embed_dim` is not even.

    Source:
        Vaswani et al. 2017, section 3.5.
    """
    angles = torch.outer(
        torch.arange(length, dtype=torch.float64), _frequencies(embed_dim)
    )  # (L, E/2)
    table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # (L, E)
    return table.to(torch.get_default_dtype())


def sinusoidal_positions_2d(height: int, width: int, embed_dim: int) -> Tensor:
    """Give each grid cell its row in one half of the vector, its column in the other.

    Args:
        height: number of rows.
        width: number of columns.
        embed_dim: E, width of each vector; divisible by 4.

    Returns:
        (height * width, E), row by row, as `patchify` orders patches.

    Raises:
        ValueError: `embed_dim` is not divisible by 4.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim={embed_dim} must be divisible by 4")
    rows = sinusoidal_positions(height, embed_dim // 2)
    columns = sinusoidal_positions(width, embed_dim // 2)
    return torch.cat(
        [rows.repeat_interleave(width, dim=0), columns.repeat(height, 1)], dim=1
    )  # (height * width, E)


class SinusoidalPositions(nn.Module):
    """Add sinusoidal positions to a sequence.

    Args:
        max_len: longest sequence that will come.
        embed_dim: E, width of the tokens; even.

    Raises:
        ValueError: as `sinusoidal_positions`.
    """

    table: Tensor

    def __init__(self, max_len: int, embed_dim: int) -> None:
        super().__init__()
        table = sinusoidal_positions(max_len, embed_dim)
        self.register_buffer("table", table, persistent=False)
        self.register_load_state_dict_post_hook(_reset)

    def reset(self) -> None:
        """Compute the table again, as after `to_empty`: no state dict holds it."""
        device = None if self.table.is_meta else self.table.device
        table = sinusoidal_positions(*self.table.shape)
        self.table = table.to(device, self.table.dtype)

    def forward(self, x: Tensor, *, start: int = 0) -> Tensor:
        """Add the positions start, start + 1, … to the tokens.

        Args:
            x: (B, L, E).
            start: position of the first token; above zero in cached decoding.

        Returns:
            (B, L, E).

        Raises:
            ValueError: the sequence leaves the table.
        """
        return x + _slice(self.table, x, start).to(x)


class LearnedPositions(nn.Module):
    """Add a learned vector for each position to a sequence.

    Args:
        max_len: longest sequence that will come.
        embed_dim: E, width of the tokens.
    """

    def __init__(self, max_len: int, embed_dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(max_len, embed_dim))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, x: Tensor, *, start: int = 0) -> Tensor:
        """Add the positions start, start + 1, … to the tokens.

        Args:
            x: (B, L, E).
            start: position of the first token; above zero in cached decoding.

        Returns:
            (B, L, E).

        Raises:
            ValueError: the sequence leaves the table.
        """
        return x + _slice(self.table, x, start)


def rotate(
    x: Tensor, positions: Tensor | None = None, *, base: float = 10000.0
) -> Tensor:
    """Turn each pair of features by an angle that grows with the position (rotary).

    The pair (2i, 2i+1) of the vector at position p turns by p / base^(2i/D).
    Done to queries and keys, their scores depend on the distance only.

    Args:
        x: (..., L, D) queries or keys, D even.
        positions: (L,) positions, any real numbers; 0 … L-1 if not given.
        base: the larger, the slower the last pairs; models name it `rope_theta`.

    Returns:
        (..., L, D), each vector as long as before.

    Raises:
        TypeError: `x` holds integers, which cannot turn.
        ValueError: D is not even, or the positions do not match L.

    Source:
        Su et al. 2021, "RoFormer", equation 34.
    """
    length, dim = x.shape[-2:]
    if not x.is_floating_point():  # sine and cosine would be rounded to integers
        raise TypeError(f"x must be floating-point, got {x.dtype}")
    if positions is None:
        positions = torch.arange(length, device=x.device)
    if positions.shape != (length,):
        raise ValueError(
            f"positions must have shape ({length},), got {tuple(positions.shape)}"
        )
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # MPS lacks it
    frequencies = _frequencies(dim, base).to(x.device, exact)
    angles = torch.outer(positions.to(exact), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)  # (L, D/2)
    even, odd = x[..., 0::2], x[..., 1::2]  # (..., L, D/2)
    turned = [even * cos - odd * sin, odd * cos + even * sin]
    return torch.stack(turned, dim=-1).flatten(-2)  # (..., L, D)


def rotate_2d(
    x: Tensor,
    grid_size: int | tuple[int, int],
    *,
    num_prefix_tokens: int = 1,
    base: float = 10000.0,
) -> Tensor:
    """Turn one half of each patch's features by its row, the other by its column.

    Done to queries and keys, the score of two patches depends on the difference of
    their rows and on that of their columns only. Tokens in front are not turned.

    Args:
        x: (..., num_prefix_tokens + N, D) queries or keys, D divisible by 4, patches
            row by row.
        grid_size: patches per side, or (rows, columns).
        num_prefix_tokens: tokens in front (CLS) that have no place in the grid.
        base: as `rotate`, whose formula holds in each half, with D/2 for D.

    Returns:
        (..., num_prefix_tokens + N, D), each vector as long as before.

    Raises:
        ValueError: D is not divisible by 4, or the tokens do not fill the grid.

    Source:
        Heo et al. 2024, "Rotary Position Embedding for Vision Transformer" (axial
        frequencies).
    """
    rows, columns = _pair(grid_size)
    length, dim = x.shape[-2:]
    if dim % 4:
        raise ValueError(f"the width must be divisible by 4, got {dim}")
    if num_prefix_tokens < 0 or length != num_prefix_tokens + rows * columns:
        raise ValueError(
            f"{num_prefix_tokens=} and a grid of {rows} x {columns} do not make "
            f"{length} tokens"
        )
    prefix, patches = x.split([num_prefix_tokens, rows * columns], dim=-2)
    row = torch.arange(rows, device=x.device).repeat_interleave(columns)  # (N,)
    column = torch.arange(columns, device=x.device).repeat(rows)  # (N,)
    by_row, by_column = patches.chunk(2, dim=-1)  # (..., N, D/2), twice
    turned = [rotate(by_row, row, base=base), rotate(by_column, column, base=base)]
    return torch.cat([prefix, torch.cat(turned, dim=-1)], dim=-2)  # (..., 1+N, D)


def alibi_slopes(num_heads: int) -> Tensor:
    """Give each head the number by which a step of distance lowers its scores.

    For a power of two, 2^(-8/H), 2^(-16/H), … down to 2^(-8). For another H, those of
    the next lower power of two, then every other one of twice that power.

    Args:
        num_heads: H.

    Returns:
        (H,) positive slopes.

    Raises:
        ValueError: there is no head.

    Source:
        Press et al. 2022, "Train Short, Test Long", section 3; for other numbers of
        heads the authors' code.

    >>> alibi_slopes(4)
    tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be 1 or more, got {num_heads}")
    power = 2 ** (num_heads.bit_length() - 1)  # the largest that is not above H
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2 ** (-4 * h / power) for h in range(1, 2 * power, 2)]
    return torch.tensor((slopes + between)[:num_heads])  # (H,)


def alibi_bias(
    num_heads: int,
    query_len: int,
    key_len: int | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Lower each score by its distance times the slope of the head (ALiBi).

    Added to the scores Q Kᵀ / √D, before the softmax; hand it to
    `torch.nn.functional.scaled_dot_product_attention` as `attn_mask`, in the dtype of
    the queries. It is no mask: every key may still be seen. Together with a causal
    mask it is the paper's; without one, a key that follows the query is treated as one
    that stands as far before it: distances are known, sides are not.

    Args:
        num_heads: H.
        query_len: L; the last query stands where the last key stands, as in
            `causal_mask`.
        key_len: S, number of keys; as many as queries if not given.
        device: where the bias is made.

    Returns:
        (H, L, S), -slope · |m - n| for a query at place m and a key at place n.

    Raises:
        ValueError: there is no head, or there are fewer keys than queries.

    Source:
        Press et al. 2022, section 3.
    """
    key_len = query_len if key_len is None else key_len
    if query_len > key_len:
        raise ValueError(f"query_len={query_len} is larger than key_len={key_len}")
    keys = torch.arange(key_len, device=device)  # (S,)
    queries = keys[key_len - query_len :]  # (L,)
    distance = (queries[:, None] - keys).abs()  # (L, S)
    return alibi_slopes(num_heads).to(device)[:, None, None] * -distance  # (H, L, S)


def resample_positions(
    pos_embed: Tensor,
    grid_size: int | tuple[int, int],
    *,
    old_grid_size: int | tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
) -> Tensor:
    """Stretch the learned positions of an image grid to another grid (bicubic).

    Args:
        pos_embed: (1, num_prefix_tokens + N, E).
        grid_size: patches per side of the new grid, or (rows, columns).
        old_grid_size: the same of the present grid; square if not given.
        num_prefix_tokens: tokens in front (CLS) whose positions are kept.

    Returns:
        (1, num_prefix_tokens + rows * columns, E).

    Raises:
        ValueError: the table does not have the size of the old grid, or the new grid
            has no patch.

    Source:
        Dosovitskiy et al. 2021, section 3.2 (fine-tuning at higher resolution).
    """
    if pos_embed.dim() != 3 or pos_embed.size(0) != 1:
        came = tuple(pos_embed.shape)
        raise ValueError(f"pos_embed must have shape (1, tokens, width), got {came}")
    num_patches = pos_embed.size(1) - num_prefix_tokens
    if not 0 < num_patches <= pos_embed.size(1):
        raise ValueError(
            f"{num_prefix_tokens=} must leave patches of {pos_embed.size(1)} tokens"
        )
    prefix, grid = pos_embed.split([num_prefix_tokens, num_patches], dim=1)
    old = _pair(round(num_patches**0.5) if old_grid_size is None else old_grid_size)
    new = _pair(grid_size)
    if old[0] * old[1] != num_patches:
        raise ValueError(
            f"{num_patches} patch positions do not form a grid of {old[0]} x {old[1]}"
        )
    if min(new) < 1:
        raise ValueError(f"the new grid must have a patch, got {new[0]} x {new[1]}")
    if new == old:
        return pos_embed
    grid = grid.unflatten(1, old).permute(0, 3, 1, 2)  # (1, E, rows, columns)
    exact = torch.promote_types(grid.dtype, torch.float32)  # half would be too coarse
    grid = F.interpolate(
        grid.to(exact), size=new, mode="bicubic", align_corners=False, antialias=True
    )  # (1, E, new rows, new columns)
    grid = grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)  # (1, N, E)
    return torch.cat([prefix, grid], dim=1)  # (1, 1+N, E)


def _reset(module: SinusoidalPositions, _: object) -> None:
    """Reset the table, from a hook: a lambda there could not be pickled."""
    module.reset()


def _frequencies(dim: int, base: float = 10000.0) -> Tensor:
    if dim % 2:
        raise ValueError(f"the width must be even, got {dim}")
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)  # (dim/2,)


def _slice(table: Tensor, x: Tensor, start: int) -> Tensor:
    end = start + x.size(-2)
    if start < 0 or end > len(table):
        asked = f"positions {start} to {end - 1}"
        raise ValueError(f"{asked} asked for, but the table has max_len={len(table)}")
    return table[start:end]  # (L, E)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
