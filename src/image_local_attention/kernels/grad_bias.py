"""Launches of the gradient of a bias.

Sums are as many whatever the GPU, so that they round alike everywhere: about SUMS floats where entries follow the
query pixel by pixel, or one for each pair of a tile's pixel and a key around it where these are more; elsewhere about
ROWS rows of entries, or one of each.
"""

import torch
from torch import Tensor

from ..rules import Rules
from .bias import bias_gradient_kernel, pair_sums_kernel
from .integers import cdiv, next_power_of_2
from .launch import Launch, Problem, depths, strides, ways, wide

TILE = 4, 16
ROWS = 8192
SUMS = 2**23


def of_attention(
    query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor, rules: Rules
) -> Tensor:
    """The gradient of the bias of `rules` from what a backward has of a fused forward, in fp32."""
    if rules.window.slots == 1:
        # A key that is seen alone has weight 1 whatever its logit: dS = -delta, where there is such a key.
        return (-delta).where(lse.isfinite(), 0.0).sum((0, 2, 3)).view(rules.bias.shape)
    problem = Problem(rules, query.shape[1], key.shape[1], tuple(query.shape[2:4]), tuple(key.shape[2:4]))
    if not problem.slides(transposed=False):
        return _entry_by_entry((query, key, value, grad_out, lse, delta), None, problem, rules.bias.shape)
    launch = Launch("grad_query", (query, grad_out), (key, value), problem, query.shape[:4])
    terms, constants = launch.framed(problem)
    q, g, k, v = launch.sources
    sums, back = _pair_sums(query, problem, launch)
    chunks, heads, blocks_y, blocks_x = sums.shape[:4]
    launch(
        pair_sums_kernel,
        *(q.handle, k.handle, v.handle, g.handle, lse, delta, *terms, sums),
        *(q.strides, k.strides, v.strides, g.strides, *strides(lse[..., None], *terms)),
        *(query.shape[0], *problem.sizes),
        rules.scale,
        grid=(chunks, heads, blocks_y * blocks_x),
        addressed=(query, key, value, grad_out),
        **depths(query, value),
        **ways(q=q, k=k, v=v, g=g),
        **constants,
        BLOCKS_X=blocks_x,
        BACK_Y=back[0],
        BACK_X=back[1],
    )
    # Entry (i, j) of a tile's pixel (y, x) lies at (y + i, x + j) of what is around the tile: a diagonal is one entry.
    names = launch.constants
    around = sums.sum(0).permute(0, 3, 4, 1, 5, 2, 6).flatten(5, 6).flatten(3, 4)  # [heads, TH, TW, rows, columns]
    head, y, x, row, column = around.stride()
    size = heads, names["TH"], names["TW"], *_entries(problem)
    begin = (back[1] - _lead(problem, 1)) * column
    total = around.as_strided(size, (head, y + row, x + column, row, column), begin).sum((1, 2))
    return total if rules.by_displacement else total.flatten(1)


def _entries(problem: Problem) -> tuple[int, int]:
    return tuple(2 * span.kernel - 1 if problem.rules.by_displacement else span.kernel for span in problem.spans)


def _lead(problem: Problem, axis: int) -> int:
    """Positions from the first entry of a query to the query."""
    span = problem.spans[axis]
    return span.kernel - 1 if problem.rules.by_displacement else span.lead


def _pair_sums(query: Tensor, problem: Problem, launch: Launch) -> tuple[Tensor, tuple[int, int]]:
    """Memory for sums [chunks, heads, blocks y, blocks x, TH, TW, ROWS, COLS] of the blocks around a tile.

    And how many rows and columns before the tile the first of them begins, where copies can.
    """
    names = launch.constants
    th, tw, rows, cols = (names[name] for name in ("TH", "TW", "ROWS", "COLS"))
    back_y, lead = _lead(problem, 0), _lead(problem, 1)
    back_x = lead + (-names["SHIFT"] - lead) % names["ALIGN"]
    n_y, n_x = _entries(problem)
    blocks_y, blocks_x = cdiv(th - 1 + n_y, rows), cdiv(back_x - lead + tw - 1 + n_x, cols)
    batch, heads, height, width = query.shape[:4]
    y, x = problem.spans
    tiles = batch * cdiv(cdiv(height, y.lattice), th) * y.lattice * cdiv(cdiv(width, x.lattice), tw) * x.lattice
    chunks = max(1, min(tiles, SUMS // (heads * blocks_y * blocks_x * th * tw * rows * cols)))
    shape = chunks, heads, blocks_y, blocks_x, th, tw, rows, cols
    return query.new_empty(shape, dtype=torch.float32), (back_y, back_x)


def of_logits(grad: Tensor, rules: Rules, shape: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """The gradient of a bias of `shape` from one of logits [B, heads, H, W, slots], in fp32.

    Keys lie in a map of `size`.
    """
    problem = Problem(rules, grad.shape[1], grad.shape[1], tuple(grad.shape[2:4]), tuple(size))
    return _entry_by_entry(None, grad, problem, shape)


def _entry_by_entry(
    inputs: tuple[Tensor, ...] | None, grad: Tensor | None, problem: Problem, shape: tuple[int, ...]
) -> Tensor:
    """inputs: query, key, value, grad_out, lse and delta, or None where there is a gradient of logits."""
    query, key, value, grad_out, lse, delta = inputs or (None,) * 6
    at_queries = grad if inputs is None else query
    rules, (batch, heads, *queries) = problem.rules, at_queries.shape[:4]
    by_displacement = len(shape) == 3
    n_y, n_x = shape[1:] if by_displacement else rules.window.kernel
    tiles = batch * cdiv(queries[0], TILE[0]) * cdiv(queries[1], TILE[1])
    chunks = max(1, min(tiles, ROWS // (heads * n_y)))
    sums = at_queries.new_empty((chunks, heads, n_y, n_x), dtype=torch.float32)
    floats = None if lse is None else lse[..., None]
    depth = {"DK": 1, "DV": 1, "DKP": 1, "DVP": 1} if inputs is None else depths(query, value)
    with torch.cuda.device_of(at_queries):
        bias_gradient_kernel[chunks, heads, n_y](
            *(query, key, value, grad_out, lse, delta, grad, *problem.terms, sums),
            *strides(query, key, value, grad_out, floats, grad, *problem.terms),
            *(batch, *problem.sizes, heads),
            rules.scale,
            **(problem.constants | problem.map_spans),
            **depth,
            BY_DISPLACEMENT=by_displacement,
            TH=TILE[0],
            TW=TILE[1],
            WIDTH=next_power_of_2(n_x),
            WIDE=wide((query, key, value, grad_out, grad)),
        )
    total = sums.sum(0)
    return total if by_displacement else total.flatten(1)
