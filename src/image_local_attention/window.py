"""Window geometry in plain integers: which keys a query sees.

Everything about geometry is one idea: per axis, an integer function `start`, such that query `q` sees the keys at
`start(q) + dilation*i` for `i = 0 .. kernel-1`, and `fold`, which says where in the map such a position is. Slot
`i*kW + j` of a window belongs to the position `(start_y + dilation_y*i, start_x + dilation_x*j)`.
"""

import functools
import math
from dataclasses import dataclass

FOLDING = ("reflect", "replicate", "circular")  # borders past which the map goes on
BORDERS = ("zeros", "mask", "shift", *FOLDING)

OUTSIDE = -1  # what `fold` gives for a position outside of the map


@dataclass(frozen=True)
class Axis:
    """One axis of a window from `queries` pixels to a map of `size` pixels (None: as many queries)."""

    kernel: int
    size: int
    border: str = "zeros"
    dilation: int = 1
    causal: bool = False
    queries: int | None = None

    @property
    def query_count(self) -> int:
        return self.size if self.queries is None else self.queries

    @property
    def shifts(self) -> bool:
        """Whether windows move inwards until they lie in the map. A causal axis does not shift."""
        return self.border == "shift" and not self.causal

    @property
    def sliding(self) -> bool:
        """Whether `start` follows the query pixel by pixel and nothing folds."""
        return self.dilation == 1 and not self.shifts and self.border not in FOLDING and self.query_count == self.size

    @property
    def outside_is_absent(self) -> bool:
        """Whether a key outside of the map does not take part, rather than count with logit and value 0."""
        return self.border != "zeros"

    def centre(self, query: int) -> int:
        """The key under a query: pixel centres of two grids over one image are aligned."""
        if self.query_count == self.size:
            return query
        return (2 * query + 1) * self.size // (2 * self.query_count)

    def start(self, query: int) -> int:
        """Position of the first key that a query sees; even kernels lean towards it by one."""
        centre = self.centre(query)
        if self.causal:
            return centre - self.dilation * (self.kernel - 1)
        if not self.shifts:
            return centre - self.dilation * (self.kernel // 2)
        residue = centre % self.dilation  # a window stays among the keys of one residue
        last = (self.size - residue + self.dilation - 1) // self.dilation - self.kernel
        index = min(max(centre // self.dilation - self.kernel // 2, 0), last)
        return residue + self.dilation * index

    def fold(self, position: int) -> int:
        """Where in the map a position is, as torch.nn.functional.pad continues it, or OUTSIDE."""
        if 0 <= position < self.size:
            return position
        if self.border == "replicate":
            return min(max(position, 0), self.size - 1)
        if self.border == "circular":
            return position % self.size
        if self.border == "reflect":
            period = max(2 * (self.size - 1), 1)
            return min(position % period, period - position % period)
        return OUTSIDE

    @functools.lru_cache(maxsize=4096)  # noqa: B019 -- a frozen value, kept by value
    def slot(self, i: int) -> tuple[int, ...]:
        """Where in the map the key in slot `i` of every query is, or OUTSIDE."""
        return tuple(self.fold(self.start(query) + self.dilation * i) for query in range(self.query_count))

    def displacement(self, query: int) -> int:
        """Steps of the dilation from a query's centre to its first key, counted from the farthest before it.

        Slot i of the window is then entry `displacement + i` of 2*kernel-1.
        """
        return (self.start(query) - self.centre(query)) // self.dilation + self.kernel - 1

    @property
    def overhang(self) -> tuple[int, int]:
        """How many pixels windows reach over the map before its first key, and after its last."""
        if 0 in (self.query_count, self.size):
            return 0, 0
        last = self.start(self.query_count - 1) + self.dilation * (self.kernel - 1)
        return max(-self.start(0), 0), max(last - (self.size - 1), 0)

    def keys(self, first: int, count: int) -> range:
        """Keys that the queries `first .. first+count-1` see, where windows slide, in the map or out of it."""
        return range(self.start(first), self.start(first + count - 1) + self.kernel)


@dataclass(frozen=True)
class Window:
    """The patch around each pixel; pairs are (y, x).

    border: one of BORDERS for each axis. A key outside of the map counts with logit 0 and value 0 under "zeros"; it
        is absent where the border of an axis it is outside on is "mask" or "shift"; the others fold it into the map.
    causal: axes on which the window ends at the query.
    raster: slots after the query in raster order are absent.
    """

    kernel: tuple[int, int]
    border: tuple[str, str] = ("zeros", "zeros")
    dilation: tuple[int, int] = (1, 1)
    causal: tuple[bool, bool] = (False, False)
    raster: bool = False

    @property
    def slots(self) -> int:
        return math.prod(self.kernel)

    def axes(self, size: tuple[int, int], queries: tuple[int, int] | None = None) -> tuple[Axis, Axis]:
        """The window's y and x axis over a map of `size` (height, width), from as many queries or another number."""
        y, x = (
            Axis(*each)
            for each in zip(
                self.kernel, size, self.border, self.dilation, self.causal, queries or (None, None), strict=True
            )
        )
        return y, x

    def dropped(self, i: int, j: int) -> bool:
        """Whether slot (i, j) comes after the query in raster order, where that matters."""
        return self.raster and (i, j) > (self.kernel[0] // 2, self.kernel[1] // 2)
