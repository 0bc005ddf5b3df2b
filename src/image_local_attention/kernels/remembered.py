"""Plans that `image-local-attention tune` found on a GPU, kept in a file, which launches read once per process.

The file holds for the GPU, the Triton and the version of this library that it names entry by entry; launches elsewhere
take the plans of the table. It only chooses among kernels that compute the same, so that a file that cannot be used is
warned of and left alone.
"""

import functools
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, get_type_hints

import torch
import triton

from .. import __version__
from . import cache, plan
from . import gpu as gpus
from .plan import FACTS, Plan
from .possible import TASKS, Asked, obstacle

FORMAT = 1  # of the file; another one where the meaning of a field changes


class Where(NamedTuple):
    """What compiles and runs kernels: elsewhere, other plans are fast, and some that are possible here are not."""

    gpu: str
    arch: int
    triton: str
    library: str


@dataclass(frozen=True)
class Entry:
    """A plan for what launches ask, and its milliseconds beside the table's plan's, at a case."""

    where: Where
    asked: Asked
    plan: Plan
    table_ms: float
    ms: float
    case: str

    def to_json(self) -> dict:
        asked = self.asked._asdict() | {"facts": sorted(self.asked.facts)}
        figures = {"table_ms": self.table_ms, "ms": self.ms, "case": self.case}
        return self.where._asdict() | asked | {"plan": asdict(self.plan)} | figures

    @classmethod
    def from_json(cls, entry: object) -> "Entry":
        """ValueError where a field is missing, unknown or mistyped."""
        own = {"plan": dict, "table_ms": float, "ms": float, "case": str}
        wanted = get_type_hints(Where) | get_type_hints(Asked) | {"facts": list} | own
        _fields(entry, wanted)
        _fields(entry["plan"], get_type_hints(Plan) | {"tile": list})
        asked = Asked(*(entry[name] for name in Asked._fields[:-1]), frozenset(map(str, entry["facts"])))
        if asked.task not in TASKS or asked.product not in gpus.PRODUCTS or not asked.facts <= FACTS:
            raise ValueError(f"no launch asks for {asked}")
        found = Plan(**entry["plan"] | {"tile": tuple(entry["plan"]["tile"])})
        where = Where(*(entry[name] for name in Where._fields))
        return cls(where, asked, found, *(entry[name] for name in ("table_ms", "ms", "case")))


def path() -> Path | None:
    """The file that launches read; None where nothing is kept."""
    where = cache.folder()
    return where and where / "plans.json"


def read(file: Path) -> list[Entry]:
    """The entries of a file, none where there is no file. ValueError or OSError where it cannot be used, and why."""
    if not os.path.exists(file):
        return []
    content = json.loads(file.read_text())
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError("it is not a file of plans")
    if content["format"] != FORMAT:
        raise ValueError(f"it has format {content['format']!r}, wanted {FORMAT}")
    entries = content.get("plans")
    if not isinstance(entries, list):
        raise ValueError("it has no list of plans")
    return [Entry.from_json(entry) for entry in entries]


def write(file: Path, entries: Iterable[Entry]) -> None:
    """Merges entries into a file, which is whole at every moment; newer ones replace those asked for alike there."""
    merged = {(entry.where, entry.asked): entry for entry in (*read(file), *entries)}
    lines = ",\n".join(sorted(json.dumps(entry.to_json()) for entry in merged.values()))
    cache.write(file, f'{{"format": {FORMAT}, "plans": [\n{lines}\n]}}\n'.encode())


def here(device: torch.device) -> Where:
    return Where(torch.cuda.get_device_name(device), gpus.of(device).arch, triton.__version__, __version__)


def shared_memory(device: torch.device) -> int:
    """Bytes that one program can have."""
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


@functools.cache
def plans(device: torch.device) -> Mapping[tuple, Plan]:
    """The remembered plans of a device by what launches ask; a file or a plan that cannot be used is warned of."""
    file = path()
    try:
        entries = read(file) if file else []
    except (OSError, ValueError) as error:
        warnings.warn(f"{file} is ignored, plans are those of the table: {error}", stacklevel=2)
        return {}
    if not entries:
        return {}
    where, shared, found = here(device), shared_memory(device), {}
    for entry in entries:
        if entry.where != where:
            continue
        if reason := obstacle(entry.asked, entry.plan, shared):
            warnings.warn(f"{file}: a plan for {entry.asked} is ignored: {reason}", stacklevel=2)
        else:
            found[entry.asked] = entry.plan
    return found


def choose(device: torch.device, *asked: object) -> Plan:
    """The plan of a device for what `plan.choose` is asked: the remembered one, else the table's."""
    kept = plans(device)
    return (kept.get(asked) if kept else None) or plan.choose(*asked)


def _fields(entry: object, wanted: Mapping[str, type]) -> None:
    if not isinstance(entry, dict) or entry.keys() != wanted.keys():
        names = sorted(entry.keys() ^ wanted.keys()) if isinstance(entry, dict) else ["all of them"]
        raise ValueError(f"fields missing or unknown: {', '.join(names)}, in {entry}")
    for name, kind in wanted.items():
        got = entry[name]
        if not isinstance(got, kind) or (isinstance(got, bool) and kind is not bool):
            raise ValueError(f"{name} must be {kind}, got {got!r}, in {entry}")
