"""The benchmarks of figures with a limit: what they compare, what they count, their rows and their commands."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch
import typer
from benchmarks import first_call, growth, host, limits, unfused
from benchmarks.limits import Figure, Row
from typer.testing import CliRunner

from image_local_attention import backends, kernels, local_attention
from image_local_attention.bench.cases import LAYOUTS, Case
from image_local_attention.bench.rows import load_rows, save_rows

MODULES = host, first_call, growth, unfused
RESULTS = sorted(Path(limits.__file__).parent.glob("results/limits-*.json"))
TINY = Case(1, 6, 5, 2, 4, 3, "fp32")
WHERE = {"gpu": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "commit": "0"}
ROW = Row(limits.HOST.name, TINY.name, "forward", 3.0, 2.0, **WHERE)
ON_THE_CPU = "import torch; from benchmarks import limits; limits.DEVICE = torch.device('cpu'); "


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(limits, "DEVICE", torch.device("cpu"))


needs_interpreter = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the CPU runs no kernel")


@pytest.fixture
def silent_kernels(monkeypatch):
    """The kernels of the fused operator, and the empty one, as mocks."""
    names = [name for name in vars(kernels.fused) if name.endswith("_kernel")]
    mocks = {name: MagicMock() for name in names}
    for name, mock in mocks.items():
        monkeypatch.setattr(kernels.fused, name, mock)
    mocks["empty"] = MagicMock()
    monkeypatch.setattr(host, "empty_kernel", mocks["empty"])
    return mocks


def allocations(run) -> Counter:
    """Shapes and dtypes of the memory that a call allocates."""
    found = Counter()

    def counted(allocate):
        def call(*args, **kwargs):
            x = allocate(*args, **kwargs)
            found[tuple(x.shape), x.stride(), x.dtype] += 1
            return x

        return call

    with (
        patch.object(torch, "empty", counted(torch.empty)),
        patch.object(torch.Tensor, "new_empty", counted(torch.Tensor.new_empty)),
    ):
        run()
    return found


@needs_interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_empty_backend_allocates_and_launches_as_much_as_the_kernels(layout, silent_kernels):
    """But for delta, which native kernels make beside the gradient of the query."""
    launched = {"forward": 1, "forward with graph": 1, "forward+backward": 3}
    for mode, call in host.calls(replace(TINY, layout=layout)):
        before = {name: mock.__getitem__.call_count for name, mock in silent_kernels.items()}
        ours = allocations(call)
        with host.empty_backend():
            floor = allocations(call)
        counts = {name: mock.__getitem__.call_count - before[name] for name, mock in silent_kernels.items()}
        assert counts.pop("delta_kernel") == (mode == "forward+backward")
        assert counts.pop("empty") == sum(counts.values()) == launched.pop(mode)
        assert ours == floor
        # output and log-sum-exp; three gradients, delta, and the operator's own gradient of no bias
        assert sum(ours.values()) == (2 if mode != "forward+backward" else 7)
    assert not launched


@needs_interpreter
def test_the_empty_backend_gives_what_the_operator_promises():
    query, key, value, grad_out = TINY.maps(limits.DEVICE)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    resolve, want = backends.resolve, local_attention(*leaves, 3, heads=2, backend="triton")
    want_grads = torch.autograd.grad(want, leaves, grad_out)
    with host.empty_backend():
        out, lse = local_attention(*leaves, 3, heads=2, return_lse=True)
        grads = torch.autograd.grad(out, leaves, grad_out)
    assert backends.resolve is resolve
    assert (out.shape, out.stride(), out.dtype) == (want.shape, want.stride(), want.dtype)
    assert (lse.shape, lse.dtype) == ((1, 2, 6, 5), torch.float32)
    assert [(x.shape, x.stride(), x.dtype) for x in grads] == [(x.shape, x.stride(), x.dtype) for x in want_grads]
    with contextlib.suppress(KeyError), host.empty_backend():
        raise KeyError
    torch.testing.assert_close(local_attention(*leaves, 3, heads=2, backend="triton"), want)


@needs_interpreter
def test_stages_repeat_what_a_forward_pass_does():
    want = host.attend_of(TINY)(*TINY.maps(limits.DEVICE)[:3])
    results = {name: (ours(), floor()) for name, ours, floor in host.stages(TINY)}
    assert list(results) == ["operator", "backend", "launch"]
    torch.testing.assert_close(results["operator"][0][0], want)
    heads = want.unflatten(1, (TINY.heads, -1)).permute(0, 1, 3, 4, 2)
    torch.testing.assert_close(results["backend"][0][0], heads)
    assert results["backend"][1][0].shape == heads.shape


@needs_interpreter
def test_the_launch_is_timed_with_the_arguments_of_a_pass(silent_kernels):
    kernel = silent_kernels["forward_kernel"]
    *_, (name, launch, _) = host.stages(TINY)
    assert name == "launch"
    kernel.reset_mock()
    launch()
    again = kernel.__getitem__.call_args, kernel.__getitem__.return_value.call_args
    kernel.reset_mock()
    host.attend_of(TINY)(*TINY.maps(limits.DEVICE)[:3])
    grid, call = kernel.__getitem__.call_args, kernel.__getitem__.return_value.call_args
    assert again[0] == grid
    assert again[1].kwargs == call.kwargs
    assert [x if isinstance(x, tuple) else type(x) for x in again[1].args] == [
        x if isinstance(x, tuple) else type(x) for x in call.args
    ]


def test_the_host_is_timed_call_by_call_in_turn(monkeypatch):
    waits, seen = [], []
    monkeypatch.setattr(limits, "synchronize", lambda: waits.append(len(seen)))
    for name, value in {"CALLS": 7, "BETWEEN": 3, "ROUNDS": 2}.items():
        monkeypatch.setattr(host, name, value)

    def ours():
        seen.append(backends.resolve(None, limits.DEVICE, torch.float32, 4))
        time.sleep(0.002)

    def floor():
        seen.append(backends.resolve(None, limits.DEVICE, torch.float32, 4))

    times = host.queue_us(ours)
    assert len(times) == 7
    assert min(times) >= 2000
    assert waits == [0, 3, 6, 7]
    seen.clear()
    slow, fast = host.in_turn(ours, floor)
    assert slow >= 2000 > fast > 0
    real, empty = backends.resolve(None, limits.DEVICE, torch.float32, 4), host.EmptyBackend
    assert seen == [real, empty, *([real] * 7 + [empty] * 7) * 2]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_bytes_of_an_unfused_pass_are_those_of_its_operators(monkeypatch, heads, dtype):
    monkeypatch.setattr(limits, "BACKEND", "tiled")
    case, moved, real = replace(TINY, heads=heads, dtype=dtype), [], backends.resolve

    def counting(*args):
        module = real(*args)

        def counted(operator):
            def run(*args):
                result = operator(*args)
                tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor)]
                moved.append(sum(x.numel() * x.itemsize for x in tensors))
                return result

            return run

        return SimpleNamespace(
            **{name: counted(getattr(module, name)) for name in ("similarity", "aggregate", "aggregate_transpose")}
        )

    monkeypatch.setattr(backends, "resolve", counting)
    names = []
    for name, operator, maps in unfused.calls(case):
        names.append(name)
        for mode, run in unfused.passes(operator, maps, tuple(unfused.OPERATORS)):
            moved.clear()
            run()
            if mode == "backward":
                assert len(moved) == 2
            assert sum(moved) == unfused.least_bytes(case, mode)
    assert names == ["similarity", "aggregate"]


def test_a_copy_reads_half_of_what_it_moves_and_writes_half(monkeypatch):
    copied = []

    def measure(run, *_, **__):
        copied.append(run().numel())
        return SimpleNamespace(ms_p50=0.5)

    monkeypatch.setattr(unfused, "measure", measure)
    unfused.copy_gb_s.cache_clear()
    assert unfused.copy_gb_s(10**6, 0.1) == 2.0
    unfused.copy_gb_s.cache_clear()
    assert copied == [10**6 // 2]


def test_bytes_a_second_stand_against_a_copy_of_as_many(monkeypatch):
    monkeypatch.setattr(limits, "BACKEND", "tiled")
    monkeypatch.setattr(unfused, "measure", lambda *_, **__: SimpleNamespace(ms_p50=0.5))
    monkeypatch.setattr(unfused, "copy_gb_s", lambda moved, budget_s: moved)
    least = 6 * 5 * 2 * (2 * 4 + 9) * 4
    assert [(mode, pytest.approx(value), against) for _, mode, value, against in unfused.values(TINY, 0.1)] == [
        ("similarity, forward", least / 0.5e6, least),
        ("similarity, backward", 2 * least / 0.5e6, 2 * least),
        ("aggregate, forward", least / 0.5e6, least),
        ("aggregate, backward", 2 * least / 0.5e6, 2 * least),
    ]


def test_growth_compares_pixels_of_two_sizes(monkeypatch):
    monkeypatch.setattr(growth, "SMALL", 4)
    sizes = []

    def measure(run, device, budget_s):
        sizes.append(run()[0].shape[2:])
        return SimpleNamespace(ms_p50=2.0 if sizes[-1] == (4, 4) else 15.0)

    monkeypatch.setattr(growth, "measure", measure)
    found = list(growth.values(replace(TINY, height=8, width=12), 0.1))
    assert sizes == [(4, 4), (4, 4), (8, 12), (8, 12)]
    small, large = 2e9 / 16, 15e9 / 96
    assert found == [(limits.GROWTH, mode, large, small) for mode in ("forward", "backward")]
    assert {(case.height, growth.small(case).height) for case in growth.CASES} == {(8192, 4)}


def test_a_cold_call_finds_an_empty_cache_and_a_warm_one_the_same(monkeypatch):
    caches = []

    def in_a_fresh_process(case, cache):
        caches.append((cache, sorted(os.listdir(cache))))
        Path(cache, "kernel").touch()
        return {"forward": 1.0, "forward+backward": 3.0, "imports": 0.25, "compile": 0.5}

    monkeypatch.setattr(first_call, "in_a_fresh_process", in_a_fresh_process)
    found = {(figure.name, mode): value / against for figure, mode, value, against in first_call.values(TINY)}
    (cold, first), (warm, second) = caches
    assert (cold, first, second) == (warm, [], ["kernel"])
    assert not Path(cold).exists()
    assert found == {
        (limits.FIRST_CALL.name, "cold, forward"): 1 / 5,
        (limits.FIRST_CALL.name, "cold, forward+backward"): 3 / 5,
        (limits.FIRST_CALL_PARTS.name, "cold, forward, imports"): 0.25,
        (limits.FIRST_CALL_PARTS.name, "cold, forward, compile"): 0.5,
        (limits.FIRST_CALL.name, "warm, forward"): 1 / 0.3,
        (limits.FIRST_CALL.name, "warm, forward+backward"): 3 / 0.3,
        (limits.FIRST_CALL_PARTS.name, "warm, forward, imports"): 0.25,
        (limits.FIRST_CALL_PARTS.name, "warm, forward, compile"): 0.5,
    }


@needs_interpreter
def test_a_first_call_is_one_of_a_process_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(first_call, "CHILD", ON_THE_CPU + first_call.CHILD)
    taken = first_call.in_a_fresh_process(TINY, str(tmp_path))
    assert taken.keys() == {"forward", "forward+backward", "imports", "compile"}
    assert 0 < taken["imports"] < taken["forward"] < taken["forward+backward"]
    monkeypatch.setattr(first_call, "CHILD", "raise SystemExit('no luck')")
    with pytest.raises(RuntimeError, match="no luck"):
        first_call.in_a_fresh_process(TINY, str(tmp_path))


def printed(code: str, **environment: str) -> str:
    """What a new interpreter prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_triton_is_not_loaded_before_the_clock_starts():
    loaded = "import sys, torch; print('triton' in sys.modules)"
    assert printed(f"from benchmarks import first_call; {loaded}") == printed(loaded)


COMPILE = """
import triton
from benchmarks import first_call, host
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
taken, hits = first_call.listen(), []
heard = triton.knobs.compilation.listener
triton.knobs.compilation.listener = lambda *, cache_hit, **more: (hits.append(cache_hit), heard(**more))
compile(ASTSource(host.empty_kernel, signature={}), target=GPUTarget("cuda", 90, 32))
print(*taken, *map(int, hits))
"""


def test_the_compiler_s_time_is_heard_of(tmp_path):
    pytest.importorskip("triton")
    for cached in 0, 1:
        taken, hit = printed(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).split()
        assert 0 < float(taken) < 60
        assert int(hit) == cached


def command(module) -> typer.Typer:
    app = typer.Typer(add_completion=False)
    app.command()(module.main)
    return app


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is one")
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_without_a_gpu_nothing_is_timed(monkeypatch, module):
    monkeypatch.setattr(limits, "DEVICE", torch.device("cuda"))
    answer = CliRunner().invoke(command(module), [])
    assert answer.exit_code == 2
    assert "there is no GPU here" in answer.output


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_command_saves_case_by_case_and_tells_what_failed(monkeypatch, module, tmp_path):
    path, good, bad = tmp_path / "rows.json", TINY, replace(TINY, kernel=5)
    last = replace(TINY, kernel=7)

    def values(case, *_):
        if case is last:
            assert [row.case for row in load_rows(path, Row)] == [good.name]
        if case is bad:
            raise RuntimeError("out of memory")
        yield limits.HOST, "forward", 3, 2.00001

    monkeypatch.setattr(module, "CASES", (good, bad, last, replace(TINY, dtype="fp16")))
    monkeypatch.setattr(module, "values", values)
    answer = CliRunner().invoke(command(module), ["--out", str(path), "--only", "fp32"])
    assert answer.exit_code == 1
    assert f"{bad.name}: RuntimeError: out of memory" in answer.output
    assert [(row.case, row.value, row.against) for row in load_rows(path, Row)] == [
        (good.name, 3.0, 2.0),
        (last.name, 3.0, 2.0),
    ]
    answer = CliRunner().invoke(command(module), ["--only", "nowhere"])
    assert answer.exit_code == 2
    assert "only must be in the name of a case" in answer.output


def test_a_goal_is_the_most_or_the_least():
    most, least, none = Figure("", "", "", most=1.5), Figure("", "", "", least=0.6), Figure("", "", "")
    assert [most.met(ratio) for ratio in (1.0, 1.5, 1.6)] == [True, True, False]
    assert [least.met(ratio) for ratio in (0.5, 0.6, 1.0)] == [False, True, True]
    assert (most.goal, least.goal, none.goal) == ("at most 1.5", "at least 0.6", "")


def test_rows_come_back_as_they_were_saved_and_newer_ones_replace_older(tmp_path):
    path = tmp_path / "rows.json"
    other = replace(ROW, figure=limits.GROWTH.name, triton=None)
    save_rows(path, [ROW, other], Row)
    newer = replace(ROW, value=1.0, commit="1")
    save_rows(path, [newer, replace(ROW, mode="backward")], Row)
    assert set(load_rows(path, Row)) == {newer, other, replace(ROW, mode="backward")}
    assert "ratio" not in json.loads(path.read_text())[0]
    assert ROW.ratio == 1.5


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_rows_are_valid_and_of_known_cases(path):
    rows = load_rows(path, Row)
    assert rows
    assert {row.case for row in rows} <= {case.name for module in MODULES for case in module.CASES}
    assert {row.figure for row in rows} <= {each.name for each in vars(limits).values() if isinstance(each, Figure)}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_cases_have_names_of_their_own(module):
    assert len({case.name for case in module.CASES}) == len(module.CASES)
