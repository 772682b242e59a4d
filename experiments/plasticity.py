"""Can it still learn? Signs of lost plasticity in a network, and the definition that matters.

Leading axes, such as seeds, pass through everything. Dormant units, ranks and norms are symptoms;
`fresh_gap` is the thing itself: does a fresh agent learn the same task faster? (Dohare et al. 2024,
Nature 632; ReDo, arXiv 2302.12902; effective rank, Roy & Vetterli 2007; srank, arXiv 2010.14498.)

`symptoms` looks at an agent on a replayed batch: at hidden layers of its world model, actor and
critic, outside of training and with draws of its own.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from agents import Dreamer
from experiments.config import Config
from experiments.data.replay import Replay
from experiments.driver import replayed_batch, unpack
from worldmodel import Batch, Carry, Decoder, Encoder, features
from worldmodel.conv import Up
from worldmodel.encoder import flat_entry
from worldmodel.mlp import MLP
from worldmodel.stages import down, up

DORMANT = 0.025  # tau for ReLU, as in ReDo
SMOOTH = 0.1  # tau for RMS norm and SiLU, whose units hardly ever give nothing: an agent's
ROWS = 4096  # of a layer's activations, at most, evenly spread: pixels of a batch are many more


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


# ---- an agent ----------------------------------------------------------------------------------
Nets = dict[str, list[list[Tensor]]]
"""By part of an agent its networks, each as the activations (rows, units) of its hidden layers."""


def look(config: Config, agent: Dreamer, replay: Replay, moment: int) -> dict[str, float]:
    """`symptoms` on a replayed batch, where that is configured and something is stored.

    `moment` (environment frames) picks the draws; replay and agent stay as they were.
    """
    if not config.evaluate.plasticity or not len(replay):
        return {}
    seed = int(np.random.SeedSequence([config.seed, 2, moment]).generate_state(1)[0])
    arrays, packed = replay.sample(config.replay.batch, np.random.default_rng(seed))
    device = agent.return_scale.low.device
    start = unpack(packed, agent.initial(config.replay.batch))
    generator = torch.Generator(device).manual_seed(seed)
    return symptoms(agent, replayed_batch(arrays, device), start, generator)


def symptoms(
    agent: Dreamer, batch: Batch, carry: Carry, generator: torch.Generator | None = None
) -> dict[str, float]:
    """Signs of lost plasticity on a batch (B, T, ...), of the whole and by part.

    plasticity/dormant: share of hidden units of a score of at most SMOOTH; plasticity/erank: mean
    over networks of the effective rank of what their output layers see; plasticity/weight_norm: of
    all parameters. The same of each part as plasticity/world/dormant and so on.
    """
    nets = hidden(agent, batch, carry, generator)
    parts = {"": [net for part in nets.values() for net in part], **nets}
    found: dict[str, float] = {}
    for part, layers in parts.items():
        weights = {n: p for n, p in agent.named_parameters() if n.startswith(part)}
        prefix = f"plasticity/{part}/" if part else "plasticity/"
        units = [unit_scores(layer) <= SMOOTH for net in layers for layer in net]
        found |= {
            f"{prefix}dormant": float(torch.cat(units).double().mean()),
            f"{prefix}erank": float(torch.stack([erank(net[-1]) for net in layers]).mean()),
            f"{prefix}weight_norm": float(weight_norm(weights, leading=0).detach()),
        }
    return found


@torch.no_grad()
def hidden(
    agent: Dreamer, batch: Batch, carry: Carry, generator: torch.Generator | None = None
) -> Nets:
    """Activations of an agent's hidden layers on a batch.

    All of encoder, decoder and heads; of the dynamics those before and after its recurrent state.
    """
    world = agent.world
    posterior, _ = world.observe(batch, carry, generator)
    deter, stoch = posterior.deter.flatten(0, 1), posterior.stoch.flatten(0, 1).flatten(1)
    tokens = world.encoder(batch.obs).flatten(0, 1)
    feature = features(posterior.deter, posterior.stoch).flatten(0, 1)
    heads: dict[str, list[MLP]] = {
        "world": [world.reward.net, world.continues.net],
        "actor": [agent.actor.net],
        "critic": [agent.critic.net],
    }
    nets: Nets = {
        part: [through(net.layers, feature) for net in found] for part, found in heads.items()
    }
    dynamics = world.dynamics
    nets["world"] += [
        [dynamics.from_deter(deter)],
        [dynamics.from_stoch(stoch)],
        through(dynamics.prior_net.layers, deter),
        through(dynamics.posterior_net.layers, torch.cat([deter, tokens], -1)),
        *encoded(world.encoder, batch.obs),
        *decoded(world.decoder, deter, stoch),
    ]
    return {part: [[thin(x) for x in net] for net in found] for part, found in nets.items()}


def through(layers: Iterable[nn.Module], x: Tensor) -> list[Tensor]:
    """What each of a chain of layers gives."""
    found: list[Tensor] = []
    for layer in layers:
        x = layer(x)
        found.append(x)
    return found


def encoded(encoder: Encoder, obs: Mapping[str, Tensor]) -> list[list[Tensor]]:
    """Hidden layers of the encoder, for vectors and for images; channels are units."""
    nets: list[list[Tensor]] = []
    if encoder.vectors:
        columns = [flat_entry(obs[key], encoder.spec[key]) for key in encoder.vectors]
        nets.append(through(encoder.dense, torch.cat(columns, -1)))
    if encoder.images:
        images = torch.cat([obs[key] for key in encoder.images], -1).flatten(0, 1)
        x, stages = images.float() / 255 - 0.5, list[Tensor]()
        for conv, norm in zip(encoder.convs, encoder.norms, strict=True):
            x = down(conv, norm, x)
            stages.append(x)
        nets.append(stages)
    return nets


def decoded(decoder: Decoder, deter: Tensor, stoch: Tensor) -> list[list[Tensor]]:
    """Hidden layers of the decoder, alike."""
    nets: list[list[Tensor]] = []
    if decoder.vectors:
        nets.append(through(decoder.dense, torch.cat([deter, stoch], -1)))
    if decoder.images:
        x = decoder.space(deter, stoch)
        stages = [x]
        for conv, norm in zip(decoder.convs[:-1], decoder.norms, strict=True):
            assert isinstance(conv, Up)  # a ModuleList gives modules of any kind
            x = up(conv.kernel(), norm, x)
            stages.append(x)
        nets.append(stages)
    return nets


def thin(activations: Tensor) -> Tensor:
    """Activations (..., units) as (rows, units) in float32, ROWS of them at most."""
    rows = activations.flatten(0, -2)
    return rows[:: -(-len(rows) // ROWS)].float()
