"""Actions of every make: likelihood, draws and divergence agree with torch's distributions."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Independent, kl_divergence

from agents.actions import Actions, Axes, Choice, Keys, Part, actions_of
from worldmodel import ActionSpec

PARTS = pytest.mark.parametrize(
    "part", [Choice(5), Keys(3), Axes(2, 7)], ids=["choice", "keys", "axes"]
)


def torch_s(part: Part, logits: Tensor) -> Categorical | Independent:
    """The same distribution from torch; axes by the numbers of their bins."""
    if isinstance(part, Choice):
        return Categorical(logits=logits)
    if isinstance(part, Keys):
        return Independent(Bernoulli(logits=logits), 1)
    return Independent(Categorical(logits=logits.unflatten(-1, (2, 7))), 1)


def as_torch(part: Part, action: Tensor) -> Tensor:
    if isinstance(part, Choice):
        return action.argmax(-1)
    return action if isinstance(part, Keys) else ((action + 1) * 3).round()


@PARTS
def test_likelihood_and_divergence_are_torch_s(part: Part):
    p, q = torch.randn(2, 4, 6, part.logits, dtype=torch.float64)
    action = part.sample(p, torch.Generator().manual_seed(0))
    assert action.shape == (4, 6, part.dim)
    expected = torch_s(part, p).log_prob(as_torch(part, action))
    assert torch.allclose(part.log_prob(p, action), expected)
    assert torch.allclose(part.kl(p, q), kl_divergence(torch_s(part, p), torch_s(part, q)))


@PARTS
def test_draws_follow_the_distribution(part: Part):
    logits = torch.randn(1, part.logits).expand(20_000, -1)
    drawn = part.sample(logits, torch.Generator().manual_seed(0))
    mean = torch_s(part, logits[0])
    values = mean.probs if isinstance(mean, Categorical) else mean.mean
    if isinstance(part, Axes):
        centres = torch.linspace(-1, 1, 7)
        values = (logits[0].unflatten(-1, (2, 7)).softmax(-1) * centres).sum(-1)
    assert torch.allclose(drawn.mean(0), values, atol=0.02)


def test_continuous_entries_fall_in_the_nearest_bin():
    axes = Axes(1, 5)  # centres at -1, -0.5, 0, 0.5, 1
    logits = torch.arange(5.0)
    action = torch.tensor([[-3.0], [-0.7], [0.2], [0.3], [1.0]])
    logp = logits.log_softmax(-1)[[0, 1, 2, 3, 4]]
    assert torch.allclose(axes.log_prob(logits.expand(5, 5), action), logp)
    with pytest.raises(ValueError, match="bins=1"):
        Axes(1, 1)


def test_parts_stand_side_by_side_and_add_up():
    """Minecraft's: keys, and a camera of many directions."""
    parts = [Keys(3), Choice(5), Axes(2, 7)]
    actions = Actions(parts)
    assert (actions.dim, actions.logits) == (10, 22)
    p, q = torch.randn(2, 4, 22)
    action = actions.sample(p, torch.Generator().manual_seed(0))
    pieces = list(zip(p.split([3, 5, 14], -1), action.split([3, 5, 2], -1), strict=True))
    logp = sum(part.log_prob(*piece) for part, piece in zip(parts, pieces, strict=True))
    assert torch.allclose(actions.log_prob(p, action), torch.as_tensor(logp))
    halves = zip(parts, p.split([3, 5, 14], -1), q.split([3, 5, 14], -1), strict=True)
    kl = sum(part.kl(a, b) for part, a, b in halves)
    assert torch.allclose(actions.kl(p, q), torch.as_tensor(kl))
    assert (actions.kl(p, q) > 0).all() and torch.equal(actions.kl(p, p), torch.zeros(4))


def test_an_environment_s_actions_become_parts():
    several = actions_of(ActionSpec("discrete", (2, 3)))
    assert (several.dim, several.logits) == (5, 5)
    continuous = actions_of(ActionSpec("continuous", (2,)), bins=9)
    assert (continuous.dim, continuous.logits) == (2, 18)
