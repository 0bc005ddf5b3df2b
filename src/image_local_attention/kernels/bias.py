"""The gradient of a bias: sums of gradients of logits over all queries, entry by entry, without atomics."""

import triton
import triton.language as tl

from .geometry import after, centre, fold, window_start
from .terms import absent, entries, finite, first_entry, load_bias, takes_part
from .tile import LOG2E, NEVER, head_start, inside, load_floats, load_pixels, pixel_offsets, pixels


@triton.jit
def bias_gradient_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, lse_ptr, delta_ptr, grad_ptr, bias_ptr, mask_ptr, sums_ptr,
    q_s, k_s, v_s, g_s, lse_s, grad_s, bias_s, mask_s,
    B, H, W, HK, WK, heads, scale_log2,
    Y: tl.constexpr, X: tl.constexpr, RASTER: tl.constexpr, BY_DISPLACEMENT: tl.constexpr, GROUP: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums [chunks, heads, entries y, entries x] over the tiles of queries i_chunk, i_chunk + chunks, ...

    The gradient of logits is read from `grad_ptr` [B, heads, H, W, slots], or, where that is None, computed:
    dS = P * (dP - delta). Keys are read pixel by pixel, for the query tile of each entry is a tile of keys that is
    shifted. WIDTH is a power of two that holds the entries of a row.
    """
    i_chunk, i_h, i_entry = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_kv = i_h // GROUP
    tiles_y, tiles_x = tl.cdiv(H, TH), tl.cdiv(W, TW)
    b_sums = tl.zeros([WIDTH], tl.float32)
    o_entries = tl.arange(0, WIDTH)
    for i_tile in tl.range(i_chunk, B * tiles_y * tiles_x, tl.num_programs(0)):
        i_b = i_tile // (tiles_y * tiles_x)
        y0, x0 = i_tile // tiles_x % tiles_y * TH, i_tile % tiles_x * TW
        o_y, o_x = pixels(y0, x0, TH, TW)
        o_start_y = window_start(tl.minimum(o_y, H - 1), HK, H, Y)
        o_start_x = window_start(tl.minimum(o_x, W - 1), WK, W, X)
        o_by = first_entry(tl.minimum(o_y, H - 1), HK, H, BY_DISPLACEMENT, Y)
        o_bx = first_entry(tl.minimum(o_x, W - 1), WK, W, BY_DISPLACEMENT, X)
        # Of the entries of a row, those that some query of the tile has; of the row, whether some has it.
        o_top, o_left = (o_start_y - o_by) // Y.dilation, (o_start_x - o_bx) // X.dilation
        first, end = tl.min(o_left, 0), tl.max(o_left, 0) + X.kernel
        if (i_entry < tl.min(o_top, 0)) | (i_entry >= tl.max(o_top, 0) + Y.kernel):
            end = first
        o_ky = o_by + i_entry * Y.dilation
        m_y = inside(o_y, o_x, H, W) & (o_ky >= o_start_y) & (o_ky < o_start_y + Y.reach)
        if grad_ptr is None:
            b_q = load_pixels(q_ptr, q_s, i_b, i_h, o_y, o_x, H, W, DK, DKP, WIDE).to(tl.float32)  # [M, DKP]
            b_g = load_pixels(g_ptr, g_s, i_b, i_h, o_y, o_x, H, W, DV, DVP, WIDE).to(tl.float32)  # [M, DVP]
            b_lse = finite(load_floats(lse_ptr, lse_s, i_b, i_h, o_y, o_x, H, W, 0.0, WIDE))
            b_delta = load_floats(delta_ptr, lse_s, i_b, i_h, o_y, o_x, H, W, 0.0, WIDE)
        for i_column in tl.range(first, end):
            o_kx = o_bx + i_column * X.dilation
            m_s = m_y & (o_kx >= o_start_x) & (o_kx < o_start_x + X.reach) & ~absent(o_ky, o_kx, HK, WK, Y, X)
            if RASTER:
                m_s = m_s & ~after(o_ky, o_kx, centre(o_y, HK, H, Y), centre(o_x, WK, W, X))
            if mask_ptr is not None:
                m_s = m_s & takes_part(mask_ptr, mask_s, i_b, i_kv, o_ky, o_kx, HK, WK, WIDE, Y, X)
            if grad_ptr is None:
                o_fy, o_fx = fold(o_ky, HK, Y), fold(o_kx, WK, X)
                b_k = load_pixels(k_ptr, k_s, i_b, i_kv, o_fy, o_fx, HK, WK, DK, DKP, WIDE).to(tl.float32)
                b_v = load_pixels(v_ptr, v_s, i_b, i_kv, o_fy, o_fx, HK, WK, DV, DVP, WIDE).to(tl.float32)
                b_bias = load_bias(bias_ptr, bias_s, i_h, o_ky, o_kx, o_by, o_bx, m_s, Y, X)
                b_s = tl.sum(b_q * b_k, 1) * scale_log2 + (b_bias - b_lse) * LOG2E
                b_ds = tl.exp2(tl.where(m_s, b_s, NEVER)) * (tl.sum(b_g * b_v, 1) - b_delta)
            else:
                o_i, o_j = (o_ky - o_start_y) // Y.dilation, (o_kx - o_start_x) // X.dilation
                o_w = pixel_offsets(o_y, o_x, grad_s, WIDE) + (o_i * X.kernel + o_j) * grad_s[4]
                b_ds = tl.load(head_start(grad_ptr, i_b, i_h, grad_s) + o_w, mask=m_s, other=0.0).to(tl.float32)
            b_sum = tl.sum(tl.where(m_s, b_ds, 0.0), 0)
            b_sums += tl.where(o_entries == i_column, b_sum, 0.0)
    n_y, n_x = entries(Y.kernel, BY_DISPLACEMENT), entries(X.kernel, BY_DISPLACEMENT)
    p_sums = sums_ptr + ((i_chunk * heads + i_h) * n_y + i_entry) * n_x + o_entries
    tl.store(p_sums, b_sums, mask=o_entries < n_x)
