"""`image-local-attention bench`: the ways to compute that it times side by side, its command and its figures."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from image_local_attention import local_attention
from image_local_attention.bench import peers
from image_local_attention.bench.cases import GROUPS, Case
from image_local_attention.bench.exact import error, exact_results, regions
from image_local_attention.bench.peers import PEERS
from image_local_attention.bench.plot import against_the_window, save_figures, share_of_the_floor
from image_local_attention.bench.rows import Row, load_rows
from image_local_attention.cli.app import app
from image_local_attention.cli.bench import Group, Impl

CPU = torch.device("cpu")
SMALL = Case(2, 6, 9, 1, 4, 3, "fp32")


def bench(*arguments: object):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def small_cases(monkeypatch):
    cases = tuple(Case(1, 8, 9, 1, 4, kernel, "fp32", layout="nchw") for kernel in (5, 11))
    monkeypatch.setitem(GROUPS, "cpu", cases)
    return cases


def test_the_command_knows_every_group_and_every_peer():
    assert [group.value for group in Group] == list(GROUPS)
    assert [impl.value for impl in Impl] == list(PEERS)


def test_the_cpu_group_runs_and_reports(small_cases, tmp_path):
    path = tmp_path / "cpu.json"
    answer = bench("--group", "cpu", "--impl", "ours", "--impl", "unfold", "--out", path, "--budget", 0.001)
    assert answer.exit_code == 0
    rows = load_rows(path)
    modes = ("forward", "forward+backward")
    assert {(row.case, row.impl, row.mode) for row in rows} == {
        (case.name, impl, mode) for case in small_cases for impl in ("ours", "unfold") for mode in modes
    }
    assert all(row.error < 1e-5 and row.ms_p50 > 0 and row.peak_mib > 0 and row.host_ms is None for row in rows)
    assert answer.output.count("met") + answer.output.count("MISSED") == 5


def test_a_peer_that_fails_is_told_and_ours_that_fails_stops(small_cases, monkeypatch):
    def fail(case):
        raise RuntimeError("out of luck")

    monkeypatch.setitem(PEERS, "unfold", replace(PEERS["unfold"], make=fail))
    answer = bench("--group", "cpu", "--impl", "ours", "--impl", "unfold", "--budget", 0.001)
    assert answer.exit_code == 0
    assert answer.output.count("unfold: RuntimeError: out of luck") == 2
    monkeypatch.setitem(PEERS, "ours", replace(PEERS["ours"], make=fail))
    with pytest.raises(RuntimeError, match="out of luck"):
        bench("--group", "cpu", "--impl", "ours", "--budget", 0.001)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--group", "none"), "'design', 'original', 'models', 'cpu'"),
        (("--group", "cpu", "--only", "k4"), "--only must be in the name of a case of cpu, got 'k4'"),
        (("--impl", "hers"), "'ours', 'unfold', 'natten', 'flex'"),
    ],
)
def test_what_is_not_there_is_refused(arguments, complaint):
    answer = bench(*arguments)
    assert answer.exit_code == 2
    assert complaint in " ".join(answer.output.replace("│", " ").split())


def test_figures_need_matplotlib_and_say_so(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "image_local_attention.bench.plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    answer = bench("--group", "cpu", "--plot", tmp_path)
    assert answer.exit_code == 2
    assert "pip install 'image-local-attention[bench]'" in answer.output


@pytest.mark.parametrize(
    "case",
    [SMALL, replace(SMALL, layout="nchw", heads=3, depth_value=5), replace(SMALL, height=9, dilation=2)],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("name", ["ours", "unfold"])
def test_peers_compute_the_case(name, case):
    peer = PEERS[name]
    if not peer.suits(case, CPU, 1 << 30):
        assert name == "unfold"
        assert case.heads > 1 or case.dilation > 1
        return
    maps = case.maps(CPU)
    out = peer.make(case)(*maps[:3])
    exact = [(region, exact_results(peer.problem(case), maps, region)) for region in regions(case)]
    assert error(case, exact, "forward", (out,)) < 1e-6


def test_the_unfold_code_needs_memory_for_its_copies():
    wanted = 4.5 * 9 * 2 * 6 * 9 * 4 * 4
    assert PEERS["unfold"].suits(SMALL, CPU, int(wanted) + 1)
    assert not PEERS["unfold"].suits(SMALL, CPU, int(wanted))


def test_flex_attention_computes_a_masked_border(monkeypatch):
    """Its own eager path, in fp64, with the mask that is given to its compiled one."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    create = flex.create_block_mask
    monkeypatch.setattr(flex, "create_block_mask", lambda *args, _compile, **kwargs: create(*args, **kwargs))
    monkeypatch.setattr(peers, "_compiled_flex", lambda: flex.flex_attention)
    case = Case(2, 8, 16, 2, 16, 4, "fp32", dilation=2)
    maps = [x.double() for x in case.maps(CPU)[:3]]
    got = PEERS["flex"].make(case)(*maps)
    want = local_attention(*maps, 4, heads=2, dilation=2, border=PEERS["flex"].border)
    torch.testing.assert_close(got, want)
    assert not PEERS["flex"].suits(replace(case, depth_value=8), CPU, 1)
    assert not PEERS["flex"].trains(CPU)


def test_natten_is_asked_for_what_it_computes(monkeypatch):
    """With a stand-in of its interface: [B, H, W, heads, D], windows that shift."""

    def na2d(query, key, value, kernel_size, dilation, scale):
        maps = [x.flatten(3).permute(0, 3, 1, 2) for x in (query, key, value)]
        assert query.shape == (2, 6, 9, 2, 4)
        out = local_attention(*maps, kernel_size, heads=query.shape[3], dilation=dilation, scale=scale, border="shift")
        return out.permute(0, 2, 3, 1).unflatten(3, query.shape[3:])

    monkeypatch.setitem(sys.modules, "natten", SimpleNamespace(na2d=na2d, __spec__=SimpleNamespace(name="natten")))
    case, peer = replace(SMALL, heads=2), PEERS["natten"]
    maps = case.maps(CPU)
    out = peer.make(case)(*maps[:3])
    assert out.shape == (2, 8, 6, 9)
    exact = [(region, exact_results(peer.problem(case), maps, region)) for region in regions(case)]
    assert error(case, exact, "forward", (out,)) < 1e-6
    gpu = torch.device("cuda")
    assert peer.suits(case, gpu, 0)
    assert not peer.suits(case, CPU, 0)
    assert not peer.suits(replace(case, kernel=4), gpu, 0)
    assert not peer.suits(replace(case, dilation=3), gpu, 0)


def row(case: Case, impl: str = "ours", mode: str = "forward", ms: float = 1.0, share: float | None = None) -> Row:
    where = {"torch": "2", "triton": None, "gpu": "none", "commit": "0"}
    none = dict.fromkeys(("l2", "floor_ms", "sketch_ms", "extension_ms", "host_ms"))
    return Row(case.name, impl, mode, ms_p50=ms, ms_p20=ms, ms_p80=ms, runs=1, peak_mib=2 * ms, error=0.0,
               floor_share=share, **none, **where)  # fmt: skip


def test_figures_show_the_rows(tmp_path):
    cpu, design = GROUPS["cpu"], GROUPS["design"]
    rows = [row(case, impl, "forward+backward", ms) for case, ms in zip(cpu, (1, 2, 3), strict=True) for impl in PEERS]
    assert share_of_the_floor(rows) is None
    assert against_the_window(rows[:1]) is None
    (time, memory) = against_the_window(rows).axes
    assert [line.get_label() for line in time.lines] == list(PEERS)
    assert time.lines[0].get_xydata().tolist() == [[5, 1], [11, 2], [21, 3]]
    assert memory.lines[0].get_ydata().tolist() == [2, 4, 6]

    rows += [
        row(design[0], share=0.5),
        row(design[0], mode="backward", share=0.25),
        row(design[1], "unfold", share=0.9),
    ]
    (axes,) = share_of_the_floor(rows).axes
    assert [bar.get_width() for bar in axes.patches] == [50, 25]
    assert [label.get_text() for label in axes.get_yticklabels()] == [design[0].name]

    written = save_figures(rows, tmp_path / "new")
    assert [path.name for path in written] == ["floor.svg", "window.svg"]
    texts = [path.read_text() for path in written]
    assert [path.read_text() for path in save_figures(rows, tmp_path / "new")] == texts
    assert design[0].name in texts[0]


def test_every_case_of_every_group_has_maps_that_the_operator_takes():
    for case in {case for cases in GROUPS.values() for case in cases}:
        small = replace(case, batch=1, height=2, width=3)
        query, key, value, grad_out = small.maps(CPU)
        assert PEERS["ours"].make(small)(query, key, value).shape == grad_out.shape
