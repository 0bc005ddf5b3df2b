"""Window geometry inside kernels: what `window.Axis` says, for tiles and blocks of pixels.

A span is what a kernel is compiled for; sizes are numbers of the run. Positions are keys counted past the ends of
the map too. A dilated window is a plain one on every lattice of pixels `dilation` apart, so kernels take maps apart
into lattices wherever windows stay within one, and count pixels of that lattice.
"""

from dataclasses import dataclass, replace

import triton
import triton.language as tl

from ..window import FOLDING, Axis, Window

NOWHERE = tl.constexpr(1 << 28)  # past any position, and far from overflow when doubled


@dataclass(frozen=True)
class Span:
    """One axis of a window.

    lead: positions from the first key to the query's centre. reach: from the first key to the last, both counted.
    dilation: from one key to the next, in pixels of the lattice; lattice: of so many pixels' steps, 1 is the map.
    scaled: whether queries and keys are grids of two sizes.
    """

    kernel: int
    lead: int
    reach: int
    dilation: int = 1
    lattice: int = 1
    border: str = "zeros"
    scaled: bool = False

    @property
    def shifts(self) -> bool:
        return self.border == "shift"

    @property
    def folds(self) -> bool:
        return self.border in FOLDING

    @property
    def absent(self) -> bool:
        """Whether keys outside of the map do not take part."""
        return self.border == "mask"

    @property
    def slides(self) -> bool:
        """Whether the first key follows the query pixel by pixel."""
        return not (self.shifts or self.scaled)

    @property
    def plain(self) -> bool:
        """Whether keys inside the window are told from others by its two ends alone."""
        return self.slides and self.dilation == 1 and not self.absent


def spans(
    window: Window,
    axes: tuple[Axis, Axis],
    until_query: bool = False,
    lattices: tuple[bool, bool] = (True, True),
) -> tuple[Span, Span]:
    """The y and x span of a window's axes.

    until_query: in raster order, leave rows after the query's out of reach. lattices: which axes to take apart where
    windows stay within a lattice.
    """
    y, x = map(_span, axes, lattices)
    if window.raster and until_query:
        y = replace(y, reach=y.lead + 1)
    return y, x


def _span(axis: Axis, apart: bool) -> Span:
    scaled = axis.query_count != axis.size
    dilation = axis.dilation if axis.kernel > 1 else 1
    lattice = dilation if apart and not scaled and axis.border not in FOLDING else 1
    step = dilation // lattice
    lead = step * (axis.kernel - 1 if axis.causal else axis.kernel // 2)
    border = "mask" if axis.border == "shift" and not axis.shifts else axis.border
    return Span(axis.kernel, lead, step * (axis.kernel - 1) + 1, step, lattice, border, scaled)


def images(axis: Axis) -> tuple[int, int]:
    """How many positions may fold to one key, its own counted, and how many of them lie before the map at most."""
    if axis.border not in FOLDING:
        return 1, 0
    before, after = axis.overhang
    return (1 + before + after if axis.border == "replicate" else 3), before


@triton.constexpr_function
def blocks(tile, reach, step):
    """Blocks of `step` pixels that cover the halo of a tile on one axis."""
    return (tile + reach - 2) // step + 1


@triton.jit
def lattice_size(size, residue, LATTICE: tl.constexpr):
    """Pixels of a lattice on one axis of a map."""
    if LATTICE > 1:
        size = (size - residue + LATTICE - 1) // LATTICE
    return size


@triton.jit
def lattice_sizes(H, W, HK, WK, i_y, i_x, Y: tl.constexpr, X: tl.constexpr):
    """Sizes of one lattice of the queries' and the keys' grid."""
    H, HK = lattice_size(H, i_y, Y.lattice), lattice_size(HK, i_y, Y.lattice)
    W, WK = lattice_size(W, i_x, X.lattice), lattice_size(WK, i_x, X.lattice)
    return H, W, HK, WK


@triton.jit
def sublattice(ptr, strides, i_y, i_x, Y: tl.constexpr, X: tl.constexpr):
    """Pointer and strides of one lattice of a map, a view."""
    if Y.lattice * X.lattice > 1:
        ptr += i_y.to(tl.int64) * strides[2] + i_x.to(tl.int64) * strides[3]
        strides = (strides[0], strides[1], strides[2] * Y.lattice, strides[3] * X.lattice, strides[4])
    return ptr, strides


@triton.jit
def centre(o_q, size, queries, A: tl.constexpr):
    """The key under a query."""
    if A.scaled:
        o_q = ((2 * o_q.to(tl.int64) + 1) * size // (2 * queries)).to(tl.int32)
    return o_q


@triton.jit
def window_start(o_q, size, queries, A: tl.constexpr):
    """Position of the first key that queries see."""
    o_c = centre(o_q, size, queries, A)
    if A.shifts:
        o_residue = o_c % A.dilation
        o_last = (size - o_residue + A.dilation - 1) // A.dilation - A.kernel
        o_c = tl.minimum(tl.maximum(o_c // A.dilation - A.kernel // 2, 0), o_last) * A.dilation + o_residue
    else:
        o_c -= A.lead
    return o_c


@triton.jit
def window_span(o_q, size, queries, CLIP: tl.constexpr, A: tl.constexpr):
    """The first key of a window, the first that takes part, and the positions from there to the last that does.

    CLIP: leave out the keys outside of the map where they do not take part.
    """
    o_start = window_start(o_q, size, queries, A)
    o_first, o_end = o_start, o_start + A.reach
    if CLIP and A.absent:
        o_first, o_end = tl.maximum(o_first, 0), tl.minimum(o_end, size)
    return o_start, o_first, o_end - o_first


@triton.jit
def within(o_k, o_first, count):
    """Whether first <= k < first + count, in one comparison: a negative difference wraps around."""
    return (o_k - o_first).to(tl.uint32) < count.to(tl.uint32)


@triton.jit
def visible(o_k, o_start, o_first, count, A: tl.constexpr):
    """Whether keys are in a window, by what `window_span` says of it."""
    m_k = within(o_k, o_first, count)
    if A.dilation > 1:
        m_k = m_k & ((o_k - o_start) % A.dilation == 0)
    return m_k


@triton.jit
def after(o_ky, o_kx, o_qy, o_qx):
    """Whether keys come after the query's centre in raster order."""
    return (o_ky > o_qy) | ((o_ky == o_qy) & (o_kx > o_qx))


@triton.jit
def key_halo(q0, size, queries, TILE: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr, ALIGN: tl.constexpr,
             A: tl.constexpr):  # fmt: skip
    """First position, PAD early or on a multiple of ALIGN, and number of blocks that a tile's queries see."""
    if A.slides:
        first = q0 - A.lead - PAD
        count = blocks(TILE + PAD, A.reach, STEP)
    else:
        first = centre(q0, size, queries, A) - A.lead
        last = centre(tl.minimum(q0 + TILE, queries) - 1, size, queries, A) - A.lead
        if A.shifts:  # windows of other residues begin up to a step away
            first = tl.maximum(tl.minimum(first, size - A.reach) - (A.dilation - 1), 0)
            last = tl.maximum(tl.minimum(last, size - A.reach), 0) + A.dilation - 1
        first = first & -ALIGN
        count = tl.maximum(last + A.reach - first + STEP - 1, 0) // STEP
    return first, count


@triton.jit
def query_from(o_c, size, queries, A: tl.constexpr):
    """The first query whose centre is at a position or after it."""
    if A.scaled:
        o_n = 2 * o_c.to(tl.int64) * queries - size
        o_c = (tl.maximum(o_n + 2 * size - 1, 0) // (2 * size)).to(tl.int32)
    return o_c


@triton.jit
def query_halo(k0, k1, size, queries, TILE: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr, ALIGN: tl.constexpr,
               A: tl.constexpr):  # fmt: skip
    """First query, PAD early or on a multiple of ALIGN, and number of blocks that see keys at positions k0 .. k1."""
    if A.slides and not A.folds:
        first = k0 + A.lead - (A.reach - 1) - PAD
        count = blocks(TILE + PAD, A.reach, STEP)
    else:
        first = tl.maximum(query_from(k0 + A.lead - (A.reach - 1), size, queries, A), 0)
        last = tl.minimum(query_from(k1 + A.lead + 1, size, queries, A), queries) - 1
        if A.shifts:  # windows that were shifted see the outermost keys
            first = tl.where(k0 < A.reach + A.dilation - 1, 0, first)
            last = tl.where(k1 >= size - A.reach - (A.dilation - 1), queries - 1, last)
        first = first & -ALIGN
        count = tl.maximum(last - first + STEP, 0) // STEP
    return first, count


@triton.jit
def fold(o_p, size, A: tl.constexpr):
    """Where in the map positions are, if they are within the border's reach."""
    if A.border == "replicate":
        o_p = tl.minimum(tl.maximum(o_p, 0), size - 1)
    elif A.border == "circular":
        o_p = tl.where(o_p < 0, o_p + size, tl.where(o_p >= size, o_p - size, o_p))
    elif A.border == "reflect":
        o_p = tl.where(o_p < 0, -o_p, o_p)
        o_p = tl.where(o_p >= size, 2 * (size - 1) - o_p, o_p)
    return o_p


@triton.jit
def image(o_k, i, size, before, A: tl.constexpr):
    """Position `i` of those that fold to keys, the first being the key's own; NOWHERE where there is none.

    The twin of `fold`; `before` of them lie before the map where the border replicates.
    """
    if A.folds:
        o_p = o_k
        m_p = (o_k >= 0) & (o_k < size)
        if A.border == "replicate":
            if i > 0:
                m_p = o_k == tl.where(i <= before, 0, size - 1)
                o_p = tl.where(i <= before, -i, size - 1 + i - before) + tl.zeros_like(o_k)
        elif A.border == "circular":
            o_p = o_k + tl.where(i == 0, 0, tl.where(i == 1, -size, size))
        else:
            if i == 1:
                m_p = m_p & (o_k > 0)
                o_p = -o_k
            if i == 2:
                m_p = m_p & (o_k < size - 1)
                o_p = 2 * (size - 1) - o_k
        o_k = tl.where(m_p, o_p, NOWHERE)
    return o_k


@triton.jit
def ends(o_p, k0, TILE: tl.constexpr, A: tl.constexpr):
    """The least and the greatest position of the keys of a tile that begins with key k0."""
    if A.folds:
        return tl.min(o_p, 0), tl.max(tl.where(o_p == NOWHERE, -NOWHERE, o_p), 0)
    return k0, k0 + TILE - 1


@triton.jit
def seen(images, blocks, A: tl.constexpr):
    """How many images of a tile to look at on the other axis: none where no query sees it on this one."""
    if A.folds:
        images = tl.where(blocks > 0, images, 0)
    return images
