"""Every user-facing error: raised before any work, naming the argument, what came and what was wanted."""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from . import backends
from .window import BORDERS, Window

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLANNED_BORDERS = ("shift", "reflect", "replicate", "circular")


def maps(**given: Tensor) -> None:
    """Maps [B, channels, H, W] of one floating dtype, device, batch and size, named by the caller.

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
        if x.shape[2:] != first.shape[2:]:
            raise NotImplementedError(
                f"{name} must have the height and width of {first_name} for now, {_shape(first)[2:]}, "
                f"got {_shape(x)[2:]}: queries and keys of different size are not available yet"
            )


def tensor(name: str, x: object, layout: str, dimensions: int) -> None:
    """A strided floating tensor of so many dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {x.layout}")
    if x.dim() != dimensions:
        raise ValueError(f"{name} must be {layout}, got {x.dim()} dimensions, shape {_shape(x)}")


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


def head_count(heads: object, kv_heads: object, **given: Tensor) -> None:
    """Heads that divide the channels of the maps given; `kv_heads` None means `heads`."""
    _positive_int("heads", heads)
    if kv_heads is not None:
        _positive_int("kv_heads", kv_heads)
        if heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got heads={heads}, kv_heads={kv_heads}")
        if kv_heads != heads:
            raise NotImplementedError(
                f"kv_heads must equal heads={heads} for now, got {kv_heads}: grouped heads are not available yet"
            )
    for name, x in given.items():
        if x.shape[1] % heads:
            raise ValueError(f"{name} must have a multiple of heads={heads} channels, got {x.shape[1]}")


def same_depth(query: Tensor, key: Tensor) -> None:
    if key.shape[1] != query.shape[1]:
        raise ValueError(f"key must have the channels of query, {query.shape[1]}, got {key.shape[1]}")


def weights(weight: Tensor, value: Tensor, heads: int, window: Window) -> None:
    """Weights [B, heads, H, W, kH*kW] of the value's dtype and device."""
    tensor("weight", weight, "[B, heads, H, W, kH*kW]", 5)
    same_kind("weight", weight, "value", value)
    b, _, h, w = value.shape
    for axis, name, wanted in ((0, "batch size", b), (1, "heads", heads), (4, "slots kH*kW", window.slots)):
        if weight.shape[axis] != wanted:
            raise ValueError(f"weight must have {wanted} {name}, got {weight.shape[axis]}, shape {_shape(weight)}")
    if weight.shape[2:4] != value.shape[2:4]:
        raise NotImplementedError(
            f"weight must have the height and width of value for now, {(h, w)}, got {_shape(weight)[2:4]}: "
            "queries and keys of different size are not available yet"
        )


def window(kernel_size: object, border: object, dilation: object, causal: object) -> Window:
    """The window that the four geometry arguments describe."""
    kernel = int_pair("kernel_size", kernel_size)
    if int_pair("dilation", dilation) != (1, 1):
        raise NotImplementedError(f"dilation must be 1 for now, got {dilation!r}: it is not available yet")
    _causality(causal)
    return Window(kernel, _border(border))


def _border(border: object) -> str:
    names = border if isinstance(border, tuple | list) else (border,)
    known = BORDERS + _PLANNED_BORDERS
    if not 1 <= len(names) <= 2 or not all(isinstance(name, str) for name in names):
        raise TypeError(f"border must be a name or a pair of names (y, x), got {border!r}")
    for name in names:
        if name not in known:
            raise ValueError(f"border must be one of {', '.join(map(repr, known))}, got {name!r}")
    if len(set(names)) > 1 or names[0] not in BORDERS:
        raise NotImplementedError(
            f"border must be one of {', '.join(map(repr, BORDERS))} for now, got {border!r}: "
            "the others, and one per axis, are not available yet"
        )
    return names[0]


def _causality(causal: object) -> None:
    if causal is False:
        return
    pair = isinstance(causal, tuple | list) and len(causal) == 2 and all(isinstance(c, bool) for c in causal)
    if not (causal is True or pair or isinstance(causal, str)):
        raise TypeError(f"causal must be a bool, a pair of bools (y, x) or 'raster', got {causal!r}")
    if isinstance(causal, str) and causal != "raster":
        raise ValueError(f"causal must be a bool, a pair of bools (y, x) or 'raster', got {causal!r}")
    if causal == "raster" or causal is True or any(causal):
        raise NotImplementedError(f"causal must be False for now, got {causal!r}: it is not available yet")


def scale_factor(scale: object, depth: int) -> float:
    """The scale itself, or depth ** -0.5 for None; 0.0 is legal."""
    if scale is None:
        return depth**-0.5
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    if not -math.inf < scale < math.inf:  # math.isfinite breaks a compiled graph
        raise ValueError(f"scale must be finite, got {scale!r}")
    return float(scale)


def no_bias_nor_mask(bias: object, key_mask: object) -> None:
    for name, x in (("bias", bias), ("key_mask", key_mask)):
        if x is not None:
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor or None, got {type(x).__name__}")
            raise NotImplementedError(f"{name} must be None for now, got {_shape(x)}: it is not available yet")


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


def no_tangents(**given: Tensor) -> None:
    """Forward-mode derivatives would come out as silent zeros, so they are refused."""
    for name, x in given.items():
        if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{name} carries a forward-mode tangent: forward-mode derivatives are not available yet, "
                "take reverse mode (torch.autograd.grad)"
            )


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def layer(inp_channels: object, out_channels: object, heads: object) -> None:
    """Channel counts of a layer, and heads that divide its output."""
    _positive_int("inp_channels", inp_channels)
    _positive_int("out_channels", out_channels)
    _positive_int("heads", heads)
    if out_channels % heads:
        raise ValueError(f"out_channels must be a multiple of heads={heads}, got {out_channels}")
