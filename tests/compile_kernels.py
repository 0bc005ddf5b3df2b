"""Compiles kernels for a GPU that need not be there, and prints a JSON line of resources for each.

    python tests/compile_kernels.py sm_90 --plans forward    # every row of the plan table of a task
    python tests/compile_kernels.py gfx942                   # every kernel once in half precision and in fp32
    python tests/compile_kernels.py sm_90 --options          # every kernel with the options of windows

The library's own launchers run up to the launch: a stub stands for the driver and says which GPU there is. Run it
without TRITON_INTERPRET, in a process of its own.
"""

import argparse
import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from image_local_attention import kernels
from image_local_attention.kernels import plan
from image_local_attention.kernels.gpu import of as gpu_of
from image_local_attention.maps import split_heads
from image_local_attention.rules import Rules
from image_local_attention.window import Window

SIDE = 64
WIDEST = {16: 21, 32: 21, 64: 21, 128: 81, 256: 21}  # windows worth compiling for, by channels per head


class StubDriver:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def use_target(name: str) -> None:
    target = GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)
    driver.set_active(StubDriver(target))
    torch.cuda.device = lambda device: contextlib.nullcontext()
    gpu_of.cache_clear()


def compiled(launch: Callable[[], object]) -> list:
    """The kernels that a call would launch."""
    found, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        found.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    return found


def resources(kernel) -> dict[str, int]:
    """Registers, bytes of shared memory, and spills: bytes of stack (NVIDIA) or registers (AMD)."""
    shared = kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        registers, spills = (int(re.search(rf"\.vgpr_{what}:\s*(\d+)", text)[1]) for what in ("count", "spill_count"))
        return {"registers": registers, "shared": shared, "spills": spills}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = f"{triton.__path__[0]}/backends/nvidia/bin/cuobjdump"
        text = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    return {"registers": registers, "shared": shared, "spills": stack}


def maps(
    depth: int, dtype: torch.dtype, planes: bool, heads: int = 2, size: tuple[int, int] = (SIDE, SIDE)
) -> tuple[torch.Tensor, torch.Tensor]:
    """A map as heads, columns or channels innermost, and its log-sum-exp."""
    x = torch.empty(1, heads * depth, *size, dtype=dtype)
    if not planes:
        x = x.contiguous(memory_format=torch.channels_last)
    return split_heads(x, heads), torch.empty(1, heads, *size)


def fused(task: str, x: torch.Tensor, lse: torch.Tensor, rules: Rules) -> None:
    if task == "forward":
        kernels.attention(x, x, x, rules)
    else:
        wanted = (True, False, False, False) if task == "grad_query" else (False, True, True, False)
        kernels.attention_backward(x, None, x, x, x, x, lse, wanted, rules)


class OtherPlan(Exception):
    """A launch would take another row of the table."""


def windows(heads: int, width: int) -> Iterator[Rules]:
    """Rules that take different rows of a table, plain ones first; of which the widest see `width` columns.

    `undivided` makes of dilation 2 a window of that many columns where columns lie side by side.
    """
    plain, with_gaps = Rules(Window((5, width))), (5, (width + 1) // 2)
    mask = torch.empty(1, SIDE, SIDE, dtype=torch.bool)
    bias = torch.empty(heads, 5 * width), torch.empty(heads, 9, 2 * width - 1)
    yield plain
    yield Rules(Window(with_gaps, dilation=(2, 2)))
    yield Rules(Window(with_gaps, dilation=(1, 2)))
    yield Rules(Window((5, width), dilation=(2, 16)))
    yield plain._replace(key_mask=mask)
    yield plain._replace(bias=bias[0])
    yield Rules(Window((5, width), ("shift", "shift")))
    yield Rules(Window((5, width), ("shift", "shift")), bias=bias[1])
    yield Rules(Window((5, width), ("reflect", "reflect")))
    yield Rules(Window((5, width), ("reflect", "reflect"), (2, 2)), bias=bias[0])


def widths(row: plan.Row) -> list[int]:
    """Windows to compile a row for: a limit of registers may do for its widest and spill for others."""
    widest = min(row.width, WIDEST[row.depth])
    return [widest, *(width for width in (5, 7, 13, 15, 19) if row.plan.max_registers and width < widest)]


def every_plan(task: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches of each row of a task, at the row's depth and widths, for the first window that takes it there.

    At its widest one must.
    """
    choose = plan.choose
    for row_task, product, planes, row in plan.plans():
        for width in widths(row) if row_task == task else ():
            dtype = torch.bfloat16 if product == "half" else torch.float32
            x, lse = maps(row.depth, dtype, planes)
            precision = "tf32" if product == "tf32" else "ieee"

            def chosen(asked, *rest, row=row):
                taken = choose(asked, *rest)
                if asked == task and taken is not row.plan:
                    raise OtherPlan
                return taken

            def launch(x=x, lse=lse, width=width, precision=precision, chosen=chosen, row=row):
                plan.choose = chosen
                try:
                    for rules in windows(x.shape[1], width):
                        with contextlib.suppress(OtherPlan):
                            return fused(task, x, lse, rules._replace(precision=precision))
                    if width == widths(row)[0]:
                        raise LookupError(f"no window takes {row}")
                finally:
                    plan.choose = choose

            name = f"{task} {product} {'planes' if planes else 'rows'} {row}, width {width}"
            yield name, launch


def every_kernel() -> Iterator[tuple[str, Callable[[], object]]]:
    """Each kernel in bf16 and in fp32, at 64 channels and a masked 7x7 window, both layouts."""
    for dtype in (torch.bfloat16, torch.float32):
        for planes in (False, True):
            name = f"{dtype} {'planes' if planes else 'rows'}"
            yield from calls_of(name, dtype, planes, Rules(Window((7, 7), ("mask", "mask"))))


def every_option() -> Iterator[tuple[str, Callable[[], object]]]:
    """Each kernel in bf16 with the options of windows, those that go together at once."""
    bias, displacements = torch.empty(2, 49, dtype=torch.bfloat16), torch.empty(2, 13, 13, dtype=torch.bfloat16)
    mask = torch.empty(1, SIDE, SIDE, dtype=torch.bool)
    options = {
        "shift": Rules(Window((7, 7), ("shift", "shift"), (2, 1)), bias=displacements),
        "causal": Rules(Window((7, 7), ("mask", "zeros"), causal=(True, True)), bias=bias, key_mask=mask),
        "raster": Rules(Window((7, 7), raster=True), key_mask=mask),
        "reflect": Rules(Window((7, 7), ("reflect", "replicate"), (1, 2)), bias=bias, key_mask=mask),
        "circular": Rules(Window((7, 7), ("circular", "mask"))),
    }
    for i, (name, rules) in enumerate(options.items()):
        planes = i % 2 == 0
        yield from calls_of(f"{name} {'planes' if planes else 'rows'}", torch.bfloat16, planes, rules)
        more = {"kv_heads": 1, "queries": (2 * SIDE, SIDE // 2)}
        yield from calls_of(f"{name} grids {'rows' if planes else 'planes'}", torch.bfloat16, not planes, rules, **more)


def calls_of(
    name: str,
    dtype: torch.dtype,
    planes: bool,
    rules: Rules,
    kv_heads: int = 2,
    queries: tuple[int, int] = (SIDE, SIDE),
) -> Iterator[tuple[str, Callable[[], object]]]:
    """A launch of each kernel at 64 channels."""
    x, lse = maps(64, dtype, planes, size=queries)
    y, _ = maps(64, dtype, planes, kv_heads)
    weight = torch.empty(*x.shape[:4], rules.window.slots, dtype=dtype)
    unbiased = rules._replace(bias=None, key_mask=None)
    wanted = (True, True, True, rules.bias is not None)
    calls = {
        "forward": lambda: kernels.attention(x, y, y, rules),
        "backward": lambda: kernels.attention_backward(x, lse, x, y, y, x, lse, wanted, rules),
        "similarity": lambda: kernels.similarity(x, y, rules, 0.0),
        "aggregate": lambda: kernels.aggregate(weight, y, unbiased),
        "transpose": lambda: kernels.aggregate_transpose(weight, x, kv_heads, (SIDE, SIDE), unbiased),
        "bias": lambda: kernels.bias_gradient(weight, rules._replace(bias=None), (2, 49), (SIDE, SIDE)),
    }
    for kernel, call in calls.items():
        yield f"{kernel} {name}", call


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--plans", metavar="TASK")
    parser.add_argument("--options", action="store_true")
    options = parser.parse_args()
    use_target(options.target)
    launches = every_plan(options.plans) if options.plans else every_option() if options.options else every_kernel()
    for case, launch in launches:
        for name, kernel in compiled(launch):
            if not options.plans or name == f"{options.plans}_kernel":
                print(json.dumps({"case": case, "kernel": name, **resources(kernel)}), flush=True)


if __name__ == "__main__":
    main()
