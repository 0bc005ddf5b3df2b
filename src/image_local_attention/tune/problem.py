"""What a search is about: a case with the terms of its logits, and each task as the one kernel that is timed."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from .. import check, kernels
from ..bench.cases import Case
from ..kernels import grad_bias, native, plan, remembered
from ..kernels.plan import Plan
from ..kernels.possible import Asked
from ..maps import empty_heads, split_heads
from ..rules import Rules
from ..window import Window

OWN_PLAN = {"grad_bias": "grad_query"}  # of a task that takes another's plan


@dataclass(frozen=True)
class Subject:
    """A case and what more decides on its logits: plain data, which other processes can be told.

    border, dilation: None is the case's; causal: as `local_attention` takes them. bias: "slot" or "displacement".
    """

    case: Case
    border: str | tuple[str, str] | None = None
    dilation: int | tuple[int, int] | None = None
    causal: bool | tuple[bool, bool] | str = False
    bias: str | None = None
    key_mask: bool = False

    @property
    def name(self) -> str:
        more = f"causal {self.causal}" if self.causal else "", f"bias by {self.bias}" if self.bias else ""
        own = (f"{word} {got}" for word, got in (("border", self.border), ("dilation", self.dilation)) if got)
        return ", ".join(filter(None, (self.case.name, *own, *more, "key_mask" if self.key_mask else "")))

    @property
    def window(self) -> Window:
        """ValueError where windows or a bias are not what `local_attention` takes on the case's maps."""
        case = self.case
        window = check.window(case.kernel, self.border or case.border, self.dilation or case.dilation, self.causal)
        check.fits(window, (case.height, case.width), (case.height, case.width), "key")
        if self.bias == "displacement" and "shift" not in window.border:
            raise ValueError(f"a bias by displacement goes with border 'shift', got {window.border}")
        return window


class Problem:
    """A subject's maps as heads, and its tasks.

    exact: whether log-sum-exp and delta are those of the maps; otherwise only their memory is there.
    """

    def __init__(self, subject: Subject, device: torch.device, exact: bool) -> None:
        case = subject.case
        self.maps = [split_heads(x, case.heads) for x in case.maps(device)]
        self.grads = [empty_heads(x, x.shape[4]) for x in self.maps[:3]]
        bias = case.bias(device, subject.bias == "displacement") if subject.bias else None
        mask = case.key_mask(device) if subject.key_mask else None
        self.rules = Rules(subject.window, 1.0, bias, mask, case.precision)
        self.lse, self.delta = (torch.empty(x.shape[:4], device=device) for x in self.maps[:2])
        if exact:
            out, self.lse = self.run("forward")
            kernels._delta(self.maps[3], None, out, self.delta, self.rules)

    def run(self, task: str) -> tuple[Tensor, ...]:
        """Results of a task, by Triton's kernel."""
        query, key, value, grad_out = self.maps
        inputs = *self.maps, self.lse, self.delta
        if task == "forward":
            with native.portable():
                return kernels.attention(query, key, value, self.rules)
        if task == "delta":
            kernels._delta(grad_out, None, grad_out, self.delta, self.rules)
            return (self.delta,)
        if task == "grad_bias":
            return (grad_bias.of_attention(*inputs, self.rules),)
        grads = self.grads[:1] if task == "grad_query" else self.grads[1:]
        launch = kernels._grad_query if task == "grad_query" else kernels._grad_key_value
        launch(*inputs, *grads, self.rules)
        return tuple(grads)

    def asks(self) -> set[str]:
        """The tasks of a forward and backward that ask for a plan; a native kernel serves the others."""
        query, key, value, grad_out = self.maps
        wanted = True, True, True, self.rules.bias is not None
        with recorded(lambda device, *asked: plan.choose(*asked)) as taken:
            out, lse = kernels.attention(query, key, value, self.rules)
            kernels.attention_backward(grad_out, None, query, key, value, out, lse, wanted, self.rules)
        return {asked.task for asked, _ in taken}

    def poison(self) -> None:
        """Fills gradients, and the memory that a forward is likely to take, with NaN."""
        query, _, value, _ = self.maps
        for x in (*self.grads, empty_heads(query, value.shape[4]), torch.empty_like(self.lse)):
            x.fill_(math.nan)


@contextmanager
def recorded(choose: Callable[..., Plan]) -> Iterator[list[tuple[Asked, Plan]]]:
    """Launches choose their plans so; yields what they asked and took."""
    usual, taken = remembered.choose, []

    def instead(device: torch.device, *asked: object) -> Plan:
        taken.append((Asked(*asked), choose(device, *asked)))
        return taken[-1][1]

    remembered.choose = instead
    try:
        yield taken
    finally:
        remembered.choose = usual


@contextmanager
def planned(task: str, candidate: Plan | None) -> Iterator[list[tuple[Asked, Plan]]]:
    """Launches of a task take the candidate, or the table's plan where it is None, as other launches do.

    Yields what launches asked and took.
    """
    own = OWN_PLAN.get(task, task)

    def choose(device: torch.device, *asked: object) -> Plan:
        return candidate if candidate is not None and asked[0] == own else plan.choose(*asked)

    with recorded(choose) as taken:
        yield taken


@contextmanager
def launched() -> Iterator[list]:
    """Yields the compiled kernels of the launches inside."""
    found, run = [], JITFunction.run

    def run_and_keep(self, *args, **kwargs):
        found.append(run(self, *args, **kwargs))
        return found[-1]

    JITFunction.run = run_and_keep
    try:
        yield found
    finally:
        JITFunction.run = run
