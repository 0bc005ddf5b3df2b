"""Strips of maps at the queries and at the keys, for the windows of a plan."""

from torch import Tensor

from . import gathered, sliding
from .plan import Plan


def query_strip(plan: Plan, x: Tensor, like: Tensor, fill: float = 0.0) -> sliding.Strip | gathered.QueryStrip:
    """Of a map [b, h, folded, Hq, Wq, D]; `fill` stands where a tile has no query."""
    return sliding.Strip(plan.queries, x, like, fill) if plan.sliding else gathered.QueryStrip(plan, x, like, fill)


def key_strip(plan: Plan, x: Tensor, like: Tensor) -> sliding.Strip | gathered.KeyStrip:
    """Of a map [b, h, 1, Hk, Wk, D]; 0 outside of the map."""
    return sliding.Strip(plan.keys, x, like) if plan.sliding else gathered.KeyStrip(plan, x, like)


def key_sums(plan: Plan, x: Tensor, like: Tensor) -> sliding.Sums | gathered.Sums:
    """Into a map [b, h, 1, Hk, Wk, D]."""
    return (sliding if plan.sliding else gathered).Sums(plan, x, like)
