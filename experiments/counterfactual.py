"""What imagination promises and reality refuses: measured from real moments, at decisions.

Scripts bring the real environment to a moment before a decision; the model watches what was seen up
to there, imagines the decision, and promises a reward; reality takes the same decision. The share
of wrong decisions for which success is promised and refused is the *hallucination rate*; that of
right ones for which it is promised tells how often the model believes in success where it should.
The *exploitation gap* is what a policy's imagined episodes return beyond what its real ones do,
both from the same first frames.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents.offline import OfflineDreamer, twohot
from experiments.config.dreamer4 import Dreamer4Config
from experiments.config.models import EnvConfig
from experiments.data.expert import errand
from experiments.envs import Envs, make_envs, recipes
from experiments.envs.build import open_env
from experiments.envs.rows import encode_choices
from experiments.envs.slot import FIRST, LAST, REWARD, Slot
from experiments.policies import of_offline, play
from worldmodel.shortcut import Clip
from worldmodel.transformer import Context

NOISE = 0.3  # of the steps that lead to a moment
# Kinds of decisions, and the bundles to be crafted; AWAY is a recipe's, but not at the bench.
RIGHT, AWAY = "right", "away"
KINDS: dict[str, tuple[recipes.Bundle, ...]] = {
    RIGHT: recipes.RECIPES,
    "single": tuple(frozenset({thing}) for thing in range(len(recipes.THINGS))),
    "pair": (frozenset({recipes.STONE, recipes.FIBRE}),),
    AWAY: recipes.RECIPES,
}
WRONG = ("single", "pair")  # wrong recipes: states that recordings show, and one they never do


class Moments(NamedTuple):
    """N real moments, each up to a decision, and what the decision gave.

    Shorter pasts begin with their first row again and again, each `first`: nothing before the
    last of them counts.
    """

    image: np.ndarray  # (N, T, H, W, C) uint8
    action: np.ndarray  # (N, T, A) float32, the encoded action that led into each row
    first: np.ndarray  # (N, T) bool
    decision: np.ndarray  # (N, A) float32
    reward: np.ndarray  # (N,) what reality gave for it
    kind: np.ndarray  # (N,) str


Promise = Callable[[Moments], np.ndarray]  # the rewards (N,) that a model expects of the decisions


class Approach(NamedTuple):
    """One episode up to a decision."""

    image: list[np.ndarray]
    action: list[np.ndarray]
    first: list[bool]
    reward: float  # that the decision gave


# ---- hallucination -----------------------------------------------------------------------------
def moments(config: EnvConfig, count: int, length: int, seed: int) -> Moments:
    """`count` moments of each kind in Recipes, with up to `length` rows of their past."""
    env = open_env(config.id, config.pixels, dict(config.kwargs), config.time_limit)
    slot = Slot(env, seed, 0, config.image_size)
    rng = np.random.default_rng([seed, 1])
    kinds = [
        (kind, bundles[i % len(bundles)]) for kind, bundles in KINDS.items() for i in range(count)
    ]
    try:
        found = [approach(slot, bundle, kind == AWAY, rng) for kind, bundle in kinds]
    finally:
        slot.close()
    images = np.stack([padded(one.image, length) for one in found])
    actions = np.stack([padded(one.action, length) for one in found])
    firsts = np.stack([padded(one.first, length) for one in found])
    decision = encode(slot, recipes.CRAFT)[None].repeat(len(found), 0)
    reward = np.array([one.reward for one in found])
    return Moments(images, actions, firsts, decision, reward, np.array([k for k, _ in kinds]))


def approach(slot: Slot, bundle: recipes.Bundle, away: bool, rng: np.random.Generator) -> Approach:
    """Rows of an episode up to where a bundle could be crafted, and the reward of crafting it."""
    room: Any = slot.env.unwrapped
    while True:
        row, _ = slot.reset()
        images, actions, firsts = [row["obs"]["image"]], [encode(slot)], [True]
        while not row["flags"][LAST]:
            action = errand(room, bundle)
            if away and room.held == bundle and room.agent != room.bench:
                action = recipes.CRAFT
            if action == recipes.CRAFT:
                taken = slot.step(encode(slot, action))[0]
                return Approach(images, actions, firsts, float(taken["flags"][REWARD]))
            if action < recipes.PICK and rng.random() < NOISE:
                action = int(rng.integers(recipes.PICK))
            row = slot.step(encode(slot, action))[0]
            images.append(row["obs"]["image"])
            actions.append(encode(slot, action))
            firsts.append(bool(row["flags"][FIRST]))


def encode(slot: Slot, action: int | None = None) -> np.ndarray:
    """An action (A,), or zeros where there was none."""
    spec = slot.actions.spec
    return (
        np.zeros(spec.dim, np.float32)
        if action is None
        else encode_choices(np.array([[action]]), spec)[0]
    )


def padded(rows: Sequence[Any], length: int) -> np.ndarray:
    """The last rows, and where there are fewer the first one again before them."""
    kept = np.asarray(rows[-length:])
    return np.concatenate([kept[:1].repeat(length - len(kept), 0), kept])


def rates(found: Moments, promise: Promise, success: float = recipes.CAP) -> dict[str, float]:
    """Shares of moments in which success is promised, by kind; of refused ones `hallucination`.

    A promise of at least half a success counts as one.
    """
    promised = promise(found) >= success / 2
    refused = found.reward < success / 2
    wrong = np.isin(found.kind, WRONG)
    assert refused[wrong].all(), "reality gave a wrong recipe"
    shares = {f"hallucination_{k}": promised[found.kind == k].mean() for k in (*WRONG, AWAY)}
    shares["hallucination"] = promised[wrong].mean()
    shares["recognised"] = promised[found.kind == RIGHT].mean()
    return {name: float(value) for name, value in shares.items()}


def promised_by(agent: OfflineDreamer, generator: torch.Generator) -> Promise:
    """The rewards that an agent's world model expects, one imagined frame each."""

    @torch.no_grad()
    def promise(found: Moments) -> np.ndarray:
        device = generator.device
        image, action, first, decision = (torch.from_numpy(x).to(device) for x in found[:4])
        past = watch(agent, image, action, first, generator).past
        no = torch.zeros_like(first[:, :1])
        blank = torch.zeros(len(no), 1, *agent.dynamics.latents, device=device)
        task = torch.zeros_like(no, dtype=torch.int64)
        after = Clip(blank, decision[:, None], no, ~no, task)
        after = after._replace(latents=agent.dynamics.generate(after, past, agent.steps, generator))
        feature, _ = agent.dynamics.observe(after, past, generator)
        return twohot(agent.reward).mean(agent.reward(feature[:, 0])).cpu().numpy()

    return promise


class Watched(NamedTuple):
    """What a world model makes of frames that were really seen."""

    latents: Tensor  # (B, T, L, Z)
    feature: Tensor  # (B, T, F)
    past: Context  # after them


def watch(
    agent: OfflineDreamer, image: Tensor, action: Tensor, first: Tensor, generator: torch.Generator
) -> Watched:
    """image (B, T, H, W, C) uint8, action (B, T, A) that led into them, first (B, T)."""
    start = agent.tokenizer.encoder.initial(len(image))
    latents, _ = agent.tokenizer.encode_next(image, start, first)
    task = torch.zeros_like(first, dtype=torch.int64)
    clip = Clip(latents, action, first, torch.ones_like(first), task)
    before = agent.dynamics.initial(len(image))
    return Watched(latents, *agent.dynamics.observe(clip, before, generator))


# ---- exploitation ------------------------------------------------------------------------------
def expected_return(reward: Tensor, live: Tensor) -> Tensor:
    """Return (B,) of imagined rewards (B, H), each counted as far as the episode still lives.

    live (B, H): the probability that the episode goes on after each row.
    """
    before = torch.cat([torch.ones_like(live[:, :1]), live.cumprod(1)[:, :-1]], 1)
    return (reward * before).sum(1)


@contextmanager
def starts(config: Dreamer4Config, seed: int) -> Iterator[Envs]:
    """Environments in which a policy's episodes begin, an episode each; the same by seed."""
    env = config.env.model_copy(update={"workers": "inprocess"})
    envs = make_envs(env, config.counterfactual.episodes, seed)
    try:
        yield envs
    finally:
        envs.close()


def real_return(
    config: Dreamer4Config, agent: OfflineDreamer, seed: int, generator: torch.Generator
) -> float:
    """Mean return of real episodes, actions sampled."""
    with starts(config, seed) as envs:
        policy = of_offline(agent, envs.num, config.data.image, generator)
        return float(np.mean(play(envs, policy, envs.num)))


@torch.no_grad()
def imagined_return(
    config: Dreamer4Config, agent: OfflineDreamer, seed: int, generator: torch.Generator
) -> float:
    """Mean return of whole imagined episodes, each from the first frame of a real one."""
    with starts(config, seed) as envs:
        image = torch.from_numpy(envs.reset().obs[config.data.image])[:, None].to(generator.device)
    first = torch.ones(len(image), 1, dtype=torch.bool, device=generator.device)
    action = torch.zeros(len(image), 1, agent.actions.dim, device=generator.device)
    seen = watch(agent, image, action, first, generator)
    rollout, _ = agent.dynamics.imagine(
        seen.past,
        seen.feature[:, -1],
        lambda x: agent.actions.sample(agent.policy(x), generator),
        config.counterfactual.frames,
        torch.zeros(len(image), dtype=torch.int64, device=generator.device),
        agent.steps,
        generator,
    )
    after = rollout.feature[:, 1:]
    reward = twohot(agent.reward).mean(agent.reward(after))
    live = 1 - agent.terminal(after).sigmoid()
    return float(expected_return(reward, live).mean())


def counterfactual(
    config: Dreamer4Config, agent: OfflineDreamer, seed: int, generator: torch.Generator
) -> dict[str, float]:
    """All of it by name.

    Moments and first frames depend on the seed alone: every round is measured in the same ones.
    """
    real = real_return(config, agent, seed, generator)
    imagined = imagined_return(config, agent, seed, generator)
    found = {"real_return": real, "imagined_return": imagined, "gap": imagined - real}
    if config.env.id == recipes.ID:
        length = config.dynamics.trunk.context
        seen = moments(config.env, config.counterfactual.contexts, length, seed)
        found |= rates(seen, promised_by(agent, generator))
    return found
