"""How far results are from those in fp64, at a few regions of a map."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import local_attention
from .cases import Case

REGION = 32  # pixels square: where a large result is compared with fp64

Span = tuple[int, int]
Exact = tuple["Region", list[Tensor]]


@dataclass(frozen=True)
class Region:
    """A rectangle of one head of one image."""

    image: int
    head: int
    rows: Span
    columns: Span

    def of(self, x: Tensor, heads: int) -> Tensor:
        """The region of a map [B, heads*D, H, W] -> [1, D, h, w]."""
        head = x[self.image : self.image + 1].unflatten(1, (heads, -1))[:, self.head]
        return head[..., slice(*self.rows), slice(*self.columns)]


def regions(case: Case) -> list[Region]:
    """Where to compare: one head of a small map; of a large one the centre of the first and the end of the last."""
    size = case.height, case.width
    first, last = (0, 0), (case.batch - 1, case.heads - 1)
    if max(size) <= 2 * REGION:
        return [Region(*last, *((0, n) for n in size))]
    end = [(max(0, n - REGION), n) for n in size]
    centre = [((begin + 1) // 2, (begin + 1) // 2 + n - begin) for begin, n in end]
    return [Region(*first, *centre), Region(*last, *end)]


def exact_results(case: Case, maps: Sequence[Tensor], region: Region) -> list[Tensor]:
    """Output and gradients of query, key and value in fp64 at a region.

    Gradients at the region come from queries one halo away, and their softmax from keys two halos away: what lies
    farther out is cut off.
    """
    halo = 2 * case.dilation * (case.kernel // 2)
    spans = (region.rows, case.height), (region.columns, case.width)
    rows, columns = ((max(0, begin - halo), min(end + halo, size)) for (begin, end), size in spans)
    around = Region(region.image, region.head, rows, columns)
    *leaves, grad_out = (around.of(x, case.heads).double() for x in maps)
    for x in leaves:
        x.requires_grad_()
    window = {"border": case.border, "dilation": case.dilation}
    out = local_attention(*leaves, case.kernel, **window, backend="tiled")

    inner = [
        (begin - start, end - start) for (begin, end), start in ((region.rows, rows[0]), (region.columns, columns[0]))
    ]
    inside = Region(0, 0, *inner)
    return [inside.of(x, 1) for x in (out.detach(), *torch.autograd.grad(out, leaves, grad_out))]


def error(case: Case, exact: Sequence[Exact], mode: str, results: Sequence[Tensor]) -> float:
    """Largest of the results' relative Frobenius norms of the deviation from fp64."""
    chosen = {"forward": slice(0, 1), "backward": slice(1, 4), "forward+backward": slice(0, 4)}[mode]
    squares = torch.zeros(len(results), 2, dtype=torch.float64)
    for region, truths in exact:
        for i, (got, truth) in enumerate(zip(results, truths[chosen], strict=True)):
            deviation = region.of(got, case.heads).double() - truth
            squares[i] += torch.stack([deviation.square().sum(), truth.square().sum()]).cpu()
    return (squares[:, 0] / squares[:, 1]).sqrt().max().item()
