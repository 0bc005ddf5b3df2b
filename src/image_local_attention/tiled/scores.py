"""Scores [N, M, K] between the queries of N tiles and the keys of their halos, and which of them count."""

import torch
from torch import Tensor

from ..window import Axis
from .plan import Plan, overhang


def visible(axis: Axis, queries: range, keys: range, device: torch.device) -> Tensor:
    """[queries, keys]: which key lies in the window of which query, in the map or out of it."""
    start = axis.start(torch.arange(queries.start, queries.stop, device=device))[:, None]
    key = torch.arange(keys.start, keys.stop, device=device)
    return (start <= key) & (key < start + axis.kernel)


def outside_window(plan: Plan, like: Tensor) -> Tensor:
    """[M, K], stored key by key, to be added to scores: -inf where the key is not in the query's window."""
    cover, (height, width) = plan.keys, plan.tile
    y = visible(cover.axes[0], range(height), cover.rows(0), like.device)  # [TH, R]
    x = visible(cover.axes[1], range(width), cover.tile_columns(0), like.device)  # [TW, C]
    seen = x.mT[:, None, :, None] & y.mT[None, :, None, :]  # [C, R, TW, TH]
    mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))
    return mask.flatten(2, 3).flatten(0, 1).mT


def fill_outside_map(scores: Tensor, plan: Plan, chunk: range, first: int, value: float) -> None:
    """Sets the scores of keys outside of the map, of some tiles of the strip that begins at row `first`."""
    cover = plan.keys
    height, width = cover.halo
    scores = scores.unflatten(0, (-1, len(chunk))).unflatten(-1, (width, height))  # [b*h, tiles, M, C, R]
    top, bottom = overhang(cover.rows(first), plan.size[0])
    if top or bottom:
        scores[..., :top] = value
        scores[..., height - bottom :] = value
    for tile, left, right in cover.overhanging:
        if tile in chunk:
            scores[:, tile - chunk.start, :, :left] = value
            scores[:, tile - chunk.start, :, width - right :] = value


def window_slots(scores: Tensor, plan: Plan) -> Tensor:
    """The scores that lie in the windows, as a view [N, TH, TW, kH, kW].

    Query (y, x) of a tile sees the keys (y + i, x + j) of its halo; both are numbered column by column.
    """
    height, halo_height = plan.tile[0], plan.keys.halo[0]
    n, m, k = scores.stride()
    strides = n, m + k, height * m + halo_height * k, k, halo_height * k
    return scores.as_strided((len(scores), *plan.tile, *plan.window.kernel), strides)
