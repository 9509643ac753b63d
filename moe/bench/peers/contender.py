"""What takes part in a comparison: a layer on a problem's weights, and how the table names it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from torch import Tensor, nn

from moe.bench.problem import Problem

Grads = tuple[Tensor, Tensor, Tensor, Tensor]
"""Router [E, D], gate [E, F, D], up [E, F, D], down [E, D, F]."""


class Unavailable(Exception):  # noqa: N818  it is no error: the table says why a line is missing
    """Why a contender cannot take part here, in words."""


class Contender(nn.Module):
    """x [T, D] -> y [T, D]. Weights may be the problem's own tensors: nobody changes them."""

    def grads(self) -> Grads | None:
        """The weights' gradients in the problem's layout; None if it has other weights."""
        return None

    def choices(self, x_TD: Tensor) -> Tensor | None:
        """Ids [T, K] by a router of its own; None: it uses the problem's."""
        return None


@dataclass(frozen=True)
class Entry:
    """A line of the table."""

    name: str
    package: str
    """The distribution that it comes from."""
    make: Callable[[Problem], Contender]
    forced: bool = True
    """Whether its routing can be forced into balance."""

    @property
    def version(self) -> str:
        return version(self.package)

    def build(self, problem: Problem) -> Contender:
        """Raises `Unavailable`."""
        try:
            version(self.package)
        except PackageNotFoundError:
            raise Unavailable(f"not installed ({self.package})") from None
        if problem.routing == "forced" and not self.forced:
            raise Unavailable("its own router cannot be forced into balance")
        try:
            return self.make(problem)
        except ModuleNotFoundError as error:
            raise Unavailable(f"it needs {error.name}, which is not installed") from None


def grad(parameter: Tensor) -> Tensor:
    """What backward left there."""
    assert parameter.grad is not None
    return parameter.grad
