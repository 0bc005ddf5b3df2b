"""`image-local-attention tune`: what it refuses, what it prints and writes, and on a GPU that its plans are right."""

import sys
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")
from conftest import CUDA, Target
from image_local_attention.bench.cases import DTYPES, LAYOUTS
from image_local_attention.cli import tune
from image_local_attention.cli.app import app
from image_local_attention.kernels import plan, remembered
from image_local_attention.kernels.cache import VARIABLE
from image_local_attention.kernels.plan import Plan
from image_local_attention.kernels.possible import TASKS, Asked
from image_local_attention.kernels.remembered import Where
from image_local_attention.tune import find
from image_local_attention.tune.find import Found
from image_local_attention.window import BORDERS
from problems import EVERY_GRADIENT, Problem
from test_accuracy import ATTENTION, check

MAPS = ("--height", 24, "--width", 40, "--channels", 16, "--kernel", 5)


def invoke(*arguments: object):
    words = map(str, ("tune", *arguments))
    return CliRunner().invoke(app, list(words), catch_exceptions=False, env={"COLUMNS": "250"})


def assert_refused(answer, *words):
    assert answer.exit_code == 2, answer.output
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1
    for word in words:
        assert word in answer.stderr


def test_the_command_knows_all_that_there_is():
    assert [each.value for each in tune.Dtype] == list(DTYPES)
    assert [each.value for each in tune.Layout] == list(LAYOUTS)
    assert {each.value for each in tune.Border} == set(BORDERS)
    assert [each.value for each in tune.Task] == list(TASKS)


@pytest.mark.skipif(CUDA, reason="here is one")
def test_without_a_gpu_one_line_says_so(tmp_path):
    assert_refused(invoke(*MAPS, "--out", tmp_path / "plans.json"), "tune needs a GPU", "torch finds no GPU here")


def test_without_triton_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(tune, "find_spec", lambda name: None)
    assert_refused(invoke(*MAPS), "tune needs a GPU and Triton", "triton is not installed")


def test_a_case_that_is_none_is_refused():
    assert_refused(invoke(*MAPS, "--border", "shift", "--dilation", 9), "border 'shift'")
    assert_refused(invoke(*MAPS, "--border", "circular", "--causal", "axes"), "causal=True goes with the borders")
    assert_refused(invoke(*MAPS, "--bias", "displacement"), "a bias by displacement goes with border 'shift'")
    assert invoke(*MAPS, "--height", 0).exit_code == 2
    assert "height" in invoke("--width", 3).output


FAST = Plan((8, 8), 32, 4)
SLOW = Plan((4, 4), 16, 1)
HERE = Where("NVIDIA H200", 90, "3.6.0", "0.1.0")


@pytest.fixture
def searches(monkeypatch):
    """What the command asks a search for; it finds a plan of the first task and none of the others."""
    searches = []
    monkeypatch.setenv(VARIABLE, "off")

    def found(subject, tasks, processes, seconds, told):
        searches.append(SimpleNamespace(subject=subject, tasks=tasks, processes=processes, seconds=seconds))
        told(7)
        ask = [Asked(task, "half", 16, 5, False, plan.PLAIN) for task in tasks]
        return [Found(ask[0], SLOW, FAST, 0.5, 0.25, 7), *(Found(each, SLOW, SLOW, 0.5, 0.5, 7) for each in ask[1:])]

    monkeypatch.setattr(find, "find", found)
    monkeypatch.setattr(find, "gpu_obstacle", lambda case: None)
    monkeypatch.setattr(find, "processes_for", lambda case, device: 3)
    monkeypatch.setattr(remembered, "here", lambda device: HERE)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return searches


def test_what_is_found_is_printed_and_remembered(searches, tmp_path):
    path = tmp_path / "folder" / "plans.json"
    answer = invoke(*MAPS, "--out", path, "--seconds", 5)
    assert answer.exit_code == 0, answer.output
    assert "50.0%" in answer.stdout
    assert "tile (8, 8), block 32, warps 4 " in answer.stdout
    assert f"remembered in {path}" in answer.stdout
    assert f"launches read no file, as {VARIABLE} says" in answer.stderr
    (entry,) = remembered.read(path)
    assert (entry.where, entry.plan, entry.asked.task, entry.ms) == (HERE, FAST, "forward", 0.25)
    assert entry.case == "1x24x40 1x16 k5 bf16 channels_last"

    assert invoke(*MAPS, "--task", "grad_query", "--out", path, "--processes", 2).exit_code == 0
    assert {entry.asked.task for entry in remembered.read(path)} == {"forward", "grad_query"}
    assert [(each.tasks, each.processes, each.seconds) for each in searches] == [
        (list(TASKS), 3, 5),
        (["grad_query"], 2, 120),
    ]


def test_every_option_reaches_the_search(searches, tmp_path):
    words = "--batch 2 --heads 3 --value-channels 32 --border shift --dilation 2 --bias displacement --key-mask"
    more = "--causal axes --dtype fp32 --precision tf32 --layout nchw"
    assert invoke(*MAPS, *words.split(), *more.split(), "--out", tmp_path / "plans.json").exit_code == 0
    subject = searches[0].subject
    assert subject.case == find.Case(2, 24, 40, 3, 16, 5, "fp32", "tf32", "nchw", 32, "shift", 2)
    assert (subject.bias, subject.key_mask, subject.causal) == ("displacement", True, True)
    assert invoke(*MAPS, "--causal", "raster", "--out", tmp_path / "plans.json").exit_code == 0
    assert (searches[1].subject.causal, searches[1].subject.case.precision) == ("raster", "ieee")


def test_the_file_is_the_one_that_launches_read(searches, monkeypatch, tmp_path):
    assert_refused(invoke(*MAPS), "--out must name a file", VARIABLE)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    answer = invoke(*MAPS)
    assert (answer.exit_code, answer.stderr) == (0, "")
    assert len(remembered.read(tmp_path / "plans.json")) == 1


def test_a_file_that_is_none_is_refused_before_the_search(searches, tmp_path):
    path = tmp_path / "plans.json"
    path.write_text('{"format": 99, "plans": []}')
    assert_refused(invoke(*MAPS, "--out", path), str(path), "it has format 99")
    assert searches == []
    assert "99" in path.read_text()


def test_where_nothing_is_faster_nothing_is_written(searches, monkeypatch, tmp_path):
    monkeypatch.setattr(
        find,
        "find",
        lambda *_: [Found(Asked(task, "half", 16, 5, False, plan.PLAIN), SLOW, SLOW, 0.5, 0.5, 9) for task in TASKS],
    )
    answer = invoke(*MAPS, "--out", tmp_path / "plans.json")
    assert answer.exit_code == 0
    assert "nothing is remembered" in answer.stderr
    assert not (tmp_path / "plans.json").exists()


def test_tasks_that_ask_for_no_plan_are_told(searches, monkeypatch, tmp_path):
    monkeypatch.setattr(find, "find", lambda *_: [])
    answer = invoke(*MAPS, "--task", "forward", "--out", tmp_path / "plans.json")
    assert (answer.exit_code, answer.stdout) == (0, "")
    assert answer.stderr == "forward: a native kernel serves this case, and takes no plan of these\n"


def test_a_table_that_cannot_run_is_told(searches, monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("the table's plan cannot run: out of luck")

    monkeypatch.setattr(find, "find", fail)
    assert_refused(invoke(*MAPS, "--out", tmp_path / "plans.json"), "1x24x40 1x16 k5", "out of luck")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize(("dtype", "layout", "options"), [
    ("bf16", "channels_last", ("--border", "mask")),
    ("bf16", "nchw", ("--bias", "slot", "--key-mask")),
    ("fp32", "nchw", ("--dilation", 2)),
])  # fmt: skip
def test_results_with_remembered_plans_are_as_exact(dtype, layout, options, monkeypatch, tmp_path):
    """The fastest plan that the search tried is remembered though it gains nothing, and launches take it."""
    monkeypatch.setattr(find, "LEAST_GAIN", -9.0)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    asked = *MAPS, "--batch", 2, "--heads", 2, "--dtype", dtype, "--layout", layout
    answer = invoke(*asked, *options, "--seconds", 30, "--processes", 8)
    assert answer.exit_code == 0, answer.output
    entries = remembered.read(tmp_path / "plans.json")
    assert entries, answer.output
    remembered.plans.cache_clear()
    taken, choose = set(), remembered.choose

    def keep(device, *asked):
        found = choose(device, *asked)
        taken.add((asked, found))
        return found

    monkeypatch.setattr(remembered, "choose", keep)
    border = "mask" if "--border" in options else "zeros"
    form = {"channels_last": "channels_last", "nchw": "contiguous"}[layout]
    problem = Problem(
        2, 2, 16, 16, (24, 40), (5, 5), (border, border), 1.0, (form,) * 4, EVERY_GRADIENT, "both", 1.0, 1.0, 0,
        dilation=(2, 2) if "--dilation" in options else (1, 1),
        bias="slot" if "--bias" in options else "none",
        key_mask="most" if "--key-mask" in options else "none",
    )  # fmt: skip
    try:
        check(ATTENTION, problem, Target("triton", "cuda"), DTYPES[dtype])
    finally:
        remembered.plans.cache_clear()
    assert {(entry.asked, entry.plan) for entry in entries} <= taken
