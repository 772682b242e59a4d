"""Lists of tensors at once: the arithmetic of flows, with one call for a whole level.

torch keeps its list kernels behind an underscore, though torch.optim is built on them; they are
named here once, so that nothing else in the package reaches into torch's private names.
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

fused_adamw_ = torch._fused_adamw_
add_ = torch._foreach_add_
addcmul_ = torch._foreach_addcmul_
copy_ = torch._foreach_copy_
div_ = torch._foreach_div_
lerp_ = torch._foreach_lerp_
mul_ = torch._foreach_mul_
zero_ = torch._foreach_zero_

Tensors = list[Tensor]


def difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensors:
    """`left - right`."""
    return list(torch._foreach_sub(list(left), list(right)))


def product(tensors: Tensors, factors: float | Sequence[Tensor]) -> Tensors:
    """`tensors * factors`; the factors are one number or tensors that broadcast."""
    if isinstance(factors, Sequence):
        return list(torch._foreach_mul(tensors, list(factors)))
    return list(torch._foreach_mul(tensors, factors))


def normalised(tensors: Tensors, squares: Tensors, correction: float, eps: float) -> Tensors:
    """`tensors / (sqrt(squares / correction) + eps)`."""
    roots = list(torch._foreach_sqrt(squares))
    div_(roots, correction**0.5)
    add_(roots, eps)
    return list(torch._foreach_div(tensors, roots))


def over_mean(tensors: Tensors) -> Tensors:
    """`tensors` over the mean of all their entries; zeros where that is zero."""
    total = torch.stack([tensor.sum() for tensor in tensors]).sum()
    mean = total / sum(tensor.numel() for tensor in tensors)
    return list(torch._foreach_div(tensors, mean.clamp_min(torch.finfo(mean.dtype).tiny)))


def share(tensors: Tensors, times: float) -> Tensors:
    """`z / (1 + z)` of `z = times * tensors`."""
    scaled = product(tensors, times)
    return list(torch._foreach_div(scaled, torch._foreach_add(scaled, 1.0)))


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each tensor, (len(tensors),), on their device."""
    return torch.stack(list(torch._foreach_norm(list(tensors))))


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all entries of all tensors, on their device."""
    return norms(tensors).square().sum().sqrt()


def approach(weights: Tensors, terms: Sequence[tuple[Tensors | None, float | Tensors]]) -> None:
    """Move `weights` by the sum of `rate * (target - weight)`, all taken at their old values.

    A target of None is zero; a rate is a number or tensors shaped as the weights.
    """
    if len(terms) == 1:
        targets, rate = terms[0]
        if targets is not None and not isinstance(rate, list):
            lerp_(weights, targets, rate)  # the common case in one pass: an average
            return
    moves = [_toward(weights, targets, rate) for targets, rate in terms]
    for move in moves:
        add_(weights, move)


def _toward(weights: Tensors, targets: Tensors | None, rate: float | Tensors) -> Tensors:
    if targets is not None:
        return product(difference(targets, weights), rate)
    return product(product(weights, -1.0), rate)


def average(stacked: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over the users axis (the first) of (N, ...), by weight (N,) if given."""
    if weights is None:
        return stacked.mean(0)
    share = (weights / weights.sum()).to(stacked)
    return (share @ stacked.flatten(1)).view(stacked.shape[1:])


def slots(state: dict[Tensor, Any], params: Iterable[Tensor], key: str) -> Tensors:
    """An optimizer's state tensors called `key`, zeros at first."""
    found: Tensors = []
    for p in params:
        own = state[p]  # looked up once: a tensor as a key is hashed in Python
        if key not in own:
            own[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
        found.append(own[key])
    return found


def by_step(state: dict[Tensor, Any], params: Iterable[Tensor]) -> dict[int, Tensors]:
    """Parameters that have a gradient, by the number of this step of theirs (1 is the first).

    Counts are kept on the host: a bias correction never waits for the device.
    """
    found: dict[int, Tensors] = {}
    for p in params:
        if p.grad is not None:
            own = state[p]
            step = own["step"] = own.get("step", 0) + 1
            found.setdefault(step, []).append(p)
    return found


def gradients(params: Iterable[Tensor]) -> Tensors:
    """The gradients of those parameters that have one."""
    return [p.grad for p in params if p.grad is not None]


def runs(tensors: Tensors, elements: int = 1 << 18) -> Iterator[Tensors]:
    """Consecutive tensors of about as many elements as stay in a CPU's cache over several passes.

    On any other device launches cost more than passes: all tensors at once.
    """
    run: Tensors = []
    count = 0
    for tensor in tensors:
        if run and tensor.is_cpu and count + tensor.numel() > elements:
            yield run
            run, count = [], 0
        run.append(tensor)
        count += tensor.numel()
    if run:
        yield run
