"""Launches plans of the native kernels on a GPU, for compute-sanitizer: make gpu-memcheck and make gpu-racecheck.

Every plan of the table and blocks that walk, or, with "kinds" among the arguments, one of each kind; with tasks among
them, those of these.
Maps are of several tiles each way and a remainder. Blocks walk as if there were few multiprocessors, so that they take
many tiles.
"""

import sys

import torch

from image_local_attention import local_aggregate, local_attention, local_similarity
from image_local_attention.bench.timing import matmul_precision
from image_local_attention.kernels import native
from image_local_attention.kernels.native import plan, table
from image_local_attention.kernels.native.walk import WalkPlan
from test_native import heads_for, kinds, noting
from test_native_gpu import WALKS

SIZE, SIZE_TO_WALK = (11, 24), (59, 104)


def launch(task: str, form: plan.Form, row: table.Row) -> None:
    """Forward and backward of the operators that the task is part of, whose other tasks take the table's plans."""
    walks = isinstance(row.plan, WalkPlan)
    heads = 1 if walks else heads_for(task, form, row)
    dtype = torch.bfloat16 if form.product == "half" else torch.float32
    layout = torch.contiguous_format if form.planes else torch.channels_last
    shape = 1, heads * row.depth, *(SIZE_TO_WALK if walks else SIZE)
    query, key, value = (
        torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        for _ in range(3)
    )
    options = {"kernel_size": row.kernel, "heads": heads, "backend": "triton"}
    with native.using(task, row.plan), matmul_precision("tf32" if form.product == "tf32" else "ieee"):
        if task in plan.UNFUSED:
            out = local_aggregate(local_similarity(query, key, **options), value, **options)
        else:
            out = local_attention(query, key, value, **options)
        out.backward(torch.randn_like(out))
        torch.cuda.synchronize()


def main() -> None:
    asked = set(sys.argv[1:])
    jobs = kinds() if "kinds" in asked else table.rows()
    tasks = asked - {"kinds"} or {task for task, _, _ in jobs}
    jobs = [job for job in (*WALKS, *jobs) if job[0] in tasks]
    if not jobs:
        raise SystemExit(f"no plan of {sorted(tasks)}")
    served: list[str] = []
    native.native = noting(served)
    native.launch._multiprocessors = lambda device: 2
    for job in jobs:
        served.clear()
        launch(*job)
        if job[0] not in served:
            raise SystemExit(f"no native kernel ran {job}")
    print(f"launched {len(jobs)} plans")


if __name__ == "__main__":
    main()
