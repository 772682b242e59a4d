"""Interactive dynamics over latent frames, sampled in a few steps: shortcut forcing.

Follows Dreamer 4 (arXiv 2509.24527). A frame is noised to a signal level tau (0 noise, 1 data),
each frame of a sequence to its own, and the network predicts the clean frame for a step of size d:
for the smallest d from data, for larger ones from two of its own half steps, taken without
gradients. `imagine` samples each new frame in K steps, then writes it to the context, slightly
noised, from which agent tokens read what policies see. Nothing reads the agent tokens.

B batch, T frames, L x Z latents of the tokenizer, repacked as S spatial tokens of C channels,
A encoded action, F feature. Levels are integers: tau = signal / k_max, d = 2 ** -step.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from worldmodel.nets import Linear, at_least_float32
from worldmodel.scale import RunningRMS
from worldmodel.tokenizer import learned
from worldmodel.transformer import Context, Transformer, Trunk


class Clip(NamedTuple):
    """Encoded sequences; row t holds the action that led into its frame."""

    latents: Tensor  # (B, T, L, Z)
    action: Tensor  # (B, T, A)
    first: Tensor  # (B, T) bool: its action means nothing, and nothing before it matters
    labelled: Tensor  # (B, T) bool: False where the action is not known
    task: Tensor  # (B, T) int64


class Levels(NamedTuple):
    """How noisy each frame is, and how far the next sampling step shall go."""

    signal: Tensor  # (B, T) int64: tau in units of 1 / k_max
    step: Tensor  # (B, T) int64: d = 2 ** -step


class Imagined(NamedTuple):
    """A rollout; `action[:, h]` was chosen from `feature[:, h]` and led into `latents[:, h]`."""

    latents: Tensor  # (B, H, L, Z)
    feature: Tensor  # (B, H + 1, F), the first is that of the start
    action: Tensor  # (B, H + 1, A), the last is not taken


Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
Weigh = Callable[[Tensor], Tensor]


def clean(out: Tensor, z: Tensor, tau: Tensor) -> Tensor:
    """The network's output is the clean frame."""
    return out


def velocity(out: Tensor, z: Tensor, tau: Tensor) -> Tensor:
    """The network's output is the direction from noise to data: the clean frame it leads to."""
    return z + (1 - tau) * out


def ramp(tau: Tensor) -> Tensor:
    """More weight to frames with more signal."""
    return 0.9 * tau + 0.1


# What the network's output means, what turns an error of the clean frame into that of the space
# the loss is measured in, and how levels are weighed: functions of the signal level.
PREDICTIONS: dict[str, Predict] = {"x": clean, "v": velocity}
LOSSES: dict[str, Weigh] = {"x": torch.ones_like, "v": lambda tau: (1 - tau) ** -2}
WEIGHTS: dict[str, Weigh] = {"ramp": ramp, "flat": torch.ones_like}


class ShortcutDynamics(nn.Module):
    """Predicts frames of latents (L, Z) from the past, actions of `action` entries and noise.

    spatial: tokens that a frame is repacked to; action_tokens, registers, agents: tokens of each
    kind; tasks: how many the agents may be given; k_max: finest sampling steps; bootstrap: share
    of rows that draw their step size (zero: no shortcuts, one: as the paper prints it), all
    others take the smallest; apart: share of rows seen as separate images, for start frames;
    settled: share of frames that training leaves as clear as a context is, so that what follows
    from them can be told (zero: each frame is noised to a level of its own, as in the paper);
    context_noise: of the frames in a context, at the nearest level; where only clean frames, which
    no training saw, are nearer than its finest level, that is told and the noise stays as asked.
    prediction, loss, weight: PREDICTIONS, LOSSES and WEIGHTS by name.
    """

    def __init__(
        self,
        action: int,
        latents: tuple[int, int] = (16, 16),
        trunk: Trunk | None = None,
        spatial: int = 8,
        action_tokens: int = 1,
        registers: int = 4,
        agents: int = 1,
        tasks: int = 1,
        k_max: int = 8,
        bootstrap: float = 0.25,
        apart: float = 0.3,
        settled: float = 0.0,
        context_noise: float = 0.1,
        prediction: Literal["x", "v"] = "x",
        loss: Literal["x", "v"] = "x",
        weight: Literal["ramp", "flat"] = "ramp",
    ):
        super().__init__()
        trunk = trunk or Trunk(width=128, layers=5, heads=4, groups=2, every=2)
        count, channels = latents
        if count * channels % spatial:
            raise ValueError(f"latents={latents} do not divide into spatial={spatial} tokens")
        if action < 1:
            raise ValueError(f"action={action}: one entry, never labelled, stands for no actions")
        if k_max < 2 or k_max & (k_max - 1):
            # of one level alone frames are noise and nothing else: no past could be read
            raise ValueError(f"k_max={k_max} must be a power of two, from 2 on")
        width, packed = trunk.width, count * channels // spatial
        self.latents, self.spatial, self.packed = latents, spatial, packed
        self.agents, self.k_max, self.finest = agents, k_max, k_max.bit_length() - 1
        self.bootstrap, self.apart, self.settled = bootstrap, apart, settled
        nearest = round((1 - context_noise) * k_max)
        self.kept = min(nearest, k_max - 1)  # the level that a context's frames are told
        self.clear = nearest / k_max if nearest < k_max else 1 - context_noise
        self.predict, self.space, self.weigh = (
            PREDICTIONS[prediction],
            LOSSES[loss],
            WEIGHTS[weight],
        )
        self.from_latent = Linear(packed, width)
        self.places = learned(spatial, width)
        self.from_action = Linear(action, action_tokens * width)
        self.no_action = learned(action_tokens, width)
        self.signal = nn.Embedding(k_max + 1, width // 2)
        self.step = nn.Embedding(self.finest + 1, width - width // 2)
        self.registers = learned(registers, width)
        self.agent = learned(agents, width)
        self.task = nn.Embedding(tasks, width)
        self.core = spatial + action_tokens + 1 + registers
        reads = torch.ones(self.core + agents, self.core + agents, dtype=torch.bool)
        reads[: self.core, self.core :] = False
        self.transformer = Transformer(trunk, self.core + agents, reads)
        self.to_latent = Linear(width, packed, 0.1)
        self.norm = RunningRMS()
        self.feature = agents * width

    def initial(self, batch: int) -> Context:
        """The context of `batch` rows before their first frame."""
        return self.transformer.initial(batch)

    def losses(
        self,
        clip: Clip,
        generator: torch.Generator | None = None,
        weight: Tensor | None = None,
        settled: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """{"dynamics": (B, T)} over its running RMS, and features (B, T, F) of the noisy frames.

        weight (B, T): what counts in the running RMS; settled (B,) bool: rows that are not noised
        to drawn levels, but seen whole and as `observe` sees them.
        """
        batch, length = clip.first.shape
        device = clip.first.device
        apart = torch.rand(batch, 1, generator=generator, device=device) < self.apart
        settled = torch.zeros_like(apart) if settled is None else settled[:, None]
        clip = clip._replace(first=clip.first | (apart & ~settled))
        rows = torch.randperm(batch, generator=generator, device=device)
        rows = rows[: round(self.bootstrap * batch)]
        data = self.pack(clip.latents)
        signal, step = self.draw(rows, batch, length, generator)
        noise = normal(data, generator)
        chosen = torch.rand(batch, length, generator=generator, device=device) < self.settled
        settled = settled | chosen
        levels = Levels(
            torch.where(settled, self.kept, signal), torch.where(settled, self.finest, step)
        )
        tau = self.tau(levels.signal)
        clear = torch.where(settled[..., None, None], self.clear, tau)
        z = torch.lerp(noise, data, clear)
        actions = self._actions(clip)
        frame, feature = self._look(
            self.transformer(self._all(z, levels, actions, clip.task), clip.first)
        )
        target = self.targets(data, z, levels, actions, clip.first, rows)
        error = at_least_float32(self.predict(frame, z, tau) - target).square().mean((-2, -1))
        tau = tau[..., 0, 0]
        loss = error * self.space(tau) * self.weigh(tau)
        return {"dynamics": self.norm(loss, weight)}, feature

    def draw(
        self, rows: Tensor, batch: int, length: int, generator: torch.Generator | None
    ) -> Levels:
        """Levels (B, T): `rows` draw a step size for each frame, the others take the smallest."""
        device, shape = rows.device, (len(rows), length)
        step = torch.full((batch, length), self.finest, device=device)
        step[rows] = torch.randint(self.finest + 1, shape, generator=generator, device=device)
        uniform = torch.rand(batch, length, generator=generator, device=device)
        count = 2**step  # levels that a step of this size may start from
        return Levels((uniform * count).long() * (self.k_max // count), step)

    @torch.no_grad()
    def targets(
        self,
        data: Tensor,
        z: Tensor,
        levels: Levels,
        actions: Tensor,
        first: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """Clean frames to be predicted (B, T, S, C): data, or where two half steps lead to."""
        if not len(rows):
            return data
        target = data.clone()
        z, actions, first = z[rows], actions[rows], first[rows]
        signal, step = (x[rows] for x in levels)
        half = (step + 1).clamp(max=self.finest)
        shift = self.k_max // 2 ** (step + 1)  # zero for the smallest step
        one = self._velocity(z, Levels(signal, half), actions, first)
        middle = z + one * self.tau(shift)
        two = self._velocity(middle, Levels(signal + shift, half), actions, first)
        led = z + (1 - self.tau(signal)) * (one + two) / 2
        target[rows] = torch.where((step == self.finest)[..., None, None], data[rows], led)
        return target

    @torch.no_grad()
    def observe(
        self, clip: Clip, context: Context, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Context]:
        """Write frames to the context: features (B, T, F), and the context after them."""
        data = self.pack(clip.latents)
        signal = torch.full_like(clip.task, self.kept)
        levels = Levels(signal, torch.full_like(signal, self.finest))
        z = torch.lerp(normal(data, generator), data, self.clear)
        tokens = self._all(z, levels, self._actions(clip), clip.task)
        x, context = self.transformer.extend(tokens, context, clip.first)
        return self._look(x)[1], context

    @torch.no_grad()
    def generate(
        self, clip: Clip, context: Context, steps: int = 4, generator: torch.Generator | None = None
    ) -> Tensor:
        """The next frame's latents (B, 1, L, Z), sampled in `steps`; clip.latents are not read."""
        if steps < 1 or self.k_max % steps:
            raise ValueError(f"steps={steps} must be a power of two up to k_max={self.k_max}")
        actions = self._actions(clip)
        shape = (*clip.first.shape, self.spatial, self.packed)
        z = normal(actions.new_empty(shape), generator)
        step = torch.full_like(clip.task, steps.bit_length() - 1)
        for i in range(steps):
            signal = torch.full_like(step, i * self.k_max // steps)
            tokens = self._tokens(z, Levels(signal, step), actions)
            x = self.transformer.peek(tokens, context, clip.first)
            frame = self.predict(self._look(x)[0], z, self.tau(signal))
            z = torch.lerp(z, frame, 1 / (steps - i))  # d / (1 - tau); the last step lands on it
        return z.reshape(*clip.first.shape, *self.latents)

    @torch.no_grad()
    def imagine(
        self,
        context: Context,
        feature: Tensor,
        policy: Callable[[Tensor], Tensor],
        horizon: int,
        task: Tensor,
        steps: int = 4,
        generator: torch.Generator | None = None,
    ) -> tuple[Imagined, Context]:
        """Roll out `horizon` frames after `context`, whose last feature (B, F) is given.

        policy maps features (B, F) to encoded actions (B, A); task (B,).
        """
        features, actions, frames = [feature], [policy(feature)], []
        no = torch.zeros_like(task, dtype=torch.bool)[:, None]
        for _ in range(horizon):
            blank = feature.new_zeros(len(feature), 1, *self.latents)
            clip = Clip(blank, actions[-1][:, None], no, ~no, task[:, None])
            clip = clip._replace(latents=self.generate(clip, context, steps, generator))
            feature, context = self.observe(clip, context, generator)
            frames.append(clip.latents)
            features.append(feature[:, 0])
            actions.append(policy(features[-1]))
        rollout = Imagined(torch.cat(frames, 1), torch.stack(features, 1), torch.stack(actions, 1))
        return rollout, context

    def pack(self, latents: Tensor) -> Tensor:
        """(B, T, L, Z) -> (B, T, S, C)."""
        return latents.reshape(*latents.shape[:2], self.spatial, self.packed)

    def tau(self, signal: Tensor) -> Tensor:
        """Signal level (B, T) -> tau (B, T, 1, 1)."""
        return (signal.to(self.places.dtype) / self.k_max)[..., None, None]

    def _velocity(self, z: Tensor, levels: Levels, actions: Tensor, first: Tensor) -> Tensor:
        tau = self.tau(levels.signal)
        out = self.transformer(self._tokens(z, levels, actions), first)
        return (self.predict(self._look(out)[0], z, tau) - z) / (1 - tau)

    def _actions(self, clip: Clip) -> Tensor:
        """Action tokens (B, T, S_a, D): the shared embedding alone where no action is known."""
        known = (clip.labelled & ~clip.first)[..., None]
        action = torch.where(known, clip.action, 0.0)  # what is not known may be anything, NaN too
        x = self.from_action(action).unflatten(-1, self.no_action.shape)
        return x * known[..., None] + self.no_action

    def _tokens(self, z: Tensor, levels: Levels, actions: Tensor) -> Tensor:
        """What a frame is predicted from: (B, T, N, D) without agent tokens."""
        level = torch.cat([self.signal(levels.signal), self.step(levels.step)], -1)
        registers = self.registers.expand(*z.shape[:2], -1, -1)
        latent = self.from_latent(z) + self.places
        return torch.cat([latent, actions, level[:, :, None], registers], 2)

    def _all(self, z: Tensor, levels: Levels, actions: Tensor, task: Tensor) -> Tensor:
        """The same with agent tokens."""
        agents = self.agent + self.task(task)[:, :, None]
        return torch.cat([self._tokens(z, levels, actions), agents], 2)

    def _look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The transformer's output -> the network's (B, T, S, C), and features (B, T, F)."""
        return self.to_latent(x[:, :, : self.spatial]), x[:, :, self.core :].flatten(2)


class Lengths(NamedTuple):
    """Many short batches, and at every so-many-th update a long one, longer than the context."""

    short: int = 16
    long: int = 64
    every: int = 4

    def at(self, update: int) -> int:
        """Frames of the batch of this update, counted from one."""
        return self.short if update % self.every else self.long


def normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise of `like`'s shape and type."""
    options = {"dtype": like.dtype, "device": like.device}
    return torch.randn(like.shape, generator=generator, **options)
