"""The search for launch plans: its candidates, its climb, its workers and its options."""

import importlib
import json
import math
import os
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import typer
from benchmarks import options
from typer.testing import CliRunner

from image_local_attention.bench.cases import GROUPS
from image_local_attention.bench.measure import Measurement


@pytest.fixture
def plans():
    pytest.importorskip("triton")
    return importlib.import_module("benchmarks.plans")


def test_neighbours_begin_with_one_respect_and_leave_out_what_cannot_be(plans):
    case = next(case for case in GROUPS["design"] if case.layout == "nchw" and case.dtype == "bf16")
    best = plans.Plan((8, 8), 32, 4, 3)
    tried = [best, replace(best, stages=2)]
    found = plans.neighbours(case, 1, "forward", best, tried, plans.FIRST)
    assert len(set(found)) == len(found) <= plans.FIRST
    assert not set(found) & set(tried)
    assert all(each.tile[1] >= 8 for each in found)
    apart = plans.neighbours(case, 2, "forward", best, (), plans.FIRST)
    assert min(each.tile[1] for each in apart) == 4
    differences = [sum(getattr(each, name) != getattr(best, name) for name in plans.CHOICES) for each in found]
    assert differences == sorted(differences, key=lambda count: count > 1)
    assert {1, 2, 3} == set(differences)
    assert plans.Plan((4, 8), 32, 1, 3) not in plans.neighbours(
        replace(case, depth=256), 1, "grad_key_value", best, (), 10**6
    )


def test_a_process_that_dies_costs_its_own_job_only(plans):
    workers = plans.Workers(1)
    assert workers.map(os._exit, [(1,)], lambda code: f"died with {code}") == ["died with 1"]
    assert workers.map(pow, [(2, 3), (2, 4)], lambda *_: None) == [8, 16]
    workers.close()


def test_a_search_climbs_to_the_fastest_plan_that_is_right_and_does_not_spill(plans, monkeypatch):
    class Fake:
        def __init__(self, *_, **__):
            self.rules = plans.Rules(plans.check.window(3, **plans.GEOMETRY))

        def run(self, task):
            return (torch.full((3,), 1.0 if taken[-1].stages < 4 else math.nan),)

        def poison(self):
            pass

    def timed(call, *_, **__):
        each = taken[-1]
        return Measurement(each.block + 9.0 * (each.warps - 2) ** 2 - each.stages, 0.0, 0.0, 0.0, 1)

    @contextmanager
    def planned(task, candidate):
        taken.append(candidate)
        yield taken

    def compiled(workers, jobs):
        return [(each, plans.Result(spills=int(each.block == 16), registers=99)) for *_, each in jobs]

    start = plans.Plan((8, 8), 128, 8, 1)
    taken = [start]
    for name, fake in (("Problem", Fake), ("measure", timed), ("planned", planned), ("compile_all", compiled)):
        monkeypatch.setattr(plans, name, fake)
    starts, case = {"forward": (start, plans.Result(registers=99))}, GROUPS["design"][0]
    *_, (search,) = plans.explore(case, "plain", torch.device("cpu"), starts, None, 4, False, 0.1)
    best = search.ranked[0]
    assert (best.block, best.warps, best.stages) == (32, 2, 3)
    rows = list(search.rows())
    assert [row["tile"] for row in rows if row["current"]] == [(8, 8)]
    assert {row["error"] for row in rows if row["stages"] == 4} == {"wrong result"}
    assert {row["max_registers"] for row in rows} == {None, 72, 80, 96}  # of 99
    json.dumps(rows)
    assert "current" in list(search.table().columns[-1].cells)
    *_, (search,) = plans.explore(case, "plain", torch.device("cpu"), starts, None, 1, False, 0.1, ["stages", "block"])
    assert {(each.tile, each.warps, each.max_registers) for each in search.results} == {((8, 8), 8, None)}
    assert len(search.results) > 2


def test_a_search_keeps_to_the_option(plans, monkeypatch):
    monkeypatch.setattr(options, "DEVICE", torch.device("cpu"))
    case = replace(options.PROBLEMS[0], batch=1, height=8, width=8)
    plain, key_mask, dilation = (
        plans.Problem(case, name, torch.device("cpu"), exact=False).rules
        for name in ("plain", "key_mask", "dilation 2")
    )
    assert (plain.window.dilation, plain.key_mask) == ((1, 1), None)
    assert key_mask.key_mask.shape == (1, 8, 8)
    assert dilation.window.dilation == (2, 2)
    app = typer.Typer(add_completion=False)
    app.command()(plans.main)
    answer = CliRunner().invoke(app, ["--option", "finer queries"])
    assert answer.exit_code == 2
    assert "border shift" in answer.output
