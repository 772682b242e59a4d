"""Dreamer 4's agent: it imitates within the world model, then learns in its imagination.

Follows arXiv 2509.24527. `finetune` keeps the dynamics' loss and adds imitation and rewards, read
from agent tokens and predicted several steps ahead. `imagine` freezes the dynamics: value and
policy learn from rollouts, the policy by PMPO, near its frozen self, which is handed in as plain
weights. A terminal head, which the paper does not name, tells where episodes end. An ensemble, if
there is one, tells what the world model does not know, and imagined rewards then pay for it.

Row t holds the action that led into frame t and the reward that came with it, so a policy that
sees frame t is taught the action of row t + 1, and a reward head the reward of row t.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from agents.actions import Actions
from agents.ensemble import Ensemble
from agents.pmpo import pmpo
from agents.returns import lambda_return
from worldmodel.heads import Binary, TwoHot
from worldmodel.mlp import Dense
from worldmodel.nets import Linear
from worldmodel.scale import RunningRMS
from worldmodel.shortcut import Clip, ShortcutDynamics
from worldmodel.tokenizer import Tokenizer
from worldmodel.transformer import Context
from worldmodel.types import Batch


class Experience(NamedTuple):
    """Recorded sequences, and what each row of them is for."""

    clip: Clip
    reward: Tensor  # (B, T); of rows that are not labelled it may be anything, NaN too
    terminal: Tensor  # (B, T) bool; of those nothing is learned
    imitate: Tensor  # (B,) bool: rows whose actions are worth imitating
    predict: Tensor  # (B,) bool: rows of the dynamics' loss
    settled: Tensor  # (B,) bool: rows seen as in acting, not noised to levels that are drawn


class Scene(NamedTuple):
    """What acting keeps between frames."""

    seen: Context  # of the encoder
    past: Context  # of the dynamics
    task: Tensor  # (B,) int64


class Imagination(NamedTuple):
    """What one pass of imagination training gives."""

    losses: dict[str, Tensor]  # (B, H) each
    metrics: dict[str, Tensor]  # scalars, on the device


class Ahead(nn.Module):
    """A small MLP with an output layer for each distance; `forward` is the nearest."""

    def __init__(
        self, n_in: int, units: int, layers: int, count: int, out: Callable[[int], nn.Module]
    ):
        super().__init__()
        sizes = [n_in] + [units] * layers
        self.trunk = nn.Sequential(*(Dense(a, b) for a, b in pairwise(sizes)))
        self.outs = nn.ModuleList(out(sizes[-1]) for _ in range(count))

    def forward(self, feature: Tensor) -> Tensor:
        """feature (..., F) -> logits (..., n) at distance zero."""
        return self.outs[0](self.trunk(feature))

    def all(self, feature: Tensor) -> Tensor:
        """feature (..., F) -> logits (..., L, n) at every distance."""
        x = self.trunk(feature)
        return torch.stack([out(x) for out in self.outs], -2)


class OfflineDreamer(nn.Module):
    """A tokenizer, dynamics with agent tokens, and heads for policy, reward, terminal and value.

    units, layers: of the heads; ahead: steps predicted ahead; horizon: imagined frames, each in
    `steps` sampling steps; discount, lam: of returns; alpha, beta: of PMPO; members: of an
    ensemble about the next frame, 0 for none; doubt: what a unit of its disagreement costs in
    imagination, below zero what it earns (curiosity).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        dynamics: ShortcutDynamics,
        actions: Actions,
        units: int = 128,
        layers: int = 1,
        ahead: int = 8,
        horizon: int = 15,
        steps: int = 4,
        discount: float = 0.997,
        lam: float = 0.95,
        alpha: float = 0.5,
        beta: float = 0.3,
        members: int = 0,
        doubt: float = 0.0,
    ):
        super().__init__()
        if not dynamics.agents:
            raise ValueError("agents=0: a policy needs dynamics with at least one agent token")
        if doubt and not members:
            raise ValueError(f"doubt={doubt} needs an ensemble: members=5, for example")
        self.tokenizer, self.dynamics, self.actions = tokenizer, dynamics, actions
        self.horizon, self.steps, self.discount, self.lam = horizon, steps, discount, lam
        self.alpha, self.beta = alpha, beta
        width = dynamics.feature
        size = actions.logits
        self.policy = Ahead(width, units, layers, ahead, lambda n: Linear(n, size, 0.01))
        self.reward = Ahead(width, units, layers, ahead, lambda n: TwoHot(n, 0, 0))
        self.terminal = Binary(width, units, layers)
        self.value = TwoHot(width, units, layers)
        names, self.doubt = ("policy", "reward", "terminal"), doubt
        self.ensemble: Ensemble | None = None
        if members:
            frame = dynamics.latents[0] * dynamics.latents[1]
            self.ensemble = Ensemble(width, actions.dim, frame, members, units, layers)
            names = (*names, "ensemble")
        self.norms = nn.ModuleDict({name: RunningRMS() for name in names})

    def finetune(
        self, batch: Experience, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Losses (B, T) of dynamics, policy, reward and terminal, over their running RMS."""
        clip = batch.clip
        ones = torch.ones_like(batch.reward)
        rows = (clip.labelled, batch.predict[:, None], batch.imitate[:, None])
        known, predict, imitate = (ones * each for each in rows)
        losses, feature = self.dynamics.losses(clip, generator, predict, batch.settled)
        losses["dynamics"] = counted(losses["dynamics"], predict)
        losses["policy"] = self._scaled("policy", self._imitation(clip, feature), imitate)
        losses["reward"] = self._scaled("reward", self._rewards(batch, feature), known)
        terminal = self.terminal.loss(self.terminal(feature), batch.terminal.float())
        losses["terminal"] = self._scaled("terminal", terminal, known)
        if self.ensemble is not None:
            losses["ensemble"] = self._foreseen(self.ensemble, clip, feature)
        return losses

    def prior(self) -> dict[str, Tensor]:
        """A copy of the policy's weights, for `imagine`: taken once, when imitation is over."""
        return {name: p.detach().clone() for name, p in self.policy.named_parameters()}

    def imagine(
        self, clip: Clip, prior: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> Imagination:
        """Losses (B, H) of policy and value, from one rollout after each clip."""
        feature, action = self._rollout(clip, generator)
        with torch.no_grad():
            reward = twohot(self.reward).mean(self.reward(feature))
            doubt = self._doubt(feature, action)
            reward = reward - self.doubt * doubt
            live = 1 - self.terminal(feature).sigmoid()
            value = self.value.value(feature)
            ones = torch.ones_like(live)
            returns = lambda_return(reward, live * self.discount, ones, value, self.lam)
            advantage = returns - value[:, :-1]
            weight = live.cumprod(1)[:, :-1]
            before = functional_call(self.policy, dict(prior), (feature[:, :-1],))
        logits = self.policy(feature[:, :-1])
        log_prob = self.actions.log_prob(logits, action[:, :-1])
        kl = self.actions.kl(logits, before)
        policy = pmpo(log_prob, advantage, kl, weight, self.alpha, self.beta)
        critic = weight * self.value.loss(self.value(feature[:, :-1]), returns)
        metrics = {
            "imagined_reward": reward.mean(),
            "imagined_return": returns.mean(),
            "advantage": advantage.abs().mean(),
            "positive": (advantage >= 0).float().mean(),
            "prior_kl": kl.detach().mean(),
        }
        if self.ensemble is not None:
            metrics["doubt"] = doubt[:, 1:].mean()
        return Imagination({"policy": policy, "value": critic}, metrics)

    def initial(self, batch: int, task: int = 0) -> Scene:
        """What `batch` rows keep before their first frame, all of them given one task."""
        past = self.dynamics.initial(batch)
        return Scene(self.tokenizer.encoder.initial(batch), past, torch.full_like(past.seen, task))

    @torch.no_grad()
    def act(
        self, scene: Scene, row: Batch, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Scene]:
        """Encoded action (B, A) for rows (B, ...) with one image each, and the scene after them."""
        (image,) = row.obs.values()
        first = row.first[:, None]
        latents, seen = self.tokenizer.encode_next(image[:, None], scene.seen, first)
        clip = Clip(
            latents, row.action[:, None], first, torch.ones_like(first), scene.task[:, None]
        )
        feature, past = self.dynamics.observe(clip, scene.past, generator)
        action = self.actions.sample(self.policy(feature[:, 0]), generator)
        return action, Scene(seen, past, scene.task)

    @torch.no_grad()
    def _rollout(self, clip: Clip, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Features (B, H + 1, F) and actions (B, H + 1, A) imagined after each clip."""
        features, context = self.dynamics.observe(
            clip, self.dynamics.initial(len(clip.first)), generator
        )
        rollout, _ = self.dynamics.imagine(
            context,
            features[:, -1],
            lambda feature: self.actions.sample(self.policy(feature), generator),
            self.horizon,
            clip.task[:, -1],
            self.steps,
            generator,
        )
        return rollout.feature, rollout.action

    def _imitation(self, clip: Clip, feature: Tensor) -> Tensor:
        """Negative log-likelihood (B, T) of the known actions that follow each frame, summed."""
        count = len(self.policy.outs)
        action, same = following(clip.action, clip.first, count, 1)
        known, _ = following(clip.labelled, clip.first, count, 1)
        counts = same & known
        action = torch.where(counts[..., None], action, 0.0)  # an unknown one may be anything
        logp = self.actions.log_prob(self.policy.all(feature).float(), action)
        return -(logp * counts).sum(-1)

    def _rewards(self, batch: Experience, feature: Tensor) -> Tensor:
        """Cross-entropy (B, T) of the known rewards from each frame on, summed."""
        clip, count = batch.clip, len(self.reward.outs)
        reward, same = following(batch.reward, clip.first, count, 0)
        known, _ = following(clip.labelled, clip.first, count, 0)
        counts = same & known
        reward = torch.where(counts, reward, 0.0)
        return (twohot(self.reward).loss(self.reward.all(feature), reward) * counts).sum(-1)

    def _foreseen(self, ensemble: Ensemble, clip: Clip, feature: Tensor) -> Tensor:
        """The ensemble's error (B, T) about the frames that follow each known action."""
        action, same = following(clip.action, clip.first, 1, 1)
        latents, _ = following(clip.latents.flatten(2), clip.first, 1, 1)
        known, _ = following(clip.labelled, clip.first, 1, 1)
        counts = same & known
        action = torch.where(counts[..., None], action, 0.0)  # an unknown one may be anything
        weight = counts[:, :, 0].to(feature.dtype)
        error = ensemble.losses(feature, action[:, :, 0], latents[:, :, 0], weight)
        return self._scaled("ensemble", error, weight)

    def _doubt(self, feature: Tensor, action: Tensor) -> Tensor:
        """Doubt (B, H + 1) about the step into each state of a rollout; none about the first."""
        if self.ensemble is None:
            return torch.zeros_like(feature[..., 0])
        found = self.ensemble.doubt(feature[:, :-1], action[:, :-1])
        return torch.cat([torch.zeros_like(found[:, :1]), found], 1)

    def _scaled(self, name: str, loss: Tensor, weight: Tensor) -> Tensor:
        return counted(self.norms[name](loss, weight), weight)


def twohot(head: Ahead) -> TwoHot:
    """The distribution whose logits the head gives, the same at every distance."""
    out = head.outs[0]
    assert isinstance(out, TwoHot)  # a ModuleList gives modules of any kind
    return out


def counted(loss: Tensor, weight: Tensor) -> Tensor:
    """loss (B, T) so that its mean is that of the rows which count by `weight` (B, T)."""
    return loss * weight / weight.mean().clamp(min=1 / weight.numel())


def following(x: Tensor, first: Tensor, count: int, shift: int) -> tuple[Tensor, Tensor]:
    """Rows t + shift .. t + shift + count - 1 of x (B, T, ...) for each t: (B, T, count, ...).

    Also whether each is there and of the same episode as t, (B, T, count) bool.
    """
    length = first.shape[1]
    row = torch.arange(length, device=first.device)
    index = row[:, None] + shift + torch.arange(count, device=first.device)
    inside, index = index < length, index.clamp(max=length - 1)
    episode = first.cumsum(1)
    return x[:, index], inside & (episode[:, index] == episode[:, :, None])
