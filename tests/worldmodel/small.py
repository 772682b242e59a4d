"""Small world models, agents and batches for the tests of worldmodel/ and agents/."""

import torch
from torch import Tensor

from agents import Dreamer, make_actor
from nested import GatedDeltaMemory
from worldmodel import (
    RSSM,
    ActionSpec,
    Batch,
    Binary,
    Decoder,
    Encoder,
    ObsSpec,
    TwoHot,
    WorldModel,
)

MIXED = {
    "image": ObsSpec("image", (16, 16, 3)),
    "state": ObsSpec("vector", (3,)),
    "item": ObsSpec("discrete", (2,), 4),
}
VECTOR = {"state": ObsSpec("vector", (4,))}
DISCRETE = ActionSpec("discrete", (3,))
SEVERAL = ActionSpec("discrete", (2, 3))
CONTINUOUS = ActionSpec("continuous", (2,))


def make_agent(
    obs: dict[str, ObsSpec] = VECTOR,
    action: ActionSpec = DISCRETE,
    memory: bool = False,
    sizes: tuple[int, int, int, int, int] = (16, 8, 4, 2, 8),
    stoch: int = 3,
    blocks: int = 2,
    layers: int = 1,
    seed: int = 0,
) -> Dreamer:
    """A Dreamer of sizes (deter, hidden, classes, depth, units)."""
    torch.manual_seed(seed)
    deter, hidden, classes, depth, units = sizes
    encoder = Encoder(obs, depth, units, layers, "faithful")
    recall = GatedDeltaMemory(3 * hidden, hidden, 8) if memory else None
    args = (deter, hidden, stoch, classes, blocks, 0.01, recall)
    dynamics = RSSM(encoder.dim, action.dim, *args)
    latent = stoch * classes
    decoder = Decoder(obs, deter, latent, depth, units, layers, blocks, "faithful")
    feature = dynamics.feature
    heads = TwoHot(feature, units, 1), Binary(feature, units, 1)
    world = WorldModel(encoder, dynamics, decoder, *heads)
    scales = {key: 1.0 for key in [*obs, "dyn", "reward", "continue", "policy", "value"]}
    scales |= {"rep": 0.1, "repvalue": 0.3}
    actor = make_actor(feature, action, units, 3)
    return Dreamer(world, actor, TwoHot(feature, units, 3), scales, horizon=4)


def off_start(memory: bool, blocks: int, readable: bool = False) -> RSSM:
    """Dynamics in float64, with weights off their special initial values."""
    dynamics = make_agent(memory=memory, blocks=blocks).world.dynamics.double()
    with torch.no_grad():
        for parameter in dynamics.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    dynamics.readable = readable
    return dynamics


def make_batch(
    obs: dict[str, ObsSpec] = VECTOR,
    action: ActionSpec = DISCRETE,
    shape: tuple[int, int] = (4, 7),
    seed: int = 0,
) -> Batch:
    """Random rows (B, T) with episode starts in the middle."""
    g = torch.Generator().manual_seed(seed)
    first = torch.rand(shape, generator=g) < 0.2
    chosen = [
        torch.nn.functional.one_hot(torch.randint(n, shape, generator=g), n).float()
        for n in action.sizes
    ]
    actions = torch.cat(chosen, -1)
    if action.kind == "continuous":
        actions = torch.rand((*shape, action.dim), generator=g) * 2 - 1
    values = {key: _observation(entry, shape, g) for key, entry in obs.items()}
    return Batch(
        values,
        actions * ~first[..., None],
        torch.randn(shape, generator=g) * ~first,
        first,
        (torch.rand(shape, generator=g) < 0.1) & ~first,
        torch.arange(shape[0])[:, None].expand(shape),
    )


def _observation(entry: ObsSpec, shape: tuple[int, int], g: torch.Generator) -> Tensor:
    full = (*shape, *entry.shape)
    if entry.kind == "image":
        return torch.randint(256, full, generator=g, dtype=torch.uint8)
    if entry.kind == "discrete":
        return torch.randint(entry.classes, full, generator=g)
    return torch.randn(full, generator=g)


def split(batch: Batch, a: int, b: int) -> Batch:
    """Steps a to b of a batch."""
    obs = {key: value[:, a:b] for key, value in batch.obs.items()}
    return Batch(obs, *(x[:, a:b] for x in batch[1:]))
