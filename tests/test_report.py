"""The tables and figures of the page, made from rows."""

from dataclasses import replace

import pytest
from benchmarks import limits, options, report

from image_local_attention.bench.cases import GROUPS
from image_local_attention.bench.rows import Row, load_rows, save_rows

WHERE = {"torch": "2", "triton": None, "gpu": "none", "commit": "0"}
NONE = dict.fromkeys(("host_ms", "floor_ms", "floor_share", "sketch_ms", "extension_ms"))
OPTION = options.Row(options.PROBLEMS[0].name, "border mask", "forward", 0.5, 0.25, 2.0, **WHERE)
LIMIT = limits.Row(limits.GROWTH.name, "a case", "forward", 3.0, 2.0, **WHERE)


def row(case, impl="ours", mode="forward", l2=None, ms=2.0, **more) -> Row:
    found = Row(case.name, impl, mode, l2, ms, ms, ms, runs=1, peak_mib=4 * ms, error=1e-3, **NONE, **WHERE)
    return replace(found, **more)


@pytest.fixture
def page(monkeypatch, tmp_path):
    path = tmp_path / "page.md"
    path.write_text("".join(f"{name}\n<!-- begin: {name} -->\nold\n<!-- end: {name} -->\n" for name in NAMES))
    monkeypatch.setattr(report, "PAGE", path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "FIGURES", tmp_path / "figures")
    return path


NAMES = ("GPU", "original", "models", "options", "CPU", *report.LIMITED)


def filled(**texts: str) -> str:
    texts = dict.fromkeys(NAMES, "No rows yet.\n") | texts
    return "".join(f"{name}\n<!-- begin: {name} -->\n\n{texts[name]}\n<!-- end: {name} -->\n" for name in NAMES)


def test_every_table_has_its_place_and_other_text_stays(page, tmp_path):
    report.main()
    assert page.read_text() == filled()
    assert not (tmp_path / "figures").exists()
    on_cpu = [row(case) for case in GROUPS["cpu"]]
    both = [row(case, l2="cold", floor_share=0.5, mode=mode) for case in GROUPS["design"][:2] for mode in report.PASSES]
    save_rows(tmp_path / "options-h200.json", [OPTION], options.Row)
    save_rows(tmp_path / "limits-h200.json", [LIMIT], limits.Row)
    save_rows(tmp_path / "cpu.json", [*on_cpu, *(replace(each, mode="forward+backward") for each in on_cpu)])
    save_rows(tmp_path / "h200.json", both)
    for _ in range(2):  # it can be repeated
        report.main()
        assert page.read_text() == filled(
            GPU=report.tables(both),
            options=report.options_table([OPTION]),
            CPU=report.cpu_table(load_rows(tmp_path / "cpu.json")),
            growth=report.limits_tables([limits.GROWTH], [LIMIT]),
        )
    assert {str(path.relative_to(tmp_path / "figures")) for path in tmp_path.glob("figures/*/*")} == {
        "h200/floor.svg",
        "cpu/window.svg",
    }


def test_a_cpu_is_compared_with_the_peers_that_have_rows():
    first, second, _ = GROUPS["cpu"]
    rows = [row(first), row(first, "unfold", ms=60.0), row(second), row(second, "flex", ms=5.0)]
    lines = report.cpu_table(rows).splitlines()
    assert lines[2] == f"| {first.name} | forward | 2 | 60 | 30.0 | - | - | 8 | 240 | 30 |"
    assert lines[3] == f"| {second.name} | forward | 2 | - | - | 5 | 2.5 | 8 | - | - |"
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")


def test_the_page_shows_the_committed_rows(monkeypatch, tmp_path):
    folder = report.PAGE.parent
    committed = report.PAGE.read_text()
    copy = tmp_path / "page.md"
    copy.write_text(committed)
    monkeypatch.setattr(report, "PAGE", copy)
    monkeypatch.setattr(report, "FIGURES", tmp_path / "figures")
    report.main()
    assert copy.read_text() == committed
    drawn = {path.relative_to(tmp_path / "figures") for path in tmp_path.glob("figures/*/*")}
    assert all(f"(figures/{path})" in committed for path in drawn)
    assert drawn == {path.relative_to(folder / "figures") for path in folder.glob("figures/*/*")}


def test_the_original_s_grid_stands_beside_the_unfold_code():
    case = GROUPS["original"][0]
    rows = [row(case, l2="cold"), row(case, l2="cold", mode="forward+backward"), row(case, "unfold", l2="cold", ms=9.0)]
    assert report.original_table(rows[:2]) == ""
    lines = report.original_table(rows).splitlines()
    assert lines[2] == f"| {case.name} | forward | 2 | 9 | 4.5 | - | - | 8 | 36 | 4 |"
    assert report.tables(rows) == ""  # it has but one layout


def test_image_models_stand_beside_flex_attention():
    case, elsewhere = GROUPS["models"][0], GROUPS["original"][0]
    rows = [row(case, l2="cold"), row(elsewhere, "flex", l2="cold"), row(case, "flex", l2="cold", ms=3.0)]
    assert report.models_table(rows[:2]) == ""
    assert report.models_table(rows).splitlines()[2] == f"| {case.name} | forward | 2 | - | - | 3 | 1.5 | 8 | - | - |"


def test_figures_with_a_limit_have_a_table_each_that_counts_what_meets_the_goal():
    growth = [replace(LIMIT, mode=mode, value=value) for mode, value in (("forward", 2.2), ("backward", 2.3))]
    part = replace(LIMIT, figure=limits.FIRST_CALL_PARTS.name, value=0.5)
    lines = report.limits_tables([limits.GROWTH], [*growth, part]).splitlines()
    assert lines == [
        "| case | mode | ps a pixel | ps a pixel at 1024x1024 | ratio |",
        "|---|---|--:|--:|--:|",
        "| a case | forward | 2.2 | 2 | 1.10 |",
        "| a case | backward | 2.3 | 2 | 1.15 |",
        "",
        "Goal of the ratio: at most 1.1, met by 1 of 2.",
        "",
        "Measured on: none, torch 2, triton None, commit 0.",
    ]
    call = replace(LIMIT, figure=limits.FIRST_CALL.name)
    both = report.limits_tables(report.LIMITED["first call"], [call, part])
    assert both.count("Measured on") == 2
    assert both.count("Goal") == 1
    assert "| a case | forward | 0.5 | 2 | 0.25 |" in both


def test_shares_of_the_floor_are_of_large_cases_in_half_precision_and_tf32():
    def shares(of: float, **like) -> list[Row]:
        cases = [case for case in GROUPS["design"] if all(getattr(case, name) == value for name, value in like.items())]
        return [row(case, mode="forward", floor_share=of) for case in cases]

    wide = shares(0.25, height=2048, layout="channels_last")
    tf32 = shares(0.64, precision="tf32", kernel=5, layout="channels_last")
    left_out = shares(0.01, height=64) + shares(0.02, dtype="fp32", precision="ieee") + shares(0.03, layout="nchw")
    assert (len(wide), len(tf32)) == (1, 1)
    lines = report.floors([*wide, *tf32, *left_out]).splitlines()
    assert lines[2:] == [f"| forward | 40% | 25% | {wide[0].case} |"]
    assert report.floors(left_out) == ""


def test_the_sketch_is_compared_in_all_cases_and_in_exact_fp32():
    sketched = [case for case in GROUPS["design"] if case.height == 512 and case.depth == 64 and case.kernel == 11]
    assert {case.precision for case in sketched} == {"ieee", "tf32"}
    speeds = {("ieee", "channels_last"): 4.0, ("tf32", "channels_last"): 1.0}
    rows = [
        row(case, l2="cold", mode=mode, sketch_ms=2.0 * speeds[case.precision, case.layout])
        if (case.precision, case.layout) in speeds
        else row(case, l2="cold", mode=mode)
        for case in sketched
        for mode in report.PASSES
    ]
    told = [line for line in report.layouts_table(rows, "design").splitlines() if "Geometric" in line]
    assert len(told) == len(report.PASSES)
    wanted = "2.00 times the sketch's speed (slowest case 1.00); 4.00 times in exact fp32; NCHW takes 1.00 times"
    assert all(wanted in line for line in told)


def test_every_figure_with_a_limit_has_a_place():
    shown = [figure.name for figures in report.LIMITED.values() for figure in figures]
    assert len(set(shown)) == len(shown)
    assert set(shown) == {each.name for each in vars(limits).values() if isinstance(each, limits.Figure)}


def test_a_table_names_the_commits_of_its_own_rows():
    design, model = (
        [row(case, l2="cold", mode=mode, commit=group) for case in GROUPS[group][:2] for mode in report.PASSES]
        for group in report.BOTH_LAYOUTS
    )
    (first, second), original = report.tables([*design, *model]).split("\n| case")[:2], GROUPS["original"][0]
    assert ("commit design." in first, "commit models." in first) == (True, False)
    assert ("commit design." in second, "commit models." in second) == (False, True)
    both = [row(original, impl, l2="cold", commit="original") for impl in ("ours", "unfold")]
    assert report.original_table([*design, *both]).count("commit") == 1
    hot = row(original, l2="hot", ms=99.0)
    assert report.original_table([*both, hot]) == report.original_table(both)
