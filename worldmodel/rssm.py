"""The recurrent state-space model of DreamerV3: block GRU, categorical latents, optional memory.

Follows arXiv 2301.04104. One step mixes (deter, stoch, action) into the new deterministic state;
the prior predicts the stochastic state from it, the posterior sees the observation as well. With
a memory from nested/, each step also writes what it has just seen into fast weights and reads
from them, so that part of the dynamics learns while it runs.

`observe` is one law for a step and a sequence: all that is not recurrent (actions, tokens, noise)
is computed before the loop, and the loop keeps only what depends on the previous state.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nested import fast as fast_state
from worldmodel.cell import Draw, Plain, Weights
from worldmodel.heads import Draws, race, unimix
from worldmodel.mlp import MLP, Dense, Net
from worldmodel.nets import BlockLinear, RMSNorm, affine, matmul, read_dtype, readable
from worldmodel.prior import Chooser, dreamed, embedded, folded, step
from worldmodel.tape import Filter, Tape
from worldmodel.types import Carry, Latent

Recall = Callable[[Tensor, Tensor, Any], tuple[Tensor | None, Any]]
Embedding = Callable[[Tensor], tuple[Tensor, Tensor]]
MemoryUse = Literal["write", "read", "off"]


class Posterior(NamedTuple):
    """States inferred from observations."""

    deter: Tensor  # (B, T, D)
    stoch: Tensor  # (B, T, S, C) one-hot, with straight-through gradients
    probs: Tensor  # (B, T, S, C)
    fast: Any  # fast weights after each step, (B, T, ...), without gradients


class Dream(NamedTuple):
    """A rollout of the prior: `action[:, h]` was chosen in state h and led to state h + 1."""

    feature: Tensor  # (N, H, F) what heads read of the states 0 .. H - 1
    last: Tensor  # (N, F) of state H
    action: Tensor  # (N, H, A)
    rows: Tensor | None  # (N * H + N, F) both one after the other, but not of groups

    def judged(self, head: Callable[[Tensor], Tensor]) -> Tensor:
        """What a head gives (...) of features (..., F), of all states: (N, H + 1)."""
        if self.rows is None:
            return torch.cat([head(self.feature), head(self.last[:, None])], 1)
        found, n = head(self.rows), len(self.last)
        return torch.cat([found[:-n].view(n, -1), found[-n:, None]], 1)


class RSSM(nn.Module):
    """Dynamics over Carry(latent, fast).

    tokens: width of the encoded observation; action: width of the encoded action; memory: a
    module from nested/ with 3 * hidden inputs and `hidden` outputs, or None.
    """

    def __init__(
        self,
        tokens: int,
        action: int,
        deter: int = 512,
        hidden: int = 64,
        stoch: int = 32,
        classes: int = 4,
        blocks: int = 8,
        mix: float = 0.01,
        memory: nn.Module | None = None,
    ):
        super().__init__()
        self.deter, self.hidden, self.stoch, self.classes = deter, hidden, stoch, classes
        self.blocks, self.mix = blocks, mix
        self.memory: Any = memory  # a module or None
        self.readable = False  # True: the loop without nodes by hand
        inputs = 3 if memory is None else 4
        self.from_deter = Dense(deter, hidden)
        self.from_stoch = Dense(stoch * classes, hidden)
        self.from_action = Dense(action, hidden)
        self.mixed = BlockLinear(deter + blocks * inputs * hidden, deter, blocks)
        self.mixed_norm = RMSNorm(deter)
        self.gates = BlockLinear(deter, 3 * deter, blocks)
        self.prior_net = MLP(deter, stoch * classes, hidden, 2)
        self.posterior_net = MLP(deter + tokens, stoch * classes, hidden, 1)

    @property
    def feature(self) -> int:
        """F, the width of what heads read."""
        return self.deter + self.stoch * self.classes

    def initial(self, batch: int) -> Carry:
        """Zero latent and the memory's (learned) initial state, for `batch` rows."""
        like = self.mixed.bias
        deter = like.new_zeros(batch, self.deter)
        stoch = like.new_zeros(batch, self.stoch, self.classes)
        fast = () if self.memory is None else self.memory.initial(batch)
        return Carry(Latent(deter, stoch), fast)

    def observe(
        self,
        carry: Carry,
        tokens: Tensor,
        action: Tensor,
        first: Tensor,
        forget: Tensor,
        use: MemoryUse = "write",
        generator: Draws = None,
    ) -> tuple[Posterior, Carry]:
        """Filter a sequence: tokens (B, T, E), action (B, T, A), first and forget (B, T) bool.

        Where `first` is set the latent and the action are zeroed before the step; where `forget`
        is set the fast weights go back to their initial state. `use`: what to do with them.
        """
        batch, length = first.shape
        weights, shares = self._hoist()
        keep = (~first).to(tokens.dtype)[..., None]
        embed, bias = self._embed(action * keep, shares)
        layer = self.posterior_net.first.linear
        seen = affine(tokens, layer.weight[..., self.deter :, :], layer.bias)
        noise = race((length, batch, self.stoch, self.classes), generator, 1)
        if self.memory is None and self._by_hand(tokens):
            latent = carry.latent.deter, carry.latent.stoch.flatten(1)
            rows = (bias, seen, keep, noise, self._draw)
            deter, stoch, probs = Filter.apply(*latent, *rows, *weights)
            history = fast = carry.fast
        else:
            each = (embed, bias, seen, keep, forget, noise.transpose(0, 1))
            rows = [x.unbind(1) for x in each]
            cell = self._cell(weights, tokens)
            (deter, stoch, probs), history, fast = self._by_steps(cell, carry, rows, use)
        after = Carry(Latent(deter[:, -1], stoch[:, -1]), fast)
        return Posterior(deter, stoch, probs, history), after

    def _by_steps(
        self, cell: Plain | Tape, carry: Carry, rows: Sequence[Sequence[Tensor]], use: MemoryUse
    ) -> tuple[tuple[Tensor, ...], Any, Any]:
        """A loop over rows of embed, bias, seen, keep, forget and noise; a memory may take part.

        Deter, stoch and its probabilities (B, T, ...), the fast weights after each step, the last.
        """
        (deter, stoch), fast = carry.latent, carry.fast
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        fasts = []
        for embed, bias, seen, keep, forget, noise in zip(*rows, strict=True):
            deter, x = cell.enter(deter, stoch.flatten(1), keep)
            recalled, fast = self.recall(use, forget)(x, embed, fast)
            deter, stoch, probs = cell.leave(deter, x, recalled, bias, seen, noise)
            steps.append((deter, stoch, probs))
            fasts.append(fast_state.detach(fast))
        history = fast_state.tree_map(lambda *x: torch.stack(x, 1), *fasts)
        return tuple(torch.stack(x, 1) for x in zip(*steps, strict=True)), history, fast

    def states(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """deter (..., D) and stoch (..., S, C) of a feature (..., F)."""
        deter, stoch = feature.split([self.deter, self.stoch * self.classes], -1)
        return deter, stoch.unflatten(-1, (self.stoch, self.classes))

    def prior(self, deter: Tensor) -> Tensor:
        """Probabilities (..., S, C) of the stochastic state given deter (..., D)."""
        return self.probs(self.prior_net(deter))

    @torch.no_grad()
    def imagine(
        self,
        carry: Carry,
        policy: Callable[[Tensor], Tensor],
        horizon: int,
        use: MemoryUse = "read",
        generator: Draws = None,
        choices: Tensor | None = None,
    ) -> Dream:
        """Roll the prior out from N carries; policy maps features (N, F) to actions (N, A).

        Without gradients: actors learn by the score function, world models by prediction.
        choices (A, A): all actions, where each is a one-hot vector; they are embedded once.
        """
        weights, shares = self._hoist()
        prior = folded(weights), self.prior_net.net(), self._draw
        deter, stoch = carry.latent.deter, carry.latent.stoch.flatten(1)
        noises = race((horizon, len(deter), self.stoch, self.classes), generator, 1)
        n, size = len(deter), self.feature
        both = deter.new_empty(n * horizon + n, size, dtype=read_dtype(deter))
        features, last = both[:-n].view(n, horizon, size), both[-n:]
        rows = [*features.unbind(1), last]
        torch.cat([deter, stoch], -1, out=rows[0])
        alone = self.memory is None and both.dtype == deter.dtype
        with torch.inference_mode():  # what leaves the loop was made before it, or is made after
            if alone and isinstance(policy, Chooser) and choices is not None:
                _, biases = self._choices(shares, choices)
                of_actor = policy.net, policy.mix, biases
                states = deter, stoch, noises, policy.noise(n), rows
                actions, kept = dreamed(*prior, *of_actor, *states)
                if policy.recording is not None:
                    policy.recording.steps = kept
            else:
                how = self.recall(use), self._embedding(shares, choices)
                actions = self._dream_by_steps(carry, policy, prior, how, noises, rows)
        return Dream(features, last, torch.stack(actions, 1), None if weights.groups else both)

    def _dream_by_steps(
        self,
        carry: Carry,
        policy: Callable[[Tensor], Tensor],
        prior: tuple[Weights, Net, Draw],
        how: tuple[Recall, Embedding],
        noises: Tensor,
        rows: Sequence[Tensor],
    ) -> list[Tensor]:
        """Fill rows (N, F) after the first with states; the actions (N, A) that led to them."""
        (recall, embedding), (weights, *_) = how, prior
        deter, stoch, fast = carry.latent.deter, carry.latent.stoch.flatten(1), carry.fast
        actions: list[Tensor] = []
        for feature, ahead, noise in zip(rows, rows[1:], noises, strict=False):
            action = policy(feature)
            embed, bias = embedding(action)
            x = embedded(weights, deter, stoch)
            recalled, fast = recall(x, embed, fast)
            # heads may read another precision than that of the state
            state = ahead if ahead.dtype == deter.dtype else deter.new_empty(ahead.shape)
            step(*prior, deter, x, recalled, bias, noise, state)
            deter, stoch = state[:, : self.deter], state[:, self.deter :]
            if state is not ahead:
                ahead.copy_(state)
            actions.append(action)
        return actions

    def _hoist(self) -> tuple[Weights, Tensor]:
        """What is recurrent, and the action's share (hidden, D) of the mixing layer."""
        weight, n = self.mixed.weight, self.deter // self.blocks
        shared = weight[..., n:, :].transpose(-3, -2)
        shared = shared.reshape(*weight.shape[:-3], -1, self.deter)
        sizes = [2 * self.hidden, self.hidden, shared.shape[-2] - 3 * self.hidden]
        state, action, memory = shared.split(sizes, -2)
        first, out = self.posterior_net.first, self.posterior_net.out
        a, b = self.from_deter, self.from_stoch
        weights = Weights(
            a.linear.weight,
            a.linear.bias,
            b.linear.weight,
            b.linear.bias,
            torch.stack([a.norm.weight, b.norm.weight], -2),
            state,
            weight[..., :n, :],
            memory,
            self.mixed_norm.weight,
            self.gates.weight,
            self.gates.bias,
            first.linear.weight[..., : self.deter, :],
            first.norm.weight,
            out.weight,
            out.bias,
        )
        return weights, action

    @property
    def _draw(self) -> Draw:
        return Draw(self.stoch, self.classes, self.mix)

    def _cell(self, weights: Weights, like: Tensor) -> Plain | Tape:
        if self._by_hand(like):
            return Tape(weights, self._draw, len(like))
        return Plain(weights, self._draw)

    def _by_hand(self, like: Tensor) -> bool:
        """Nodes by hand where gradients are wanted; they know neither autocast nor torch.func."""
        mixed_precision = torch.is_autocast_enabled(like.device.type)
        plain = self.readable or mixed_precision or not torch.is_grad_enabled() or readable(like)
        return not plain

    def _embed(self, action: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded action (..., hidden) and its part of the mixing layer (..., D)."""
        embed = self.from_action(action.clamp(-1, 1))
        return embed, affine(embed, share, self.mixed.bias)

    def _embedding(self, share: Tensor, choices: Tensor | None) -> Embedding:
        """`_embed` as a function of the action alone; of few choices it is a table."""
        if choices is None:
            return lambda action: self._embed(action, share)
        table = torch.cat(self._choices(share, choices), -1)
        sizes = [self.hidden, self.deter]

        def looked_up(action: Tensor) -> tuple[Tensor, Tensor]:
            embed, bias = matmul(action, table).split(sizes, -1)
            return embed, bias

        return looked_up

    def _choices(self, share: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        """`_embed` of all actions there are: (A, hidden) and (A, D), of each group."""
        groups = share.shape[:-2]
        embed, bias = self._embed(choices.repeat(*(groups or (1,)), 1), share)
        shape = (*groups, len(choices), -1)
        return embed.view(shape), bias.view(shape)

    def probs(self, logits: Tensor) -> Tensor:
        """Probabilities (..., S, C) of logits (..., S * C)."""
        return unimix(logits.unflatten(-1, (self.stoch, self.classes)), self.mix)

    def recall(self, use: MemoryUse, reset: Tensor | None = None) -> Recall:
        """How a step meets the fast weights: writes, then reads; reads only; or ignores them."""
        if self.memory is None:
            return lambda x, embed, fast: (None, fast)
        memory = self.memory

        def write(x: Tensor, embed: Tensor, fast: Any) -> tuple[Tensor, Any]:
            return memory(torch.cat([x, embed], -1), fast, reset)

        def read(x: Tensor, embed: Tensor, fast: Any) -> tuple[Tensor, Any]:
            return memory.read(torch.cat([x, embed], -1), fast), fast

        def off(x: Tensor, embed: Tensor, fast: Any) -> tuple[None, Any]:
            return None, fast

        return {"write": write, "read": read, "off": off}[use]
