"""The benchmarks: baselines, floors, measurement, errors against fp64, and the rows that are kept."""

import functools
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from image_local_attention.bench.cases import CPU_GOALS, GROUPS, MODES, PROTOTYPE, Case, extension_ms, sketch_ms
from image_local_attention.bench.exact import error, exact_results, regions
from image_local_attention.bench.measure import MIB, Measurement, measure
from image_local_attention.bench.peers import PEERS, Peer
from image_local_attention.bench.rows import load_rows, row_of, save_rows
from image_local_attention.bench.tables import goals_table
from image_local_attention.bench.timing import passes, time_case, warm_up
from image_local_attention.bench.unfold import unfold_attention, unfold_similarity, unfold_weighting

RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("h*.json"))
SMALL = Case(2, 40, 70, 3, 4, 4, "fp32", layout="nchw", depth_value=5)


def patch_of(x, y, at, kH, kW):
    """[C, kH*kW]: the patch around pixel (y, at) of [C, H, W], zeros outside the map."""
    patch = x.new_zeros(x.shape[0], kH * kW)
    for i, j in itertools.product(range(kH), range(kW)):
        row, column = y - kH // 2 + i, at - kW // 2 + j
        if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
            patch[:, i * kW + j] = x[:, row, column]
    return patch


@pytest.mark.parametrize("kernel", [(3, 5), (4, 2), (1, 9)])
def test_baselines_agree_with_a_loop_over_pixels(kernel):
    query, key, value = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64)
    logits = torch.empty(2, 5, 6, kernel[0] * kernel[1], dtype=torch.float64)
    sums, attended = torch.empty_like(value), torch.empty_like(value)
    weight = torch.randn_like(logits)
    for b, y, x in itertools.product(range(2), range(5), range(6)):
        logits[b, y, x] = query[b, :, y, x] @ patch_of(key[b], y, x, *kernel)
        sums[b, :, y, x] = patch_of(value[b], y, x, *kernel) @ weight[b, y, x]
        attended[b, :, y, x] = patch_of(value[b], y, x, *kernel) @ logits[b, y, x].softmax(0)
    torch.testing.assert_close(unfold_similarity(query, key, *kernel), logits)
    torch.testing.assert_close(unfold_weighting(value, weight, *kernel), sums)
    torch.testing.assert_close(unfold_attention(query, key, value, *kernel), attended)


def test_the_baseline_is_differentiable():
    maps = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda q, k, v: unfold_attention(q, k, v, 3, 2), maps)


# As printed in the design. Its row of windows of 81 has the floor of 80, and its rates are rounded.
PRINTED_FLOORS = (
    *(0.125, 0.125, 0.250, 0.0375, 0.0312, 0.111, 0.250, 0.0039, 6.52),
    *(0.0624, 0.0624, 0.0624, 0.0624, 0.0156, 0.0142),
)


@pytest.mark.parametrize(("case", "printed"), tuple(zip(PROTOTYPE, PRINTED_FLOORS, strict=True)))
def test_floors_are_the_printed_ones(case, printed):
    if case.kernel == 81:
        case = replace(case, kernel=80)
    assert case.floor_ms("forward") == pytest.approx(printed, rel=0.0125)


def test_backward_floors():
    bytes_bound = Case(1, 512, 512, 1, 64, 5, "fp32", "tf32")
    assert bytes_bound.floor_ms("backward") == pytest.approx(512 * 512 * (8 * 64 * 4 + 4) / 4.3e12 * 1e3)
    flops_bound = Case(1, 512, 512, 1, 64, 21, "bf16")
    assert flops_bound.floor_ms("backward") == pytest.approx(512 * 512 * 441 * 10 * 64 / 790e12 * 1e3)
    both = flops_bound.floor_ms("forward") + flops_bound.floor_ms("backward")
    assert flops_bound.floor_ms("forward+backward") == pytest.approx(both)
    two_depths = Case(1, 64, 64, 1, 64, 5, "bf16", depth_value=32)
    assert two_depths.flops("forward") == 64 * 64 * 25 * 2 * (64 + 32)
    assert two_depths.flops("backward") == 64 * 64 * 25 * (3 * 2 * 64 + 2 * 2 * 32)
    assert two_depths.bytes("forward") == 64 * 64 * 2 * (2 * 64 + 2 * 32)
    assert replace(two_depths, dtype="fp16", dilation=3).floor_ms("forward") == two_depths.floor_ms("forward")


def test_groups_and_known_times():
    assert {name: len(cases) for name, cases in GROUPS.items()} == {
        "design": 30,
        "original": 28,
        "models": 16,
        "cpu": 3,
    }
    names = [case.name for case in {case for cases in GROUPS.values() for case in cases}]
    assert len(set(names)) == len(names)
    assert {kernel for kernel, _ in CPU_GOALS} <= {case.kernel for case in GROUPS["cpu"]}
    known = Case(1, 256, 256, 24, 128, 81, "bf16")
    assert sketch_ms(known, "forward+backward") == pytest.approx(13.9 + 18.5 + 27.2)
    assert sketch_ms(replace(known, layout="nchw"), "forward") is None
    assert extension_ms(GROUPS["cpu"][1], "backward") == pytest.approx(2.12 - 0.92)


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_maps_have_the_layout_of_the_case(layout):
    query, _, value, grad_out = replace(SMALL, layout=layout).maps(torch.device("cpu"))
    assert query.shape == (2, 12, 40, 70)
    assert value.shape == grad_out.shape == (2, 15, 40, 70)
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert all(x.is_contiguous(memory_format=format) for x in (query, value, grad_out))


def test_measure_finds_a_known_peak():
    def known():
        first, second = torch.empty(3 * MIB, dtype=torch.uint8), torch.empty(2 * MIB, dtype=torch.uint8)
        del first  # 5 MiB at once, then 2, then 4.5
        return second, torch.empty(5 * MIB // 2, dtype=torch.uint8)

    def from_argument(x):
        return x[: MIB // 2].clone()

    kept = []
    assert measure(lambda: kept.append(torch.empty(MIB)), "cpu", budget_s=0.01).peak_mib == 4.0
    assert measure(known, "cpu", budget_s=0.01).peak_mib == 5.0
    kept.clear()
    assert measure(known, "cpu", budget_s=0.01).peak_mib == 5.0
    prepare = iter(range(10**6))
    taken = measure(
        from_argument, "cpu", setup=lambda: torch.full((8 * MIB,), next(prepare) % 9, dtype=torch.uint8), budget_s=0.01
    )
    assert taken.peak_mib == 0.5
    assert measure(lambda: None, "cpu", budget_s=0.01).peak_mib == 0.0


def test_measure_counts_the_graph_and_the_gradients():
    x = torch.ones(MIB, requires_grad=True)  # 4 MiB
    taken = measure(lambda: torch.autograd.grad(x.exp().sum(), x), "cpu", budget_s=0.01)
    assert taken.peak_mib == pytest.approx(8.0, abs=0.01)  # exp, saved, and the gradient beside it


def test_measure_times_the_call_and_not_its_setup(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("image_local_attention.bench.measure.time.perf_counter", lambda: now[0])

    def take(seconds):
        now[0] += seconds

    taken = measure(lambda _: take(0.25), "cpu", setup=lambda: take(1.0), budget_s=3.5)
    assert taken == Measurement(250.0, 250.0, 250.0, 0.0, 3)
    once = iter([7.0])
    over_budget = measure(lambda: take(next(once)), "cpu", budget_s=3.5)
    assert over_budget == Measurement(7000.0, 7000.0, 7000.0, 0.0, 1)
    lengths = iter([0.5, *range(1, 12)])
    assert measure(lambda: take(next(lengths)), "cpu", budget_s=60.0) == Measurement(6.0e3, 3.0e3, 9.0e3, 0.0, 11)


@pytest.mark.parametrize("case", [SMALL, replace(SMALL, height=9, width=11)], ids=["regions", "whole"])
def test_errors_are_measured_against_fp64(case):
    maps = case.maps(torch.device("cpu"))
    doubles = [x.double() for x in maps]
    (_, compute), (_, differentiate) = passes(PEERS["ours"].make(case), doubles, ("forward", "backward"))
    results = *compute(), *differentiate()
    exact = [(region, exact_results(case, maps, region)) for region in regions(case)]
    assert error(case, exact, "forward+backward", results) < 1e-12
    assert error(case, exact, "forward", results[:1]) < 1e-12

    compared = torch.cat([region.of(results[2], case.heads).flatten() for region in regions(case)])
    results[2][-1, -1, -1, -1] += 0.5  # key's gradient, at the last pixel of the last head of the last image
    assert error(case, exact, "backward", results[1:]) == pytest.approx(0.5 / compared.norm().item())


def test_every_mode_gives_its_results():
    case = replace(SMALL, height=6, width=5)
    runs = dict(passes(PEERS["ours"].make(case), case.maps(torch.device("cpu")), MODES))
    out, *grads = runs["forward+backward"]()
    assert len(grads) == 3
    torch.testing.assert_close(runs["forward"](), (out,))
    for _ in range(2):  # it can be repeated
        torch.testing.assert_close(runs["backward"](), tuple(grads))


def row(**changes):
    taken, where = Measurement(0.25, 0.2, 0.3, 12.0, 9), {"torch": "2.11", "triton": "3.6", "gpu": "NVIDIA H200"}
    case = next(iter(PROTOTYPE))
    return replace(row_of(case, "ours", "forward", "cold", taken, 1e-3, where | {"commit": "0"}), **changes)


def test_a_row_has_the_floor_and_the_sketch_of_an_h200_only():
    assert (row().floor_ms, row().floor_share, row().sketch_ms) == (0.1249, 0.499, 0.23)
    elsewhere = {"torch": "2.11", "triton": None, "gpu": "none (CPU, 2 thread(s))", "commit": "0"}
    taken = Measurement(0.25, 0.2, 0.3, 12.0, 9)
    other = row_of(next(iter(PROTOTYPE)), "ours", "forward", None, taken, 1e-3, elsewhere)
    assert (other.floor_ms, other.floor_share, other.sketch_ms, other.extension_ms) == (None,) * 4


def test_rows_come_back_as_they_were_saved_and_newer_ones_replace_older(tmp_path):
    path = tmp_path / "new" / "rows.json"
    save_rows(path, [row(mode="backward"), row()])
    assert load_rows(path) == [row(mode="backward"), row()]
    save_rows(path, [row(ms_p50=0.125, commit="1"), row(gpu="another"), row(l2="hot")])
    assert load_rows(path) == [
        *(row(mode="backward"), row(ms_p50=0.125, commit="1"), row(l2="hot")),
        row(gpu="another"),
    ]
    text = path.read_text()
    save_rows(path, load_rows(path)[::-1])
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda entry: entry.pop("error"), "missing or unknown: ['error']"),
        (lambda entry: entry.update(date="today"), "missing or unknown: ['date']"),
        (lambda entry: entry.update(ms_p50="0.25"), "ms_p50 must be"),
        (lambda entry: entry.update(error=None), "error must be"),
        (lambda entry: entry.update(runs=True), "runs must be"),
        (lambda entry: entry.update(mode="forward"), "two rows"),
    ],
)
def test_spoiled_rows_are_refused(tmp_path, spoil, complaint):
    path = tmp_path / "rows.json"
    save_rows(path, [row(), row(mode="backward")])
    entries = json.loads(path.read_text())
    spoil(next(entry for entry in entries if entry["mode"] == "backward"))
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="rows") as caught:
        load_rows(path)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_rows_are_valid_and_of_known_cases(path):
    names = {case.name for cases in GROUPS.values() for case in cases}
    rows = load_rows(path)
    assert rows
    assert {row.case for row in rows} <= names
    assert {row.mode for row in rows} <= set(MODES)
    assert {row.impl for row in rows} <= set(PEERS)
    assert "unknown" not in {row.commit for row in rows}


def test_the_goals_are_judged_by_their_ratios():
    case = GROUPS["cpu"][1]
    assert case.kernel == 11
    mine, theirs = (
        row(case=case.name, impl=impl, ms_p50=ms, l2=None) for impl, ms in (("ours", 2.0), ("unfold", 500.0))
    )

    def verdicts(ours, unfold):
        table = goals_table([ours, unfold])
        return [list(column.cells) for column in table.columns][5::4]

    assert verdicts(replace(mine, peak_mib=2.0), replace(theirs, peak_mib=99.0)) == [["250 met"], ["50 MISSED"]]
    assert verdicts(replace(mine, ms_p50=2.1), replace(theirs, peak_mib=600.0)) == [["250 MISSED"], ["50 met"]]
    assert verdicts(replace(mine, l2="cold"), replace(theirs, l2="cold")) == [[], []]  # they are a CPU's


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels do compile")
def test_a_warm_up_that_fails_is_told_and_breaks_nothing(capfd):
    assert warm_up([SMALL], 2) == [SMALL]
    assert "Traceback" in capfd.readouterr().err


def test_every_case_of_a_peer_that_compiles_is_compiled(monkeypatch):
    """However many shapes torch would compile one function for."""
    monkeypatch.setitem(PEERS, "compiled", Peer(lambda case: _compiled, lambda *_: True, compiles=True))
    cases = [Case(1, 8, 4 + i, 1, 16, 3, "fp32", layout="nchw") for i in range(3)]
    with torch._dynamo.config.patch(recompile_limit=1):
        for case in cases:
            assert [
                mode for mode, *_ in time_case(case, "compiled", torch.device("cpu"), ("forward",), False, 0.01)
            ] == ["forward"]


@functools.partial(torch.compile, dynamic=False, fullgraph=True, backend="eager")
def _compiled(query, key, value):
    return query + key + value
