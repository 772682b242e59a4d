"""UserPop-v0: a million users, each with a CartPole of its own and wishes of its own.

A user's eight hidden numbers bend the physics (action sign and gain, gravity, length, delay,
rotation of the actions) and weigh what is rewarded (position, energy, smoothness, target). They are
never observed, unless `oracle` appends them; `differ` names the traits in which users differ, and
in the others all are plain CartPoles. All slots are stepped at once in numpy. A user sits in a slot
for a visit of 1 to 5 episodes, then another one does.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from experiments.envs.cartpole import (
    CAP,
    FORCE,
    MAX_ANGLE,
    MAX_POSITION,
    advance,
    slot_keys,
    start_states,
)
from experiments.envs.known import DIFFER
from experiments.envs.population import SIZE, SPLITS, Population, checked, visitors
from experiments.envs.rows import Envs, Row, check_action
from worldmodel.types import ActionSpec, ObsSpec

ID = "UserPop-v0"
NAMES = tuple(SPLITS)
ACTIONS = 3  # push one way, do nothing, push the other way
DELAYS = 3  # 0, 1 or 2 steps
TARGET, WIDTH = 1.0, 0.5  # metres: where the fourth feature wants the cart, and how closely
FEATURES = ("position", "energy", "smoothness", "target")


class Traits(NamedTuple):
    """What a user's numbers mean, for N users."""

    force: np.ndarray  # (N,) newtons of a push, negative where the sign of actions is flipped
    gravity: np.ndarray  # (N,) m/s^2
    half: np.ndarray  # (N,) half the pole's length, m
    delay: np.ndarray  # (N,) int, steps until a command acts
    rotation: np.ndarray  # (N,) int, by which the actions are permuted
    weights: np.ndarray  # (N, 4) of the features in the reward, which sum to one, or zeros
    alive: np.ndarray  # (N,) what a step is worth whatever its features: 0, or 1 without wishes


def traits(contexts: np.ndarray, differ: Sequence[str] = DIFFER) -> Traits:
    """The traits of hidden numbers (N, 8); thirds of a standard normal make the whole numbers.

    A trait that is not in `differ` is that of CartPole-v1, where a step is worth 1.
    """
    sign, gravity, length, delay, rotation, *wishes = contexts.T
    third = np.array([-0.4307, 0.4307])
    logits = np.stack([np.zeros(len(contexts)), *wishes], 1)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    force = np.where(sign < 0, -FORCE, FORCE) * np.clip(0.7 + 0.4 * np.abs(sign), 0.7, 1.7)
    told = {name: float(name in differ) for name in DIFFER}
    return Traits(
        force if "sign" in differ else np.full(len(contexts), FORCE),
        9.8 * np.exp(told["gravity"] * np.clip(0.3 * gravity, -0.8, 0.8)),
        0.5 * np.exp(told["length"] * np.clip(0.3 * length, -0.7, 0.7)),
        np.digitize(delay, third) * ("delay" in differ),
        np.digitize(rotation, third) * ("rotation" in differ),
        weights / weights.sum(1, keepdims=True) * told["wishes"],
        np.full(len(contexts), 1.0 - told["wishes"]),
    )


def features(position: np.ndarray, command: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """The rewarded features (N, 4), each in [0, 1]: all arguments (N,)."""
    return np.stack(
        [
            1.0 - np.minimum(np.abs(position) / MAX_POSITION, 1.0),
            1.0 - np.abs(command),
            1.0 - 0.5 * np.abs(command - previous),
            np.exp(-0.5 * np.square((position - TARGET) / WIDTH)),
        ],
        1,
    )


class UserPopVectorEnv(VectorEnv):
    """N slots in which users sit; autoreset on the next step, three actions.

    `user_ids` (N,) keeps these users in the slots; without, slots draw the users of a `split`.
    `reset(options={"user_ids": ids})` seats users, `{"split": name or N names}` draws them,
    `{"epoch": n}` sets how far the clusters have drifted; each holds until it is set again.
    `info["user_id"]` (N,) tells who sits where. With `oracle` the observation ends in the context.
    """

    def __init__(
        self,
        num_envs: int = 1,
        user_ids: Sequence[int] | None = None,
        split: str = "train",
        population: Population | None = None,
        epoch: int = 0,
        oracle: bool = False,
        max_episode_steps: int = CAP,
        render_mode: None = None,
        differ: Sequence[str] = DIFFER,
    ):
        unknown = [name for name in differ if name not in DIFFER]
        if unknown:
            raise ValueError(f"users of {ID} cannot differ in {unknown[0]!r}, only in {DIFFER}")
        self.num_envs, self.differ = num_envs, tuple(differ)
        self.render_mode = render_mode
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        bound = [2 * MAX_POSITION, np.inf, 2 * MAX_ANGLE, np.inf, *[np.inf] * (SIZE * oracle)]
        high = np.array(bound, np.float32)
        self.single_observation_space = spaces.Box(-high, high)
        self.single_action_space = spaces.Discrete(ACTIONS)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.limit, self.epoch, self.width = max_episode_steps, epoch, len(bound)
        self.population = Population() if population is None else population
        self.seed: int | None = None
        self.keys = np.zeros(num_envs, np.uint64)
        self.episodes = np.zeros(num_envs, np.uint64)
        self.visits = np.zeros(num_envs, np.int64)
        self.left = np.zeros(num_envs, np.int64)  # episodes left of the visit, this one included
        self.state = np.zeros((4, num_envs))
        self.commands = np.zeros((DELAYS, num_envs))  # the newest first
        self.steps = np.zeros(num_envs, np.int64)
        self.over = np.zeros(num_envs, bool)
        self.splits = split_numbers(split, num_envs)
        self.seated = user_ids is not None
        self.load_users(np.zeros(num_envs, np.int64) if user_ids is None else self._ids(user_ids))

    def _ids(self, user_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = checked(np.asarray(user_ids))
        if len(ids) != self.num_envs:
            raise ValueError(f"{len(ids)} users for {self.num_envs} slots of {ID}")
        return ids

    def load_users(self, users: np.ndarray) -> None:
        """Seats users (N,) at once."""
        self.users = users.copy()
        self.contexts = self.population.contexts(users, self.epoch)
        self.traits = traits(self.contexts, self.differ)

    def load_seed(self, seed: int) -> None:
        """The seed of all start states and visitors from the next one on."""
        self.seed, self.keys = seed, slot_keys(seed, self.num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Observations of new episodes in all slots, and who sits there."""
        options = options or {}
        if seed is not None or self.seed is None:
            self.load_seed(int(self.np_random.integers(2**31)) if seed is None else seed)
            self.episodes[:] = self.visits[:] = self.left[:] = 0
        else:
            self.episodes += np.uint64(1)
            self.left -= 1
        self.epoch = self.epoch if options.get("epoch") is None else int(options["epoch"])
        if options.get("split") is not None:
            self.splits, self.seated = split_numbers(options["split"], self.num_envs), False
            self.left[:] = 0
        if options.get("user_ids") is not None:
            self.users, self.seated = self._ids(options["user_ids"]), True
        self.load_users(self.users)
        self._begin(np.arange(self.num_envs))
        self.over = np.zeros(self.num_envs, bool)
        return self.observe(), self.info()

    def step(self, actions: np.ndarray):
        """Advances all slots; those that ended start a new episode instead, with reward zero."""
        assert self.seed is not None, "call reset before step"
        restart, who = self.over, self.traits
        command = (np.asarray(actions) + who.rotation) % ACTIONS - 1.0
        previous = self.commands[0]
        self.commands = np.concatenate([command[None], self.commands[:-1]])
        acting = self.commands[who.delay, np.arange(self.num_envs)]
        self.state = advance(self.state, acting * who.force, who.half, who.gravity)
        self.steps += 1
        wishes = (features(self.state[0], command, previous) * who.weights).sum(1)
        reward = who.alive + wishes
        if restart.any():
            ended = np.flatnonzero(restart)
            self.episodes[ended] += np.uint64(1)
            self.left[ended] -= 1
            self._begin(ended)
        terminated = np.abs(self.state[0]) > MAX_POSITION
        terminated |= np.abs(self.state[2]) > MAX_ANGLE
        truncated = (self.steps >= self.limit) & ~terminated
        self.over = terminated | truncated
        return self.observe(), np.where(restart, 0.0, reward), terminated, truncated, self.info()

    def observe(self) -> np.ndarray:
        """Observations (N, 4) float32, or (N, 12) for an oracle."""
        shown = np.concatenate([self.state.T, self.contexts], 1)
        return shown[:, : self.width].astype(np.float32)

    def info(self) -> dict[str, Any]:
        """Who sits where, for bookkeeping only."""
        return {"user_id": self.users.copy(), "_user_id": np.ones(self.num_envs, bool)}

    def _begin(self, slots: np.ndarray) -> None:
        """A new episode in some slots, and a new visit where the last one is over."""
        self.steps[slots] = 0
        self.commands[:, slots] = 0.0
        self.state[:, slots] = start_states(self.keys[slots], self.episodes[slots])
        free = slots[self.left[slots] <= 0]
        if self.seated or not len(free):
            return
        assert self.seed is not None
        users, self.left[free] = visitors(self.seed, free, self.visits[free], self.splits[free])
        self.visits[free] += 1
        self.users[free] = users
        self.contexts[free] = self.population.contexts(users, self.epoch)
        self.traits = traits(self.contexts, self.differ)


def split_numbers(split: str | Sequence[str], num: int) -> np.ndarray:
    """Numbers (num,) into NAMES of one split for all slots, or of one a slot."""
    names = [split] * num if isinstance(split, str) else list(split)
    for name in names:
        if name not in SPLITS:
            raise ValueError(f"split {name!r} of {ID} is unknown; choose from {list(NAMES)}")
    if len(names) != num:
        raise ValueError(f"{len(names)} splits for {num} slots of {ID}")
    return np.array([NAMES.index(name) for name in names])


class UserPopEnv(gymnasium.Env):
    """A single slot; see UserPopVectorEnv. `reset(options={"user_id": id})` seats a user."""

    metadata = {"render_modes": []}  # noqa: RUF012  gymnasium's own convention

    def __init__(self, render_mode: None = None, **options: Any):
        self.render_mode = render_mode
        self._vector = UserPopVectorEnv(1, max_episode_steps=2**62, **options)
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """The observation of a new episode, and who plays it."""
        super().reset(seed=seed)
        options = dict(options or {})
        if "user_id" in options:
            options["user_ids"] = [options.pop("user_id")]
        obs, info = self._vector.reset(seed=seed, options=options)
        return obs[0], {"user_id": int(info["user_id"][0])}

    def step(self, action: int):
        """One step; gymnasium's TimeLimit caps the episode."""
        obs, reward, terminated, truncated, info = self._vector.step(np.array([action]))
        told = {"user_id": int(info["user_id"][0])}
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), told


class UserPopEnvs(Envs):
    """UserPop behind the `Envs` contract: a hidden context is the name of a split."""

    def __init__(self, num: int, seed: int = 0, limit: int = CAP, **options: Any):
        self._vector = UserPopVectorEnv(num, max_episode_steps=limit, **options)
        self._seed = seed
        self.obs_spec = {"state": ObsSpec("vector", (self._vector.width,))}
        self.action_spec = ActionSpec("discrete", (ACTIONS,))
        self.num = num
        # the wishes of a user contradict each other
        self.cap = None if "wishes" in self._vector.differ else float(limit)
        self._row: Row | None = None

    def reset(self, context: str | Sequence[str] | None = None) -> Row:
        """Starts a new episode in every slot, with users of the split `context` if one is named."""
        return self._reset({"split": context})

    def seat(self, user_ids: Sequence[int] | np.ndarray) -> Row:
        """Starts a new episode in every slot with these users (N,), who stay."""
        return self._reset({"user_ids": user_ids})

    def _reset(self, options: dict[str, Any]) -> Row:
        seed = self._seed if self._row is None else None
        obs, _ = self._vector.reset(seed=seed, options=options)
        off = np.zeros(self.num, bool)
        return self._keep(obs, np.zeros((self.num, ACTIONS)), np.zeros(self.num), ~off, off)

    def step(self, action: np.ndarray) -> Row:
        """Encoded actions (N, 3)."""
        check_action(action, self.num, self.action_spec)
        first = self._vector.over
        taken = np.where(first[:, None], 0.0, action)
        obs, reward, terminal, _, _ = self._vector.step(action.argmax(1))
        return self._keep(obs, taken, reward, first, terminal)

    def _keep(self, obs, action, reward, first, terminal) -> Row:
        last, users = self._vector.over, self._vector.users
        action, reward = action.astype(np.float32), reward.astype(np.float32)
        self._row = Row({"state": obs}, action, reward, first, terminal, last, users.copy())
        return self._row

    def state_dict(self) -> dict[str, Any]:
        """The arrays of physics and visits, and of the current row."""
        if self._row is None:
            raise RuntimeError("reset the environments before asking for their state")
        vector, row = self._vector, self._row
        return {
            "seed": vector.seed,
            "epoch": vector.epoch,
            "seated": vector.seated,
            "state": vector.state.copy(),
            "commands": vector.commands.copy(),
            "steps": vector.steps.copy(),
            "episodes": vector.episodes.astype(np.int64),
            "visits": vector.visits.copy(),
            "left": vector.left.copy(),
            "users": vector.users.copy(),
            "splits": vector.splits.copy(),
            "action": row.action.copy(),
            "reward": row.reward.copy(),
            "first": row.first.copy(),
            "terminal": row.terminal.copy(),
            "last": row.last.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> Row:
        """Continues bit for bit from a `state_dict` of as many slots."""
        vector = self._vector
        if len(state["users"]) != self.num:
            raise ValueError(f"state of {len(state['users'])} slots loaded into {self.num}")
        vector.load_seed(int(state["seed"]))
        vector.epoch, vector.seated = int(state["epoch"]), bool(state["seated"])
        vector.state, vector.commands = state["state"].copy(), state["commands"].copy()
        vector.steps, vector.over = state["steps"].copy(), state["last"].copy()
        vector.episodes = state["episodes"].astype(np.uint64)
        vector.visits, vector.left = state["visits"].copy(), state["left"].copy()
        vector.splits = state["splits"].copy()
        vector.load_users(state["users"])
        first, terminal = state["first"].copy(), state["terminal"].copy()
        return self._keep(vector.observe(), state["action"], state["reward"], first, terminal)

    def close(self) -> None:
        """Nothing to free."""


if ID not in gymnasium.registry:
    gymnasium.register(
        ID,
        entry_point=f"{__name__}:UserPopEnv",
        vector_entry_point=f"{__name__}:UserPopVectorEnv",
        max_episode_steps=CAP,
    )
