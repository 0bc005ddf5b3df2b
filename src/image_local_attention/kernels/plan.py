"""Launch plans: which tile, block, warps and stages a task takes, from a short table of measured facts.

What decides: queries per tile times keys in its halo is the arithmetic, so tiles are small; halos that fill whole
blocks (8 + 8, 4 + 12 or 8 + 20 columns) throw the fewest scores away; a product in three passes needs its operands
three times in registers, so its tiles are the smallest that a matrix unit takes. Where columns lie side by side,
copies begin on whole vectors, so tiles are 8 columns wide at least, and 16 wide where whole sectors pay.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Plan:
    """`tile` stationary pixels (rows, columns), `block` streamed pixels a step, warps and pipeline stages.

    `keep_by_pointer`, `stream_by_pointer`: load the tile or the blocks by pointer even where a descriptor could.
    """

    tile: tuple[int, int]
    block: int
    warps: int
    stages: int = 2
    keep_by_pointer: bool = False
    stream_by_pointer: bool = False

    def block_shape(self, kernel_width: int, step: int) -> tuple[int, int]:
        """(rows, columns) of a block: multiples of `step` columns that cover the tile's halo with the least excess."""
        halo = self.tile[1] + kernel_width - 1
        widths = [w for w in (32, 16, 8) if max(step, 8) <= w <= self.block]
        cols = min(widths, key=lambda w: -(-halo // w) * w)
        return self.block // cols, cols


class Row(NamedTuple):
    depth: int  # most channels per head
    width: int  # widest window
    plan: Plan


ANY = 1 << 30

# By task, by what the matrix units do, by whether the streamed maps have their columns side by side. Rows are read
# from the top, the first that is deep and wide enough is taken. A figure is milliseconds on one H200, of the
# benchmark case named before it; a row without one is by analogy.
_TABLE: dict[str, dict[tuple[str, bool], tuple[Row, ...]]] = {
    "forward": {
        ("half", False): (
            Row(32, 13, Plan((4, 8), 32, 1, keep_by_pointer=True)),  # 512-4x16-k7 0.113, 2048-32-k7 0.525
            Row(32, ANY, Plan((4, 8), 64, 1, 3)),  # 512-4x16-k21 0.397
            Row(64, 9, Plan((8, 8), 64, 4, 3)),  # 8x128-8x64-k7 0.242
            Row(64, 13, Plan((16, 4), 64, 4, 3)),  # 8x128-8x64-k13 0.352
            Row(64, ANY, Plan((8, 8), 64, 4, 3)),  # 512-64-k21 0.162
            Row(128, 13, Plan((16, 4), 64, 4, 3)),  # 8x128-8x128-k13 0.601
            Row(128, 40, Plan((8, 8), 64, 4, 3)),
            Row(128, ANY, Plan((8, 16), 64, 8, 3)),  # 256-24x128-k81 13.5
            Row(256, ANY, Plan((8, 8), 32, 8)),
        ),
        ("half", True): (
            Row(32, ANY, Plan((4, 8), 32, 1, 3)),  # 512-4x16-k7 0.169, 512-4x16-k21 0.454
            Row(64, ANY, Plan((8, 8), 32, 4, 3, stream_by_pointer=True)),  # 512-64-k21 0.253
            Row(128, ANY, Plan((8, 16), 64, 8, 3)),
            Row(256, ANY, Plan((4, 16), 32, 8)),
        ),
        ("tf32", False): (
            Row(64, 5, Plan((4, 4), 16, 1, 3)),  # 512-64-k5-tf32 0.088
            Row(64, ANY, Plan((4, 8), 16, 1, 3)),  # 512-64-k11-tf32 0.202
            Row(128, ANY, Plan((4, 4), 16, 2)),
            Row(256, ANY, Plan((4, 4), 16, 4)),
        ),
        ("tf32", True): (
            Row(64, 5, Plan((8, 8), 32, 4)),  # 512-64-k5-tf32 0.186
            Row(64, ANY, Plan((4, 16), 32, 4)),  # 512-64-k11-tf32 0.262
            Row(128, ANY, Plan((4, 8), 16, 4)),
            Row(256, ANY, Plan((2, 8), 16, 4)),
        ),
        ("exact", False): (
            Row(64, 16, Plan((4, 4), 32, 1)),  # 512-64-k5-3x 0.133, 512-64-k11-3x 0.351, 512-16-k11-3x 0.132
            Row(64, ANY, Plan((4, 4), 16, 1)),  # 128-64-k21-3x 0.068
            Row(128, ANY, Plan((4, 4), 16, 2)),
            Row(256, ANY, Plan((4, 4), 16, 4)),
        ),
        ("exact", True): (
            Row(32, ANY, Plan((4, 4), 32, 1)),  # 512-16-k11-3x 0.149
            Row(64, ANY, Plan((4, 4), 16, 1)),  # 512-64-k5-3x 0.283, 512-64-k11-3x 0.559
            Row(128, ANY, Plan((4, 4), 16, 2)),
            Row(256, ANY, Plan((4, 4), 16, 4)),
        ),
    },
    "grad_query": {
        ("half", False): (
            Row(32, 13, Plan((4, 8), 32, 1, 3, keep_by_pointer=True)),  # 512-4x16-k7 0.117, 2048-32-k7 0.552
            Row(32, ANY, Plan((8, 4), 32, 1, 3)),  # 512-4x16-k21 0.350
            Row(64, 9, Plan((8, 8), 32, 4, 3, keep_by_pointer=True)),  # 8x128-8x64-k7 0.239
            Row(64, 13, Plan((16, 4), 64, 4, 3, keep_by_pointer=True)),  # 8x128-8x64-k13 0.373
            Row(64, ANY, Plan((8, 8), 64, 4, keep_by_pointer=True)),  # 512-64-k21 0.172
            Row(128, 13, Plan((16, 4), 64, 4, 3)),  # 8x128-8x128-k13 0.662
            Row(128, 40, Plan((8, 8), 64, 4, 3)),
            Row(128, ANY, Plan((8, 16), 64, 8, 3)),  # 256-24x128-k81 15.4
            Row(256, ANY, Plan((8, 8), 32, 8)),
        ),
        ("half", True): (
            Row(32, ANY, Plan((4, 8), 32, 1, 3)),  # 512-4x16-k7 0.186, 512-4x16-k21 0.479
            Row(64, ANY, Plan((8, 8), 32, 4, 3, stream_by_pointer=True)),  # 512-64-k21 0.265
            Row(128, ANY, Plan((8, 16), 64, 8)),
            Row(256, ANY, Plan((4, 16), 32, 8)),
        ),
        ("tf32", False): (
            Row(64, ANY, Plan((4, 4), 16, 1, 3)),  # 512-64-k5-tf32 0.112, 512-64-k11-tf32 0.237
            Row(128, ANY, Plan((4, 4), 16, 2)),
            Row(256, ANY, Plan((4, 4), 16, 4)),
        ),
        ("tf32", True): (
            Row(64, ANY, Plan((8, 8), 16, 4)),  # 512-64-k5-tf32 0.243, 512-64-k11-tf32 0.401
            Row(128, ANY, Plan((4, 8), 16, 4)),
            Row(256, ANY, Plan((2, 8), 16, 4)),
        ),
        ("exact", False): (
            Row(64, ANY, Plan((4, 4), 16, 1)),  # 512-64-k5-3x 0.257, 512-64-k11-3x 0.603, 512-16-k11-3x 0.169
            Row(128, ANY, Plan((4, 4), 16, 2)),
            Row(256, ANY, Plan((4, 4), 16, 4)),
        ),
        ("exact", True): (
            Row(32, ANY, Plan((4, 4), 32, 1)),  # 512-16-k11-3x 0.188
            Row(64, ANY, Plan((4, 4), 16, 1)),  # 512-64-k5-3x 0.376, 512-64-k11-3x 0.837
            Row(128, ANY, Plan((4, 4), 16, 2)),
            Row(256, ANY, Plan((4, 4), 16, 4)),
        ),
    },
    "grad_key_value": {
        ("half", False): (
            Row(32, 13, Plan((4, 8), 32, 1, keep_by_pointer=True)),  # 512-4x16-k7 0.153, 2048-32-k7 0.882
            Row(32, ANY, Plan((8, 4), 32, 1, 3)),  # 512-4x16-k21 0.501
            Row(64, 9, Plan((4, 8), 16, 1, 3, keep_by_pointer=True)),  # 8x128-8x64-k7 0.452
            Row(64, 13, Plan((16, 4), 32, 4, 3)),  # 8x128-8x64-k13 0.699
            Row(64, ANY, Plan((16, 4), 32, 4)),  # 512-64-k21 0.337
            Row(128, 13, Plan((16, 4), 32, 4)),  # 8x128-8x128-k13 1.24
            Row(128, ANY, Plan((8, 8), 32, 4)),  # 256-24x128-k81 27.6
            Row(256, ANY, Plan((4, 8), 16, 4)),
        ),
        ("half", True): (
            Row(32, ANY, Plan((4, 8), 32, 1, 3)),  # 512-4x16-k7 0.236, 512-4x16-k21 0.633
            Row(64, ANY, Plan((8, 8), 32, 4, 3)),  # 512-64-k21 0.425
            Row(128, ANY, Plan((4, 16), 32, 4)),  # 8x128-8x128-k13 1.93
            Row(256, ANY, Plan((2, 16), 16, 4)),
        ),
        ("tf32", False): (
            Row(64, ANY, Plan((4, 4), 16, 1)),  # 512-64-k5-tf32 0.162, 512-64-k11-tf32 0.417
            Row(128, ANY, Plan((4, 4), 16, 2)),
            Row(256, ANY, Plan((4, 4), 16, 4)),
        ),
        ("tf32", True): (
            Row(64, ANY, Plan((4, 16), 32, 4)),  # 512-64-k11-tf32 0.511
            Row(128, ANY, Plan((4, 8), 16, 4)),
            Row(256, ANY, Plan((2, 8), 16, 4)),
        ),
        ("exact", False): (
            Row(64, ANY, Plan((4, 4), 16, 1, keep_by_pointer=True)),  # 512-64-k11-3x 1.02
            Row(128, ANY, Plan((4, 4), 16, 4)),
            Row(256, ANY, Plan((4, 4), 16, 8)),
        ),
        ("exact", True): (
            Row(32, ANY, Plan((4, 4), 16, 1)),  # 512-16-k11-3x 0.311
            Row(64, ANY, Plan((4, 16), 32, 4)),  # 512-64-k5-3x 0.673, 512-64-k11-3x 1.30
            Row(128, ANY, Plan((4, 8), 16, 4)),
            Row(256, ANY, Plan((4, 4), 16, 8)),
        ),
    },
}

# The interpreter's time goes by the number of programs and blocks; wide enough for planes.
INTERPRETED = Plan((8, 8), 64, 1)

_DELTA = (Row(64, ANY, Plan((4, 16), 16, 4)), Row(256, ANY, Plan((2, 16), 16, 4)))
_UNFUSED = {
    "half": (Row(64, ANY, Plan((8, 8), 32, 4)), Row(128, ANY, Plan((4, 8), 32, 4)), Row(256, ANY, Plan((4, 8), 16, 4))),
    "full": (Row(64, ANY, Plan((4, 8), 16, 4)), Row(256, ANY, Plan((2, 8), 16, 4))),
}


def plans() -> Iterator[tuple[str, str, bool, Row]]:
    """Every row of the fused tasks: task, work, planes, row."""
    for task, tables in _TABLE.items():
        for (work, planes), rows in tables.items():
            for row in rows:
                yield task, work, planes, row


def choose(task: str, work: str, depth: int, kernel: tuple[int, int], planes: bool) -> Plan:
    """The plan of a task: "forward", "delta", "grad_query", "grad_key_value" or "unfused".

    work: one of `gpu.PRECISIONS`. depth: most channels per head of its maps. planes: whether the streamed maps have
    their columns side by side, so that blocks must begin on whole vectors.
    """
    if task == "delta":
        rows = _DELTA
    elif task == "unfused":
        rows = _UNFUSED["half" if work == "half" else "full"]
    else:
        rows = _TABLE[task]["exact" if work == "three-pass" else work, planes]
    return next(row.plan for row in rows if depth <= row.depth and kernel[1] <= row.width)
