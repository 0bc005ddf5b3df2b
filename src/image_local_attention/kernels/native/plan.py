"""Plans of the native kernels: a short table of measured facts, which also says what they serve.

What decides: a warp's 16 pixels see few keys that count for none of them, so tiles need no other shape than what makes
halos cheap: 8x8 pixels, or few rows where several heads share the copies of a pixel, or where columns lie side by side.
A window is served as long as its halo leaves room for several blocks on a multiprocessor; wider ones are read over and
over from the L2 cache, and Triton's kernels, which hold less of them at once, are as fast.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ..integers import cdiv

_PATTERN = 1024  # bytes after which a swizzle's pattern begins anew
_BARRIERS = 16  # bytes
_VECTOR = 8  # halves in 16 bytes: columns of a block where these lie side by side


@dataclass(frozen=True)
class Plan:
    """`tile` kept pixels (rows, columns), `warps` of a block.

    resident: blocks that are to share a multiprocessor, which bounds the registers of a thread. step: pairs of blocks
    of 8 pixels that are unrolled at most; in the forward, those of a chunk, after which the maximum is looked at.
    pixel_bytes: of a pixel that a copy takes at most; several heads where these are less deep. Where columns lie side
    by side, it is one head.
    """

    tile: tuple[int, int]
    warps: int
    resident: int
    step: int
    pixel_bytes: int = 128

    def group(self, heads: int, depth: int, planes: bool) -> int:
        """Heads of a block."""
        if planes:
            return 1
        return next(group for group in (4, 2, 1) if heads % group == 0 and group * depth * 2 <= self.pixel_bytes)


class Shape(NamedTuple):
    """What a block holds under a plan: the twin of what `tile.cuh` says.

    sub: pixels (rows, columns) of a warp's subtile. seen, halo: pixels that a subtile, and that a tile sees, with those
    that are copied for the sake of addresses: `pad` columns before those that are seen, and more behind them.
    """

    sub: tuple[int, int]
    seen: tuple[int, int]
    halo: tuple[int, int]
    pad: int

    @property
    def pairs(self) -> int:
        """Pairs of blocks of 8 pixels that a subtile sees."""
        return cdiv(self.seen[0] * self.seen[1], 16)


def shape(plan: Plan, kernel: tuple[int, int], lead: int, planes: bool) -> Shape:
    """lead: columns from the first that a pixel sees to its own."""
    (th, tw), (kh, kw) = plan.tile, kernel
    sub = (2, 8) if planes else (4, 4)
    pad = -lead % _VECTOR if planes else 0
    seen_h, seen_w = kh + sub[0] - 1, pad + kw + sub[1] - 1
    if planes:
        seen_w = cdiv(seen_w, _VECTOR) * _VECTOR
    halo_h = th + kh - 1
    if planes and halo_h % 2 == 0:
        halo_h += 1
    return Shape(sub, (seen_h, seen_w), (halo_h, tw - sub[1] + seen_w), pad)


def patterns(plan: Plan, held: Shape, channels: int, planes: bool) -> tuple[int, int]:
    """Bytes of the patterns that copies of tiles and of halos are swizzled in: of a copy's rows; 16 is none.

    In planes, the halo is swizzled where its rows would put every other channel in the same banks.
    """
    if planes:
        return 2 * plan.tile[1], 64 if held.halo[1] == 32 else 16
    return 2 * channels, 2 * channels


def suits(plan: Plan, group: int, planes: bool) -> bool:
    """Whether warps share a block's subtiles and heads evenly."""
    subtiles = plan.tile[0] * plan.tile[1] // 16
    return plan.warps % subtiles == 0 and subtiles * group % plan.warps == 0


def shared(task: str, plan: Plan, group: int, depth: int, held: Shape) -> int:
    """Bytes of shared memory that a block takes."""
    counts = held.halo[0] * held.halo[1], plan.tile[0] * plan.tile[1]
    halo, tile = (cdiv(count * group * depth * 2, _PATTERN) * _PATTERN for count in counts)
    rows = counts[0] * group * 8 if task == "grad_key_value" else 0
    return 2 * halo + _TILES[task] * tile + _BARRIERS + rows


class Row(NamedTuple):
    depth: int  # channels per head
    kernel: int  # the larger side of the widest window
    plan: Plan
    pixels: int = 1 << 60  # of all images and heads, at most: few blocks are to share the multiprocessors evenly


_TILES = {"forward": 1, "grad_query": 3, "grad_key_value": 2}  # kept in shared memory, each as large as the query's

# Rows are read from the top, the first that is deep and wide enough and suits the heads is taken. A figure is
# milliseconds of that kernel on an H200 when plans were tried, then those of Triton's for the same; delta is part of
# grad_query, and of Triton's figure. docs/performance.md has what passes take.
_TABLE: dict[tuple[str, bool], tuple[Row, ...]] = {
    ("forward", False): (
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
        Row(64, 7, Plan((8, 16), 8, 2, 9), pixels=2**15),  # 4x64-2x64-k7 0.012 : 0.013
        Row(64, 9, Plan((8, 8), 4, 3, 9)),  # 8x128-8x64-k7 0.181 : 0.221, k9 0.192 : 0.249
    ),
    ("grad_query", False): (
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
    ("grad_key_value", False): (
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
    ("forward", True): (
        Row(16, 9, Plan((4, 32), 8, 2, 6)),  # 512-4x16-k7 0.144 : 0.154
        Row(16, 13, Plan((8, 8), 4, 5, 4)),  # 512-4x16-k13 0.213 : 0.342
        Row(32, 7, Plan((4, 32), 8, 2, 6)),  # 2048-32-k7 0.764 : 0.949
        Row(32, 9, Plan((4, 32), 8, 2, 4)),  # 512-4x32-k9 0.242 : 0.284
        Row(32, 13, Plan((8, 16), 8, 2, 6)),  # 512-2x32-k13 0.162 : 0.181
        Row(64, 5, Plan((16, 16), 16, 1, 9)),  # 2048-64-k5 1.44 : 1.77
    ),
    ("grad_query", True): (
        Row(16, 9, Plan((4, 32), 8, 2, 1)),  # 512-4x16-k7 0.136 : 0.207
        Row(16, 13, Plan((4, 32), 8, 2, 2)),  # 512-4x16-k13 0.207 : 0.278
        Row(32, 9, Plan((4, 32), 8, 2, 4)),  # 2048-32-k7 1.02 : 1.13, 512-4x32-k9 0.308 : 0.322
    ),
    ("grad_key_value", True): (
        Row(16, 9, Plan((4, 32), 8, 2, 1)),  # 512-4x16-k7 0.199 : 0.213
        Row(16, 13, Plan((16, 8), 8, 2, 2)),  # 512-4x16-k13 0.288 : 0.329
        # 2048-32-k7 1.29 : 1.77, 512-4x32-k9 0.359 : 0.552, 512-2x32-k13 0.255 : 0.346
        Row(32, 13, Plan((8, 16), 8, 2, 4)),
    ),
}


def rows() -> list[tuple[str, bool, Row]]:
    """Every row with its task, and whether it is of planes."""
    return [(task, planes, row) for (task, planes), table in _TABLE.items() for row in table]


def choose(
    task: str, planes: bool, heads: int, depth: int, pixels: int, kernel: tuple[int, int], lead: int, limit: int
) -> Plan | None:
    """The plan of "forward", "grad_query" or "grad_key_value"; None where the task is not served.

    planes: whether maps have their columns side by side, else their channels. depth: channels per head. pixels: of all
    images and heads. kernel: (height, width) of the window. lead: columns from the first that a kept pixel sees to its
    own. limit: bytes of shared memory that a block may take.
    """
    rows = (row for row in _TABLE[task, planes] if row.depth == depth and max(kernel) <= row.kernel)
    for plan in (row.plan for row in rows if pixels <= row.pixels):
        group, held = plan.group(heads, depth, planes), shape(plan, kernel, lead, planes)
        if suits(plan, group, planes) and shared(task, plan, group, depth, held) <= limit:
            return plan
    return None
