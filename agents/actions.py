"""Actions of any make as distributions over one encoded vector: for imitation and for PMPO.

A vector of A entries is split into parts: one-hot choices, binary keys, and continuous entries in
[-1, 1]. Each part has logits, a likelihood, draws and a divergence in closed form. Continuous
entries are categorical over bins, for which a paper on discrete actions (Dreamer 4, arXiv
2509.24527) needs no change; a bounded likelihood is also what keeps PMPO's negative term tame.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from worldmodel.heads import race, sample
from worldmodel.types import ActionSpec


class Choice:
    """One of n, as a one-hot vector: discrete actions, or a camera of n directions."""

    def __init__(self, n: int):
        self.dim = self.logits = n

    def log_prob(self, logits: Tensor, action: Tensor) -> Tensor:
        """logits (..., n), one-hots (..., n) -> (...)."""
        return (logits.log_softmax(-1) * action).sum(-1)

    def sample(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """One-hots (..., n)."""
        return sample(logits.softmax(-1), race(logits.shape, generator))

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) (...) of logits (..., n)."""
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)


class Keys:
    """n keys, pressed (1) or not (0), independent of each other."""

    def __init__(self, n: int):
        self.dim = self.logits = n

    def log_prob(self, logits: Tensor, action: Tensor) -> Tensor:
        """logits (..., n), keys (..., n) -> (...)."""
        return -F.binary_cross_entropy_with_logits(logits, action, reduction="none").sum(-1)

    def sample(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Keys (..., n)."""
        device = generator.device if generator is not None else None
        uniform = torch.rand(logits.shape, generator=generator, device=device)
        return (uniform < logits.sigmoid()).to(logits.dtype)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) (...) of logits (..., n)."""
        down = F.logsigmoid(-p) - F.logsigmoid(-q)
        return (p.sigmoid() * (p - q) + down).sum(-1)


class Axes:
    """n continuous entries in [-1, 1], each a choice of one of so many bins."""

    def __init__(self, n: int, bins: int = 41):
        if bins < 2:
            raise ValueError(f"bins={bins}: a continuous action needs at least 2")
        self.dim, self.bins, self.logits = n, bins, n * bins
        self.choice = Choice(bins)

    def log_prob(self, logits: Tensor, action: Tensor) -> Tensor:
        """logits (..., n * bins), entries (..., n) -> log-probability (...) of their bins."""
        index = ((action.clamp(-1, 1) + 1) * ((self.bins - 1) / 2)).round().long()
        logp = logits.unflatten(-1, (self.dim, self.bins)).log_softmax(-1)
        return logp.gather(-1, index[..., None])[..., 0].sum(-1)

    def sample(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Entries (..., n), at the bins' centres."""
        drawn = self.choice.sample(logits.unflatten(-1, (self.dim, self.bins)), generator)
        return drawn.argmax(-1).to(logits.dtype) * (2 / (self.bins - 1)) - 1

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) (...) of logits (..., n * bins)."""
        shape = (self.dim, self.bins)
        return self.choice.kl(p.unflatten(-1, shape), q.unflatten(-1, shape)).sum(-1)


Part = Choice | Keys | Axes


class Actions:
    """Parts side by side: `dim` entries of an action, `logits` of its distribution."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = tuple(parts)
        self.dims, self.sizes = [p.dim for p in self.parts], [p.logits for p in self.parts]
        self.dim, self.logits = sum(self.dims), sum(self.sizes)

    def log_prob(self, logits: Tensor, action: Tensor) -> Tensor:
        """log pi(action) (...) of logits (..., `logits`) and action (..., A)."""
        pieces = zip(
            self.parts, logits.split(self.sizes, -1), action.split(self.dims, -1), strict=True
        )
        return torch.stack([part.log_prob(p, a) for part, p, a in pieces]).sum(0)

    def sample(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """A draw (..., A), without gradients."""
        pieces = zip(self.parts, logits.detach().split(self.sizes, -1), strict=True)
        return torch.cat([part.sample(p, generator) for part, p in pieces], -1)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) (...) of logits (..., `logits`)."""
        pieces = zip(self.parts, p.split(self.sizes, -1), q.split(self.sizes, -1), strict=True)
        return torch.stack([part.kl(a, b) for part, a, b in pieces]).sum(0)


def actions_of(spec: ActionSpec, bins: int = 41) -> Actions:
    """The distribution that fits an environment's actions."""
    if spec.kind == "discrete":
        return Actions([Choice(n) for n in spec.sizes])
    return Actions([Axes(spec.dim, bins)])
