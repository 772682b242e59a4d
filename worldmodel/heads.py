"""Distributions that heads predict: two-hot scalars, Bernoulli flags, unimix categoricals.

Follows DreamerV3 (arXiv 2301.04104). A head is a network that gives raw parameters; these are
pure functions and small modules on those parameters. Losses are negative log-likelihoods,
unreduced over the leading axes.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from worldmodel.mlp import MLP
from worldmodel.nets import at_least_float32, number, on_cpu, readable, symexp

Draws: TypeAlias = torch.Generator | tuple[torch.Generator, ...] | None  # one, or one a group
FEW = 16  # classes below which a softmax is written out on a CPU


class TwoHot(nn.Module):
    """A scalar as a softmax over exponentially spaced bins from -e^20 to e^20.

    The target is split between the two bins around it (arXiv 2301.04104, equation 10). Output
    weights start at zero, so every prediction starts at 0. The bin at zero comes first, then the
    positive ones and the negative ones, each from small to large; classes nobody can choose fill
    the last places of a row.
    """

    bins: Tensor  # (bins,) the value of each class
    edges: Tensor  # (bins,) the same in order of size

    def __init__(self, n_in: int, units: int, layers: int, bins: int = 255):
        super().__init__()
        if bins % 2 == 0:
            raise ValueError(f"bins={bins} must be odd, so that one bin stands at zero")
        self.net = MLP(n_in, bins, units, layers, scale=0.0, fill=-torch.inf)
        self.pairs = bins // 2
        half = -symexp(torch.linspace(-20, 0, self.pairs + 1))[:-1].flip(0)
        zero = torch.zeros(1)
        self.register_buffer("bins", torch.cat([zero, half, -half]), persistent=False)
        self.register_buffer("edges", torch.cat([-half.flip(0), zero, half]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., F) -> logits (..., bins and more), those of the unused ones -inf."""
        return at_least_float32(self.net(x))

    @torch.no_grad()
    def value(self, x: Tensor) -> Tensor:
        """Expected value (...) of what x (..., F) is told."""
        parts = [self.mean(at_least_float32(logits)) for logits in self.net.blocks(x)]
        return torch.cat(parts).view(x.shape[:-1])

    def mean(self, logits: Tensor) -> Tensor:
        """Expected value (...)."""
        return self.expected(logits.softmax(-1))

    def expected(self, probs: Tensor) -> Tensor:
        """The value (...) of probabilities. Opposite bins are paired first: exact at zero."""
        n = self.pairs
        paired = probs[..., 1 : n + 1] - probs[..., n + 1 : 2 * n + 1]
        return torch.mv(paired.flatten(0, -2), self.bins[1 : n + 1]).view(paired.shape[:-1])

    def loss(
        self,
        logits: Tensor,
        *targets: Tensor,
        weights: Sequence[float] = (1.0,),
        probs: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy (...) of the two-hot encodings of targets (...), summed with weights.

        probs: the softmax of the logits, without gradients, where it is known.
        """
        if len(weights) != len(targets):
            raise ValueError(f"{len(targets)} targets need as many weights, not {len(weights)}")
        index, share = self._places(torch.stack(targets, -1))
        if any(weight != 1.0 for weight in weights):
            share = share * share.new_tensor(weights)[:, None]
        return cross_entropy(logits, index.flatten(-2), share.flatten(-2), probs)

    def _places(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """The two bins around each target, and how it is split between them: (..., 2) each."""
        edges, n = self.edges, self.pairs
        target = at_least_float32(target).clamp(edges[0], edges[-1]).contiguous()
        above = torch.searchsorted(edges, target, right=True).clamp(1, 2 * n)
        low, high = edges[above - 1], edges[above]
        share = (target - low) / (high - low)
        rank = torch.stack([above - 1, above], -1) - n  # from -n, of the least value, to n
        return torch.where(rank < 0, n - rank, rank), torch.stack([1 - share, share], -1)


class Binary(nn.Module):
    """A probability: logit (...) of a flag or of a soft target."""

    def __init__(self, n_in: int, units: int, layers: int):
        super().__init__()
        self.net = MLP(n_in, 1, units, layers)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., F) -> logit (...)."""
        return at_least_float32(self.net(x)).squeeze(-1)

    @torch.no_grad()
    def probability(self, x: Tensor) -> Tensor:
        """Of the flag (...), given x (..., F)."""
        parts = [at_least_float32(logit) for logit in self.net.blocks(x)]
        return torch.cat(parts).sigmoid_().view(x.shape[:-1])

    def loss(self, logit: Tensor, target: Tensor) -> Tensor:
        """Binary cross-entropy (...) to a target in [0, 1]."""
        return F.binary_cross_entropy_with_logits(logit, target, reduction="none")


def cross_entropy(
    logits: Tensor, index: Tensor, share: Tensor, probs: Tensor | None = None
) -> Tensor:
    """Minus the log-probability (...) of few classes, `index` (..., K), each weighed by `share`."""
    if not torch.is_grad_enabled() or readable(logits):
        return -(logits.log_softmax(-1).gather(-1, index) * share).sum(-1)
    probs = logits.detach().softmax(-1) if probs is None else probs
    return CrossEntropy.apply(logits, probs, index, share)


class CrossEntropy(torch.autograd.Function):
    """`cross_entropy` with one pass over the classes each way.

    The value saturates where a class is less probable than a float can say; the gradient does not.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, probs: Tensor, index: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(probs, index, share)
        picked = probs.gather(-1, index).clamp_(min=torch.finfo(probs.dtype).tiny)
        return -(picked.log_() * share).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        probs, index, share = ctx.saved_tensors
        grad = grads[0].unsqueeze(-1)
        back = probs * (grad * share.sum(-1, keepdim=True))
        return back.scatter_add_(-1, index, -grad * share), None, None, None


def softmax(logits: Tensor, few: int = FEW) -> Tensor:
    """Probabilities (..., C). On a CPU torch's own takes fifteen times longer for few classes."""
    if logits.shape[-1] >= few or not on_cpu(logits):
        return logits.softmax(-1)
    raised = (logits - logits.detach().amax(-1, keepdim=True)).exp_()
    return raised / raised.sum(-1, keepdim=True)


def softmax_back(grad: Tensor, probs: Tensor) -> Tensor:
    """Gradient of the logits from that of their probabilities (..., C)."""
    if probs.shape[-1] >= FEW or not on_cpu(probs):
        return torch.ops.aten._softmax_backward_data(grad, probs, -1, probs.dtype)
    return (grad - torch.linalg.vecdot(grad, probs).unsqueeze(-1)).mul_(probs)


def unimix(logits: Tensor, mix: float) -> Tensor:
    """Probabilities (..., C): a softmax mixed with a `mix` share of the uniform distribution."""
    return evened(softmax(at_least_float32(logits)), mix)


def evened(probs: Tensor, mix: float) -> Tensor:
    """probs (..., C), mixed with a `mix` share of the uniform distribution."""
    return torch.add(number(mix / probs.shape[-1], probs.dtype), probs, alpha=1 - mix)


def drawn(
    function: Callable[..., Tensor], shape: Sequence[int], generator: Draws, axis: int
) -> Tensor:
    """torch.rand or torch.randn of a shape; of several generators each draws its part of `axis`."""
    if not isinstance(generator, tuple):
        device = generator.device if generator is not None else None
        return function(tuple(shape), generator=generator, device=device)
    part = [*shape[:axis], shape[axis] // len(generator), *shape[axis + 1 :]]
    return torch.cat([drawn(function, part, one, axis) for one in generator], axis)


def race(shape: Sequence[int], generator: Draws, axis: int = 0) -> Tensor:
    """Noise for `sample`: inverse exponential variables, on the generator's device.

    argmax(probs / Exp(1)) is a draw from probs; the noise holds no state of the distribution, so
    a time loop draws it all at once. A draw for T steps equals T draws for one step. `axis` is
    that of the batch, for groups with a generator each.
    """
    uniform = drawn(torch.rand, shape, generator, axis)
    return uniform.clamp_(1e-12, 1 - 1e-7).log_().reciprocal_().neg_()


def sample(probs: Tensor, noise: Tensor, out: Tensor | None = None) -> Tensor:
    """One-hot draw (..., C) from probs (..., C), without gradients."""
    # of few classes `max` finds the place in half of the time that `argmax` takes on a CPU
    index = (probs.detach() * noise).max(-1, keepdim=True).indices
    drawn = torch.zeros_like(probs) if out is None else out.zero_()
    return drawn.scatter_(-1, index, 1.0)


def chosen(logits: Tensor, noise: Tensor, mix: float, out: Tensor | None = None) -> Tensor:
    """`sample` of `unimix` (..., C): whoever wins the race wins it before they sum to one."""
    logits = at_least_float32(logits)
    raised = (logits - logits.amax(-1, keepdim=True)).exp_()
    if mix:  # all odds in units of the even ones, which are those of the total
        total, even = raised.sum(-1, keepdim=True), mix / logits.shape[-1]
        raised = torch.add(total, raised, alpha=(1 - mix) / even)
    return sample(raised, noise, out)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of categoricals with probabilities (..., S, C), summed over S -> (...)."""
    return (p * (p.log() - q.log())).sum((-2, -1))


def balanced_kl(p: Tensor, q: Tensor, free: float) -> tuple[Tensor, Tensor]:
    """`kl` twice, at least `free`: what q, then what p has to learn of it; (...) each."""
    if not torch.is_grad_enabled() or readable(p):
        return kl(p.detach(), q).clamp(min=free), kl(p, q.detach()).clamp(min=free)
    return BalancedKL.apply(p, q, free)


class BalancedKL(torch.autograd.Function):
    """`balanced_kl`, whose two values are one."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor, free: float) -> tuple[Tensor, Tensor]:
        ratio = p.log().sub_(q.log())
        value = (p * ratio).sum((-2, -1))
        ctx.save_for_backward(p, q, ratio, value)
        ctx.free = free
        ctx.set_materialize_grads(False)  # whoever asks for one direction gets nothing of the other
        value = value.clamp(min=free)
        return value, value.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        p, q, ratio, value = ctx.saved_tensors
        counts = (value >= ctx.free).to(p.dtype)
        of_q, of_p = (None if g is None else (g * counts)[..., None, None] for g in grads)
        g_p = None if of_p is None else (ratio + 1).mul_(of_p)
        return g_p, None if of_q is None else (p / q).mul_(of_q.neg_()), None
