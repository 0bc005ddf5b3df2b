"""How wrong a result may be: twice what plain PyTorch makes of the same numbers in the same dtype.

    err(got) <= 2 * (err(plain) + eps(dtype) * max|exact|)

with err(x) = max|x - exact| over the whole tensor and `exact` in fp64. The last term is one rounding of the largest
result. Of few numbers plain code may get every one right by luck, and where terms cancel, be right because both took
the same way. So err(plain) is the largest over several ways its roundings may fall: as they do, and, in `Rounding`,
at random.

The maximum over a tensor does not see a pixel whose gradient is zeroed where gradients are small. So every pixel is
judged by itself too, far more loosely: where plain code is within a twentieth of its length, ours must be
within three quarters. Left out are pixels shorter than one rounding of the longest: a
fused backward takes delta from the output, which was rounded, and that may cost as much.

For fp64 results the oracle is no more exact than plain code, so its own error, as large again, comes on top. There,
plain code and the oracle must agree: a yardstick that is wrong would allow everything.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SLACK = 2.0
ALIKE = 1e-10
PLAIN_IS_GOOD, OURS_IS_BAD = 0.05, 0.75


# Operations that round, beside sums; views, selections and copies are exact in every dtype.
_ROUNDS = {"add", "div", "exp", "index_add", "logsumexp", "mul", "sub", "unfold_backward"}


class Rounding(TorchDispatchMode):
    """Arithmetic whose results are off by up to half an `eps` of themselves, at random. For fp64 on the CPU.

    Sums run term after term, in fp32 at least, as a dot product's may.
    """

    def __init__(self, eps: float, seed: int) -> None:
        super().__init__()
        # Half an eps of fp64 is lost in fp64.
        self.eps = max(eps, 2 * torch.finfo(torch.float64).eps)
        self.sum_eps = min(self.eps, torch.finfo(torch.float32).eps)
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        x = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "sum" and args[0].dim():
            dims = (args[1] if len(args) > 1 else None) or list(range(args[0].dim()))
            partial = args[0].movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1).cumsum(0)
            x = x + partial.mul_(self._off(partial, self.sum_eps)).sum(0).view(x.shape)
        elif name not in _ROUNDS or x.dtype != torch.float64:
            return x
        return self._off(x, self.eps).double().add_(1).mul_(x)

    def _off(self, x: Tensor, eps: float) -> Tensor:
        """In fp32, for most of what a budget takes is the making of these numbers."""
        return torch.rand(x.shape, generator=self.generator).sub_(0.5).mul_(eps)


def assert_within(name: str, got: Tensor, plain: list[Tensor], exact: Tensor, eps: float) -> None:
    """Fails where `got` is further from `exact` than the budget that plain results set."""
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(exact.shape)}"
    got, exact = _wide(got), _wide(exact)
    finite = exact.isfinite()
    assert torch.equal(got[~finite], exact[~finite]), f"{name}: infinite elsewhere than it should be"
    if not finite.any():
        return
    error, *usual = ((_wide(x)[finite] - exact[finite]).abs().max().item() for x in (got, *plain))
    largest = exact[finite].abs().max().item()
    in_fp64 = eps <= torch.finfo(torch.float64).eps
    budget = (SLACK + in_fp64) * (max(usual) + eps * largest)
    assert not in_fp64 or budget <= ALIKE * (1 + largest), f"{name}: plain code and the oracle do not agree"
    assert error <= budget, f"{name}: error {error:.3e} exceeds the budget of {budget:.3e}"


def assert_pixels_within(name: str, got: Tensor, plain: list[Tensor], exact: Tensor, eps: float) -> None:
    """Fails where a pixel of a map [B, C, H, W] is off by 3/4 of its length and plain code by no 1/20."""
    exact = _wide(exact).movedim(1, -1)
    off, *usual = ((_wide(x).movedim(1, -1) - exact).norm(dim=-1) for x in (got, *plain))
    length = exact.norm(dim=-1)
    good = (torch.stack(usual).amax(0) <= PLAIN_IS_GOOD * length) & (length > eps * length.max())
    worst = (good & ~(off <= OURS_IS_BAD * length)).nonzero()
    assert len(worst) == 0, f"{name}: {len(worst)} pixels (batch, y, x) are far off, first {worst[0].tolist()}"


def _wide(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)
