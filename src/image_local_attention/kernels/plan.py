"""Launch plans: which tile, block, warps and stages a task takes, from a short table of measured facts.

What decides: queries per tile times keys in its halo is the arithmetic, so tiles are small; halos that fill whole
blocks (8 + 8, 4 + 12 or 8 + 20 columns) throw the fewest scores away; a product in three passes needs its operands
three times in registers, so its tiles are the smallest that a matrix unit takes. Where columns lie side by side,
copies begin on whole vectors, so tiles are as wide (8 columns of halves, 4 of fp32), and 16 wide where sectors pay.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Plan:
    """`tile` stationary pixels (rows, columns), `block` streamed pixels a step, warps and pipeline stages.

    `keep_by_pointer`, `stream_by_pointer`: load the tile or the blocks by pointer even where a descriptor could.
    `hoist`: hold the visibility of a column of blocks in registers, in the gradients of key and value.
    `delta_early`: ask for delta there together with the log-sum-exp, not where it is needed.
    `max_registers`: the most that a thread takes, where the compiler's choice lets fewer programs share a processor.
    """

    tile: tuple[int, int]
    block: int
    warps: int
    stages: int = 2
    keep_by_pointer: bool = False
    stream_by_pointer: bool = False
    hoist: bool = True
    delta_early: bool = False
    max_registers: int | None = None

    def block_shape(self, kernel_width: int, step: int) -> tuple[int, int]:
        """(rows, columns) of a block: multiples of `step` columns that cover the tile's halo with the least excess."""
        widths = [w for w in (32, 16, 8) if max(step, 8) <= w <= self.block]
        cols = min(widths, key=lambda w: self._covered(kernel_width, w))
        return self.block // cols, cols

    def free_columns(self, kernel_width: int, wanted: int, step: int) -> int:
        """`wanted` columns more in front of the halo if its blocks cover them anyway, else 0."""
        without, with_them = (
            self._covered(width, self.block_shape(width, step)[1]) for width in (kernel_width, kernel_width + wanted)
        )
        return wanted if with_them <= without else 0

    def _covered(self, kernel_width: int, cols: int) -> int:
        """Columns of the blocks of `cols` columns that cover the tile's halo."""
        return -(-(self.tile[1] + kernel_width - 1) // cols) * cols


class Row(NamedTuple):
    depth: int  # most channels per head
    width: int  # widest window, in columns from its first to its last
    plan: Plan
    wants: str = ""  # what of FACTS must hold, words


# What launches may have that plans depend on: logits of one window that slides over the map and of nothing else, for
# some plans leave no registers for other terms; no bias; copies through descriptors; windows that
# slide, and do not fold; windows that shift, on grids of one size; windows that fold; windows with gaps, columns that
# they leave out between theirs.
FACTS = frozenset({"plain", "unbiased", "copies", "slides", "shifts", "folds", "gaps"})
PLAIN = FACTS - {"shifts", "folds", "gaps"}

ANY = 1 << 30

_COLUMNS = 16  # of a tile where columns lie side by side

# By task, by how products are taken, by whether the streamed maps have their columns side by side. Rows are read
# from the top, the first that is deep and wide enough and has what it wants is taken. A figure is milliseconds of that
# one kernel on an H200 when plans were tried, at the case named before it; docs/performance.md has what passes take. A
# case without a figure: chosen there on an H100, by timings in which part of the host's time to launch was counted:
# plans were compared where that is alike or, between ways to load, where the gain was larger than it. Without a case:
# by analogy.
_TABLE: dict[str, dict[tuple[str, bool], tuple[Row, ...]]] = {
    "forward": {
        ("half", False): (
            Row(32, 13, Plan((4, 8), 32, 1, 3, keep_by_pointer=True), "plain"),  # 512-4x16-k7, 2048-32-k7
            Row(32, 13, Plan((4, 8), 32, 1, 3), "unbiased"),  # 512-4x16-k7, key_mask 0.123
            # 512-4x16-k7, bias 0.115, bias by displacement 0.131
            Row(16, 13, Plan((4, 8), 32, 1, 3, max_registers=96)),
            Row(32, 13, Plan((4, 8), 32, 1, 3)),
            Row(32, ANY, Plan((4, 8), 64, 1, 3)),  # 512-4x16-k21 0.397
            Row(64, 9, Plan((4, 8), 32, 1, 3), "copies"),  # 8x128-8x64-k7 0.216, 64-2x64-k7 0.0128
            Row(64, 9, Plan((8, 8), 32, 4, 3)),  # 8x128-8x64-k7, dilation 2 0.248, (1, 3) 0.281
            # 8x128-8x64-k13 0.352; 512-64-k13, key_mask 0.114
            Row(64, 13, Plan((16, 4), 64, 4, 3, max_registers=128), "unbiased"),
            Row(64, 13, Plan((16, 4), 64, 4, 3)),
            Row(64, ANY, Plan((8, 8), 64, 4, 3)),  # 512-64-k21 0.162
            Row(128, 13, Plan((16, 4), 32, 4, 3)),  # 8x128-8x128-k13
            Row(128, 40, Plan((8, 8), 64, 4, 3)),
            Row(128, ANY, Plan((8, 16), 128, 8, 3)),  # 256-24x128-k81 13.6
            Row(256, ANY, Plan((8, 8), 32, 8)),
        ),
        ("half", True): (
            Row(16, 13, Plan((8, 8), 32, 1, 3), "plain copies"),  # 512-4x16-k7
            Row(16, 13, Plan((8, 8), 32, 4, 3), "folds"),  # 512-4x16-k7, border reflect 0.192
            Row(16, ANY, Plan((2, 16), 32, 1, 3), "gaps"),  # 512-4x16-k7, dilation 2 0.178
            # 512-4x16-k21 0.454; 512-4x16-k7, bias 0.175, key_mask 0.190, dilation (1, 3) 0.204
            Row(16, ANY, Plan((4, 8), 32, 1, 3)),
            Row(
                32, ANY, Plan((4, 16), 64, 4, 3, keep_by_pointer=True, stream_by_pointer=True)
            ),  # 2048-32-k7 0.952, dilation 2 0.960
            # 8x128-8x64-k7, dilation 2 0.412, 3 0.584, (1, 3) 0.575
            Row(64, 19, Plan((4, 16), 32, 4, 3, keep_by_pointer=True, stream_by_pointer=True), "gaps"),
            # 512-64-k13, dilation 2 0.214, 3 0.252, (1, 3) 0.235
            Row(64, ANY, Plan((4, 16), 32, 4, 3, keep_by_pointer=True), "gaps"),
            Row(64, 9, Plan((4, 16), 32, 4, 3, keep_by_pointer=True), "copies"),  # 8x128-8x64-k7 0.386
            Row(64, 9, Plan((8, 8), 32, 4, 3)),  # 8x128-8x64-k7, border reflect 0.579
            Row(64, 13, Plan((4, 16), 32, 4, 3, keep_by_pointer=True)),  # 8x128-8x64-k13 0.540
            Row(64, ANY, Plan((8, 8), 32, 4, 4, keep_by_pointer=True, stream_by_pointer=True)),  # 512-64-k21 0.254
            Row(128, 40, Plan((4, 16), 32, 4, 3, stream_by_pointer=True)),  # 8x128-8x128-k13 0.964
            Row(128, ANY, Plan((8, 16), 64, 8, 3, stream_by_pointer=True)),  # 256-24x128-k81 18.7
            Row(256, ANY, Plan((4, 16), 32, 8)),
        ),
        ("tf32", False): (
            Row(64, 5, Plan((4, 4), 16, 1, 3)),  # 512-64-k5-tf32 0.088
            Row(64, ANY, Plan((8, 4), 16, 1, 3)),  # 512-64-k11-tf32
            Row(128, ANY, Plan((4, 4), 16, 4, keep_by_pointer=True)),
        ),
        ("tf32", True): (
            Row(64, 8, Plan((4, 8), 16, 1, 3)),  # 512-64-k5-tf32 0.170
            Row(64, ANY, Plan((4, 16), 32, 4)),  # 512-64-k11-tf32 0.283
            Row(128, ANY, Plan((4, 8), 16, 4)),
        ),
        ("exact", False): (
            Row(32, ANY, Plan((4, 4), 32, 1)),  # 512-16-k11-3x 0.132
            Row(64, ANY, Plan((4, 4), 16, 1, 3)),  # 512-64-k5-3x 0.146, 512-64-k11-3x 0.390, 128-64-k21-3x 0.067
            Row(128, ANY, Plan((4, 4), 16, 4)),
        ),
        ("exact", True): (
            Row(32, ANY, Plan((4, 4), 32, 1)),  # 512-16-k11-3x 0.149
            Row(64, 13, Plan((4, 4), 16, 1), "gaps"),  # 256-64-k7-3x, dilation 2 0.118
            Row(
                64, ANY, Plan((4, 8), 32, 2, keep_by_pointer=True), "gaps copies"
            ),  # 256-64-k7-3x, dilation (1, 3) 0.133
            Row(64, ANY, Plan((4, 8), 16, 2, keep_by_pointer=True), "gaps"),
            # 512-64-k5-3x 0.281, 512-64-k11-3x 0.560, 128-64-k21-3x 0.122
            Row(64, ANY, Plan((4, 4), 16, 1), "copies"),
            Row(64, ANY, Plan((4, 4), 16, 2, 1), "plain"),  # 256-64-k7-3x, dilation 4 0.181
            Row(64, 9, Plan((4, 4), 16, 1, 3, keep_by_pointer=True)),  # 256-64-k7-3x, border reflect 0.165
            Row(64, ANY, Plan((4, 4), 16, 2, 3)),
            Row(128, ANY, Plan((4, 4), 16, 4, keep_by_pointer=True)),
        ),
    },
    "grad_query": {
        ("half", False): (
            Row(32, 13, Plan((4, 8), 32, 1, 3, keep_by_pointer=True), "plain"),  # 512-4x16-k7 0.117, 2048-32-k7 0.552
            # 512-4x16-k7, key_mask 0.127, bias by displacement 0.133
            Row(16, 13, Plan((4, 8), 32, 1, 3, max_registers=128)),
            Row(32, ANY, Plan((4, 8), 32, 1, 3)),  # 512-4x16-k21 0.376
            Row(64, 9, Plan((8, 8), 32, 4, 3, keep_by_pointer=True)),  # 8x128-8x64-k7 0.235
            Row(64, 13, Plan((16, 4), 64, 4, 3, keep_by_pointer=True)),  # 8x128-8x64-k13 0.371
            Row(64, ANY, Plan((8, 8), 64, 4, keep_by_pointer=True)),  # 512-64-k21 0.168
            Row(128, 13, Plan((16, 4), 64, 4, 3)),  # 8x128-8x128-k13 0.650
            Row(128, ANY, Plan((8, 8), 64, 4, 3)),  # 256-24x128-k81 14.7
            Row(256, ANY, Plan((8, 8), 32, 8)),
        ),
        ("half", True): (
            # 512-4x16-k7, dilation 2 0.183
            Row(16, ANY, Plan((4, 16), 64, 4, 3, keep_by_pointer=True, stream_by_pointer=True), "gaps"),
            # 512-4x16-k7 0.159, bias 0.175, key_mask 0.181, bias by displacement 0.196
            Row(16, 13, Plan((2, 16), 32, 1, 3, max_registers=128), "copies"),
            Row(16, 13, Plan((8, 8), 32, 4, 3, keep_by_pointer=True), "folds"),  # 512-4x16-k7, border reflect 0.201
            Row(16, ANY, Plan((4, 8), 32, 1, 3)),  # 512-4x16-k21 0.479; 512-4x16-k7, dilation (1, 3) 0.212
            Row(
                32, ANY, Plan((4, 16), 64, 4, 3, keep_by_pointer=True, stream_by_pointer=True)
            ),  # 2048-32-k7 0.890, dilation 2 0.929
            # 8x128-8x64-k7, dilation 2 0.427, 3 0.589, (1, 3) 0.589
            Row(64, 19, Plan((4, 16), 32, 4, 3, keep_by_pointer=True, stream_by_pointer=True), "gaps"),
            # 512-64-k13, dilation 2 0.207, 3 0.240, (1, 3) 0.228
            Row(64, ANY, Plan((4, 16), 32, 4, 3, keep_by_pointer=True), "gaps"),
            Row(64, 9, Plan((4, 16), 32, 4, 3, keep_by_pointer=True), "copies"),  # 8x128-8x64-k7 0.435
            Row(64, 9, Plan((8, 8), 32, 4, 3, keep_by_pointer=True)),  # 8x128-8x64-k7, border reflect 0.615
            Row(64, 13, Plan((4, 16), 32, 4, 3, keep_by_pointer=True), "copies"),  # 8x128-8x64-k13
            Row(64, 13, Plan((8, 16), 32, 8, 3)),  # 512-64-k13, dilation 4 0.274
            Row(64, ANY, Plan((8, 8), 32, 4, 3, stream_by_pointer=True)),  # 512-64-k21 0.265
            Row(128, 40, Plan((4, 16), 32, 4, 3, stream_by_pointer=True)),  # 8x128-8x128-k13 1.16
            Row(128, ANY, Plan((8, 16), 32, 8, 3, stream_by_pointer=True)),  # 256-24x128-k81
            Row(256, ANY, Plan((8, 8), 16, 8)),
        ),
        ("tf32", False): (
            Row(64, ANY, Plan((4, 4), 16, 1, 3)),  # 512-64-k5-tf32 0.112, 512-64-k11-tf32 0.237
            Row(128, ANY, Plan((4, 4), 16, 4, keep_by_pointer=True)),
        ),
        ("tf32", True): (
            Row(64, 8, Plan((4, 8), 16, 2)),  # 512-64-k5-tf32 0.253
            Row(64, ANY, Plan((4, 16), 32, 4)),  # 512-64-k11-tf32 0.416
            Row(128, ANY, Plan((4, 8), 16, 4, keep_by_pointer=True)),
        ),
        ("exact", False): (
            Row(32, ANY, Plan((4, 4), 16, 1)),  # 512-16-k11-3x 0.169
            Row(64, 16, Plan((4, 4), 32, 2, keep_by_pointer=True), "plain"),  # 512-64-k5-3x 0.184, 512-64-k11-3x 0.498
            # 128-64-k21-3x 0.082
            Row(64, 21, Plan((4, 4), 16, 1, keep_by_pointer=True, max_registers=200), "plain"),
            # 256-64-k7-3x, bias 0.103, key_mask 0.107
            Row(64, ANY, Plan((4, 4), 16, 1, keep_by_pointer=True)),
            Row(128, ANY, Plan((4, 4), 16, 4, keep_by_pointer=True)),
        ),
        ("exact", True): (
            Row(32, ANY, Plan((4, 4), 32, 1)),  # 512-16-k11-3x 0.188
            Row(64, 13, Plan((4, 4), 32, 2, keep_by_pointer=True), "gaps"),  # 256-64-k7-3x, dilation 2 0.175
            # 256-64-k7-3x, dilation (1, 3) 0.187
            Row(64, ANY, Plan((4, 8), 32, 2, 3, keep_by_pointer=True), "gaps copies"),
            Row(64, ANY, Plan((4, 8), 32, 4, keep_by_pointer=True), "gaps"),
            Row(64, 9, Plan((4, 4), 16, 2)),  # 512-64-k5-3x 0.363
            # 512-64-k11-3x 0.714; where blocks are wide, at 14 to 18 columns and past 21, the limit is too low
            Row(64, 13, Plan((4, 4), 16, 2, max_registers=128), "plain copies"),
            Row(64, 18, Plan((4, 4), 16, 2)),
            Row(64, 21, Plan((4, 4), 16, 2, max_registers=128), "plain copies"),  # 128-64-k21-3x 0.124
            Row(64, ANY, Plan((4, 4), 16, 2)),
            Row(128, ANY, Plan((4, 4), 16, 4, keep_by_pointer=True)),
        ),
    },
    "grad_key_value": {
        ("half", False): (
            Row(16, 13, Plan((4, 8), 32, 1, 2, True, True), "plain"),  # 512-4x16-k7 0.147
            # 2048-32-k7 0.876; 512-4x16-k7, bias by displacement 0.196, dilation 2 0.156, border shift 0.153
            Row(32, 13, Plan((4, 8), 32, 1, 3, keep_by_pointer=True)),
            Row(32, ANY, Plan((4, 8), 32, 1, 3)),  # 512-4x16-k21 0.511
            # 8x128-8x64-k7 0.432 (with delta late 0.446), bias by displacement 0.493, border reflect 0.536
            Row(64, 9, Plan((4, 8), 16, 1, 3, True, True, delta_early=True)),
            Row(64, 13, Plan((16, 4), 32, 4, 3, keep_by_pointer=True), "copies slides"),  # 8x128-8x64-k13 0.678
            # 512-64-k13, border reflect 0.281
            Row(64, 13, Plan((8, 4), 16, 2, 3, stream_by_pointer=True, hoist=False), "folds"),
            # 512-64-k13, border shift 0.210, bias by displacement 0.225
            Row(64, 13, Plan((8, 8), 32, 4, 3, hoist=False), "copies"),
            # 512-64-k13, dilation (1, 3) 0.223
            Row(64, 13, Plan((8, 4), 16, 1, 3, stream_by_pointer=True, hoist=False)),
            Row(64, 80, Plan((8, 4), 16, 1, 3, stream_by_pointer=True, hoist=False), "plain"),  # 512-64-k21 0.320
            Row(64, ANY, Plan((16, 4), 32, 4, 3, keep_by_pointer=True)),
            Row(128, 13, Plan((16, 4), 32, 4, 3, keep_by_pointer=True)),  # 8x128-8x128-k13 1.27
            Row(128, ANY, Plan((8, 8), 32, 4, 3, hoist=False), "plain"),  # 256-24x128-k81 26.2
            Row(128, ANY, Plan((8, 8), 16, 4, 3)),
            Row(256, ANY, Plan((4, 8), 16, 8, keep_by_pointer=True)),
        ),
        ("half", True): (
            Row(16, 13, Plan((2, 16), 32, 1, 3), "plain copies"),  # 512-4x16-k7 0.225
            Row(16, ANY, Plan((2, 16), 32, 1, 3), "gaps"),  # 512-4x16-k7, dilation 2 0.290
            Row(16, 9, Plan((4, 8), 32, 1, max_registers=168), "plain"),  # 512-4x16-k7, dilation (1, 3) 0.303
            # 512-4x16-k7, bias 0.260, bias by displacement 0.277, key_mask 0.240
            Row(16, 13, Plan((4, 8), 32, 1, 3, keep_by_pointer=True)),
            Row(16, ANY, Plan((4, 8), 32, 1, 3)),  # 512-4x16-k21 0.633
            Row(32, ANY, Plan((4, 16), 32, 2, 3, hoist=False), "plain"),  # 2048-32-k7 1.68
            # 2048-32-k7, dilation 2 1.60
            Row(32, ANY, Plan((4, 16), 32, 4, 3, keep_by_pointer=True, stream_by_pointer=True), "gaps"),
            Row(32, ANY, Plan((4, 8), 32, 1, 3)),
            # 8x128-8x64-k7, dilation 2 0.686
            Row(64, 13, Plan((4, 16), 32, 4, 3, keep_by_pointer=True, stream_by_pointer=True), "gaps"),
            # 8x128-8x64-k7, dilation (1, 3) 0.932
            Row(64, 19, Plan((4, 16), 32, 4, keep_by_pointer=True, stream_by_pointer=True), "gaps copies"),
            Row(
                64, ANY, Plan((4, 16), 32, 4, 3, keep_by_pointer=True), "gaps copies"
            ),  # 512-64-k13, dilation (1, 3) 0.401
            # 512-64-k13, dilation 2 0.326, 3 0.459; 8x128-8x64-k7, dilation 3 0.892
            Row(64, ANY, Plan((4, 16), 32, 4, 3, keep_by_pointer=True, hoist=False), "gaps"),
            # 8x128-8x64-k7 0.680, bias 0.772, 8x128-8x64-k13
            Row(64, 13, Plan((4, 16), 32, 4, 3, keep_by_pointer=True), "copies slides"),
            Row(64, 9, Plan((8, 8), 32, 4, hoist=False), "copies"),  # 8x128-8x64-k7, bias by displacement 0.905
            # 512-64-k13, bias by displacement 0.311
            Row(64, 13, Plan((4, 16), 32, 4, keep_by_pointer=True, hoist=False), "copies shifts"),
            Row(64, 13, Plan((8, 8), 32, 4, hoist=False), "copies"),
            Row(64, 9, Plan((8, 8), 16, 4, 1)),  # 8x128-8x64-k7, dilation 4 1.06
            Row(64, 13, Plan((4, 16), 32, 4, 1)),  # 512-64-k13, dilation 4 0.430
            Row(64, ANY, Plan((8, 8), 32, 4, 3)),  # 512-64-k21 0.425
            Row(128, 40, Plan((4, 16), 32, 4, 4, keep_by_pointer=True)),  # 8x128-8x128-k13 1.94
            Row(128, ANY, Plan((8, 16), 32, 8, 3, keep_by_pointer=True)),
            Row(256, ANY, Plan((4, 8), 16, 8, keep_by_pointer=True)),
        ),
        ("tf32", False): (
            Row(64, 11, Plan((4, 4), 16, 1, hoist=False), "plain"),  # 512-64-k5-tf32 0.153, 512-64-k11-tf32 0.390
            Row(64, ANY, Plan((4, 4), 16, 2, keep_by_pointer=True)),
            Row(128, ANY, Plan((4, 4), 16, 4, keep_by_pointer=True)),
        ),
        ("tf32", True): (
            Row(64, 8, Plan((4, 8), 16, 2, keep_by_pointer=True)),  # 512-64-k5-tf32
            Row(64, ANY, Plan((4, 16), 32, 4)),  # 512-64-k11-tf32 0.582
            Row(128, ANY, Plan((4, 4), 16, 4, 3, keep_by_pointer=True)),
        ),
        ("exact", False): (
            Row(32, ANY, Plan((4, 4), 32, 1, keep_by_pointer=True, hoist=False)),  # 512-16-k11-3x 0.224
            # 512-64-k5-3x 0.262, 512-64-k11-3x 0.756, 128-64-k21-3x 0.126; 256-64-k7-3x, border shift 0.151
            Row(64, ANY, Plan((4, 4), 32, 2, keep_by_pointer=True, hoist=False)),
            Row(128, ANY, Plan((4, 4), 16, 4, keep_by_pointer=True)),
        ),
        ("exact", True): (
            Row(16, ANY, Plan((4, 4), 32, 1, 3, hoist=False)),  # 512-16-k11-3x 0.272
            Row(32, ANY, Plan((4, 4), 16, 1)),
            Row(64, 13, Plan((4, 4), 32, 2, keep_by_pointer=True), "gaps"),  # 256-64-k7-3x, dilation 2 0.223
            # 256-64-k7-3x, dilation (1, 3) 0.293
            Row(64, ANY, Plan((4, 8), 32, 4, keep_by_pointer=True, hoist=False), "gaps"),
            # 512-64-k5-3x 0.468, 512-64-k11-3x 0.893; 256-64-k7-3x, key_mask 0.188, border shift 0.184
            Row(64, 11, Plan((4, 4), 32, 2, keep_by_pointer=True), "copies"),
            Row(64, ANY, Plan((4, 4), 16, 2, keep_by_pointer=True), "copies"),  # 128-64-k21-3x 0.176
            Row(64, ANY, Plan((4, 4), 16, 2, 1)),  # 256-64-k7-3x, dilation 4 0.285
            Row(128, ANY, Plan((4, 4), 16, 4, keep_by_pointer=True)),
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
    """Every row of the fused tasks: task, product, planes, row."""
    for task, tables in _TABLE.items():
        for (product, planes), rows in tables.items():
            for row in rows:
                yield task, product, planes, row


def undivided(task: str, product: str, depth: int, kernel: int, dilation: int, by_pointer: bool) -> bool:
    """Whether a task whose maps have their columns side by side reads rows whole, for a window's width and dilation.

    Then it masks scores of the columns between those of a window. Otherwise it takes rows apart into lattices, whose
    pixels it reads one by one, and that costs as much as so many more columns. by_pointer: no descriptor can copy
    whole rows, for maps are taken apart along columns.
    """
    if task == "unfused":
        return False
    if product != "half":
        most = 1.5 if by_pointer else 1.65  # 256-64-k7-3x: at 1.55 slower by pointer, through descriptors at 1.8
    elif depth <= 16:
        most = 1.4  # 512-4x16-k7: at 1.27 faster, 1.55 slower
    else:
        most = 2.4  # 512-64-k13: at 2.29 as fast
    return _COLUMNS + (kernel - 1) * dilation <= most * (_COLUMNS + kernel - 1)


@functools.lru_cache(maxsize=4096)
def choose(
    task: str,
    product: str,
    depth: int,
    width: int,
    planes: bool,
    facts: frozenset[str] = PLAIN,
) -> Plan:
    """The plan of a task: "forward", "delta", "grad_query", "grad_key_value" or "unfused".

    product: one of `gpu.PRODUCTS`. depth: most channels per head of its maps. width: columns from a window's first to
    its last. planes: whether the streamed maps have their columns side by side, so that blocks must begin on whole
    vectors. facts: those of FACTS that hold.
    """
    if task == "delta":
        rows = _DELTA
    elif task == "unfused":
        rows = _UNFUSED["half" if product == "half" else "full"]
    else:
        rows = _TABLE[task]["exact" if product == "three-pass" else product, planes]
    fitting = (row for row in rows if depth <= row.depth and width <= row.width)
    return next(row.plan for row in fitting if facts.issuperset(row.wants.split()))
