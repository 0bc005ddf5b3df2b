"""A bias and a key mask as tables in fp32 with a frame around them, so that no load of a tile asks where it is.

Where the first entry of a bias moves pixel by pixel with the query, the entry of a pair is a number of the tile's pixel
plus one of the block's: that of each score lies at a fixed distance from a pointer, and minus infinity past the
window's ends.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_cuda

from .integers import cdiv
from .tile import INTERPRETED

FRAME_BLOCK = 1024


def table(bias: Tensor, margins: tuple[int, int]) -> Tensor:
    """A bias [heads, y, x] in fp32 with so many entries of minus infinity before and after it on each axis, as a view.

    Memory: one float for an entry and for each of those around.
    """
    return _framed(bias, margins, ceiling=False)


def ceiling(mask: Tensor, margins: tuple[int, int]) -> Tensor:
    """The most that logits may be: minus infinity where a mask [B, heads, Hk, Wk, 1] of bytes is 0, else infinity.

    Alike for all heads. There are so many pixels of infinity before and after it on each axis. Memory: one float for
    a pixel of the mask and for each of those around.
    """
    return _framed(mask[:, 0, :, :, 0], margins, ceiling=True)[:, None, :, :, None].expand_as(mask)


def _framed(x: Tensor, margins: tuple[int, int], ceiling: bool) -> Tensor:
    (n, h, w), (margin_y, margin_x) = x.shape, margins
    height, width = h + 2 * margin_y, w + 2 * margin_x
    framed = x.new_empty((n, height, width), dtype=torch.float32)
    with torch.cuda.device_of(x):
        frame_kernel[cdiv(framed.numel(), FRAME_BLOCK),](
            *(x, framed, x.stride(), framed.numel()),
            *(h, w, height, width, margin_y, margin_x),
            CEILING=ceiling,
            BLOCK=FRAME_BLOCK,
        )
    return framed[:, margin_y : margin_y + h, margin_x : margin_x + w]


@triton.jit
def frame_kernel(
    x_ptr, framed_ptr, x_s, count, H, W, height, width, margin_y, margin_x,
    CEILING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Numbers [n, height, width] of a bias or a mask [n, H, W], and what stands for none around it."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_y, o_x = o // width % height - margin_y, o % width - margin_x
    m_x = (o < count) & (o_y >= 0) & (o_y < H) & (o_x >= 0) & (o_x < W)
    p_x = x_ptr + o // (width * height) * x_s[0] + o_y * x_s[1] + o_x * x_s[2]
    if CEILING:
        b_x = tl.where(tl.load(p_x, mask=m_x, other=1) == 0, float("-inf"), float("inf"))
    else:
        b_x = tl.load(p_x, mask=m_x, other=float("-inf")).to(tl.float32)
    tl.store(framed_ptr + o, b_x, mask=o < count)


@triton.constexpr_function
def registers(m, n, warps):
    """How matrix units leave [M, N] scores in registers: warps along M and N, tiles of 16 x 8 of a warp along M and N.

    Zeros where there are too few scores for it.
    """
    warps_m = min(warps, m // 16)
    if warps_m == 0 or n < 8 * (warps // warps_m):
        return 0, 0, 0, 0
    warps_n = warps // warps_m
    return warps_m, warps_n, m // 16 // warps_m, n // 8 // warps_n


@triton.jit
def load_here(ptr):
    """Floats into registers, when they are asked for.

    The compiler would copy them to shared memory a step ahead, float by float: there the copies of a warp meet in one
    bank, and a kernel takes 5 times as long.
    """
    if INTERPRETED or not is_cuda():
        b_x = tl.load(ptr)
    else:
        b_x = tl.inline_asm_elementwise("ld.global.nc.f32 $0, [$1];", "=f,l", [ptr], tl.float32, is_pure=True, pack=1)
    return b_x


@triton.jit
def distance(o, COLS: tl.constexpr, ROW: tl.constexpr):
    """From the first entry to that of pixel `o` of a tile or a block of COLS columns."""
    return o // COLS * ROW + o % COLS


@triton.jit
def load_entries(
    ptr, M: tl.constexpr, N: tl.constexpr, TW: tl.constexpr, COLS: tl.constexpr,
    SIGN: tl.constexpr, ROW: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """[M, N] entries of a table with rows of ROW entries, for M pixels of a tile and N of a block.

    ptr: the entry of the first pixels of both. SIGN: 1 where blocks are of keys, -1 where they are of queries.
    They are loaded in the order in which matrix units leave scores, each lane's own; in any other order the compiler
    would carry them there through shared memory.
    """
    layout: tl.constexpr = registers(M, N, WARPS)
    WM: tl.constexpr = layout[0]
    WN: tl.constexpr = layout[1]
    TM: tl.constexpr = layout[2]
    TN: tl.constexpr = layout[3]
    if WM == 0:
        o_m, o_n = distance(tl.arange(0, M), TW, ROW), distance(tl.arange(0, N), COLS, ROW)
        b_x = load_here(ptr + SIGN * (o_n[None, :] - o_m[:, None]))
    else:  # bits of a pixel's number are those of a register's and of a lane's, and distances add up bit by bit
        o_r, o_l = tl.arange(0, TM * TN * 4), tl.arange(0, WM * WN * 32)
        o_rm, o_rn = o_r // (TN * 4) * (WM * 16) + o_r // 2 % 2 * 8, o_r // 4 % TN * (WN * 8) + o_r % 2
        o_lm, o_ln = o_l // (WN * 32) * 16 + o_l // 4 % 8, o_l // 32 % WN * 8 + o_l % 4 * 2
        o_r = distance(o_rn, COLS, ROW) - distance(o_rm, TW, ROW)
        o_l = distance(o_ln, COLS, ROW) - distance(o_lm, TW, ROW)
        b_x = load_here((ptr + SIGN * o_l)[None, :] + SIGN * o_r[:, None])
        b_x = b_x.reshape(TM, TN, 2, 2, WM, WN, 8, 4).permute(0, 4, 2, 6, 1, 5, 7, 3).reshape(M, N)
    return b_x
