"""The fused kernels: forward, delta, and the gradients of query and of key and value.

Logits are kept in powers of two (`scale_log2 = scale * log2(e)`) unless products are exact, the log-sum-exp in memory
is natural. Each kernel keeps a tile of pixels and streams the blocks of its halo, column of blocks by column of
blocks, because the visibility of columns does not change along one. H and W are of the queries' grid, HK and WK of the
keys'.
"""

import triton
import triton.language as tl

from .geometry import (
    after,
    centre,
    ends,
    image,
    key_halo,
    lattice_sizes,
    query_halo,
    seen,
    sublattice,
    visible,
    window_span,
)
from .softmax import softmax_end, softmax_start, softmax_step
from .table import load_entries
from .terms import (
    finite,
    first_entry,
    load_bias,
    load_ceiling,
    table_start,
    takes_part,
    unseen_columns,
    weight_gradient,
)
from .tile import (
    ABSENT,
    LOG2E,
    NEVER,
    add_product,
    inside,
    load_block,
    load_floats,
    load_keys,
    natural,
    part_bounds,
    pixels,
    product,
    program_tile,
    row_parts,
    scores,
    store_block,
    store_floats,
)


@triton.jit
def forward_kernel(
    q_src, k_src, v_src, o_ptr, lse_ptr, bias_ptr, most_ptr,
    q_s, k_s, v_s, o_s, lse_s, bias_s, most_s,
    H, W, HK, WK, heads, scale_log2, scale,
    Y: tl.constexpr, X: tl.constexpr, RASTER: tl.constexpr, GROUP: tl.constexpr,
    BY_DISPLACEMENT: tl.constexpr, ROW: tl.constexpr, WARPS: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHIFT: tl.constexpr, PAD: tl.constexpr, ALIGN: tl.constexpr, FLAT: tl.constexpr, STRIP: tl.constexpr,
    Q_WAY: tl.constexpr, K_WAY: tl.constexpr, V_WAY: tl.constexpr,
    SIGN: tl.constexpr, WIDE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """O = softmax(scale * <q, k_ij> + bias_ij) v_ij and its log-sum-exp.

    `scale_log2` and `scale` are positive, SIGN that of the scale. GROUP heads of queries share one of keys and values.
    """
    i_b, i_h, i_y, i_x, y0, x0 = program_tile(H, W, heads, TH, TW, SHIFT, FLAT, STRIP, Y, X)
    q_src, q_s = sublattice(q_src, q_s, i_y, i_x, Y, X)
    k_src, k_s = sublattice(k_src, k_s, i_y, i_x, Y, X)
    v_src, v_s = sublattice(v_src, v_s, i_y, i_x, Y, X)
    o_ptr, o_s = sublattice(o_ptr, o_s, i_y, i_x, Y, X)
    lse_ptr, lse_s = sublattice(lse_ptr, lse_s, i_y, i_x, Y, X)
    if most_ptr is not None:
        most_ptr, most_s = sublattice(most_ptr, most_s, i_y, i_x, Y, X)
    H, W, HK, WK = lattice_sizes(H, W, HK, WK, i_y, i_x, Y, X)
    i_kv = i_h // GROUP

    o_y, o_x = pixels(y0, x0, TH, TW)
    o_start_y, o_top, rows = window_span(o_y, HK, H, True, Y)
    o_start_x, o_left, cols = window_span(o_x, WK, W, True, X)
    o_cy, o_cx = centre(o_y, HK, H, Y), centre(o_x, WK, W, X)
    o_by, o_bx = first_entry(o_y, HK, H, BY_DISPLACEMENT, Y), first_entry(o_x, WK, W, BY_DISPLACEMENT, X)
    if bias_ptr is not None:
        if ROW > 0:
            p_tile = table_start(bias_ptr, bias_s, i_h, y0, x0, HK, WK, H, W, BY_DISPLACEMENT, ROW, Y, X)
        else:  # windows of queries outside of the map have no entries
            rows = tl.where(inside(o_y, o_x, H, W), rows, 0)
    # Minus infinity tells of every key that is not seen.
    BARE: tl.constexpr = bias_ptr is not None and (ROW == 0 or not (BY_DISPLACEMENT or Y.absent or X.absent))
    b_q = load_block(q_src, q_s, i_b, i_h, y0, x0, H, W, TH, TW, DK, DKP, Q_WAY, WIDE)  # [M, DKP]
    if SIGN != 1:
        b_q = b_q * SIGN
    b_o, b_m, b_l = softmax_start(TH * TW, DVP)
    halo_y, n_rows = key_halo(y0, HK, H, TH, ROWS, 0, 1, Y)
    halo_x, n_cols = key_halo(x0, WK, W, TW, COLS, PAD, ALIGN, X)
    PARTS: tl.constexpr = row_parts(TH, ROWS, Y, RASTER or most_ptr is not None or bias_ptr is not None)
    for i_col in tl.range(n_cols):
        k_x0 = halo_x + i_col * COLS
        o_ky, o_kx = pixels(halo_y, k_x0, ROWS, COLS)
        m_cols = visible(o_kx[None, :], o_start_x[:, None], o_left[:, None], cols[:, None], X)
        b_cols = tl.zeros(m_cols.shape, tl.float32) if BARE else tl.where(m_cols, 0.0, ABSENT)  # [M, N]
        for PART in tl.static_range(PARTS):
            first, end = part_bounds(PART, PARTS, n_rows, TH, ROWS, Y)
            for i_row in tl.range(first, end):
                k_y0 = halo_y + i_row * ROWS
                o_row = o_ky + i_row * ROWS
                # What small loads bring is asked for first, for nothing else hides their latency.
                if most_ptr is not None:
                    o_most = i_b, i_kv, k_y0, k_x0
                    b_most = load_ceiling(most_ptr, most_s, *o_most, HK, WK, ROWS, COLS, WIDE, Y, X)[None, :]
                else:
                    b_most = float("inf")
                if bias_ptr is not None:
                    if ROW > 0:
                        p_block = p_tile + (k_y0 * ROW + k_x0)
                        b_bias = load_entries(p_block, TH * TW, ROWS * COLS, TW, COLS, 1, ROW, WARPS)
                    else:
                        m_rows = visible(o_row[None, :], o_start_y[:, None], o_top[:, None], rows[:, None], Y)
                        o_pairs = o_row[None, :], o_kx[None, :], o_by[:, None], o_bx[:, None]
                        b_bias = load_bias(bias_ptr, bias_s, i_h, *o_pairs, m_cols & m_rows, Y, X)
                b_k = load_keys(k_src, k_s, i_b, i_kv, k_y0, k_x0, HK, WK, ROWS, COLS, DK, DKP, K_WAY, WIDE, Y, X)
                b_v = load_keys(v_src, v_s, i_b, i_kv, k_y0, k_x0, HK, WK, ROWS, COLS, DV, DVP, V_WAY, WIDE, Y, X)
                b_s = scores(b_cols, b_q, b_k, PRODUCT)
                if bias_ptr is not None:
                    b_s = b_s * scale + b_bias
                elif natural(PRODUCT):
                    b_s = b_s * scale
                if not BARE and PART != 1:  # a minimum is cheaper than a selection
                    m_rows = visible(o_row[None, :], o_start_y[:, None], o_top[:, None], rows[:, None], Y)
                    b_s = tl.minimum(b_s, tl.where(m_rows, b_most, ABSENT))
                elif most_ptr is not None:
                    b_s = tl.minimum(b_s, b_most)
                if RASTER:
                    m_s = after(o_row[None, :], o_kx[None, :], o_cy[:, None], o_cx[:, None])
                    b_s = tl.where(m_s, ABSENT, b_s)
                step_scale = LOG2E if bias_ptr is not None else scale_log2
                b_o, b_m, b_l = softmax_step(b_o, b_m, b_l, b_s, b_v, step_scale, PRODUCT)
    b_o, b_lse = softmax_end(b_o, b_m, b_l, most_ptr is not None, PRODUCT)
    store_block(o_ptr, b_o, o_s, i_b, i_h, y0, x0, H, W, TH, TW, DV, DVP, WIDE)
    store_floats(lse_ptr, b_lse, lse_s, i_b, i_h, o_y, o_x, H, W, WIDE)


@triton.jit
def delta_kernel(
    g_ptr, o_ptr, grad_lse_ptr, delta_ptr,
    g_s, o_s, grad_lse_s, delta_s,
    H, W, heads,
    D: tl.constexpr, DP: tl.constexpr,
    Y: tl.constexpr, X: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, FLAT: tl.constexpr, STRIP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """delta = sum(grad_out * out) - grad_lse per pixel and head, so that dS = P * (dP - delta)."""
    i_b, i_h, _, _, y0, x0 = program_tile(H, W, heads, TH, TW, 0, FLAT, STRIP, Y, X)
    b_g = load_block(g_ptr, g_s, i_b, i_h, y0, x0, H, W, TH, TW, D, DP, "pointer", WIDE)
    b_o = load_block(o_ptr, o_s, i_b, i_h, y0, x0, H, W, TH, TW, D, DP, "pointer", WIDE)
    b_delta = tl.sum(b_g.to(tl.float32) * b_o.to(tl.float32), 1)
    o_y, o_x = pixels(y0, x0, TH, TW)
    if grad_lse_ptr is not None:
        b_delta -= load_floats(grad_lse_ptr, grad_lse_s, i_b, i_h, o_y, o_x, H, W, 0.0, WIDE)
    store_floats(delta_ptr, b_delta, delta_s, i_b, i_h, o_y, o_x, H, W, WIDE)


@triton.jit
def grad_query_kernel(
    q_src, k_src, v_src, g_src, lse_ptr, delta_ptr, grad_q_ptr, bias_ptr, most_ptr,
    q_s, k_s, v_s, g_s, lse_s, grad_q_s, bias_s, most_s,
    H, W, HK, WK, heads, scale_log2, scale,
    Y: tl.constexpr, X: tl.constexpr, RASTER: tl.constexpr, GROUP: tl.constexpr,
    BY_DISPLACEMENT: tl.constexpr, ROW: tl.constexpr, WARPS: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHIFT: tl.constexpr, PAD: tl.constexpr, ALIGN: tl.constexpr, FLAT: tl.constexpr, STRIP: tl.constexpr,
    Q_WAY: tl.constexpr, K_WAY: tl.constexpr, V_WAY: tl.constexpr, G_WAY: tl.constexpr,
    WIDE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """dQ = scale * sum_ij dS_ij k_ij over the keys that the tile's queries see. Delta lies as the log-sum-exp does."""
    i_b, i_h, i_y, i_x, y0, x0 = program_tile(H, W, heads, TH, TW, SHIFT, FLAT, STRIP, Y, X)
    q_src, q_s = sublattice(q_src, q_s, i_y, i_x, Y, X)
    k_src, k_s = sublattice(k_src, k_s, i_y, i_x, Y, X)
    v_src, v_s = sublattice(v_src, v_s, i_y, i_x, Y, X)
    g_src, g_s = sublattice(g_src, g_s, i_y, i_x, Y, X)
    delta_ptr, _ = sublattice(delta_ptr, lse_s, i_y, i_x, Y, X)
    lse_ptr, lse_s = sublattice(lse_ptr, lse_s, i_y, i_x, Y, X)
    grad_q_ptr, grad_q_s = sublattice(grad_q_ptr, grad_q_s, i_y, i_x, Y, X)
    if most_ptr is not None:
        most_ptr, most_s = sublattice(most_ptr, most_s, i_y, i_x, Y, X)
    H, W, HK, WK = lattice_sizes(H, W, HK, WK, i_y, i_x, Y, X)
    i_kv = i_h // GROUP

    o_y, o_x = pixels(y0, x0, TH, TW)
    o_start_y, o_top, rows = window_span(o_y, HK, H, True, Y)
    o_start_x, o_left, cols = window_span(o_x, WK, W, True, X)
    o_cy, o_cx = centre(o_y, HK, H, Y), centre(o_x, WK, W, X)
    o_by, o_bx = first_entry(o_y, HK, H, BY_DISPLACEMENT, Y), first_entry(o_x, WK, W, BY_DISPLACEMENT, X)
    if bias_ptr is not None:
        if ROW > 0:
            p_tile = table_start(bias_ptr, bias_s, i_h, y0, x0, HK, WK, H, W, BY_DISPLACEMENT, ROW, Y, X)
        else:  # windows of queries outside of the map have no entries
            rows = tl.where(inside(o_y, o_x, H, W), rows, 0)
    # Minus infinity tells of every key that is not seen.
    BARE: tl.constexpr = bias_ptr is not None and (ROW == 0 or not (BY_DISPLACEMENT or Y.absent or X.absent))
    b_q = load_block(q_src, q_s, i_b, i_h, y0, x0, H, W, TH, TW, DK, DKP, Q_WAY, WIDE)  # [M, DKP]
    b_g = load_block(g_src, g_s, i_b, i_h, y0, x0, H, W, TH, TW, DV, DVP, G_WAY, WIDE)  # [M, DVP]
    b_lse = load_floats(lse_ptr, lse_s, i_b, i_h, o_y, o_x, H, W, 0.0, WIDE)
    if bias_ptr is None and not natural(PRODUCT):
        b_lse = b_lse * LOG2E
    if most_ptr is not None:
        b_lse = finite(b_lse)
    b_delta = load_floats(delta_ptr, lse_s, i_b, i_h, o_y, o_x, H, W, 0.0, WIDE)
    b_grad_q = tl.zeros([TH * TW, DKP], tl.float32)
    halo_y, n_rows = key_halo(y0, HK, H, TH, ROWS, 0, 1, Y)
    halo_x, n_cols = key_halo(x0, WK, W, TW, COLS, PAD, ALIGN, X)
    PARTS: tl.constexpr = row_parts(TH, ROWS, Y, RASTER or bias_ptr is not None)
    for i_col in tl.range(n_cols):
        k_x0 = halo_x + i_col * COLS
        o_ky, o_kx = pixels(halo_y, k_x0, ROWS, COLS)
        m_cols = visible(o_kx[None, :], o_start_x[:, None], o_left[:, None], cols[:, None], X)  # [M, N]
        b_cols = -b_lse[:, None] if BARE else tl.where(m_cols, -b_lse[:, None], NEVER)
        for PART in tl.static_range(PARTS):
            first, end = part_bounds(PART, PARTS, n_rows, TH, ROWS, Y)
            for i_row in tl.range(first, end):
                k_y0 = halo_y + i_row * ROWS
                o_row = o_ky + i_row * ROWS
                if most_ptr is not None:
                    o_most = i_b, i_kv, k_y0, k_x0
                    b_most = load_ceiling(most_ptr, most_s, *o_most, HK, WK, ROWS, COLS, WIDE, Y, X)[None, :]
                if bias_ptr is not None:
                    if ROW > 0:
                        p_block = p_tile + (k_y0 * ROW + k_x0)
                        b_bias = load_entries(p_block, TH * TW, ROWS * COLS, TW, COLS, 1, ROW, WARPS)
                    else:
                        m_rows = visible(o_row[None, :], o_start_y[:, None], o_top[:, None], rows[:, None], Y)
                        o_pairs = o_row[None, :], o_kx[None, :], o_by[:, None], o_bx[:, None]
                        b_bias = load_bias(bias_ptr, bias_s, i_h, *o_pairs, m_cols & m_rows, Y, X)
                b_k = load_keys(k_src, k_s, i_b, i_kv, k_y0, k_x0, HK, WK, ROWS, COLS, DK, DKP, K_WAY, WIDE, Y, X)
                b_v = load_keys(v_src, v_s, i_b, i_kv, k_y0, k_x0, HK, WK, ROWS, COLS, DV, DVP, V_WAY, WIDE, Y, X)
                b_s = product(b_q, b_k, PRODUCT)
                if natural(PRODUCT):  # to the bit what the forward has, up to where scale and bias come in
                    b_s = b_s * scale + b_bias if bias_ptr is not None else b_s * scale
                    b_s = (b_s + b_cols) * LOG2E
                elif bias_ptr is not None:  # close to each other: their difference is rounded least
                    b_s = (b_s * scale + (b_bias + b_cols)) * LOG2E
                else:
                    b_s = b_s * scale_log2 + b_cols
                if not BARE and PART != 1:
                    m_rows = visible(o_row[None, :], o_start_y[:, None], o_top[:, None], rows[:, None], Y)
                    b_s = tl.where(m_rows, b_s, NEVER)
                if RASTER:
                    m_s = after(o_row[None, :], o_kx[None, :], o_cy[:, None], o_cx[:, None])
                    b_s = tl.where(m_s, NEVER, b_s)
                if most_ptr is not None:
                    b_s = tl.minimum(b_s, b_most)
                b_dp = weight_gradient(b_g, b_v, PRODUCT, False, Y, X)
                b_ds = tl.exp2(b_s) * (b_dp - b_delta[:, None])
                b_grad_q = add_product(b_grad_q, b_ds, b_k, PRODUCT)
    store_block(grad_q_ptr, b_grad_q * scale, grad_q_s, i_b, i_h, y0, x0, H, W, TH, TW, DK, DKP, WIDE)


@triton.jit
def grad_key_value_kernel(
    q_src, k_src, v_src, g_src, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, bias_ptr, mask_ptr,
    q_s, k_s, v_s, g_s, lse_s, grad_k_s, grad_v_s, bias_s, mask_s,
    H, W, HK, WK, heads, images_y, before_y, images_x, before_x, scale_log2, scale,
    Y: tl.constexpr, X: tl.constexpr, RASTER: tl.constexpr, GROUP: tl.constexpr,
    BY_DISPLACEMENT: tl.constexpr, ROW: tl.constexpr, WARPS: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHIFT: tl.constexpr, PAD: tl.constexpr, ALIGN: tl.constexpr, FLAT: tl.constexpr, STRIP: tl.constexpr,
    Q_WAY: tl.constexpr, K_WAY: tl.constexpr, V_WAY: tl.constexpr, G_WAY: tl.constexpr,
    HOIST: tl.constexpr, EARLY: tl.constexpr, WIDE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """dK = scale * sum dS q and dV = sum P g over the queries that see the tile's keys: a gather, no atomics.

    A gradient whose pointer is None is not computed. `heads` are of keys and values. Keys are seen at every position
    that folds to them. HOIST: blocks go column by column, each with the visibility of its columns in registers, else in
    one loop, for tiles that have no registers for it. EARLY: delta is loaded with the log-sum-exp.
    """
    i_b, i_h, i_y, i_x, y0, x0 = program_tile(HK, WK, heads, TH, TW, SHIFT, FLAT, STRIP, Y, X)
    q_src, q_s = sublattice(q_src, q_s, i_y, i_x, Y, X)
    k_src, k_s = sublattice(k_src, k_s, i_y, i_x, Y, X)
    v_src, v_s = sublattice(v_src, v_s, i_y, i_x, Y, X)
    g_src, g_s = sublattice(g_src, g_s, i_y, i_x, Y, X)
    delta_ptr, _ = sublattice(delta_ptr, lse_s, i_y, i_x, Y, X)
    lse_ptr, lse_s = sublattice(lse_ptr, lse_s, i_y, i_x, Y, X)
    if grad_k_ptr is not None:
        grad_k_ptr, grad_k_s = sublattice(grad_k_ptr, grad_k_s, i_y, i_x, Y, X)
    if grad_v_ptr is not None:
        grad_v_ptr, grad_v_s = sublattice(grad_v_ptr, grad_v_s, i_y, i_x, Y, X)
    if mask_ptr is not None:
        mask_ptr, mask_s = sublattice(mask_ptr, mask_s, i_y, i_x, Y, X)
    H, W, HK, WK = lattice_sizes(H, W, HK, WK, i_y, i_x, Y, X)

    o_y, o_x = pixels(y0, x0, TH, TW)
    b_k = load_block(k_src, k_s, i_b, i_h, y0, x0, HK, WK, TH, TW, DK, DKP, K_WAY, WIDE)  # [M, DKP]
    b_v = load_block(v_src, v_s, i_b, i_h, y0, x0, HK, WK, TH, TW, DV, DVP, V_WAY, WIDE)  # [M, DVP]
    BARE: tl.constexpr = bias_ptr is not None and not RASTER and (ROW == 0 or not BY_DISPLACEMENT)
    b_grad_k = tl.zeros([TH * TW, DKP], tl.float32)
    b_grad_v = tl.zeros([TH * TW, DVP], tl.float32)
    for i_image_y in tl.range(images_y if Y.folds else 1):
        o_py = image(o_y, i_image_y, HK, before_y, Y)
        first, last = ends(o_py, y0, TH, Y)
        halo_y, n_rows = query_halo(first, last, HK, H, TH, ROWS, 0, 1, Y)
        for i_image_x in tl.range(seen(images_x, n_rows, Y) if X.folds else 1):
            o_px = image(o_x, i_image_x, WK, before_x, X)
            first, last = ends(o_px, x0, TW, X)
            halo_x, n_cols = query_halo(first, last, WK, W, TW, COLS, PAD, ALIGN, X)
            for i_member in tl.range(GROUP):
                i_q = i_h * GROUP + i_member
                for i_outer in tl.range(n_cols if HOIST else 1):
                    if HOIST:
                        o_qx = pixels(0, halo_x + i_outer * COLS, ROWS, COLS)[1]
                        b_cols = unseen_columns(o_px, o_qx, WK, W, X)
                    for i_inner in tl.range(n_rows if HOIST else n_rows * n_cols):
                        if HOIST:
                            q_y0, q_x0 = halo_y + i_inner * ROWS, halo_x + i_outer * COLS
                        else:
                            q_y0, q_x0 = halo_y + i_inner % n_rows * ROWS, halo_x + i_inner // n_rows * COLS
                        o_qy, o_qx = pixels(q_y0, q_x0, ROWS, COLS)
                        if not HOIST:
                            b_cols = unseen_columns(o_px, o_qx, WK, W, X)
                        b_q = load_block(q_src, q_s, i_b, i_q, q_y0, q_x0, H, W, ROWS, COLS, DK, DKP, Q_WAY, WIDE)
                        b_g = load_block(g_src, g_s, i_b, i_q, q_y0, q_x0, H, W, ROWS, COLS, DV, DVP, G_WAY, WIDE)
                        # no query there: P is 0
                        b_lse = load_floats(lse_ptr, lse_s, i_b, i_q, o_qy, o_qx, H, W, float("inf"), WIDE)
                        o_delta = i_b, i_q, o_qy, o_qx, H, W, 0.0
                        if grad_k_ptr is not None and EARLY:
                            b_delta = load_floats(delta_ptr, lse_s, *o_delta, WIDE)
                        if bias_ptr is None and not natural(PRODUCT):
                            b_lse = b_lse * LOG2E
                        if mask_ptr is not None:
                            b_lse = finite(b_lse)
                        o_start, o_top, rows = window_span(o_qy, HK, H, False, Y)
                        if bias_ptr is not None and ROW == 0:
                            rows = tl.where(inside(o_qy, o_qx, H, W), rows, 0)
                        m_s = visible(o_py[:, None], o_start[None, :], o_top[None, :], rows[None, :], Y)  # [M, N]
                        if RASTER:
                            o_cy, o_cx = centre(o_qy, HK, H, Y), centre(o_qx, WK, W, X)
                            m_s = m_s & ~after(o_py[:, None], o_px[:, None], o_cy[None, :], o_cx[None, :])
                        if bias_ptr is not None:
                            if ROW > 0:
                                o_first = q_y0, q_x0, HK, WK, H, W
                                p_block = table_start(bias_ptr, bias_s, i_q, *o_first, BY_DISPLACEMENT, ROW, Y, X)
                                p_block += y0 * ROW + x0
                                b_bias = load_entries(p_block, TH * TW, ROWS * COLS, TW, COLS, -1, ROW, WARPS)
                            else:
                                o_by = first_entry(o_qy, HK, H, BY_DISPLACEMENT, Y)
                                o_bx = first_entry(o_qx, WK, W, BY_DISPLACEMENT, X)
                                o_pairs = o_py[:, None], o_px[:, None], o_by[None, :], o_bx[None, :]
                                b_bias = load_bias(bias_ptr, bias_s, i_q, *o_pairs, m_s & (b_cols == 0.0), Y, X)
                        b_s = product(b_k, b_q, PRODUCT, True)
                        if natural(PRODUCT):  # to the bit what the forward has, up to where scale and bias come in
                            b_s = b_s * scale + b_bias if bias_ptr is not None else b_s * scale
                            b_s = (b_s - b_lse[None, :]) * LOG2E
                        elif bias_ptr is not None:  # close to each other: their difference is rounded least
                            b_s = (b_s * scale + (b_bias - b_lse[None, :])) * LOG2E
                        else:
                            b_s = b_s * scale_log2 + b_cols - b_lse[None, :]
                        if not BARE and (bias_ptr is not None or natural(PRODUCT)):
                            b_s += b_cols
                        if not BARE:
                            b_s = tl.where(m_s, b_s, NEVER)
                        b_p = tl.exp2(b_s)
                        if grad_v_ptr is not None:
                            b_grad_v = add_product(b_grad_v, b_p, b_g, PRODUCT)
                        if grad_k_ptr is not None:
                            if not EARLY:
                                b_delta = load_floats(delta_ptr, lse_s, *o_delta, WIDE)
                            b_dp = weight_gradient(b_v, b_g, PRODUCT, True, Y, X)
                            b_ds = b_p * (b_dp - b_delta[None, :])
                            b_grad_k = add_product(b_grad_k, b_ds, b_q, PRODUCT)
    if mask_ptr is not None:  # a key that does not take part has only its own gradients spoiled
        m_k = takes_part(mask_ptr, mask_s, i_b, i_h, o_y, o_x, HK, WK, WIDE, Y, X)[:, None]
        b_grad_k, b_grad_v = tl.where(m_k, b_grad_k, 0.0), tl.where(m_k, b_grad_v, 0.0)
    if grad_k_ptr is not None:
        store_block(grad_k_ptr, b_grad_k * scale, grad_k_s, i_b, i_h, y0, x0, HK, WK, TH, TW, DK, DKP, WIDE)
    if grad_v_ptr is not None:
        store_block(grad_v_ptr, b_grad_v, grad_v_s, i_b, i_h, y0, x0, HK, WK, TH, TW, DV, DVP, WIDE)
