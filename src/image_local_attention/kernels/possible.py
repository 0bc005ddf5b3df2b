"""Which plans other than those of the table can be: their fields, and whether a task can be launched with one."""

import math
from dataclasses import fields
from typing import NamedTuple

from .gpu import padded
from .plan import Plan

TASKS = ("forward", "grad_query", "grad_key_value")
CHOICES = {
    "tile": ((2, 8), (2, 16), (4, 4), (4, 8), (8, 4), (8, 8), (4, 16), (16, 4), (8, 16), (16, 8)),
    "block": (16, 32, 64, 128),
    "warps": (1, 2, 4, 8),
    "stages": (1, 2, 3, 4),
    "keep_by_pointer": (False, True),
    "stream_by_pointer": (False, True),
    "hoist": (False, True),
    "delta_early": (False, True),
    "max_registers": (None, 64, 72, 80, 96, 112, 128, 144, 168, 200),
}
REGISTERS = 255  # of 4 bytes, the most that a thread has


class Asked(NamedTuple):
    """What `plan.choose` is asked, which says what each is."""

    task: str
    product: str
    depth: int
    width: int
    planes: bool
    facts: frozenset[str]


def obstacle(asked: Asked, candidate: Plan, shared: int) -> str | None:
    """Why not every launch that asks so can take the candidate, None where all can. shared: bytes of a processor.

    Copies begin on whole vectors where columns lie side by side; sums and scores alone leave registers to a thread; the
    kept tiles and all stages of the blocks fit into shared memory, as deep as `asked` allows each map to be.
    """
    for field in fields(Plan):
        got, choices = getattr(candidate, field.name), CHOICES[field.name]
        if repr(got) not in map(repr, choices):  # 1 is neither 1.0 nor True
            return f"{field.name} must be one of {', '.join(map(str, choices))}, got {got!r}"
    element, depth, pixels = 2 if asked.product == "half" else 4, padded(asked.depth), math.prod(candidate.tile)
    if asked.planes and candidate.tile[1] % (16 // element):
        return f"tile must be a multiple of {16 // element} columns wide, got {candidate.tile}"
    maps = {"forward": (1, 1), "grad_query": (2, 1), "grad_key_value": (2, 2)}
    kept, sums = maps[asked.task]
    if pixels * (sums * depth + candidate.block) > REGISTERS * 32 * candidate.warps:
        return f"a tile of {candidate.tile} and a block of {candidate.block} take more registers than there are"
    if (taken := (kept * pixels + 2 * candidate.stages * candidate.block) * depth * element) > shared:
        return f"tiles and blocks may take {taken} bytes of shared memory, and there are {shared}"
    return None
