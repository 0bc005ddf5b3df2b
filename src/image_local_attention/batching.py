"""torch.func.vmap of the registered operators: images are independent, so the batch axis joins theirs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops


def _register(op) -> None:
    names = [argument.name for argument in op._schema.arguments]

    def rule(info, axes, *args):
        axes = [axis if isinstance(x, Tensor) else None for x, axis in zip(args, axes, strict=True)]
        named = dict(zip(names, zip(args, axes, strict=True), strict=True))
        apart = op is ops.bias_gradient or ("bias" in named and named["bias"][1] is not None)
        apart = apart or ("wanted" in named and named["wanted"][0][3])
        results = (_one_by_one if apart else _together)(op, names, args, axes, info.batch_size)
        return results, (0,) * len(results) if isinstance(results, tuple) else 0

    torch.library.register_vmap(op.name(), rule)


def _together(op, names: Sequence[str], args: Sequence, axes: Sequence, n: int) -> Tensor | tuple[Tensor, ...]:
    """One call for all, where images share nothing but what every member of the batch shares too."""
    results = op(
        *(
            _join(x, axis, n) if isinstance(x, Tensor) and name != "bias" else x
            for name, x, axis in zip(names, args, axes, strict=True)
        )
    )
    return tuple(_part(x, n) for x in results) if isinstance(results, tuple) else _part(results, n)


def _one_by_one(op, names: Sequence[str], args: Sequence, axes: Sequence, n: int) -> Tensor | tuple[Tensor, ...]:
    """A call for each, where a bias, or the gradient of one, belongs to all images of a member of the batch."""
    each = [
        op(*(x if axis is None else x.select(axis, i) for x, axis in zip(args, axes, strict=True))) for i in range(n)
    ]
    if isinstance(each[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True))
    return torch.stack(each)


def _join(x: Tensor, axis: int | None, n: int) -> Tensor:
    x = x.expand(n, *x.shape) if axis is None else x.movedim(axis, 0)
    return x.flatten(0, 1)


def _part(x: Tensor, n: int) -> Tensor:
    """The gradients that are not wanted are empty and stay so."""
    return x.unflatten(0, (n, -1)) if x.dim() > 1 else x.expand(n, *x.shape)


def register() -> None:
    for op in ops.OPERATORS:
        _register(op)
