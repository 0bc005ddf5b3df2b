"""Plans of blocks that walk, with windows to try them at."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from image_local_attention.kernels import native
from image_local_attention.kernels.native.walk import WalkPlan

FUSED = {"forward", "grad_query", "grad_key_value"}

# By blocks that walk: whether columns lie side by side, channels per head, windows of every width of halos and place of
# tiles, and plans.
WALKED = [(False, 64, kernel, WalkPlan(slots=5)) for kernel in ((21, 21), (11, 13), (4, 17), (21, 1), (1, 3), (9, 6))]
WALKED += [
    (False, 64, (6, 19), WalkPlan((8, 8), 2, 7, 3)),
    (False, 128, (17, 5), WalkPlan((8, 8), 2, 3, 3)),
    (False, 128, (3, 7), WalkPlan((8, 8), 4, 3, 2)),
    (False, 128, (9, 2), WalkPlan((8, 8), 8, 2, 2)),
]
WALKED += [(True, 64, kernel, WalkPlan((8, 8), 2, 8)) for kernel in ((21, 21), (3, 8), (6, 25))]
WALKED += [(True, 64, kernel, WalkPlan((4, 16), 2, 8)) for kernel in ((17, 17), (15, 14), (4, 5))]
WALKED += [
    (True, 16, (5, 21), WalkPlan((4, 16), 2, 6, 4, 2)),
    (True, 16, (5, 4), WalkPlan((4, 16), 2, 5, 4, 2, one_by_one=True)),
    (True, 32, (9, 6), WalkPlan((4, 16), 1, 8, 6, 3)),
    (True, 32, (3, 9), WalkPlan((8, 8), 2, 5, 3, 3, one_by_one=True)),
    (True, 64, (5, 7), WalkPlan((4, 16), 1, 5, 3, 3)),
    (True, 64, (7, 2), WalkPlan((4, 16), 2, 4, 2, 2)),
    (True, 128, (7, 3), WalkPlan((4, 16), 1, 7, 2, one_by_one=True)),
    (True, 128, (2, 19), WalkPlan((8, 8), 2, 3, 2, one_by_one=True)),
    (True, 9, (5, 11), WalkPlan((4, 16), 2, 6, 4, 2)),
    (True, 30, (9, 9), WalkPlan((4, 16), 2, 8, 3)),
    (True, 45, (6, 25), WalkPlan((8, 8), 2, 8)),
    (True, 100, (3, 7), WalkPlan((4, 16), 1, 7, 2, one_by_one=True)),
]
# Of sets that are apart, in one chunk and in several.
WALKED += [
    (False, 64, (5, 31), WalkPlan((8, 8), 2, 3, 2, chunk=24)),
    (False, 64, (3, 30), WalkPlan((8, 8), 4, 2, 2, chunk=24)),
    (False, 128, (9, 3), WalkPlan((8, 8), 2, 2, 2, chunk=32)),
    (True, 16, (5, 41), WalkPlan((8, 8), 2, 3, 3, chunk=32)),
    (True, 32, (7, 7), WalkPlan((4, 16), 2, 3, 2, 2, chunk=64)),
    (True, 48, (11, 5), WalkPlan((4, 16), 1, 4, 2, chunk=64)),
    (True, 64, (3, 53), WalkPlan((4, 16), 1, 3, 2, chunk=32)),
    (True, 128, (2, 35), WalkPlan((4, 16), 1, 2, 2, one_by_one=True, chunk=32)),
]


@contextmanager
def walking(held: WalkPlan) -> Iterator[None]:
    """Within, blocks walk wherever they can, under this plan."""
    with ExitStack() as stack:
        for task in FUSED:
            stack.enter_context(native.using(task, held))
        yield


def walked_name(walked) -> str:
    planes, depth, (h, w), held = walked
    side_by_side = f"{held.abreast}x{held.tile[1]}{f'-chunk{held.chunk}' if held.chunk else ''}"
    return f"{'planes' if planes else 'rows'}-{depth}-{h}x{w}-{held.tile[0]}x{side_by_side}"
