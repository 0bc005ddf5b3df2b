"""A softmax that takes logits block by block, in one pass over keys: output, maximum and sums of a row."""

import triton
import triton.language as tl

from .tile import LN2, LOG2E, NEVER, add_product, natural

LANES = tl.constexpr(8)  # sums that a row of scores is kept as, for lanes of a warp to add up once, at the end


@triton.jit
def softmax_start(M: tl.constexpr, DVP: tl.constexpr):
    """Output [M, DVP], maximum [M] and sums [M, LANES] of no logits."""
    return tl.zeros([M, DVP], tl.float32), tl.full([M], NEVER, tl.float32), tl.zeros([M, LANES], tl.float32)


@triton.jit
def softmax_step(b_o, b_m, b_l, b_s, b_v, scale_log2, PRODUCT: tl.constexpr):
    """Takes the logits [M, N] of one block into output, maximum and sums.

    They are natural, and so is the maximum, or in units of 1 / scale_log2, with a maximum of powers of two.
    """
    if natural(PRODUCT):
        b_max = tl.maximum(b_m, tl.max(b_s, 1))
        b_rescale = tl.exp2((b_m - b_max) * LOG2E)
        b_p = tl.exp2((b_s - b_max[:, None]) * LOG2E)
    else:
        b_max = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
        b_rescale = tl.exp2(b_m - b_max)
        b_p = tl.exp2(b_s * scale_log2 - b_max[:, None])
    b_o = add_product(b_o * b_rescale[:, None], b_p, b_v, PRODUCT)
    b_sums = tl.sum(b_p.reshape(b_p.shape[0], b_p.shape[1] // LANES, LANES), 1)
    return b_o, b_max, b_l * b_rescale[:, None] + b_sums


@triton.jit
def softmax_end(b_o, b_m, b_l, EMPTY: tl.constexpr, PRODUCT: tl.constexpr):
    """The output, and the natural log-sum-exp [M]. EMPTY: there may be rows without a key, whose output is zero."""
    b_sum = tl.sum(b_l, 1)
    b_lse = b_m + tl.log(b_sum) if natural(PRODUCT) else (b_m + tl.log2(b_sum)) * LN2
    if EMPTY:
        b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    return b_o / b_sum[:, None], b_lse
