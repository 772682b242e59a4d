"""The world model: what will happen, learned from what did.

Assembled from parts: an encoder, dynamics, a decoder, and heads for reward and continuation.
It filters sequences (`observe`), predicts (`imagine`, `predict`), and gives its losses as a dict
of unreduced (B, T) tensors. Losses follow DreamerV3 (arXiv 2301.04104): reconstruction in symlog
space, two-hot rewards, and the KL in its two directions with free nats.
"""

from typing import Any

import torch
from torch import Tensor, nn

from nested import fast as fast_state
from worldmodel.encoder import Decoder, Encoder
from worldmodel.heads import Binary, Draws, TwoHot, balanced_kl
from worldmodel.nets import at_least_float32, exact_on_cpu
from worldmodel.rssm import RSSM, MemoryUse, Posterior
from worldmodel.step import step
from worldmodel.types import NOBODY, Batch, Carry, Latent

FAST_FORGETS = ("episode", "session", "never")


class WorldModel(nn.Module):
    """encoder, dynamics, decoder, reward and continuation head.

    forget: when fast weights go back to their initial state: at every `first`, at a `first` where
    another user has sat down, or never. users: whether rows tell users apart; without, a slot is
    one user whose session is the episode, so `session` is `episode`. discount: 1 - 1 / horizon,
    folded into the continuation target, so that imagination needs no separate discount.
    """

    def __init__(
        self,
        encoder: Encoder,
        dynamics: RSSM,
        decoder: Decoder,
        reward: TwoHot,
        continues: Binary,
        forget: str = "session",
        discount: float = 1 - 1 / 333,
        free_nats: float = 1.0,
        users: bool = False,
    ):
        super().__init__()
        if forget not in FAST_FORGETS:
            raise ValueError(f"forget={forget!r} must be one of {FAST_FORGETS}")
        self.encoder, self.dynamics, self.decoder = encoder, dynamics, decoder
        self.reward, self.continues = reward, continues
        self.forget, self.discount, self.free_nats = forget, discount, free_nats
        self.users = users

    def initial(self, batch: int) -> Carry:
        """The carry of `batch` rows before their first step."""
        carry = self.dynamics.initial(batch)
        nobody = torch.full((batch,), NOBODY, device=carry.latent.deter.device)
        return carry._replace(user=nobody) if self.users else carry

    def observe(
        self,
        batch: Batch,
        carry: Carry,
        generator: Draws = None,
        use: MemoryUse = "write",
    ) -> tuple[Posterior, Carry]:
        """Filter (B, T, ...) rows from `carry`; any split of T gives the same result."""
        forget = self._forgotten(batch, carry)
        tokens = self.encoder(batch.obs)
        with exact_on_cpu(tokens):
            rows = (at_least_float32(tokens), batch.action, batch.first, forget)
            posterior, carry = self.dynamics.observe(carry, *rows, use, generator)
        return posterior, carry._replace(user=batch.user[:, -1] if self.users else ())

    def step(
        self, row: Batch, carry: Carry, generator: Draws = None, use: MemoryUse = "write"
    ) -> Carry:
        """`observe` on one row (B, ...) where nobody learns: the carry after it."""
        forget = self._leaving(row, carry.user)
        tokens = self.encoder(row.obs)
        with exact_on_cpu(tokens):
            rows = (at_least_float32(tokens), row.action, row.first, forget)
            carry = step(self.dynamics, carry, *rows, use, generator)
        return carry._replace(user=row.user) if self.users else carry

    def _forgotten(self, batch: Batch, carry: Carry) -> Tensor:
        """Rows (B, T) whose fast weights go back to their initial state."""
        users = (carry.user[:, None], batch.user[:, :-1]) if self.users else ()
        return self._leaving(batch, torch.cat(users, 1) if users else ())

    def _leaving(self, rows: Batch, before: Any) -> Tensor:
        """Rows (...) whose fast weights go back to their initial state; `before` had which user."""
        if self.forget == "never":
            return torch.zeros_like(rows.first)
        if self.forget == "episode" or not self.users:
            return rows.first
        return rows.first & (rows.user != before)

    def losses(self, batch: Batch, posterior: Posterior) -> dict[str, Tensor]:
        """Every loss of the world model, unreduced: {name: (B, T)}."""
        lead = batch.first.shape
        deter, stoch = posterior.deter, posterior.stoch
        feature = features(deter, stoch)
        prior = self.dynamics.prior(deter)
        post = posterior.probs
        targets = {key: value.flatten(0, 1) for key, value in batch.obs.items()}
        errors = self.decoder.errors(deter.flatten(0, 1), stoch.flatten(0, 1), targets)
        losses = {key: value.view(lead) for key, value in errors.items()}
        losses["dyn"], losses["rep"] = balanced_kl(post, prior, self.free_nats)
        losses["reward"] = self.reward.loss(self.reward(feature), batch.reward)
        target = (~batch.terminal).float() * self.discount
        losses["continue"] = self.continues.loss(self.continues(feature), target)
        return losses

    def starts(self, posterior: Posterior, last: int = 0) -> Carry:
        """Carries (B * K, ...) of the last K steps (0: all), where imagination may start."""
        tree = (posterior.deter, posterior.stoch, posterior.fast)
        deter, stoch, fast = fast_state.tree_map(
            lambda x: x.detach()[:, -last:].flatten(0, 1), tree
        )
        return Carry(Latent(deter, stoch), fast)


def features(deter: Tensor, stoch: Tensor) -> Tensor:
    """What heads read: (..., D) and (..., S, C) -> (..., D + S * C)."""
    return torch.cat([deter, stoch.flatten(-2)], -1)
