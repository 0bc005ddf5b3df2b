"""What this installation consists of."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

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
    Console().print(table)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
