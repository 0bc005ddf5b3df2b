"""What this installation consists of."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from rich.console import Console
from rich.table import Table


def info() -> None:
    """Show the versions and devices that this library finds."""
    import torch

    from image_local_attention import __version__

    table = Table("", "found", title="image-local-attention", show_header=False)
    table.add_row("image-local-attention", __version__)
    table.add_row("Python", platform.python_version())
    table.add_row("torch", torch.__version__)
    table.add_row("triton", _version("triton"))
    table.add_row("cpu", f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(index)
        table.add_row(
            f"cuda:{index}",
            f"{props.name}, capability {props.major}.{props.minor}, {props.total_memory / 2**30:.0f} GiB",
        )
    if torch.backends.mps.is_available():
        table.add_row("mps", platform.processor())
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        table.add_row("xpu", torch.xpu.get_device_name())
    if find_spec("triton"):
        table.add_row("plans", _plans())
    Console().print(table)


def _plans() -> str:
    """Where launches look for remembered plans, and how many of them each GPU takes."""
    import torch

    from ..kernels import remembered
    from ..kernels.cache import VARIABLE

    file = remembered.path()
    if file is None:
        return f"those of the table: {VARIABLE} is off"
    if not file.exists():
        return f"those of the table: there is no {file}"
    counts = (len(remembered.plans(torch.device("cuda", index))) for index in range(torch.cuda.device_count()))
    used = ", ".join(f"{count} in use on cuda:{index}" for index, count in enumerate(counts)) or "no GPU to use them"
    return f"{file}: {used}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
