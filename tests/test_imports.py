"""What an import costs and brings, who may import whom, and how long things may grow."""

import ast
import functools
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import image_local_attention

PACKAGE = Path(image_local_attention.__file__).parent
ROOT = Path(__file__).parents[1]
NAME = "image_local_attention"
FILES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}
USERS = [p for folder in ("benchmarks", "examples") for p in sorted((ROOT / folder).rglob("*.py"))]

# Whom each module may import of ours. Backends are loaded by name when an operator runs.
LAW = {
    "__init__": {"functional", "modules"},
    "modules": {"check", "functional"},
    "functional": {"backends", "check", "derivatives", "ops"},
    "check": {"backends", "window"},
    "derivatives": {"batching", "maps", "ops"},
    "batching": {"ops"},
    "ops": {"backends", "maps", "rules", "window"},
    "backends": set(),
    "reference": {"maps", "rules", "window"},
    "tiled": {"maps", "rules", "window", "tiled"},
    "kernels": {"maps", "rules", "window", "kernels"},
    "rules": {"window"},
    "maps": set(),
    "window": set(),
    "nlm": {"functional"},
    "bench": {"bench"},
    "tune": {"backends", "bench", "check", "kernels", "maps", "rules", "window", "tune"},
    "cli": {"nlm", "bench", "kernels", "tune", "cli"},
}
# What runs on the GPU knows nothing of how it is launched.
_TILE = {"kernels.geometry", "kernels.tile"}
KERNEL_LAW = {
    "kernels.cache": set(),
    "kernels.context": set(),
    "kernels.geometry": set(),
    "kernels.integers": set(),
    "kernels.tile": {"kernels.geometry"},
    "kernels.softmax": {"kernels.tile"},
    "kernels.table": {"kernels.integers", "kernels.tile"},
    "kernels.terms": _TILE | {"kernels.table"},
    "kernels.attention": _TILE | {"kernels.softmax", "kernels.table", "kernels.terms"},
    "kernels.unfused": _TILE | {"kernels.terms"},
    "kernels.native.__init__": {"kernels.launch", "kernels.native.launch", "kernels.source"},
    "kernels.native.launch": {
        "kernels.geometry",
        "kernels.gpu",
        "kernels.integers",
        "kernels.launch",
        "kernels.native.compiled",
        "kernels.native.driver",
        "kernels.native.nvrtc",
        "kernels.native.plan",
        "kernels.native.table",
        "kernels.native.walk",
        "kernels.native.walk_table",
        "kernels.source",
    },
    "kernels.native.compiled": {"kernels.integers", "kernels.native.driver", "kernels.native.plan"},
    "kernels.native.driver": {"kernels.context", "kernels.integers"},
    "kernels.native.nvrtc": {"kernels.cache"},
    "kernels.native.plan": {"kernels.integers"},
    "kernels.native.table": {"kernels.native.plan"},
    "kernels.native.walk": {
        "kernels.integers",
        "kernels.native.compiled",
        "kernels.native.driver",
        "kernels.native.products",
    },
    "kernels.native.walk_table": {"kernels.native.plan", "kernels.native.walk"},
    "kernels.bias": _TILE | {"kernels.table", "kernels.terms"},
    "kernels.possible": {"kernels.gpu", "kernels.plan"},
    "kernels.remembered": {"kernels.cache", "kernels.gpu", "kernels.plan", "kernels.possible"},
}
# The command line may ask which plans are remembered. The search for plans drives the tasks one by one.
ASKERS = {"kernels.cache", "kernels.remembered"}
DRIVER = "tune.problem"
# Benchmarks and examples use public names; those of plans drive the package's searches and kernels, two time backends.
USER_LAW = {
    "plans.py": {"kernels.possible", "tune.compiling", "tune.find", "tune.problem", "tune.search"},
    "native_plans.py": {
        "kernels",
        "kernels.gpu",
        "kernels.native",
        "kernels.native.launch",
        "kernels.native.nvrtc",
        "kernels.native.plan",
        "kernels.native.table",
        "kernels.native.walk",
        "kernels.native.walk_table",
    },
    "host.py": {"backends", "maps"},
    "first_call.py": {"backends"},
}
# Who may use public names.
ABOVE = ("bench", "cli", "nlm", "tune")
BENCH = {name for name in FILES if name.startswith("bench.")}


def fresh(code: str, **environment: str) -> str:
    """What a new interpreter prints."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_import_takes_a_tenth_of_a_second_beyond_torch():
    code = (
        f"import torch, time; start = time.perf_counter(); import {NAME}; "
        "print(time.perf_counter() - start)"
    )  # fmt: skip
    times = []
    while not times or min(times) >= 0.1:  # a busy machine may be slow once
        times.append(float(fresh(code)))
        assert len(times) < 5, f"took {times} s"


def test_an_import_brings_nothing_but_torch_and_ourselves():
    code = f"import sys, torch; before = set(sys.modules); import {NAME}; print(*(set(sys.modules) - before))"
    brought = {name.split(".")[0] for name in fresh(code).split()}
    assert NAME in brought
    assert brought <= {NAME, "torch"} | sys.stdlib_module_names


USE = f"""
import sys, torch
if {{hidden}}:
    sys.modules["triton"] = None  # as if it were not installed
from {NAME} import local_aggregate, local_attention, local_similarity, LocalAttention
x = torch.randn(1, 4, 5, 5, requires_grad=True)
before = "triton" in sys.modules
out = local_attention(x, x, x, 3, backend={{backend}}) + local_aggregate(local_similarity(x, x, 3), x, 3)
(out + LocalAttention(4, 4, 3, 3)(x)).sum().backward()
assert x.grad.abs().sum() > 0
print(before, "triton" in sys.modules)
"""


def test_everything_but_triton_works_without_triton():
    fresh(USE.format(hidden=True, backend=None))
    code = USE.format(hidden=True, backend="'triton'").replace("out =", "try:\n  out =")
    code = code.split("(out")[0] + "except ValueError as error:\n  print(error)"
    assert "triton is not installed" in fresh(code)


def test_triton_is_not_loaded_for_another_backend():
    plain_torch = fresh("import sys, torch; print('triton' in sys.modules)")
    assert fresh(USE.format(hidden=False, backend="'reference'")).split()[0] == plain_torch
    code = USE.format(hidden=False, backend=None)
    torchs_own = fresh("import sys, torch; x = torch.randn(2, requires_grad=True); x.sum().backward(); "
                       "print('triton' in sys.modules)")  # fmt: skip
    assert fresh(code).split()[1] == torchs_own


def test_triton_loads_at_the_first_launch():
    pytest.importorskip("triton")
    code = USE.format(hidden=False, backend="'triton'")
    assert fresh(code, TRITON_INTERPRET="1") == "False True"


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(module: str, path: Path) -> set[str]:
    """The modules of ours that one imports anywhere, by dotted name; public names count as their owner, `__init__`."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = [part for part in package if part != "__init__"]
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix(NAME).lstrip(".") for alias in node.names if _ours(alias.name)}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                base = [*base, *(node.module or "").split(".")] if node.module else base
            elif _ours(node.module):
                base = node.module.split(".")[1:]
            else:
                continue
            found |= {_owner([*base, alias.name], base) for alias in node.names}
    return {name or "__init__" for name in found}


def _ours(name: str) -> bool:
    return name == NAME or name.startswith(f"{NAME}.")


def _owner(path: list[str], base: list[str]) -> str:
    """The module that a name is, or that it comes from."""
    dotted = ".".join(path)
    return dotted if dotted in FILES or f"{dotted}.__init__" in FILES else ".".join(base)


def public_names(path: Path) -> set[str]:
    """Names taken straight from the package."""
    nodes = [n for n in ast.walk(tree(path)) if isinstance(n, ast.ImportFrom) and not n.level and n.module == NAME]
    return {alias.name for node in nodes for alias in node.names}


def top(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", FILES)
def test_the_import_law(module):
    got = imports(module, FILES[module])
    if top(module) in ABOVE:
        names = public_names(FILES[module])
        assert names <= {*image_local_attention.__all__, "__version__", "nlm"}
        got.discard("__init__")
    if module == "kernels.remembered":  # plans are those of a version
        got.discard("__init__")
    assert {top(name) for name in got} <= LAW[top(module)]
    if module == DRIVER:
        got.discard("kernels")
    kernels = {name.removesuffix(".__init__") for name in FILES if top(name) == "kernels"}
    assert got & kernels <= KERNEL_LAW.get(module, ASKERS if top(module) == "cli" else kernels)
    assert f"{top(module)}.__init__" not in got
    assert not got & {"kernels", "tiled"}, "nobody imports a package of kernels as a whole"


@pytest.mark.parametrize("module", FILES)
def test_the_core_needs_torch_alone(module):
    found = set()
    for node in ast.walk(tree(FILES[module])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    allowed = {
        "kernels": {"torch", "triton"},
        "bench": {"torch", "rich", "matplotlib", "natten"},
        "tune": {"torch", "triton"},
        "cli": {"torch", "numpy", "PIL", "rich", "typer"},
    }
    assert {top(name) for name in found} - sys.stdlib_module_names - {NAME} <= allowed.get(top(module), {"torch"})


def test_imports_go_one_way():
    graph = {name.removesuffix(".__init__"): imports(name, path) for name, path in FILES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_law_knows_every_module():
    assert {top(module) for module in FILES} <= set(LAW)


@pytest.mark.parametrize("path", USERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_benchmarks_and_examples_use_public_names_only(path):
    ours = {node.module for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) and not node.level}
    inner = USER_LAW.get(path.name, set()) | BENCH
    assert {name for name in ours if _ours(name)} <= {NAME, f"{NAME}.nlm"} | {f"{NAME}.{module}" for module in inner}
    assert public_names(path) <= {*image_local_attention.__all__, "__version__", "nlm"} | inner


def test_no_file_is_longer_than_400_lines():
    paths = [*FILES.values(), *USERS, *(ROOT / "tests").rglob("*.py")]
    lengths = {str(path.relative_to(path.parents[1])): len(path.read_text().splitlines()) for path in paths}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


FUNCTIONS = [
    (module, node)
    for module, path in FILES.items()
    for node in ast.walk(tree(path))
    if isinstance(node, ast.FunctionDef) and top(module) != "kernels"
]


def test_no_function_outside_the_kernels_is_longer_than_80_lines():
    lengths = {f"{module}.{node.name}": node.end_lineno - node.lineno + 1 for module, node in FUNCTIONS}
    assert {name: n for name, n in lengths.items() if n > 80} == {}


def test_no_function_outside_the_kernels_has_more_than_12_arguments():
    def count(a: ast.arguments) -> int:
        return len(a.posonlyargs + a.args + a.kwonlyargs) + bool(a.vararg) + bool(a.kwarg)

    counts = {(module, node.name): count(node.args) for module, node in FUNCTIONS}
    long = {key for key, n in counts.items() if n > 12}
    mirrors = {key for key in long if key[0] == "ops" and key[1].startswith("_")}  # of a schema
    public = {key for key in long if key[0] == "functional" and key[1] in image_local_attention.__all__}
    public |= {("modules", "__init__")}  # of the layer
    commands = {key for key in long if key[0] == f"cli.{key[1]}"}
    assert long - mirrors - public - commands == set()


ON_THE_WAY = {"functional", "ops", "maps"} | {m for m in FILES if top(m) == "kernels"} - set(KERNEL_LAW)


@pytest.mark.parametrize("module", sorted(ON_THE_WAY))
def test_no_copies_are_asked_for_on_the_way_to_a_kernel(module):
    calls = {
        ast.unparse(node.func).split(".")[-1] for node in ast.walk(tree(FILES[module])) if isinstance(node, ast.Call)
    }
    assert not calls & {"clone", "contiguous", "copy_", "repeat", "reshape"}


@pytest.mark.parametrize("module", FILES)
def test_errors_are_neither_asserted_nor_swallowed(module):
    for node in ast.walk(tree(FILES[module])):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: assertions vanish under -O"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), f"line {node.lineno} catches {caught}"
