"""The unfused kernels: similarity, aggregation and its transpose, over weights [B, heads, H, W, kH*kW].

H and W are of the queries' grid, HK and WK of the keys'.
"""

import triton
import triton.language as tl

from .geometry import (
    after,
    centre,
    ends,
    fold,
    image,
    key_halo,
    lattice_sizes,
    query_halo,
    seen,
    sublattice,
    window_start,
)
from .terms import absent, first_entry, load_bias, takes_part
from .tile import (
    add_exactly,
    add_product,
    head_start,
    inside,
    load_block,
    load_keys,
    matmul,
    natural,
    pixel_offsets,
    pixels,
    product,
    program_tile,
    store_block,
)


@triton.jit
def slots(
    o_qy, o_qx, o_ky, o_kx, H, W, HK, WK, strides, RASTER: tl.constexpr, WIDE: tl.constexpr,
    Y: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Of pairs of queries and positions of keys: offsets of weights within one head, whether such a slot is, and
    whether its key takes part by its place in raster order."""
    o_y, o_x = o_ky - window_start(o_qy, HK, H, Y), o_kx - window_start(o_qx, WK, W, X)
    o_i, o_j = o_y // Y.dilation, o_x // X.dilation
    m_w = inside(o_i, o_j, Y.kernel, X.kernel) & (o_y >= 0) & (o_x >= 0)
    if Y.dilation * X.dilation > 1:
        m_w = m_w & (o_y % Y.dilation == 0) & (o_x % X.dilation == 0)
    m_before = m_w
    if RASTER:
        m_before = ~after(o_ky, o_kx, centre(o_qy, HK, H, Y), centre(o_qx, WK, W, X))
    o_slot = o_i * X.kernel + o_j
    if WIDE:
        o_slot = o_slot.to(tl.int64)
    return pixel_offsets(o_qy, o_qx, strides, WIDE) + o_slot * strides[4], m_w, m_before


@triton.jit
def similarity_kernel(
    q_src, k_src, w_ptr, bias_ptr, mask_ptr,
    q_s, k_s, w_s, bias_s, mask_s,
    H, W, HK, WK, heads, scale, nothing,
    Y: tl.constexpr, X: tl.constexpr, RASTER: tl.constexpr, BY_DISPLACEMENT: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHIFT: tl.constexpr, PAD: tl.constexpr, ALIGN: tl.constexpr, FLAT: tl.constexpr, STRIP: tl.constexpr,
    Q_WAY: tl.constexpr, K_WAY: tl.constexpr,
    WIDE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """W_ij = scale * <q, k_ij> + bias_ij, `nothing` where the key does not take part."""
    i_b, i_h, i_y, i_x, y0, x0 = program_tile(H, W, heads, TH, TW, SHIFT, FLAT, STRIP, Y, X)
    q_src, q_s = sublattice(q_src, q_s, i_y, i_x, Y, X)
    k_src, k_s = sublattice(k_src, k_s, i_y, i_x, Y, X)
    w_ptr, w_s = sublattice(w_ptr, w_s, i_y, i_x, Y, X)
    if mask_ptr is not None:
        mask_ptr, mask_s = sublattice(mask_ptr, mask_s, i_y, i_x, Y, X)
    H, W, HK, WK = lattice_sizes(H, W, HK, WK, i_y, i_x, Y, X)
    i_kv = i_h // GROUP

    o_y, o_x = pixels(y0, x0, TH, TW)
    m_q = inside(o_y, o_x, H, W)
    o_by, o_bx = first_entry(o_y, HK, H, BY_DISPLACEMENT, Y), first_entry(o_x, WK, W, BY_DISPLACEMENT, X)
    b_q = load_block(q_src, q_s, i_b, i_h, y0, x0, H, W, TH, TW, D, DP, Q_WAY, WIDE)  # [M, DP]
    p_head = head_start(w_ptr, i_b, i_h, w_s)
    halo_y, n_rows = key_halo(y0, HK, H, TH, ROWS, 0, 1, Y)
    halo_x, n_cols = key_halo(x0, WK, W, TW, COLS, PAD, ALIGN, X)
    for i_col in tl.range(n_cols):
        k_x0 = halo_x + i_col * COLS
        for i_row in tl.range(n_rows):
            k_y0 = halo_y + i_row * ROWS
            o_ky, o_kx = pixels(k_y0, k_x0, ROWS, COLS)
            b_k = load_keys(k_src, k_s, i_b, i_kv, k_y0, k_x0, HK, WK, ROWS, COLS, D, DP, K_WAY, WIDE, Y, X)
            b_w = product(b_q, b_k, PRODUCT) * scale  # [M, N]
            o_pairs = o_ky[None, :], o_kx[None, :], o_by[:, None], o_bx[:, None]
            m_absent = absent(o_ky, o_kx, HK, WK, Y, X)
            if mask_ptr is not None:
                m_absent = m_absent | ~takes_part(mask_ptr, mask_s, i_b, i_kv, o_ky, o_kx, HK, WK, WIDE, Y, X)
            o_q = o_y[:, None], o_x[:, None]
            o_w, m_w, m_before = slots(*o_q, o_ky[None, :], o_kx[None, :], H, W, HK, WK, w_s, RASTER, WIDE, Y, X)
            if bias_ptr is not None:
                b_w += load_bias(bias_ptr, bias_s, i_h, *o_pairs, m_w & m_q[:, None], Y, X)
            if RASTER:
                b_w = tl.where(m_before, b_w, nothing)
            if Y.absent or X.absent or mask_ptr is not None:
                b_w = tl.where(m_absent[None, :], nothing, b_w)
            tl.store(p_head + o_w, b_w.to(w_ptr.dtype.element_ty), mask=m_w & m_q[:, None])


@triton.jit
def aggregate_kernel(
    w_ptr, x_src, o_ptr,
    w_s, x_s, o_s,
    H, W, HK, WK, heads, scale,
    Y: tl.constexpr, X: tl.constexpr, RASTER: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHIFT: tl.constexpr, PAD: tl.constexpr, ALIGN: tl.constexpr, FLAT: tl.constexpr, STRIP: tl.constexpr,
    X_WAY: tl.constexpr,
    WIDE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """O = scale * sum_ij W_ij x_ij over the keys in the map that take part."""
    i_b, i_h, i_y, i_x, y0, x0 = program_tile(H, W, heads, TH, TW, SHIFT, FLAT, STRIP, Y, X)
    w_ptr, w_s = sublattice(w_ptr, w_s, i_y, i_x, Y, X)
    x_src, x_s = sublattice(x_src, x_s, i_y, i_x, Y, X)
    o_ptr, o_s = sublattice(o_ptr, o_s, i_y, i_x, Y, X)
    H, W, HK, WK = lattice_sizes(H, W, HK, WK, i_y, i_x, Y, X)
    i_kv = i_h // GROUP

    o_y, o_x = pixels(y0, x0, TH, TW)
    m_q = inside(o_y, o_x, H, W)
    p_head = head_start(w_ptr, i_b, i_h, w_s)
    b_o = tl.zeros([TH * TW, DP], tl.float32)
    halo_y, n_rows = key_halo(y0, HK, H, TH, ROWS, 0, 1, Y)
    halo_x, n_cols = key_halo(x0, WK, W, TW, COLS, PAD, ALIGN, X)
    for i_col in tl.range(n_cols):
        k_x0 = halo_x + i_col * COLS
        for i_row in tl.range(n_rows):
            k_y0 = halo_y + i_row * ROWS
            o_ky, o_kx = pixels(k_y0, k_x0, ROWS, COLS)
            b_x = load_keys(x_src, x_s, i_b, i_kv, k_y0, k_x0, HK, WK, ROWS, COLS, D, DP, X_WAY, WIDE, Y, X)
            o_q = o_y[:, None], o_x[:, None]
            o_w, m_w, m_before = slots(*o_q, o_ky[None, :], o_kx[None, :], H, W, HK, WK, w_s, RASTER, WIDE, Y, X)
            m_w = m_w & m_before & m_q[:, None] & inside(fold(o_ky, HK, Y), fold(o_kx, WK, X), HK, WK)[None, :]
            b_w = tl.load(p_head + o_w, mask=m_w, other=0.0)  # [M, N]
            b_o = add_product(b_o, b_w, b_x, PRODUCT)
    store_block(o_ptr, b_o * scale, o_s, i_b, i_h, y0, x0, H, W, TH, TW, D, DP, WIDE)


@triton.jit
def aggregate_transpose_kernel(
    w_ptr, x_src, o_ptr,
    w_s, x_s, o_s,
    H, W, HK, WK, heads, images_y, before_y, images_x, before_x, scale,
    Y: tl.constexpr, X: tl.constexpr, RASTER: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SHIFT: tl.constexpr, PAD: tl.constexpr, ALIGN: tl.constexpr, FLAT: tl.constexpr, STRIP: tl.constexpr,
    X_WAY: tl.constexpr,
    WIDE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Each key gathers scale * W_ij x over the queries that see it in their slot ij.

    It is seen at every position that folds to it. `heads` are of the keys; GROUP heads of queries share one.
    """
    i_b, i_h, i_y, i_x, y0, x0 = program_tile(HK, WK, heads, TH, TW, SHIFT, FLAT, STRIP, Y, X)
    w_ptr, w_s = sublattice(w_ptr, w_s, i_y, i_x, Y, X)
    x_src, x_s = sublattice(x_src, x_s, i_y, i_x, Y, X)
    o_ptr, o_s = sublattice(o_ptr, o_s, i_y, i_x, Y, X)
    H, W, HK, WK = lattice_sizes(H, W, HK, WK, i_y, i_x, Y, X)

    o_y, o_x = pixels(y0, x0, TH, TW)
    m_k = inside(o_y, o_x, HK, WK)
    b_o = tl.zeros([TH * TW, DP], tl.float32)
    b_lost = b_o  # one key may be seen by every query, and a sum of many blocks loses more than products do
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
                p_head = head_start(w_ptr, i_b, i_q, w_s)
                for i_col in tl.range(n_cols):
                    q_x0 = halo_x + i_col * COLS
                    for i_row in tl.range(n_rows):
                        q_y0 = halo_y + i_row * ROWS
                        o_qy, o_qx = pixels(q_y0, q_x0, ROWS, COLS)
                        b_x = load_block(x_src, x_s, i_b, i_q, q_y0, q_x0, H, W, ROWS, COLS, D, DP, X_WAY, WIDE)
                        o_pairs = o_qy[None, :], o_qx[None, :], o_py[:, None], o_px[:, None]
                        o_w, m_w, m_before = slots(*o_pairs, H, W, HK, WK, w_s, RASTER, WIDE, Y, X)
                        m_w = m_w & m_before & m_k[:, None] & inside(o_qy, o_qx, H, W)[None, :]
                        b_w = tl.load(p_head + o_w, mask=m_w, other=0.0)  # [M, N]
                        if natural(PRODUCT):
                            b_o, b_lost = add_exactly(b_o, b_lost, matmul(tl.zeros_like(b_o), b_w, b_x, PRODUCT))
                        else:
                            b_o = add_product(b_o, b_w, b_x, PRODUCT)
    store_block(o_ptr, b_o * scale, o_s, i_b, i_h, y0, x0, HK, WK, TH, TW, D, DP, WIDE)
