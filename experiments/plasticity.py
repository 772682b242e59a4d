"""Can it still learn? Signs of lost plasticity in a network, and the definition that matters.

Leading axes, such as seeds, pass through everything. Dormant units, ranks and norms are symptoms;
`fresh_gap` is the thing itself: does a fresh agent learn the same task faster? (Dohare et al. 2024,
Nature 632; ReDo, arXiv 2302.12902; effective rank, Roy & Vetterli 2007; srank, arXiv 2010.14498.)
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

DORMANT = 0.025  # tau for ReLU, as in ReDo; units that can be negative need about 0.1: state it


def unit_scores(activations: Tensor) -> Tensor:
    """Mean |activation| of each unit over that of its layer: (..., batch, units) -> (..., units).

    ReDo's score; all zeros where the whole layer is silent.
    """
    size = activations.abs().mean(-2)
    return size / size.mean(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)


def dormant(activations: Tensor, tau: float = DORMANT) -> Tensor:
    """Share of units whose score is at most tau: (..., batch, units) -> (...,)."""
    return (unit_scores(activations) <= tau).to(activations.dtype).mean(-1)


def erank(features: Tensor) -> Tensor:
    """Effective rank of features (..., n, d): exp of the entropy of normalised singular values.

    Between 1 and min(n, d); 0 where all features are zero.
    """
    share = _spectrum(features)
    entropy = -torch.xlogy(share, share).sum(-1)
    return entropy.exp() * (share.sum(-1) > 0)


def srank(features: Tensor, share: float = 0.99) -> Tensor:
    """Least number of singular values of (..., n, d) that hold `share` of their sum (srank_.99)."""
    held = _spectrum(features).cumsum(-1)
    return ((held < share - 1e-6).sum(-1) + 1).to(features.dtype) * (held[..., -1] > 0)


def weight_norm(weights: Mapping[str, Tensor], leading: int = 1) -> Tensor:
    """Euclidean norm of all weights together; `leading` axes, such as seeds, are kept."""
    squares = [w.flatten(leading).square().sum(-1) for w in weights.values()]
    return torch.stack(squares).sum(0).sqrt()


def fresh_gap(fresh: np.ndarray, own: np.ndarray) -> np.ndarray:
    """By task (..., N), how much more area a fresh agent has under its learning curve.

    Areas as of `metrics.auc`, same task, same budget; positive: plasticity was lost.
    """
    return np.asarray(fresh, np.float64) - own


def _spectrum(features: Tensor) -> Tensor:
    """Singular values over their sum, largest first; zeros where the sum is zero."""
    values = torch.linalg.svdvals(features)
    return values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
