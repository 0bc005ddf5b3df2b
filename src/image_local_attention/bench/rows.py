"""Rows of a benchmark: what is kept of each timing, and where it was taken."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import get_type_hints

import torch

from .. import __version__
from .cases import Case, extension_ms, sketch_ms
from .measure import Measurement


@dataclass(frozen=True)
class Row:
    """One timing. `l2` is "cold" or "hot" on a GPU; `gpu` says how many threads where it was a CPU.

    host_ms: the host's time to queue the call on a GPU. error: relative Frobenius norm against fp64: of the output, or
    the largest of the gradients', or both. floor_ms, sketch_ms, extension_ms: of one H200; None elsewhere and where
    unknown.
    """

    case: str
    impl: str
    mode: str
    l2: str | None
    ms_p50: float
    ms_p20: float
    ms_p80: float
    runs: int
    host_ms: float | None
    peak_mib: float
    error: float
    floor_ms: float | None
    floor_share: float | None
    sketch_ms: float | None
    extension_ms: float | None
    torch: str
    triton: str | None
    gpu: str
    commit: str

    @property
    def key(self) -> tuple[str, ...]:
        return self.gpu, self.case, self.impl, self.mode, self.l2 or ""


def load_rows(path: Path, kind: type = Row) -> list:
    """The rows of a results file; ValueError where one has unknown, missing or mistyped fields, or comes twice.

    kind: the rows' dataclass. Two rows with one `key` are the same.
    """
    rows = [_row(entry, path, kind) for entry in json.loads(path.read_text())]
    if len({row.key for row in rows}) != len(rows):
        raise ValueError(f"{path} has two rows of one case, option or implementation, mode, L2 state and GPU")
    return rows


def _row(entry: dict, path: Path, row: type) -> object:
    types = get_type_hints(row)
    if entry.keys() != types.keys():
        raise ValueError(f"{path}: fields missing or unknown: {sorted(entry.keys() ^ types.keys())}, in {entry}")
    for name, kind in types.items():
        got = entry[name]
        if not isinstance(got, kind) or isinstance(got, bool):
            raise ValueError(f"{path}: {name} must be {kind}, got {got!r}, in {entry}")
    return row(**entry)


def save_rows(path: Path, rows: Sequence, kind: type = Row) -> None:
    """Writes rows, one a line, sorted; those of the file that have no newer one stay."""
    merged = {row.key: row for row in (load_rows(path, kind) if path.exists() else [])} | {row.key: row for row in rows}
    lines = ",\n".join(json.dumps(asdict(merged[key])) for key in sorted(merged))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n")


def environment(device: torch.device) -> dict[str, str | None]:
    """The fields of a row that say what ran it."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else f"none (CPU, {torch.get_num_threads()} thread(s))"
    triton = import_module("triton").__version__ if find_spec("triton") else None
    return {"torch": torch.__version__, "triton": triton, "gpu": gpu, "commit": commit()}


def commit() -> str:
    """ILA_COMMIT where it is set (a copy without git), else git's, else the installed version."""
    if name := os.environ.get("ILA_COMMIT"):
        return name
    found = ""
    if shutil.which("git"):
        describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
        found = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    return found or f"version {__version__}"


def row_of(case: Case, impl: str, mode: str, l2: str | None, taken: Measurement, err: float, where: dict) -> Row:
    h200 = "H200" in where["gpu"]
    return Row(
        case=case.name,
        impl=impl,
        mode=mode,
        l2=l2,
        **{name: rounded(value) for name, value in asdict(taken).items()},
        error=rounded(err, 3),
        floor_ms=rounded(case.floor_ms(mode)) if h200 else None,
        floor_share=rounded(case.floor_ms(mode) / taken.ms_p50, 3) if h200 else None,
        sketch_ms=rounded(sketch_ms(case, mode)) if h200 else None,
        extension_ms=rounded(extension_ms(case, mode)) if h200 else None,
        **where,
    )


def rounded(x: float | None, digits: int = 4) -> float | None:
    return x if x is None or isinstance(x, int) else float(f"{x:.{digits}g}")
