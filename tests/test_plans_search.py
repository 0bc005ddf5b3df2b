"""The search for launch plans: its candidates, its climb, its workers, what it settles on; the script."""

import importlib
import json
import math
import os
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import typer
from benchmarks import options
from typer.testing import CliRunner

from image_local_attention.bench.cases import GROUPS, Case
from image_local_attention.bench.measure import Measurement

pytest.importorskip("triton")
from image_local_attention.kernels import native, plan
from image_local_attention.kernels.plan import Plan
from image_local_attention.kernels.possible import CHOICES, TASKS, Asked, obstacle
from image_local_attention.tune import find, search
from image_local_attention.tune.compiling import Result, Workers, compile_all
from image_local_attention.tune.problem import Problem, Subject, planned

CPU = torch.device("cpu")
SHARED = 232_448  # bytes, of an H200
ROWS = Asked("forward", "half", 64, 7, False, plan.PLAIN)
PLANES = ROWS._replace(planes=True)


def test_neighbours_begin_with_one_respect_and_leave_out_what_cannot_be():
    best = Plan((8, 8), 32, 4, 3)
    tried = [best, replace(best, stages=2)]
    found = search.neighbours(PLANES, best, tried, find.FIRST, SHARED)
    assert len(set(found)) == len(found) <= find.FIRST
    assert not set(found) & set(tried)
    assert all(each.tile[1] >= 8 for each in found)
    assert min(each.tile[1] for each in search.neighbours(ROWS, best, (), find.FIRST, SHARED)) == 4
    differences = [sum(getattr(each, name) != getattr(best, name) for name in CHOICES) for each in found]
    assert differences == sorted(differences, key=lambda count: count > 1)
    assert {1, 2, 3} == set(differences)
    deep = ROWS._replace(task="grad_key_value", depth=256)
    everything = search.neighbours(deep, best, (), 10**6, SHARED)
    assert Plan((8, 8), 32, 1, 3) not in everything
    assert max(each.stages * each.block for each in everything) < max(
        each.stages * each.block for each in search.neighbours(deep, best, (), 10**6, 10 * SHARED)
    )


def test_every_plan_of_the_table_is_possible_on_an_h200():
    for task, product, planes, row in plan.plans():
        asked = Asked(task, product, row.depth, 5, planes, plan.PLAIN)
        assert obstacle(asked, row.plan, SHARED) is None, row


def test_a_process_that_dies_or_fails_costs_its_own_job_only():
    workers = Workers(1)
    dead, failed, *right = workers.map(_perhaps, [("die",), ("fail",), ("work",), ("work",)])
    workers.close()
    assert type(dead).__name__ == "BrokenProcessPool"
    assert str(failed) == "out of luck"
    assert right == ["done", "done"]


def _perhaps(what):
    if what == "die":
        os._exit(1)
    if what == "fail":
        raise RuntimeError("out of luck")
    return "done"


def test_what_a_candidate_raises_is_its_result():
    workers = SimpleNamespace(map=lambda fn, jobs: [RuntimeError("out of luck"), ("a plan", Result(registers=3))])
    jobs = [("subject", "forward", "one"), ("subject", "forward", "another")]
    failed, made = compile_all(workers, jobs)
    assert failed == ("one", Result(error="RuntimeError: out of luck"))
    assert made == ("a plan", Result(registers=3))


START = Plan((8, 8), 128, 8, 1)


@pytest.fixture
def fakes(monkeypatch):
    """Searches whose plans are not launched: four stages are wrong, blocks of 16 spill, and the time is a formula."""
    fakes = SimpleNamespace(taken=[START], ms=lambda each: each.block + 9.0 * (each.warps - 2) ** 2 - each.stages)
    fakes.refused, fakes.asks = lambda subject, task, each: None, set(TASKS)

    class Fake:
        def __init__(self, *_, **__):
            pass

        def run(self, task):
            return (torch.full((3,), 1.0 if fakes.taken[-1].stages < 4 else math.nan),)

        def poison(self):
            pass

        def asks(self):
            return fakes.asks

    @contextmanager
    def planned(task, candidate):
        fakes.taken.append(candidate or START)
        yield [(ROWS._replace(task=task), fakes.taken[-1])]

    def compiled(workers, jobs):
        made = Result(registers=99)
        return [
            (each, replace(made, spills=int(each.block == 16), error=fakes.refused(subject, task, each)))
            for subject, task, each in jobs
        ]

    def timed(call, *_, **__):
        return Measurement(fakes.ms(fakes.taken[-1]), 0.0, 0.0, 0.0, 1)

    monkeypatch.setattr(search, "Problem", Fake)
    monkeypatch.setattr(find, "Problem", Fake)
    monkeypatch.setattr(search, "planned", planned)
    monkeypatch.setattr(search, "compile_all", compiled)
    monkeypatch.setattr(find, "compile_all", compiled)
    monkeypatch.setattr(search, "measure", timed)
    monkeypatch.setattr(search, "shared_memory", lambda device: SHARED)
    return fakes


def explored(rounds=4, **more):
    """The one search of a forward."""
    subject, starts = Subject(GROUPS["design"][0]), {"forward": Result(registers=99)}
    limits = [find.FIRST] * rounds
    *_, (found,) = search.explore(subject, CPU, starts, SimpleNamespace(processes=8), limits, **more)
    return found


def test_a_search_climbs_to_the_fastest_plan_that_is_right_and_does_not_spill(fakes):
    plans = importlib.import_module("benchmarks.plans")
    found = explored()
    best = found.ranked[0]
    assert (best.block, best.warps, best.stages) == (32, 2, 3)
    rows = list(plans.rows_of(found, "plain"))
    assert [row["tile"] for row in rows if row["current"]] == [(8, 8)]
    assert {row["error"] for row in rows if row["stages"] == 4} == {"wrong result"}
    assert {row["max_registers"] for row in rows} == {None, 72, 80, 96}  # of 99
    json.dumps(rows)
    assert "current" in list(plans.table_of(found, "plain").columns[-1].cells)
    found = explored(1, respects=["stages", "block"])
    assert {(each.tile, each.warps, each.max_registers) for each in found.results} == {((8, 8), 8, None)}
    assert len(found.results) > 2


def test_a_search_ends_with_its_time_and_with_its_candidates(fakes, monkeypatch):
    assert list(explored(seconds=0).results) == [START]
    clock = iter(range(100))
    monkeypatch.setattr(search, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert len(explored(seconds=3).results) == 1 + 2 * 2 * 8  # two chunks of twice as many as there are processes
    monkeypatch.setattr(search, "time", SimpleNamespace(perf_counter=lambda: 0))
    assert explored(10**6, respects=["warps"]).ranked[0].warps == 2


def test_the_tolerance_is_of_the_dtype_and_the_product():
    def tolerance(dtype, product):
        subject = Subject(Case(1, 8, 8, 1, 16, 3, dtype))
        asked = ROWS._replace(product=product)
        return search.Search.tolerance.fget(SimpleNamespace(subject=subject, asked=asked))

    exact, tf32 = tolerance("fp32", "three-pass"), tolerance("fp32", "tf32")
    assert exact < 1e-5 < tf32 == tolerance("fp16", "half") < tolerance("bf16", "half") < 0.025


def test_what_is_settled_on_gains_enough_when_timed_anew(fakes):
    found = explored()
    settled = find.settle(found, None)
    assert settled.table == START
    assert (settled.best.block, settled.best.warps) == (32, 2)
    assert settled.gain == pytest.approx(1 - (32 - 3) / (128 + 9 * 36 - 1))
    assert settled.tried == len(found.results)

    at_least = (1 - find.LEAST_GAIN) * 100
    for ms, kept in ((at_least + 0.1, False), (at_least - 0.1, True)):
        fakes.ms = lambda each, ms=ms: 100.0 if each == START else ms
        assert (find.settle(found, None).best != START) == kept


def test_a_lucky_time_is_not_settled_on(fakes):
    found = explored()
    lucky, steady = found.ranked[:2]
    fakes.ms = lambda each: {START: 100.0, lucky: 99.0}.get(each, 50.0)
    assert find.settle(found, None).best == steady


def test_a_plan_that_other_launches_which_ask_the_same_cannot_take_is_not_settled_on(fakes):
    found = explored()
    first, second = found.ranked[:2]
    fakes.refused = lambda subject, task, each: "out of resource" if each == first else None
    assert find.settle(found, None).best == second
    fakes.refused = lambda *_: "out of resource"
    assert find.settle(found, None).best == START


def test_a_search_begins_with_what_the_table_compiles_to(fakes, monkeypatch):
    asked, told = [], []

    def compiled(workers, jobs):
        asked.extend(jobs)
        return [(each or START, Result(registers=99, error=fakes.refused(*job, each))) for *job, each in jobs]

    workers = SimpleNamespace(processes=8, close=lambda: told.append("closed"))
    monkeypatch.setattr(find, "Workers", lambda processes: workers)
    monkeypatch.setattr(find, "compile_all", compiled)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    subject = Subject(GROUPS["design"][0])
    found = find.find(subject, ["grad_query", "forward"], 8, 60, told.append)
    assert [each.asked.task for each in found] == ["grad_query", "forward"]
    assert {(each.table, each.best.block, each.best.warps) for each in found} == {(START, 32, 2)}
    assert [job for job in asked if job[-1] is None] == [
        (subject, task, None) for task in ("grad_query", "forward", "delta")
    ]
    assert told[0] == 2  # the table's plans
    assert told[-2:] == [sum(each.tried for each in found), "closed"]

    fakes.asks = {"forward"}
    assert [each.asked.task for each in find.find(subject, TASKS, 8, 60, told.append)] == ["forward"]
    fakes.asks = set()
    assert find.find(subject, TASKS, 8, 60, told.append) == []

    fakes.refused = lambda subject, task, each: "out of luck" if task == "delta" else None
    with pytest.raises(RuntimeError, match="the table's plan cannot run: out of luck"):
        find.find(subject, ["forward"], 8, 60, told.append)
    assert told[-1] == "closed"


def test_the_kin_of_a_search_hold_as_much_as_launches_that_ask_the_same_may():
    def kin(subject, asked):
        return find.kin(SimpleNamespace(subject=subject, asked=asked, task=asked.task))

    case = Case(4, 16, 16, 2, 16, 3, "bf16", depth_value=64)
    ((fullest, task),) = kin(Subject(case), ROWS)
    assert (fullest.case.depths, fullest.case.batch, fullest.key_mask, task) == ((64, 64), 1, False, "forward")
    biased = Subject(case, bias="slot")
    asked = ROWS._replace(task="grad_query", facts=ROWS.facts - {"plain", "unbiased"})
    (fullest, _), (_, other) = kin(biased, asked)
    assert (fullest.key_mask, fullest.bias, other) == (True, "slot", "grad_bias")


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches of the interpreter ask for no plan")
@pytest.mark.parametrize("subject", [
    Subject(Case(1, 8, 8, 2, 4, 3, "fp32")),
    Subject(Case(1, 8, 8, 2, 4, 3, "fp32", layout="nchw"), border="shift", bias="displacement", key_mask=True),
], ids=lambda subject: subject.name)  # fmt: skip
def test_every_task_runs_alone_with_the_plan_that_it_is_given(subject, monkeypatch):
    monkeypatch.setattr(search, "shared_memory", lambda device: SHARED)
    asked_of = _asking(monkeypatch)
    problem = Problem(subject, CPU, exact=True)
    assert problem.asks() == set(TASKS)
    with monkeypatch.context() as patch:
        patch.setattr(native, "forward", lambda *_: True)
        patch.setattr(native, "grad_key_value", lambda *_: True)
        assert problem.asks() == {"grad_query"}
        serving = []
        patch.setattr(native, "forward", lambda *_: serving.append(native.launch._serving))
        problem.run("forward")
        assert serving == [False]
    for task in ("forward", "grad_query", "grad_key_value", *(["grad_bias"] if subject.bias else [])):
        with planned(task, None) as taken:
            exact = [x.clone() for x in problem.run(task)]
        ((asked, table),) = taken
        assert asked in asked_of
        assert table == plan.choose(*asked)
        other = Plan((8, 8), 32, 1)
        problem.poison()
        with planned(task, other) as taken:
            again = problem.run(task)
        assert [each for _, each in taken] == [other]
        for x, y in zip(again, exact, strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def _asking(monkeypatch):
    """The interpreter's launches ask for plans too; what they asked."""
    from image_local_attention.kernels import gpu, remembered

    monkeypatch.setattr(gpu, "of", lambda device: gpu.Gpu(90, True))
    asked, choose = set(), plan.choose
    monkeypatch.setattr(plan, "choose", lambda *each: (asked.add(each), choose(*each))[1])
    monkeypatch.setattr(remembered, "plans", lambda device: {})
    return asked


def test_a_subject_says_what_its_case_does_not(monkeypatch):
    case = Case(1, 8, 8, 2, 4, 3, "fp32")
    rules = Problem(Subject(case, key_mask=True, dilation=2, causal="raster"), CPU, exact=False).rules
    assert rules.key_mask.shape == (1, 8, 8)
    assert (rules.window.dilation, rules.window.raster, rules.bias) == ((2, 2), True, None)
    names = {
        each.name for each in (Subject(case), Subject(case, bias="slot"), Subject(case, key_mask=True, causal=True))
    }
    assert len(names) == 3
    for wrong in (Subject(case, bias="displacement"), Subject(case, border="shift", dilation=4)):
        with pytest.raises(ValueError, match="shift"):
            _ = wrong.window


def test_the_script_searches_with_the_option(monkeypatch):
    plans = importlib.import_module("benchmarks.plans")
    monkeypatch.setattr(options, "DEVICE", CPU)
    case = replace(options.PROBLEMS[0], batch=1, height=8, width=8)
    for name in plans.SEARCHED:
        rules = Problem(plans.subject_of(case, name), CPU, exact=False).rules
        asked = options.BY_NAME[name].arguments_for(case)
        want = plans.Subject(case, **{k: v for k, v in asked.items() if k in ("border", "dilation", "causal")}).window
        assert rules.window == want
        for tensor in ("bias", "key_mask"):
            assert getattr(getattr(rules, tensor), "shape", None) == getattr(asked.get(tensor), "shape", None)
    app = typer.Typer(add_completion=False)
    app.command()(plans.main)
    answer = CliRunner().invoke(app, ["--option", "finer queries"])
    assert answer.exit_code == 2
    assert "border shift" in answer.output
