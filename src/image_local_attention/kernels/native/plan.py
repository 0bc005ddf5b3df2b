"""Plans of the native kernels: a short table of measured facts, which also says what they serve.

What decides: a warp's 4x4 pixels see few keys that count for none of them, so tiles of warps need no other shape than
what makes halos cheap: of 8x8 pixels, or of few rows where several heads share the copies of a pixel. A window is
served as long as its halo leaves room for several blocks on a multiprocessor; wider ones are read over and over from
the L2 cache, and Triton's kernels, which hold less of them at once, are as fast.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

from ..integers import cdiv

SIDE = 4  # pixels of a warp's subtile on each axis
_PATTERN = 1024  # bytes after which a swizzle's pattern begins anew
_BARRIERS = 16  # bytes


@dataclass(frozen=True)
class Plan:
    """`tile` kept pixels (rows, columns) of which a warp takes 4x4, `warps` of a block.

    resident: blocks that are to share a multiprocessor, which bounds the registers of a thread. step: pairs of blocks
    of 8 keys that are unrolled at most; in the forward, those of a chunk, after which the maximum is looked at.
    pixel_bytes: of a pixel that a copy takes at most; several heads where these are less deep.
    """

    tile: tuple[int, int]
    warps: int
    resident: int
    step: int
    pixel_bytes: int = 128

    def group(self, heads: int, depth: int) -> int:
        """Heads of a block."""
        return next(group for group in (4, 2, 1) if heads % group == 0 and group * depth * 2 <= self.pixel_bytes)

    def suits(self, group: int) -> bool:
        """Whether warps share a block's subtiles and heads evenly."""
        subtiles = self.tile[0] // SIDE * (self.tile[1] // SIDE)
        return self.warps % subtiles == 0 and subtiles * group % self.warps == 0

    def pairs(self, kernel: tuple[int, int]) -> int:
        """Pairs of blocks of 8 pixels that a subtile sees."""
        return cdiv((kernel[0] + SIDE - 1) * (kernel[1] + SIDE - 1), 16)

    def shared(self, task: str, group: int, depth: int, kernel: tuple[int, int]) -> int:
        """Bytes of shared memory that a block takes."""
        pixels = (self.tile[0] + kernel[0] - 1) * (self.tile[1] + kernel[1] - 1)
        halo, tile = (
            cdiv(count * group * depth * 2, _PATTERN) * _PATTERN for count in (pixels, self.tile[0] * self.tile[1])
        )
        rows = pixels * group * 8 if task == "grad_key_value" else 0
        return 2 * halo + _TILES[task] * tile + _BARRIERS + rows


class Row(NamedTuple):
    depth: int  # channels per head
    kernel: int  # the larger side of the widest window
    plan: Plan


_TILES = {"forward": 1, "grad_query": 3, "grad_key_value": 2}  # kept in shared memory, each as large as the query's

# Rows are read from the top, the first that is deep and wide enough and suits the heads is taken. A figure is
# milliseconds of that kernel on an H200, then those of Triton's for the same; delta is part of grad_query, and of
# Triton's figure.
_TABLE: dict[str, tuple[Row, ...]] = {
    "forward": (
        Row(16, 7, Plan((4, 8), 4, 5, 9)),  # 512-4x16-k5 0.052 : 0.095, k7 0.075 : 0.111
        Row(16, 9, Plan((4, 8), 4, 4, 9)),  # 512-4x16-k9 0.086 : 0.127
        Row(16, 9, Plan((8, 8), 4, 5, 9, 32)),  # 512-4x16-k7 0.082, k9 0.097
        Row(16, 13, Plan((8, 8), 4, 5, 4, 32)),  # 512-4x16-k11 0.155 : 0.264, k13 0.145 : 0.257
        Row(16, 21, Plan((8, 8), 4, 3, 6, 32)),  # 512-4x16-k21 0.299 : 0.371
        Row(32, 5, Plan((8, 8), 8, 2, 4)),  # 512-2x32-k5 0.043
        Row(32, 9, Plan((4, 8), 4, 4, 9)),  # 512-4x32-k9 0.123 : 0.160
        Row(32, 7, Plan((8, 8), 4, 5, 9)),  # 2048-32-k7 0.381 : 0.502
        Row(32, 9, Plan((8, 8), 4, 4, 9)),
        Row(32, 13, Plan((8, 8), 8, 2, 4)),  # 512-2x32-k11 0.110 : 0.152, k13 0.104 : 0.151
        Row(64, 5, Plan((8, 8), 4, 4, 4)),  # 512-64-k3 0.039 : 0.050, 2048-64-k5 0.547 : 0.740
        Row(64, 9, Plan((8, 8), 4, 3, 9)),  # 8x128-8x64-k7 0.181 : 0.221, k9 0.192 : 0.249
    ),
    "grad_query": (
        Row(16, 9, Plan((4, 8), 8, 2, 1)),  # 512-4x16-k5 0.065 : 0.129, k7 0.089 : 0.141, k9 0.109 : 0.154
        Row(16, 9, Plan((8, 16), 8, 2, 1, 32)),  # 512-4x16-k9 0.108
        Row(16, 13, Plan((8, 8), 4, 5, 4, 32)),  # 512-4x16-k11 0.137 : 0.247, k13 0.151 : 0.243
        Row(16, 21, Plan((8, 16), 8, 2, 4, 32)),  # 512-4x16-k21 0.320 : 0.402
        Row(32, 5, Plan((8, 8), 8, 2, 1)),  # 512-2x32-k5 0.060 : 0.092
        Row(32, 11, Plan((8, 8), 8, 2, 4)),  # 512-4x32-k9 0.166 : 0.212, 2x32-k11 0.108 : 0.187
        Row(32, 7, Plan((8, 8), 4, 5, 4)),  # 2048-32-k7 0.495 : 0.683
        Row(32, 13, Plan((4, 8), 4, 2, 4)),  # 512-2x32-k13 0.147 : 0.186
        Row(64, 3, Plan((8, 8), 4, 4, 4)),  # 512-64-k3 0.057 : 0.075
        Row(64, 5, Plan((8, 16), 8, 2, 4)),  # 2048-64-k5 0.763 : 1.07
        Row(64, 7, Plan((8, 8), 4, 3, 4)),
    ),
    "grad_key_value": (
        Row(16, 5, Plan((8, 16), 8, 2, 1, 32)),  # 512-4x16-k5 0.090 : 0.140
        Row(16, 9, Plan((8, 8), 4, 4, 1, 32)),  # 512-4x16-k7 0.127 : 0.159, k9 0.142 : 0.188
        Row(16, 11, Plan((8, 8), 4, 4, 2, 32)),  # 512-4x16-k11 0.190 : 0.305
        Row(16, 13, Plan((8, 16), 8, 2, 4, 32)),  # 512-4x16-k13 0.207 : 0.310
        Row(16, 21, Plan((8, 16), 8, 1, 2, 32)),  # 512-4x16-k21 0.437 : 0.511
        Row(32, 5, Plan((8, 8), 8, 2, 4)),  # 512-2x32-k5 0.078 : 0.104
        Row(32, 9, Plan((8, 8), 8, 2, 1)),  # 512-4x32-k9 0.233 : 0.254
        Row(32, 7, Plan((8, 8), 4, 4, 1)),  # 2048-32-k7 0.760 : 0.835
        Row(32, 11, Plan((8, 8), 8, 2, 2)),  # 512-2x32-k11 0.170 : 0.243
        Row(32, 13, Plan((16, 8), 16, 1, 2)),  # 512-2x32-k13 0.195 : 0.250
        Row(64, 3, Plan((8, 8), 4, 4, 4)),  # 512-64-k3 0.065 : 0.085
        Row(64, 5, Plan((8, 16), 8, 2, 4)),  # 2048-64-k5 0.929 : 1.29
        Row(64, 7, Plan((8, 8), 4, 3, 1)),  # 8x128-8x64-k7 0.328 : 0.430
        Row(64, 11, Plan((8, 8), 4, 2, 4)),  # 8x128-8x64-k9 0.392 : 0.484, 512-64-k11 0.163 : 0.209
    ),
}


def rows() -> list[tuple[str, Row]]:
    """Every row with its task."""
    return [(task, row) for task, table in _TABLE.items() for row in table]


@functools.lru_cache(maxsize=4096)
def choose(task: str, heads: int, depth: int, kernel: tuple[int, int], shared: int) -> Plan | None:
    """The plan of "forward", "grad_query" or "grad_key_value"; None where the task is not served.

    depth: channels per head. kernel: (height, width) of the window. shared: bytes that a block may take.
    """
    for row in _TABLE[task]:
        if row.depth == depth and max(kernel) <= row.kernel:
            group = row.plan.group(heads, depth)
            if row.plan.suits(group) and row.plan.shared(task, group, depth, kernel) <= shared:
                return row.plan
    return None
