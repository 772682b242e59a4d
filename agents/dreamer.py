"""DreamerV3: an agent that learns its behaviour inside its world model's imagination.

Follows arXiv 2301.04104. `losses` gives every loss of world model, actor and critic as a dict of
unreduced tensors; `total` weighs them. The slow critic is not stored here: it is a copy level of
timescales/, handed in as plain weights. `act` filters one row and draws an action.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from agents.heads import Actor, Critic, policy_of
from agents.returns import ReturnScale, by_group, lambda_return, standardized
from nested import fast
from worldmodel import Batch, Carry, Posterior, WorldModel, features
from worldmodel.heads import Draws
from worldmodel.rssm import Dream, MemoryUse


class Outcome(NamedTuple):
    """What one pass over a batch gives."""

    losses: dict[str, Tensor]  # unreduced; world model (B, T), behaviour (B, K) or (B, T - 1)
    carry: Carry  # after the last row
    metrics: dict[str, Tensor]  # scalars, on the device


def outside(x: Tensor) -> Tensor:
    """x as a tensor that gradients may meet, which one of inference mode is not."""
    return x.clone() if x.is_inference() else x


class Dreamer(nn.Module):
    """A world model with an actor and a critic that learn in imagination.

    horizon: steps imagined from each start; starts: how many of the last steps of each sequence
    imagination starts from (0: all); imagine_memory: how imagination meets fast weights;
    standardize: advantages get mean 0 and deviation 1 in each batch, as DreamerV3's code offers.
    """

    def __init__(
        self,
        world: WorldModel,
        actor: Actor,
        critic: Critic,
        scales: Mapping[str, float],
        horizon: int = 15,
        starts: int = 0,
        lam: float = 0.95,
        entropy: float = 3e-4,
        slow_regularizer: float = 1.0,
        imagine_memory: MemoryUse = "read",
        standardize: bool = False,
    ):
        super().__init__()
        self.world, self.actor, self.critic = world, actor, critic
        self.scales = dict(scales)
        self.horizon, self.starts, self.lam = horizon, starts, lam
        self.entropy, self.slow_regularizer = entropy, slow_regularizer
        self.imagine_memory: MemoryUse = imagine_memory
        self.standardize = standardize
        self.return_scale = ReturnScale()

    def initial(self, batch: int) -> Carry:
        """The carry of `batch` rows before their first step."""
        return self.world.initial(batch)

    def act(
        self,
        carry: Carry,
        row: Batch,
        generator: Draws = None,
        use: MemoryUse = "write",
    ) -> tuple[Tensor, Carry]:
        """Encoded action (B, A) for rows (B, ...), and the carry after them."""
        with torch.inference_mode():
            after = self.world.step(row, carry, generator, use)
            raw = self.actor.net(features(*after.latent))
            action = self.actor.sample(raw, self.actor.noise(1, len(raw), generator)[0])
        return fast.tree_map(outside, (action, after))

    def losses(
        self,
        batch: Batch,
        carry: Carry,
        slow_critic: Mapping[str, Tensor],
        generator: Draws = None,
    ) -> Outcome:
        """Every loss of one batch of sequences (B, T, ...) that starts from `carry`."""
        posterior, carry = self.world.observe(batch, carry, generator)
        losses = self.world.losses(batch, posterior)
        behaviour, *starts, metrics = self._behaviour(posterior, slow_critic, generator)
        losses |= behaviour
        losses["repvalue"] = self._replay_value(batch, posterior, *starts)
        return Outcome(losses, carry, metrics | self._surprise(posterior))

    def _surprise(self, posterior: Posterior) -> dict[str, Tensor]:
        """How wrong the fast memory was about what it then wrote, where there is one."""
        if self.world.dynamics.memory is None:
            return {}
        rows = fast.tree_map(lambda x: x.flatten(0, 1), posterior.fast)
        return {"surprise": by_group(rows.surprise, self.return_scale.low).mean(-1)}

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of mean losses; the names must be those of the scales."""
        if losses.keys() != self.scales.keys():
            extra = sorted(losses.keys() ^ self.scales.keys())
            raise ValueError(f"losses and scales differ in {extra}")
        like = self.return_scale.low
        means = {key: by_group(losses[key], like).mean(-1) for key in self.scales}
        return torch.stack([means[k] * s for k, s in self.scales.items()]).sum()

    def _behaviour(
        self,
        posterior: Posterior,
        slow_critic: Mapping[str, Tensor],
        generator: Draws,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
        """Losses of actor and critic in imagination; returns, slow values (B, K) of its starts."""
        starts = self.world.starts(posterior, self.starts)
        recording = self.actor.net.recording(starts.latent.deter, self.horizon)
        dream = self.world.dynamics.imagine(
            starts,
            policy_of(self.actor, self.horizon, generator, recording),
            self.horizon,
            self.imagine_memory,
            generator,
            self.actor.choices,
        )
        reward, live = self._judged(dream)
        slow_value = self._slow_value(dream.feature, slow_critic)
        logits = self.critic(dream.feature)
        with torch.no_grad():
            probs = logits.softmax(-1)
            last = self.critic.value(dream.last)
            value = torch.cat([self.critic.expected(probs), last[:, None]], 1)
        returns = lambda_return(reward, live, torch.ones_like(live), value, self.lam)
        scale = self.return_scale(returns)
        weight = live.cumprod(1)[:, :-1]
        advantage = by_group(returns - value[:, :-1], scale) / scale.unsqueeze(-1)
        if self.standardize:
            advantage = standardized(advantage, by_group(weight, scale))
        advantage = advantage.view(returns.shape)
        params = self.actor(dream.feature, recording)
        entropy = self.actor.entropy(params)
        log_prob = self.actor.log_prob(params, dream.action)
        policy = -weight * (log_prob * advantage + self.entropy * entropy)
        critic = weight * self._value_loss(logits, returns, slow_value, probs)
        shape = (len(posterior.deter), -1)
        losses = {"policy": policy.mean(1).view(shape), "value": critic.mean(1).view(shape)}
        metrics = {
            "entropy": entropy.detach(),
            "return_scale": scale,
            "imagined_return": returns,
            "advantage": advantage.abs(),
            "imagined_reward": reward,
        }
        metrics = {name: by_group(x, scale).mean(-1) for name, x in metrics.items()}
        return losses, returns[:, 0].view(shape), slow_value[:, 0].view(shape), metrics

    @torch.no_grad()
    def _judged(self, dream: Dream) -> tuple[Tensor, Tensor]:
        """Reward and continuation (N, H + 1) of the states of a dream."""
        world = self.world
        return dream.judged(world.reward.value), dream.judged(world.continues.probability)

    def _replay_value(
        self,
        batch: Batch,
        posterior: Posterior,
        returns: Tensor,
        slow_value: Tensor,
    ) -> Tensor:
        """Critic loss (B, K - 1) on replayed rewards, bootstrapped with imagined returns (B, K).

        slow_value (B, K): the slow critic's values of the same steps.
        """
        k = returns.shape[1]
        feature = features(posterior.deter, posterior.stoch)[:, -k:]
        first, terminal = batch.first[:, -k:], batch.terminal[:, -k:]
        # the row before a `first` row is the last of its episode; the chunk's end bootstraps
        last = torch.cat([first[:, 1:], torch.zeros_like(first[:, :1])], 1)
        live = (~terminal).float() * self.world.discount
        target = lambda_return(batch.reward[:, -k:], live, (~last).float(), returns, self.lam)
        logits = self.critic(feature[:, :-1])
        loss = self._value_loss(logits, target, slow_value[:, :-1])
        return (~last[:, :-1]).float() * loss

    @torch.no_grad()
    def _slow_value(self, feature: Tensor, slow_critic: Mapping[str, Tensor]) -> Tensor:
        """The slow critic's values (...) of features (..., F)."""
        return fast.bind(self.critic, slow_critic, Critic.value)(feature)

    def _value_loss(
        self, logits: Tensor, target: Tensor, slow_value: Tensor, probs: Tensor | None = None
    ) -> Tensor:
        """Error against returns, and against the slow critic as a regulariser."""
        weights = (1.0, self.slow_regularizer)
        return self.critic.loss(logits, target, slow_value, weights=weights, probs=probs)
