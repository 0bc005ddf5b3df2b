"""What a call on a small map costs the host, against the same operator with an empty backend.

python -m benchmarks.host --help

The empty backend allocates what the triton backend allocates and launches as many kernels as it does where native ones
serve a call, which have no arguments and do nothing. Stages are timed by themselves, each with the arguments that it
gets in a forward pass:

operator: the registered operator, without the checks and the derivative of the public function.
backend: the backend's function, without the operator.
launch: the launch of the compiled kernel, by Triton or by the driver, without what is done to get there.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from unittest.mock import MagicMock, patch

import torch
import triton
import typer
from torch import Tensor

from benchmarks import limits
from benchmarks.limits import HOST, HOST_STAGES, Value
from image_local_attention import backends, local_attention
from image_local_attention.bench.cases import Case
from image_local_attention.bench.timing import passes
from image_local_attention.maps import empty_heads

CASES = tuple(
    Case(1, 32, 32, heads, depth, 7, dtype) for heads, depth in ((1, 64), (8, 16)) for dtype in ("fp32", "bf16")
)
CALLS, BETWEEN, ROUNDS = 300, 50, 3  # calls in a round, calls between two synchronisations, rounds in turn


@triton.jit
def empty_kernel():
    pass


class EmptyBackend:
    """Results as `kernels` allocates them, never written."""

    @staticmethod
    def attention(query: Tensor, key: Tensor, value: Tensor, rules) -> tuple[Tensor, Tensor]:
        out = empty_heads(query, value.shape[4])
        lse = query.new_empty(query.shape[:4], dtype=torch.float32)
        empty_kernel[(1,)]()
        return out, lse

    @staticmethod
    def attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, wanted, rules
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        grads = [empty_heads(x, x.shape[4]) for x in (query, key, value)]
        out.new_empty(out.shape[:4], dtype=torch.float32)  # delta
        for _ in ("delta and grad_query", "grad_key_value"):
            empty_kernel[(1,)]()
        return *grads, None


def empty_backend():
    """A context in which operators run on the empty backend."""
    return patch.object(backends, "resolve", lambda *_: EmptyBackend)


def attend_of(case: Case) -> Callable[..., Tensor]:
    return partial(local_attention, kernel_size=case.kernel, heads=case.heads, backend=limits.BACKEND)


def calls(case: Case) -> Iterator[tuple[str, Callable]]:
    """Modes and calls of the public function."""
    attend, maps = attend_of(case), case.maps(limits.DEVICE)
    leaves = [x.detach().requires_grad_() for x in maps[:3]]
    yield from passes(attend, maps, ("forward",))
    yield "forward with graph", partial(attend, *leaves)
    yield from passes(attend, maps, ("forward+backward",))


def stages(case: Case) -> Iterator[tuple[str, Callable, Callable]]:
    """Stages of a forward pass with their calls, and with those of the empty backend."""
    attend, inputs = attend_of(case), case.maps(limits.DEVICE)[:3]
    operator = torch.ops.image_local_attention.attention.default
    window = (case.kernel,) * 2, (case.border,) * 2, (case.dilation,) * 2, (False, False), False
    call = partial(operator, *inputs, None, None, case.heads, case.heads, 1.0, *window, case.precision, limits.BACKEND)
    yield "operator", call, call

    module = backends.resolve(limits.BACKEND, limits.DEVICE, inputs[0].dtype, case.depth)
    with patch.object(module, "attention", wraps=module.attention) as function:
        attend(*inputs)
    heads = function.call_args.args
    yield "backend", partial(module.attention, *heads), partial(EmptyBackend.attention, *heads)

    yield "launch", launched(module, heads), lambda: empty_kernel[(1,)]()


def launched(module, heads: Sequence) -> Callable:
    """The launch that a forward of the triton backend comes to: of a native kernel, else of Triton's."""
    kernels = module.native.launch.Kernel
    with (
        patch.object(kernels, "__call__", autospec=True) as native,
        patch.object(module.fused, "forward_kernel", MagicMock()) as kernel,
    ):
        module.attention(*heads)
    if native.called:
        return partial(kernels.__call__, *native.call_args.args)
    grid = kernel.__getitem__.call_args.args[0]
    args, options = kernel.__getitem__.return_value.call_args
    return lambda: module.fused.forward_kernel[grid](*args, **options)


def queue_us(call: Callable) -> list[float]:
    """Microseconds in which the host queues a call, of many one after the other; results are freed outside of it."""
    times = []
    for i in range(CALLS):
        if i % BETWEEN == 0:  # the queue of the device never fills
            limits.synchronize()
        begin = time.perf_counter_ns()
        result = call()
        times.append((time.perf_counter_ns() - begin) / 1e3)
        del result
    limits.synchronize()
    return times


def in_turn(ours: Callable, floor: Callable) -> tuple[float, float]:
    """Median microseconds of a call with the triton backend, and of one with the empty backend."""
    times: Sequence[list[float]] = [], []
    ours()
    with empty_backend():
        floor()
    for _ in range(ROUNDS):
        times[0].extend(queue_us(ours))
        with empty_backend():
            times[1].extend(queue_us(floor))
    return statistics.median(times[0]), statistics.median(times[1])


def values(case: Case) -> Iterator[Value]:
    for mode, call in calls(case):
        yield HOST, mode, *in_turn(call, call)
    for stage, ours, floor in stages(case):
        yield HOST_STAGES, stage, *in_turn(ours, floor)


def main(out: limits.Out = None, only: limits.Only = "", warm_up_with: limits.WarmUp = 0) -> None:
    """Time the host in calls on 32x32 maps, against the same operator with an empty backend."""
    limits.run(CASES, values, out, only, warm_up_with)


if __name__ == "__main__":
    typer.run(main)
