"""Window geometry in plain integers: which keys a query sees, and which queries see a key.

Everything about geometry is one idea: per axis, an integer function `start`, such that query `q` sees the
keys `start(q) + i` for `i = 0 .. kernel-1`. Slot `i*kW + j` of a window belongs to key
`(start_y + i, start_x + j)`. What a key outside the map means is the border's business.
"""

from dataclasses import dataclass

BORDERS = ("zeros", "mask")


@dataclass(frozen=True)
class Axis:
    """One axis of a window over a map of `size` pixels."""

    kernel: int
    size: int

    def start(self, query: int) -> int:
        """First key that a query sees; even kernels lean towards it by one."""
        return query - self.kernel // 2

    def first_query(self, key: int) -> int:
        """First query that sees a key: the inverse of `start(query) + kernel - 1`."""
        return key - (self.kernel - 1) + self.kernel // 2

    def keys(self, first: int, count: int) -> range:
        """Keys that the queries `first .. first+count-1` see, in the map or out of it."""
        return range(self.start(first), self.start(first + count - 1) + self.kernel)

    def queries(self, first: int, count: int) -> range:
        """Queries that see one of the keys `first .. first+count-1`, in the map or out of it."""
        return range(self.first_query(first), self.first_query(first + count - 1) + self.kernel)

    def slot(self, i: int) -> range:
        """The key in slot `i` of every query of the map, in the map or out of it."""
        return range(self.start(0) + i, self.start(0) + i + self.size)


@dataclass(frozen=True)
class Window:
    """The patch around each pixel: `kernel` is (kH, kW), `border` one of BORDERS.

    "zeros": a key outside the map counts with logit 0 and value 0.
    "mask": a key outside the map does not take part.
    """

    kernel: tuple[int, int]
    border: str = "zeros"

    @property
    def slots(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def masked(self) -> bool:
        """Whether keys outside the map do not take part."""
        return self.border == "mask"

    @property
    def lead(self) -> int:
        """Columns by which a window begins left of its query."""
        return -Axis(self.kernel[1], 1).start(0)

    @property
    def query_lead(self) -> int:
        """Columns by which the queries that see a key begin left of it."""
        return -Axis(self.kernel[1], 1).first_query(0)

    def axes(self, size: tuple[int, int]) -> tuple[Axis, Axis]:
        """The window's y and x axis over a map of `size` (height, width)."""
        return Axis(self.kernel[0], size[0]), Axis(self.kernel[1], size[1])
