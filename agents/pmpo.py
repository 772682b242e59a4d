"""PMPO: a policy learns from the signs of advantages, held near a prior.

Follows Dreamer 4 (arXiv 2509.24527), which takes preference optimisation (arXiv 2410.04166) to
imagined rollouts. States with an advantage of at least zero and those below make two sets that
weigh the same, however many each holds and however large their advantages are:

  (1 - alpha) mean_{A < 0} ln pi(a) - alpha mean_{A >= 0} ln pi(a) + beta mean KL(pi || prior)
"""

import torch
from torch import Tensor


def pmpo(
    log_prob: Tensor,
    advantage: Tensor,
    kl: Tensor,
    weight: Tensor,
    alpha: float = 0.5,
    beta: float = 0.3,
) -> Tensor:
    """The loss of each state, (B, H) as all arguments; its mean is the equation above.

    kl: KL(pi || prior), the learning policy first; weight: what each state counts in every mean.
    An empty set adds nothing.
    """
    good = (advantage >= 0).to(log_prob.dtype) * weight
    bad = weight - good
    push = (1 - alpha) * share(bad) - alpha * share(good)
    return log_prob.numel() * (push * log_prob + beta * share(weight) * kl)


def share(weight: Tensor) -> Tensor:
    """Weights over their sum; zeros stay zeros."""
    return weight / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
