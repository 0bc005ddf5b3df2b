"""Every user-facing error: raised before any work, naming the argument, what came and what was wanted."""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from . import backends
from .window import BORDERS, FOLDING, Axis, Window

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def maps(**given: Tensor) -> None:
    """Maps [B, channels, H, W] of one floating dtype, device and batch size, named by the caller.

    Under autocast their dtypes may differ: the operator casts them to one.
    """
    for name, x in given.items():
        tensor(name, x, "[B, channels, H, W]", 4)
        if x.shape[1] < 1:
            raise ValueError(f"{name} must have at least one channel, got shape {_shape(x)}")
    (first_name, first), *others = given.items()
    for name, x in others:
        same_kind(name, x, first_name, first)
        if x.shape[0] != first.shape[0]:
            raise ValueError(f"{name} must have the batch size of {first_name}, {first.shape[0]}, got {x.shape[0]}")


def same_size(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape[2:4] != other.shape[2:4]:
        raise ValueError(
            f"{name} must have the height and width of {other_name}, {_shape(other)[2:4]}, got {_shape(x)[2:4]}"
        )


def tensor(name: str, x: object, layout: str, dimensions: int) -> None:
    """A strided floating tensor of so many dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    strided(name, x)
    if x.dim() != dimensions:
        raise ValueError(f"{name} must be {layout}, got {x.dim()} dimensions, shape {_shape(x)}")


def strided(name: str, x: Tensor) -> None:
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {x.layout}")


def same_kind(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """One device, and one dtype unless autocast will make it one."""
    if x.device != other.device:
        raise TypeError(f"{name} must be on the device of {other_name}, {other.device}, got {x.device}")
    if x.dtype != other.dtype and not _autocast_unites(x, other):
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {x.dtype}")


def _autocast_unites(x: Tensor, other: Tensor) -> bool:
    return (
        x.device.type in ("cuda", "cpu")
        and torch.is_autocast_enabled(x.device.type)
        and torch.float64 not in (x.dtype, other.dtype)
    )


def head_counts(heads: object, kv_heads: object, *, at_queries: dict[str, Tensor], at_keys: dict[str, Tensor]) -> int:
    """Heads that divide the channels of the maps they are of, by name; returns `kv_heads`, `heads` where it is None."""
    _positive_int("heads", heads)
    kv_heads = heads if kv_heads is None else kv_heads
    _positive_int("kv_heads", kv_heads)
    if heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, got heads={heads}, kv_heads={kv_heads}")
    for count, of, given in ((heads, "heads", at_queries), (kv_heads, "kv_heads", at_keys)):
        for name, x in given.items():
            if x.shape[1] % count:
                raise ValueError(f"{name} must have a multiple of {of}={count} channels, got {x.shape[1]}")
    return kv_heads


def same_depth(query: Tensor, key: Tensor, heads: int, kv_heads: int) -> None:
    depth = query.shape[1] // heads
    if key.shape[1] != depth * kv_heads:
        raise ValueError(
            f"key must have {depth * kv_heads} channels, {depth} for each of {kv_heads} heads as query has, "
            f"got {key.shape[1]}"
        )


def weights(weight: Tensor, value: Tensor, heads: int, window: Window) -> None:
    """Weights [B, heads, H, W, kH*kW] of the value's dtype and device."""
    tensor("weight", weight, "[B, heads, H, W, kH*kW]", 5)
    same_kind("weight", weight, "value", value)
    for axis, name, wanted in (
        (0, "batch size", value.shape[0]),
        (1, "heads", heads),
        (4, "slots kH*kW", window.slots),
    ):
        if weight.shape[axis] != wanted:
            raise ValueError(f"weight must have {wanted} {name}, got {weight.shape[axis]}, shape {_shape(weight)}")


def window(kernel_size: object, border: object, dilation: object, causal: object) -> Window:
    """The window that the four geometry arguments describe."""
    kernel, borders, steps = int_pair("kernel_size", kernel_size), _borders(border), int_pair("dilation", dilation)
    axes, raster = _causality(causal)
    for name, ends in zip(borders, axes, strict=True):
        if (ends and name in FOLDING) or (raster and name in (*FOLDING, "shift")):
            fitting = "zeros and mask" if raster else "zeros, mask and shift"
            raise ValueError(f"causal={causal!r} goes with the borders {fitting}, got border={border!r}")
    return Window(kernel, borders, steps, axes, raster)


def fits(window: Window, size: Sequence[int], queries: Sequence[int], name: str) -> None:
    """A window from `queries` pixels over a map of `size`, called `name`: one that the border can serve."""
    if 0 in queries:
        return
    for axis, pixels, which in zip(window.axes(tuple(size), tuple(queries)), size, ("height", "width"), strict=True):
        if pixels == 0:
            raise ValueError(f"{name} must have at least one pixel where there are queries, got {which} 0")
        _fits(axis, which)


def _fits(axis: Axis, which: str) -> None:
    if axis.shifts and axis.kernel * axis.dilation > axis.size:
        raise ValueError(
            f"kernel_size times dilation must be at most the {which} of the keys, {axis.size}, under border 'shift', "
            f"got {axis.kernel} * {axis.dilation}"
        )
    most = {"reflect": axis.size - 1, "circular": axis.size}.get(axis.border)
    if most is not None and max(axis.overhang) > most:
        raise ValueError(
            f"kernel_size may reach at most {most} pixels past a map of {which} {axis.size} under border "
            f"{axis.border!r}, got {max(axis.overhang)}"
        )


def _borders(border: object) -> tuple[str, str]:
    names = tuple(border) if isinstance(border, tuple | list) else (border, border)
    if len(names) != 2 or not all(isinstance(name, str) for name in names):
        raise TypeError(f"border must be a name or a pair of names (y, x), got {border!r}")
    for name in names:
        if name not in BORDERS:
            raise ValueError(f"border must be one of {', '.join(map(repr, BORDERS))}, got {name!r}")
    return names


def _causality(causal: object) -> tuple[tuple[bool, bool], bool]:
    """Which axes are causal, and whether the raster order is."""
    if isinstance(causal, str):
        if causal != "raster":
            raise ValueError(f"causal must be a bool, a pair of bools (y, x) or 'raster', got {causal!r}")
        return (False, False), True
    pair = tuple(causal) if isinstance(causal, tuple | list) else (causal, causal)
    if len(pair) != 2 or not all(isinstance(each, bool) for each in pair):
        raise TypeError(f"causal must be a bool, a pair of bools (y, x) or 'raster', got {causal!r}")
    return pair, False


def scale_factor(scale: object, depth: int) -> float:
    """The scale itself, or depth ** -0.5 for None; 0.0 is legal."""
    if scale is None:
        return depth**-0.5
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    if not -math.inf < scale < math.inf:  # math.isfinite breaks a compiled graph
        raise ValueError(f"scale must be finite, got {scale!r}")
    return float(scale)


def bias(x: object, like: Tensor, heads: int, window: Window) -> Tensor | None:
    """A bias by slot as [heads, kH*kW], one by displacement as [heads, 2*kH-1, 2*kW-1]; None for None."""
    if x is None:
        return None
    (kh, kw), shifts = window.kernel, "shift" in window.border
    if not isinstance(x, Tensor):
        raise TypeError(f"bias must be a tensor [heads, kH*kW] or None, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"bias must be float16, bfloat16, float32 or float64, got {x.dtype}")
    strided("bias", x)
    same_kind("bias", x, "query", like)
    if x.shape in ((heads, kh * kw), (heads, kh, kw)):
        return x.flatten(1)
    if shifts and x.shape == (heads, 2 * kh - 1, 2 * kw - 1):
        return x
    wanted = f"[{heads}, {kh * kw}] or [{heads}, {kh}, {kw}]"
    more = f" or, by displacement, [{heads}, {2 * kh - 1}, {2 * kw - 1}]" if shifts else ""
    raise ValueError(f"bias must be {wanted}{more}, got shape {_shape(x)}")


def key_mask(x: object, key: Tensor) -> None:
    """None, or a mask [B, Hk, Wk] of bools."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"key_mask must be a tensor [B, Hk, Wk] of bools or None, got {type(x).__name__}")
    if x.dtype != torch.bool:
        raise ValueError(f"key_mask must be of dtype torch.bool, got {x.dtype}")
    strided("key_mask", x)
    if x.device != key.device:
        raise TypeError(f"key_mask must be on the device of key, {key.device}, got {x.device}")
    wanted = key.shape[0], *key.shape[2:]
    if tuple(x.shape) != wanted:
        raise ValueError(f"key_mask must be [B, Hk, Wk] = {wanted}, got shape {_shape(x)}")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def backend_name(backend: object) -> None:
    if backend is None:
        return
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a name or None, got {backend!r}")
    if backend not in backends.NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, backends.NAMES))}, got {backend!r}")


def int_pair(name: str, value: object) -> tuple[int, int]:
    """(y, x) of a positive int or a pair of them."""
    pair = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be an int or a pair (y, x), got {value!r}")
    for item in pair:
        if isinstance(item, bool) or not isinstance(item, int):
            raise TypeError(f"{name} must be an int or a pair of ints (y, x), got {value!r}")
        if item < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    return pair


def _positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def no_compiled_tangents(**given: Tensor | None) -> None:
    """Forward-mode derivatives would come out of a compiled graph as silent zeros, so they are refused there."""
    if not torch.compiler.is_compiling():
        return
    for name, x in given.items():
        if x is not None and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{name} carries a forward-mode tangent in a compiled graph, which is not available: take it out of "
                "torch.compile, or take reverse mode (torch.autograd.grad)"
            )


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def layer(inp_channels: object, out_channels: object, heads: object, kv_heads: object) -> int:
    """Channel counts of a layer, and heads that divide its output; returns `kv_heads`."""
    for name, count in (("inp_channels", inp_channels), ("out_channels", out_channels), ("heads", heads)):
        _positive_int(name, count)
    if out_channels % heads:
        raise ValueError(f"out_channels must be a multiple of heads={heads}, got {out_channels}")
    return head_counts(heads, kv_heads, at_queries={}, at_keys={})


def results(pairs: object) -> None:
    """Pairs (out [B, heads*Dv, H, W], lse [B, heads, H, W]) of the same queries."""
    if not isinstance(pairs, Sequence) or not pairs:
        raise TypeError(f"results must be a sequence of pairs (out, lse), got {pairs!r}")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"results[{i}] must be a pair (out, lse), got {type(pair).__name__}")
        for name, x, (first_name, first) in zip(
            (f"results[{i}][0]", f"results[{i}][1]"),
            pair,
            (("results[0][0]", pairs[0][0]), ("results[0][1]", pairs[0][1])),
            strict=True,
        ):
            tensor(name, x, "[B, heads*Dv, H, W] and [B, heads, H, W]", 4)
            same_kind(name, x, first_name, first)
            if x.shape != first.shape:
                raise ValueError(f"{name} must have the shape of {first_name}, {_shape(first)}, got {_shape(x)}")
    out, lse = pairs[0]
    if lse.device != out.device:
        raise TypeError(f"results[0][1] must be on the device of results[0][0], {out.device}, got {lse.device}")
    if (
        lse.shape[1] == 0
        or out.shape[0] != lse.shape[0]
        or out.shape[2:] != lse.shape[2:]
        or out.shape[1] % lse.shape[1]
    ):
        raise ValueError(
            f"results[0] must be out [B, heads*Dv, H, W] and lse [B, heads, H, W], got {_shape(out)} and {_shape(lse)}"
        )
