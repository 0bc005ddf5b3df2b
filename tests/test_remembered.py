"""Plans in a file: what is written comes back, what cannot be used is told and left alone, launches take the others."""

import json
import os
import warnings
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")
from image_local_attention import local_attention
from image_local_attention.cli.app import app
from image_local_attention.kernels import gpu, plan, remembered
from image_local_attention.kernels.cache import VARIABLE
from image_local_attention.kernels.plan import Plan
from image_local_attention.kernels.possible import CHOICES, TASKS, Asked, obstacle
from image_local_attention.kernels.remembered import Entry, Where

CPU = torch.device("cpu")
SHARED = 232_448  # bytes, of an H200
HERE = Where("NVIDIA H200", 90, "3.6.0", "0.1.0")
ASKED = Asked("forward", "half", 64, 7, False, plan.PLAIN)
OTHER = Plan((4, 4), 16, 2, 4, keep_by_pointer=True, max_registers=128)
ENTRY = Entry(HERE, ASKED, OTHER, 0.5, 0.25, "a case")


@pytest.fixture
def file(monkeypatch, tmp_path):
    """The file that launches read, which is not there yet; they are on an H200."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "here", lambda device: HERE)
    monkeypatch.setattr(remembered, "shared_memory", lambda device: SHARED)
    remembered.plans.cache_clear()
    yield remembered.path()
    remembered.plans.cache_clear()


def test_entries_come_back_as_they_were_written_and_newer_ones_replace_older(file):
    elsewhere = replace(ENTRY, where=HERE._replace(triton="3.7.0"))
    biased = replace(ENTRY, asked=ASKED._replace(facts=frozenset({"slides", "copies"})))
    remembered.write(file, [ENTRY, elsewhere, biased])
    assert set(remembered.read(file)) == {ENTRY, elsewhere, biased}
    newer = replace(ENTRY, plan=Plan((8, 8), 32, 4), ms=0.125)
    planes = replace(newer, asked=ASKED._replace(planes=True))
    remembered.write(file, [newer, planes])
    assert set(remembered.read(file)) == {newer, planes, elsewhere, biased}
    assert [path.name for path in file.parent.iterdir()] == ["plans.json"]
    assert remembered.plans(CPU) == {newer.asked: newer.plan, planes.asked: planes.plan, biased.asked: biased.plan}


def test_a_file_is_whole_at_every_moment(file, monkeypatch):
    remembered.write(file, [ENTRY])
    before = file.read_text()

    def fail(part, target):
        assert file.read_text() == before
        assert json.loads(part.read_text())
        raise OSError("out of luck")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="out of luck"):
        remembered.write(file, [replace(ENTRY, ms=0.125)])
    assert file.read_text() == before
    assert [path.name for path in file.parent.iterdir()] == ["plans.json"]


def test_what_launches_ask_for_comes_from_the_file_or_else_from_the_table(file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert remembered.choose(CPU, *ASKED) == plan.choose(*ASKED)  # there is no file
        remembered.plans.cache_clear()
        remembered.write(file, [ENTRY])
        assert remembered.choose(CPU, *ASKED) == OTHER != plan.choose(*ASKED)
        for other in (
            ASKED._replace(task="grad_query"),
            ASKED._replace(product="tf32"),
            ASKED._replace(depth=63),
            ASKED._replace(width=8),
            ASKED._replace(planes=True),
            ASKED._replace(facts=plan.PLAIN - {"plain"}),
        ):
            assert remembered.choose(CPU, *other) == plan.choose(*other)


def test_a_file_is_read_once_per_process_and_device(file, monkeypatch):
    remembered.write(file, [ENTRY])
    reads, read = [], remembered.read
    monkeypatch.setattr(remembered, "read", lambda file: (reads.append(file), read(file))[1])
    for _ in range(3):
        remembered.choose(CPU, *ASKED)
    assert reads == [file]


def test_launches_take_what_is_remembered(file, monkeypatch):
    """In the interpreter, whose launches take one plan unless there is a GPU."""
    if torch.cuda.is_available():
        pytest.skip("the search's own test does so on a GPU")
    monkeypatch.setattr(gpu, "of", lambda device: gpu.Gpu(90, True))
    taken, choose = [], remembered.choose
    monkeypatch.setattr(remembered, "choose", lambda *each: (taken.append((each[1:], choose(*each))), taken[-1][1])[1])
    x = torch.randn(3, 1, 4, 9, 10, generator=torch.Generator().manual_seed(0))

    def run():
        taken.clear()
        remembered.plans.cache_clear()
        maps = [each.clone().requires_grad_() for each in x]
        out = local_attention(*maps, 3, backend="triton")
        return out, *torch.autograd.grad(out.square().sum(), maps)

    usual = run()
    asked = [Asked(*each) for each, _ in taken]
    assert [each.task for each in asked] == list(TASKS)
    other = Plan((8, 8), 16, 2, keep_by_pointer=True)
    assert other not in {found for _, found in taken}
    remembered.write(file, [replace(ENTRY, asked=each, plan=other) for each in asked])
    again = run()
    assert taken == [(each, other) for each in asked]
    for got, want in zip(again, usual, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("where", [
    HERE._replace(gpu="NVIDIA H100"), HERE._replace(arch=100), HERE._replace(triton="3.7.0"),
    HERE._replace(library="0.2.0"),
])  # fmt: skip
def test_plans_of_elsewhere_are_not_taken(file, where):
    remembered.write(file, [replace(ENTRY, where=where)])
    assert remembered.choose(CPU, *ASKED) == plan.choose(*ASKED)


def broken(**changes) -> str:
    return json.dumps({"format": remembered.FORMAT, "plans": [ENTRY.to_json() | changes]})


@pytest.mark.parametrize(("text", "reason"), [
    ('{"format": 99, "plans": []}', f"it has format 99, wanted {remembered.FORMAT}"),
    ('{"plans": []}', "it is not a file of plans"),
    ("[]", "it is not a file of plans"),
    ('{"format": 1}', "it has no list of plans"),
    ('{"format": 1, "plans": [', "Expecting value"),
    ("", "Expecting value"),
    (b"\xff\xfe", "decode"),
    (broken(depth="64"), "depth must be"),
    (broken(planes=1), "planes must be"),
    (broken(depth=True), "depth must be"),
    (broken(colour="red"), "fields missing or unknown: colour"),
    (broken(task="backward"), "no launch asks for"),
    (broken(facts=["plain", "wild"]), "no launch asks for"),
    (broken(plan={"tile": [8, 8]}), "fields missing or unknown"),
    (broken(plan=3), "plan must be"),
    ('{"format": 1, "plans": [3]}', "fields missing or unknown"),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_told_and_the_table_holds(file, text, reason):
    file.parent.mkdir()
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(UserWarning, match=reason) as caught:
        assert remembered.choose(CPU, *ASKED) == plan.choose(*ASKED)
    assert len(caught) == 1
    assert str(file) in str(caught[0].message)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=reason):
        remembered.write(file, [ENTRY])
    assert file.read_bytes() == before


def test_a_file_that_cannot_be_read_is_told(file):
    file.mkdir(parents=True)
    with pytest.warns(UserWarning, match="is ignored"):
        assert remembered.plans(CPU) == {}


@pytest.mark.parametrize(("asked", "change", "reason"), [
    (ASKED, {"tile": [8, 9]}, "tile must be one of"),
    (ASKED, {"tile": [4.0, 4]}, "tile must be one of"),
    (ASKED, {"block": 48}, "block must be one of"),
    (ASKED, {"warps": 3}, "warps must be one of"),
    (ASKED, {"stages": 0}, "stages must be one of"),
    (ASKED, {"max_registers": 1000}, "max_registers must be one of"),
    (ASKED._replace(planes=True), {"tile": [4, 4]}, "tile must be a multiple of 8 columns wide"),
    (ASKED, {"tile": [16, 8], "warps": 1}, "more registers than there are"),
    (ASKED._replace(depth=200), {"block": 128, "stages": 4, "warps": 8}, "bytes of shared memory"),
])  # fmt: skip
def test_a_plan_that_cannot_be_is_told_and_the_others_hold(file, asked, change, reason):
    impossible = replace(ENTRY, asked=asked)
    content = impossible.to_json()
    content["plan"] |= change
    other = replace(ENTRY, asked=ASKED._replace(width=9))
    file.parent.mkdir()
    file.write_text(json.dumps({"format": remembered.FORMAT, "plans": [content, other.to_json()]}))
    with pytest.warns(UserWarning, match=reason) as caught:
        assert remembered.choose(CPU, *asked) == plan.choose(*asked)
    assert len(caught) == 1
    assert remembered.plans(CPU) == {other.asked: OTHER}


def test_choices_name_every_field_of_a_plan_and_hold_its_defaults():
    assert set(CHOICES) == set(Plan.__dataclass_fields__)
    assert obstacle(ASKED, Plan((8, 8), 32, 4), SHARED) is None


def test_the_file_lies_in_the_folder_named_or_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, "~/somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert remembered.path() == tmp_path / "somewhere" / "plans.json"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert remembered.path() == tmp_path / ".cache" / "image-local-attention" / "plans.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert remembered.path() == tmp_path / "xdg" / "image-local-attention" / "plans.json"
    monkeypatch.setenv(VARIABLE, "off")
    assert remembered.path() is None
    remembered.plans.cache_clear()
    assert remembered.choose(CPU, *ASKED) == plan.choose(*ASKED)


def test_info_says_which_plans_launches_take(file, monkeypatch):
    def info() -> str:
        answer = CliRunner().invoke(app, ["info"], env={"COLUMNS": "250"})
        assert answer.exit_code == 0
        return answer.stdout

    assert f"those of the table: there is no {file}" in info()
    remembered.write(file, [ENTRY, replace(ENTRY, where=HERE._replace(arch=80))])
    if not torch.cuda.is_available():
        assert f"{file}: no GPU to use them" in info()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = type("Properties", (), {"name": "NVIDIA H200", "major": 9, "minor": 0, "total_memory": 2**37})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert f"{file}: 1 in use on cuda:0" in info()
    monkeypatch.setenv(VARIABLE, "off")
    assert f"those of the table: {VARIABLE} is off" in info()
