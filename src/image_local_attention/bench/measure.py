"""Time and peak memory of one call."""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
MIN_RUNS, MAX_RUNS = 5, 200
BUFFER_BYTES = 256 * MIB  # five times the L2 cache of an H200
MAX_WRITES = 100  # of the buffer before one call: some 8 ms on an H200


@dataclass(frozen=True)
class Measurement:
    """Quantiles of the milliseconds of one call, the memory it takes on top of what is there, and the runs timed.

    host_ms: on a GPU, the host's time to queue a call on an idle device, which is no part of the others.
    """

    ms_p50: float
    ms_p20: float
    ms_p80: float
    peak_mib: float
    runs: int
    host_ms: float | None = None


def measure(
    fn: Callable,
    device: torch.device | str,
    *,
    setup: Callable[[], object] | None = None,
    budget_s: float = 1.0,
    flush_l2: bool = True,
) -> Measurement:
    """Times `fn()`, or `fn(setup())`, on `device` for about `budget_s` seconds.

    setup: makes a fresh argument before every call, outside time and memory.
    flush_l2: on a GPU, True has the call find nothing of its inputs in the L2 cache; False has it find what an equal
        call just before has left there.

    Peak memory is the most that torch has allocated at once during a call, above what was allocated before it, the
    results included. On a GPU the first call warms up (kernels compile) and the second gives the memory. On a CPU
    the first call does both; where it alone takes longer than the budget, its time is the measurement (`runs` is 1).

    GPU time is the device's, between an event before and an event after the call, and the host's time to launch is
    no part of it: before each call a 256 MiB buffer is written, as often as keeps the device busy until the host has
    queued the call behind that. Unlike a CUDA graph this times the call as users make it and leaves room to
    flush the cache between calls; unlike a sleep kernel it needs no private API. The last pass over the buffer
    reads it, so that no dirty line is left for the call to write back. A call that itself waits for the device is
    timed with its waiting.
    """
    device = torch.device(device)
    call, prepare = (fn, setup) if setup else (lambda _: fn(), lambda: None)
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _measure_gpu(call, prepare, budget_s, flush_l2)
    return _measure_cpu(call, prepare, budget_s)


def _measure_cpu(call: Callable, prepare: Callable, budget_s: float) -> Measurement:
    argument = prepare()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        first_ms = _wall_ms(call, argument)
    peak_mib = _peak_mib(trace)
    if first_ms > budget_s * 1e3:
        return _summary([first_ms], peak_mib)

    times, deadline = [], time.perf_counter() + budget_s
    while not times or (time.perf_counter() < deadline and len(times) < MAX_RUNS):
        times.append(_wall_ms(call, prepare()))
    return _summary(times, peak_mib)


def _wall_ms(call: Callable, argument: object) -> float:
    begin = time.perf_counter()
    result = call(argument)
    took = time.perf_counter() - begin
    del result  # freed outside the time
    return took * 1e3


def _peak_mib(trace: profile) -> float:
    """Most CPU memory allocated at once, from the profiler's running total, above that before the first event."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    if not memory:
        return 0.0
    memory = [e["args"] for e in sorted(memory, key=lambda e: (e["ts"], e["args"]["Ev Idx"]))]
    before = memory[0]["Total Allocated"] - memory[0]["Bytes"]
    return max(0, *(e["Total Allocated"] - before for e in memory)) / MIB


def _measure_gpu(call: Callable, prepare: Callable, budget_s: float, flush_l2: bool) -> Measurement:
    call(prepare())
    peak_mib = _gpu_peak_mib(call, prepare())
    buffer = torch.zeros(BUFFER_BYTES // 4, dtype=torch.int32, device="cuda")
    greatest = torch.empty((), dtype=torch.int32, device="cuda")
    host_ms = statistics.median(_host_ms(call, prepare()) for _ in range(3))
    write_ms = statistics.median(_event_ms(buffer.zero_) for _ in range(3))
    calls = 1 if flush_l2 else 2
    writes = min(math.ceil(2 * calls * host_ms / write_ms), MAX_WRITES)

    def queue() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        argument, earlier = prepare(), None if flush_l2 else prepare()
        for _ in range(writes):
            buffer.zero_()
        torch.amax(buffer, 0, out=greatest)
        if not flush_l2:
            call(earlier)
        return _timed(call, argument)

    pairs, deadline = [], time.perf_counter() + budget_s
    while len(pairs) < MIN_RUNS or (time.perf_counter() < deadline and len(pairs) < MAX_RUNS):
        pairs.append(queue())
        pairs[-1][1].synchronize()
    return replace(_summary([begin.elapsed_time(end) for begin, end in pairs], peak_mib), host_ms=host_ms)


def _timed(call: Callable, argument: object) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = call(argument)
    end.record()
    del result
    return begin, end


def _event_ms(fn: Callable) -> float:
    begin, end = _timed(lambda _: fn(), None)
    end.synchronize()
    return begin.elapsed_time(end)


def _host_ms(call: Callable, argument: object) -> float:
    """Milliseconds in which the host queues a call on an idle device."""
    torch.cuda.synchronize()
    took = _wall_ms(call, argument)
    torch.cuda.synchronize()
    return took


def _gpu_peak_mib(call: Callable, argument: object) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call(argument)
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / MIB


def _summary(times: list[float], peak_mib: float) -> Measurement:
    p50, p20, p80 = (
        torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
    )
    return Measurement(p50, p20, p80, peak_mib, len(times))
