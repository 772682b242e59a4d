"""Our ids in gymnasium's registry: where each is made, and the steps of its episodes.

`import experiments.envs` registers them, so nothing heavy is imported here: the environments and
their packages are when they are made.
"""

from gymnasium.envs.registration import EnvSpec, registry

from experiments.envs.tasks import STREAMS

_HERE = "experiments.envs"
_OWN = (
    EnvSpec(
        "CartPoleShift-v0",
        entry_point=f"{_HERE}.cartpole:CartPoleShiftEnv",
        vector_entry_point=f"{_HERE}.cartpole:CartPoleShiftVectorEnv",
        max_episode_steps=200,
    ),
    EnvSpec("crafter", f"{_HERE}.crafter:CrafterEnv"),
    EnvSpec("CrafterShift-v0", f"{_HERE}.craftershift:CrafterShiftEnv"),
    EnvSpec("SlipperyAnt-v0", f"{_HERE}.slipperyant:SlipperyAntEnv", max_episode_steps=1000),
    EnvSpec("Recipes-v0", f"{_HERE}.recipes:RecipesEnv", max_episode_steps=40),
    EnvSpec("CoinRun-v0", f"{_HERE}.coinrun:CoinRunEnv"),
)
_STREAMS = (
    EnvSpec(
        name,
        entry_point=f"{_HERE}.build:open_stream",
        max_episode_steps=stream.steps,
        kwargs={"name": name},
    )
    for name, stream in STREAMS.items()
)
SPECS = {spec.id: spec for spec in (*_OWN, *_STREAMS)}


def register() -> None:
    """Adds them to gymnasium's registry, once."""
    for name, spec in SPECS.items():
        registry.setdefault(name, spec)
