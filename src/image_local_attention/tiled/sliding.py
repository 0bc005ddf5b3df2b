"""Strips of maps where windows slide, the tiles in them, and the sums that tiles send to their halos.

A strip of some rows of a map is stored column by column, [b, h, columns, folded, rows, D], in the dtype of sums.
Whatever a tile covers of it, itself or its halo, is then a run of whole columns: all tiles of a strip are one
overlapping view [tiles, pixels, D], which products take as it is.
"""

from torch import Tensor

from .plan import Cover, Plan, overhang
from .products import multiply

COLUMNS, ROWS = 2, 4


class Buffer:
    """Memory of a strip, and the views of it that every strip asks for again.

    in_map: what lies in the map's columns. top, bottom: the rows that the strip before covered too, and those that the
    next will.
    """

    def __init__(self, pixels: Tensor, columns: tuple[int, int], kept: int):
        """columns: the first that lies in the map, and their number. kept: rows that two strips cover."""
        self.pixels = pixels
        self.in_map = pixels.narrow(COLUMNS, *columns)
        self.top = pixels.narrow(ROWS, 0, kept)
        self.bottom = pixels.narrow(ROWS, pixels.shape[ROWS] - kept, kept)
        self.tiles: dict[range, Tensor] = {}  # of a chunk, where they are a view


class Strip:
    """A strip of a map [b, h, folded, H, W, D]; strips come from top to bottom. `fill` is outside of the map."""

    def __init__(self, cover: Cover, x: Tensor, like: Tensor, fill: float = 0.0):
        self.cover = cover
        self.fill = fill
        b, h, folded, _, width, depth = x.shape
        before, after = overhang(cover.columns, width)
        columns = max(len(cover.columns) - before - after, 0)
        self.x = x.permute(0, 1, 4, 2, 3, 5).narrow(COLUMNS, cover.columns.start + before if columns else 0, columns)
        self.kept = cover.y.length - cover.y.side  # rows that the next strip covers too
        pixels = like.new_full((b, h, len(cover.columns), folded, cover.y.length, depth), fill)
        self.buffer, self.spare = (
            Buffer(memory, (before if columns else 0, columns), self.kept)
            for memory in (pixels, pixels.clone() if self.kept else pixels)
        )

    @property
    def pixels(self) -> Tensor:
        return self.buffer.pixels

    def load(self, strip: int) -> None:
        """Reads what a strip covers."""
        kept = self.kept if strip else 0
        if kept:
            self.move_on()
        rows = self.cover.rows(strip)[kept:]
        if any(overhang(rows, self.x.shape[ROWS])):
            self.pixels.narrow(ROWS, kept, len(rows)).fill_(self.fill)
        pixels, there = self.inside(kept, rows)
        pixels.copy_(there)

    def store(self, strip: int) -> None:
        """Writes a strip to the map."""
        self.store_rows(self.cover.rows(strip))

    def store_rows(self, rows: range) -> None:
        """Writes the first rows of the strip, which are `rows` of the map."""
        pixels, there = self.inside(0, rows)
        there.copy_(pixels)

    def inside(self, first: int, rows: range) -> tuple[Tensor, Tensor]:
        """What lies in the map of the rows from `first` on, which are `rows` of it, and these pixels of the map."""
        before, after = overhang(rows, self.x.shape[ROWS])
        length = max(len(rows) - before - after, 0)
        if not length:
            before, rows = 0, range(0)
        here = self.buffer.in_map.narrow(ROWS, first + before, length)
        return here, self.x.narrow(ROWS, rows.start + before, length)

    def move_on(self) -> None:
        """Moves the rows that the next strip covers too to its top."""
        self.spare.top.copy_(self.buffer.bottom)
        self.buffer, self.spare = self.spare, self.buffer

    def tiles(self, chunk: range) -> Tensor:
        """What some tiles cover, [N, pixels, D]; a view, or where tiles overlap and maps are several a copy."""
        found = self.buffer.tiles.get(chunk)
        if found is not None:
            return found
        y, x, depth = self.cover.y, self.cover.x, self.pixels.shape[-1]
        column = self.cover.folded * y.length * depth
        maps, length = self.pixels.shape[:2].numel(), self.pixels.shape[2:].numel()
        shape = maps, len(chunk), x.length * self.cover.folded * y.length, depth
        strides = length, x.side * column, depth, 1
        tiles = self.pixels.as_strided(shape, strides, chunk.start * x.side * column).flatten(0, 1)
        if maps == 1:
            self.buffer.tiles[chunk] = tiles
        return tiles


class Sums(Strip):
    """Sums, over the tiles of a map at the keys, of what each sends to its halo.

    Once a strip has sent, the rows that no later strip covers are final and go to the map. The order of the sums is
    fixed.
    """

    def __init__(self, plan: Plan, x: Tensor, like: Tensor):
        super().__init__(plan.keys, x, like)
        self.last = plan.strips[-1]
        self.halos = like.new_empty((*x.shape[:2], plan.chunk, plan.x.length, 1, plan.y.length, x.shape[-1]))

    def send(self, chunk: range, weight: Tensor, vector: Tensor, factor: float = 1.0) -> None:
        """Adds factor * weight^T @ vector, of [N, M, K] and [N, M, D], to the halos of some tiles."""
        halos = self.halos[:, :, : len(chunk)]  # [b, h, tiles, C, 1, R, D]
        multiply(weight.mT, vector, halos.flatten(3, 5).flatten(0, 2), factor)
        width = self.cover.x.side
        tiles = self.pixels.unflatten(COLUMNS, (-1, width))  # [b, h, tiles + ..., TW, 1, R, D]
        for i, left in enumerate(range(0, self.cover.x.length, width)):
            part = halos[:, :, :, left : left + width]
            tiles[:, :, chunk.start + i : chunk.stop + i, : part.shape[3]] += part

    def flush(self, strip: int) -> None:
        """Ends a strip."""
        rows, height = self.cover.rows(strip), self.cover.y.side
        self.store_rows(rows if strip == self.last else rows[:height])
        if self.kept:
            self.move_on()
        self.pixels[:, :, :, :, self.kept :] = 0.0
