"""The benchmark of window options: its problems and options, what they are compared with, its rows and its table."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from benchmarks import options, report
from benchmarks.options import BY_NAME, OPTIONS, PLAIN, PROBLEMS, Row
from typer.testing import CliRunner

from image_local_attention.bench.cases import LAYOUTS, Case
from image_local_attention.bench.rows import load_rows, save_rows
from image_local_attention.bench.timing import passes

APP = typer.Typer(add_completion=False)
APP.command()(options.main)
RESULTS = sorted(Path(options.__file__).parent.glob("results/options-*.json"))
TINY = Case(2, 8, 12, 4, 4, 3, "fp32")
SUITING = [(c, o) for c in (TINY, replace(TINY, heads=1, layout="nchw")) for o in OPTIONS if o.suits(c)]
DISPLACEMENT = "bias by displacement, border shift"
WHERE = {"gpu": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "commit": "0"}
ROW = Row(PROBLEMS[0].name, "border mask", "forward", 0.5, 0.25, 2.0, **WHERE)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(options, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(options, "BACKEND", "reference")


def run_once(attend, maps):
    """What the forward pass gives, as a tuple of tensors, and the gradients of the backward pass."""
    (_, forward), (_, backward) = passes(attend, maps, options.MODES)
    (out,) = forward()
    return out if isinstance(out, tuple) else (out,), backward()


def test_names_are_unique_and_grids_and_heads_can_be_halved():
    assert len({case.name for case in PROBLEMS}) == len(PROBLEMS)
    assert len(BY_NAME) == len(OPTIONS) + 1
    assert all(case.height % 2 == case.width % 2 == 0 for case in PROBLEMS)
    assert all(case.heads == 1 or case.heads % 2 == 0 for case in PROBLEMS)
    assert {case.layout for case in PROBLEMS} == set(LAYOUTS)


def test_every_suiting_pair_is_a_job_and_a_name_picks_some():
    jobs = options.jobs_of()
    assert len(set(jobs)) == len(jobs) == sum(len(OPTIONS) - 2 * (case.heads == 1) for case in PROBLEMS)
    assert {name for case, name in jobs if case.heads > 1} - {name for case, name in jobs if case.heads == 1} == {
        "kv_heads heads/2",
        "kv_heads 1",
    }
    assert set(options.jobs_of("border mask")) == {(case, "border mask") for case in PROBLEMS}
    assert set(options.jobs_of(PROBLEMS[0].name)) == {job for job in jobs if job[0] == PROBLEMS[0]}


@pytest.mark.parametrize(("case", "option"), SUITING, ids=lambda each: each.name)
def test_every_option_runs_and_does_something(case, option):
    (attend, maps), *_ = options.calls(case, option)
    results, grads = run_once(attend, maps)
    assert all(x.isfinite().all() and x.abs().sum() > 0 for x in (*results, *grads))
    assert len(grads) == (4 if option.name.endswith("trained") else 3)
    assert results[0].shape == (2, 4 * case.heads, 8 // option.queries, 12 // option.queries)
    assert grads[1].shape[2:] == (8 // option.keys, 12 // option.keys)
    if option.name == "return_lse":
        assert [x.shape for x in results[1:]] == [(2, case.heads, 8, 12)]
    elif not option.instead:
        ((attend, maps),) = options.calls(case, PLAIN)
        assert (results[0] - run_once(attend, maps)[0][0]).abs().max() > 1e-3


def test_what_an_option_adds_is_of_the_problem():
    case = replace(TINY, height=80, dtype="bf16")
    by_slot, by_displacement = (BY_NAME[name].arguments(case)["bias"] for name in ("bias by slot", DISPLACEMENT))
    assert by_slot.shape == (4, 9)
    assert by_displacement.shape == (4, 5, 5)
    assert by_slot.dtype == by_displacement.dtype == torch.bfloat16
    mask = BY_NAME["key_mask"].arguments(case)["key_mask"]
    assert mask.shape == (2, 80, 12)
    assert 0.85 < mask.float().mean() < 0.95
    heads = [BY_NAME[name] for name in ("kv_heads heads/2", "kv_heads 1")]
    assert [next(options.calls(case, option))[1][1].shape[1] // 4 for option in heads] == [2, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_coarser_queries_are_compared_with_plain_calls_of_the_very_same_result(layout):
    ours, theirs = (run_once(*call) for call in options.calls(replace(TINY, layout=layout), BY_NAME["coarser queries"]))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kernel", [3, 5])
def test_finer_queries_are_compared_with_plain_calls_over_the_same_keys(kernel):
    (ours, _), (theirs, grads) = (
        run_once(*call) for call in options.calls(replace(TINY, kernel=kernel), BY_NAME["finer queries"])
    )
    torch.testing.assert_close(ours[0][:, :, 1::2, 1::2], theirs[0][:, :, 1::2, 1::2])
    assert (ours[0][:, :, ::2] - theirs[0][:, :, ::2]).abs().max() > 1e-3
    assert grads[1].shape[2:] == (4, 6)  # of the keys themselves: the upsampling is differentiated


def test_a_job_that_fails_is_told_and_the_others_are_kept(monkeypatch, tmp_path):
    broken = options.Option("broken", {"dilation": 0})
    chosen = BY_NAME["border mask"], broken, BY_NAME["coarser queries"]
    monkeypatch.setattr(options, "OPTIONS", chosen)
    monkeypatch.setattr(options, "BY_NAME", {option.name: option for option in (PLAIN, *chosen)})
    monkeypatch.setattr(options, "PROBLEMS", (TINY,))
    path = tmp_path / "options-cpu.json"
    answer = CliRunner().invoke(APP, ["--out", str(path), "--budget", "0.001"])
    assert answer.exit_code == 1
    assert "broken: ValueError: dilation must be at least 1, got 0" in answer.output
    rows = load_rows(path, Row)
    assert [(row.option, row.mode) for row in rows] == [
        *(("border mask", mode) for mode in sorted(options.MODES)),
        *(("coarser queries", mode) for mode in sorted(options.MODES)),
    ]
    assert all(row.ratio == pytest.approx(row.ms_p50 / row.plain_ms, rel=1e-3) for row in rows)

    answer = CliRunner().invoke(APP, ["--only", "border", "--budget", "0.001"])
    assert answer.exit_code == 0
    assert "coarser" not in answer.output


def test_ratios_are_to_the_plain_window_or_to_what_an_option_names(monkeypatch):
    taken = {"plain": [2.0], "border mask": [3.0], "finer queries": [4.0, 16.0]}
    asked = []

    def times(case, option, budget_s):
        asked.append(option.name)
        return [dict.fromkeys(options.MODES, ms) for ms in taken[option.name]]

    monkeypatch.setattr(options, "times", times)
    jobs = [(TINY, name) for name in ("border mask", "finer queries", "border mask")]
    found = [rows for _, rows, _ in options.results(jobs, 0.1, WHERE)]
    assert [[row.ratio for row in rows] for rows in found] == [[1.5, 1.5], [0.25, 0.25], [1.5, 1.5]]
    assert [rows[0].plain_ms for rows in found] == [2.0, 16.0, 2.0]
    assert asked.count("plain") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels do compile")
def test_a_warm_up_that_fails_is_told_and_its_job_is_not_timed(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(options, "PROBLEMS", (TINY,))
    path = tmp_path / "rows.json"
    answer = CliRunner().invoke(APP, ["--only", "border mask", "--warm-up", "1", "--out", str(path)])
    assert answer.exit_code == 1
    assert not path.exists()
    for name in ("plain", "border mask"):
        assert f"{TINY.name}: {name}: failed in the warm-up, not timed" in answer.output
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is one")
def test_without_a_gpu_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(options, "DEVICE", torch.device("cuda"))
    answer = CliRunner().invoke(APP, [])
    assert answer.exit_code == 2
    assert "there is no GPU here" in answer.output


def test_rows_come_back_as_they_were_saved_and_newer_ones_replace_older(tmp_path):
    path = tmp_path / "rows.json"
    other = replace(ROW, option="causal", triton=None)
    save_rows(path, [other, ROW], Row)
    assert load_rows(path, Row) == [ROW, other]
    newer = replace(ROW, ms_p50=1.0, ratio=4.0, commit="1")
    save_rows(path, [newer, replace(ROW, gpu="another"), replace(ROW, mode="backward")], Row)
    assert load_rows(path, Row) == [replace(ROW, mode="backward"), newer, other, replace(ROW, gpu="another")]
    with pytest.raises(ValueError, match="missing or unknown"):
        load_rows(path)  # rows of another kind


def test_the_report_has_a_line_for_each_option_and_both_layouts_in_a_cell():
    first, second = (case.name.rsplit(" ", 1)[0] for case in (PROBLEMS[0], PROBLEMS[-1]))
    rows = [
        replace(ROW, problem=f"{first} channels_last", ratio=1.25),
        replace(ROW, problem=f"{first} nchw", ratio=1.5),
        replace(ROW, problem=f"{first} nchw", mode="backward", ratio=0.5),
        replace(ROW, problem=f"{second} channels_last", option="causal", ratio=math.pi),
    ]
    head, align, *lines, empty, where = report.options_table(rows).splitlines()
    cells = {line.split(" | ")[0]: line.strip("| ").split(" | ")[1:] for line in (head, *lines)}
    columns = cells["| option"]
    assert align.count("--:") == len(columns) == 4
    assert [line.split(" | ")[0] for line in lines] == [f"| {option.name}" for option in OPTIONS]
    mask, causal, lse = (
        dict(zip(columns, cells[f"| {name}"], strict=True)) for name in ("border mask", "causal", "return_lse")
    )
    assert mask[f"{first}, forward"] == "1.25 / 1.50"
    assert mask[f"{first}, backward"] == "- / 0.50"
    assert causal[f"{second}, forward"] == "3.14 / -"
    assert set(lse.values()) == {"- / -"}
    assert (empty, where) == ("", "Measured on: NVIDIA H200, torch 2.11, triton 3.6, commit 0.")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_rows_are_valid_and_of_known_jobs(path):
    rows = load_rows(path, Row)
    assert rows
    assert {(row.problem, row.option) for row in rows} <= {(case.name, name) for case, name in options.jobs_of()}
    assert {row.mode for row in rows} <= set(options.MODES)
    assert "unknown" not in {row.commit for row in rows}
