"""What the first call in a fresh process takes, nothing compiled and all of it: python -m benchmarks.first_call --help

Torch and the library are imported, the maps are made, torch has run a backward pass, whose first imports much of torch
itself, and the device has done its work before the clock starts. It stops when the device has done its work again.
"Cold": the caches on disk are empty, Triton's and that of the native kernels; "warm": they are as the cold process left
them. Parts of the first forward pass:

imports: of Triton and of the backend.
compile: in Triton's compiler, or the reading of its cache.
The rest is the compilation of launchers by the C compiler where these are not cached either, the loading of kernels
onto the device, and the call.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict

import torch
import typer

from benchmarks import limits
from benchmarks.limits import FIRST_CALL, FIRST_CALL_PARTS, Value
from image_local_attention import backends, local_attention
from image_local_attention.bench.cases import Case

CASES = Case(1, 128, 128, 1, 64, 7, "bf16"), Case(1, 128, 128, 1, 64, 11, "fp32", layout="nchw")
GOALS = {"cold": 5.0, "warm": 0.3}  # seconds
VARIABLE = "IMAGE_LOCAL_ATTENTION_CACHE"  # where native kernels are kept
CHILD = "import sys; from benchmarks import first_call; first_call.child(sys.stdin.read())"


def seconds(case: Case) -> dict[str, float]:
    """Seconds of the first forward pass, of the first forward and backward pass together, and of the parts."""
    *leaves, grad_out = case.maps(limits.DEVICE)
    for x in leaves:
        x.requires_grad_()
    x = torch.ones(2, device=limits.DEVICE, requires_grad=True)
    torch.autograd.grad(x * 2, x, x.detach())
    limits.synchronize()

    begin = time.perf_counter()
    backends.resolve(limits.BACKEND, limits.DEVICE, grad_out.dtype, case.depth)
    imported = time.perf_counter()
    compiled = listen()
    out = local_attention(*leaves, case.kernel, heads=case.heads, backend=limits.BACKEND)
    limits.synchronize()
    forward, compile_s = time.perf_counter(), sum(compiled, 0.0)
    torch.autograd.grad(out, leaves, grad_out)
    limits.synchronize()
    both = time.perf_counter()
    return {
        "forward": forward - begin,
        "forward+backward": both - begin,
        "imports": imported - begin,
        "compile": compile_s,
    }


def listen() -> list[float]:
    """The seconds of every kernel in Triton's compiler from now on, as they come."""
    import triton  # not before the clock has started

    taken: list[float] = []
    triton.knobs.compilation.listener = lambda *, times, **_: taken.append(times.total / 1e6)
    return taken


def child(problem: str) -> None:
    """Prints the seconds of a case, both as JSON, and ends the process where the work is done."""
    print(json.dumps(seconds(Case(**json.loads(problem)))), flush=True)
    os._exit(0)


def in_a_fresh_process(case: Case, cache: str) -> dict[str, float]:
    """`seconds` with Triton's cache in a folder; RuntimeError where the process fails."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(asdict(case)),
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_CACHE_DIR": cache, VARIABLE: os.path.join(cache, "native")},
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-250:])
    return json.loads(done.stdout.splitlines()[-1])


def values(case: Case) -> Iterator[Value]:
    with tempfile.TemporaryDirectory() as cache:
        for state, goal in GOALS.items():
            taken = in_a_fresh_process(case, cache)
            for mode in ("forward", "forward+backward"):
                yield FIRST_CALL, f"{state}, {mode}", taken[mode], goal
            for part in ("imports", "compile"):
                yield FIRST_CALL_PARTS, f"{state}, forward, {part}", taken[part], taken["forward"]


def main(out: limits.Out = None, only: limits.Only = "") -> None:
    """Time the first call in a fresh process on the GPU."""
    limits.run(CASES, values, out, only)


if __name__ == "__main__":
    typer.run(main)
