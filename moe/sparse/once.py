"""A backward that writes in place, or talks to other ranks -> one that refuses to be differentiated itself."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
Context = TypeVar("Context")


def first_derivative_only(
    backward: Callable[Concatenate[Context, P], R],
) -> Callable[Concatenate[Context, P], R]:
    """For `backward` of an autograd function: raise `RuntimeError` under create_graph=True.

    What it computes would be taken for a constant, and second derivatives be wrong in silence. Torch's own
    `once_differentiable` lets that pass where the gradient that comes in has no graph, as that of a sum.
    """

    @functools.wraps(backward)
    def checked(ctx: Context, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "backward was called with create_graph=True, but there are no second derivatives here: gradients are "
                "written in place. Leave create_graph out: a penalty on gradients cannot be trained here."
            )
        return backward(ctx, *args, **kwargs)

    return checked
