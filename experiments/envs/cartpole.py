"""CartPoleShift-v0: CartPole with a hidden context, stepped for all slots at once in numpy.

The physics is that of gymnasium's CartPole-v1 (Barto, Sutton & Anderson 1983), the episode is
capped at 200 steps. The context (sign of the action, length of the pole, gravity) is an array
over slots and never part of the observation. Start states are a hash of (seed, slot, episode), so
a slot's next episode does not depend on what the other slots did.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from experiments.envs.rows import Envs, Row, check_action
from worldmodel.types import ActionSpec, ObsSpec

ID = "CartPoleShift-v0"
CAP = 200

TAU = 0.02  # seconds between two states
FORCE = 10.0
MASS_POLE = 0.1
MASS = 1.0 + MASS_POLE  # of cart and pole
MAX_POSITION = 2.4
MAX_ANGLE = 12 * 2 * math.pi / 360
START = 0.05  # start states are uniform in [-START, START]


class Context(NamedTuple):
    """What is hidden: the sign of the action, half the pole's length (m), gravity (m/s^2)."""

    sign: float = 1.0
    half_length: float = 0.5
    gravity: float = 9.8


CONTEXTS = {
    "normal": Context(),
    "flipped": Context(sign=-1.0),
    "long": Context(half_length=0.75),  # a pole of 1.5 times the length, of the same mass
    "heavy": Context(gravity=20.0),
}
NAMES = tuple(CONTEXTS)
TABLE = np.array(list(CONTEXTS.values()))  # (contexts, 3)


def advance(state: np.ndarray, force: np.ndarray, half: np.ndarray, gravity: np.ndarray):
    """One Euler step of the states (4, N) float64: position, velocity, angle, angular velocity."""
    _, velocity, angle, spin = state
    cos, sin = np.cos(angle), np.sin(angle)
    moment = MASS_POLE * half
    push = (force + moment * np.square(spin) * sin) / MASS
    rates = np.empty_like(state)
    rates[0] = velocity
    rates[2] = spin
    rates[3] = (gravity * sin - cos * push) / (
        half * (4.0 / 3.0 - MASS_POLE * np.square(cos) / MASS)
    )
    rates[1] = push - moment * rates[3] * cos / MASS
    return state + TAU * rates


def slot_keys(seed: int, num: int) -> np.ndarray:
    """Keys (num,) uint64 of the slots, a hash of seed and slot."""
    return _mix(_mix(np.full(num, seed, np.uint64)) + np.arange(num, dtype=np.uint64))


def start_states(keys: np.ndarray, episodes: np.ndarray) -> np.ndarray:
    """Start states (4, n) float64, a hash of slot keys and episodes, both (n,) uint64."""
    bits = _mix(_mix(keys + episodes) + _DIMENSIONS)
    return (bits >> _11) * (2.0**-52 * START) - START


_11, _27, _30, _31 = np.array([11, 27, 30, 31], np.uint64)
_STEP, _FIRST, _SECOND = np.array(
    [0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64
)
_DIMENSIONS = np.arange(1, 5, dtype=np.uint64)[:, None] * np.uint64(0xD1B54A32D192ED03)


def _mix(key: np.ndarray) -> np.ndarray:
    """One output of splitmix64 (Steele et al. 2014) for each uint64 key."""
    key = key + _STEP
    key = (key ^ (key >> _30)) * _FIRST
    key = (key ^ (key >> _27)) * _SECOND
    return key ^ (key >> _31)


def context_indices(context: str | Sequence[str], num: int) -> np.ndarray:
    """Indices (num,) of one name for all slots, or of one name a slot."""
    names = [context] * num if isinstance(context, str) else list(context)
    for name in names:
        if name not in CONTEXTS:
            raise ValueError(f"context {name!r} of {ID} is unknown; choose from {list(NAMES)}")
    if len(names) != num:
        raise ValueError(f"{len(names)} contexts for {num} slots of {ID}")
    return np.array([NAMES.index(name) for name in names])


class CartPoleShiftVectorEnv(VectorEnv):
    """N CartPoles with hidden contexts; autoreset on the next step, actions 0 (left), 1 (right).

    `reset(seed)` starts at episode 0 of that seed, `reset()` starts every slot's next episode;
    `options={"context": name or N names}` sets the hidden context until it is set again.
    """

    def __init__(self, num_envs: int = 1, max_episode_steps: int = CAP, render_mode: None = None):
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        bound = np.array([2 * MAX_POSITION, np.inf, 2 * MAX_ANGLE, np.inf], np.float32)
        self.single_observation_space = spaces.Box(-bound, bound)
        self.single_action_space = spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.limit = max_episode_steps
        self.seed: int | None = None
        self.keys = np.zeros(num_envs, np.uint64)
        self.episodes = np.zeros(num_envs, np.uint64)
        self.state = np.zeros((4, num_envs))
        self.steps = np.zeros(num_envs, np.int64)
        self.over = np.zeros(num_envs, bool)
        self.set_context("normal")

    def set_context(self, context: str | Sequence[str]) -> None:
        """Changes the hidden context at once, in the middle of episodes too."""
        self.load_context(context_indices(context, self.num_envs))

    def load_context(self, context: np.ndarray) -> None:
        """Contexts by index (N,) into NAMES."""
        self.context = context
        sign, self.half, self.gravity = np.ascontiguousarray(TABLE[context].T)
        self.right, self.left = FORCE * sign, -FORCE * sign

    def load_seed(self, seed: int) -> None:
        """The seed of all start states from the next one on."""
        self.seed, self.keys = seed, slot_keys(seed, self.num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Observations (N, 4) float32 of new episodes in all slots, and an empty info."""
        if seed is not None or self.seed is None:
            self.load_seed(int(self.np_random.integers(2**31)) if seed is None else seed)
            self.episodes[:] = 0
        else:
            self.episodes += np.uint64(1)
        if options and options.get("context") is not None:
            self.set_context(options["context"])
        self.state = start_states(self.keys, self.episodes)
        self.steps[:] = 0
        self.over = np.zeros(self.num_envs, bool)
        return self.observe(), {}

    def step(self, actions: np.ndarray):
        """Advances all slots; those that ended start a new episode instead, with reward zero."""
        assert self.seed is not None, "call reset before step"
        restart = self.over
        force = np.where(actions, self.right, self.left)
        self.state = advance(self.state, force, self.half, self.gravity)
        self.steps += 1
        if restart.any():
            self._restart(np.flatnonzero(restart))
        terminated = np.abs(self.state[0]) > MAX_POSITION
        terminated |= np.abs(self.state[2]) > MAX_ANGLE
        truncated = (self.steps >= self.limit) & ~terminated
        self.over = terminated | truncated
        return self.observe(), np.where(restart, 0.0, 1.0), terminated, truncated, {}

    def observe(self) -> np.ndarray:
        """Observations (N, 4) float32."""
        return self.state.T.astype(np.float32, order="C")

    def _restart(self, ended: np.ndarray) -> None:
        self.episodes[ended] += np.uint64(1)
        self.steps[ended] = 0
        self.state[:, ended] = start_states(self.keys[ended], self.episodes[ended])


class CartPoleShiftEnv(gymnasium.Env):
    """A single CartPole with a hidden context; see CartPoleShiftVectorEnv."""

    metadata = {"render_modes": []}  # noqa: RUF012  gymnasium's own convention

    def __init__(self, render_mode: None = None):
        self.render_mode = render_mode
        self._vector = CartPoleShiftVectorEnv(1, max_episode_steps=2**62)
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """The observation (4,) float32 of a new episode, and an empty info."""
        super().reset(seed=seed)
        obs, info = self._vector.reset(seed=seed, options=options)
        return obs[0], info

    def step(self, action: int):
        """One step; gymnasium's TimeLimit caps the episode."""
        obs, reward, terminated, truncated, info = self._vector.step(np.array([action]))
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), info


class CartPoleShiftEnvs(Envs):
    """CartPoleShift behind the `Envs` contract; its state is its arrays, nothing is replayed.

    With `oracle` a second observation, `context` (N, 4), tells the context as a one-hot.
    """

    def __init__(self, num: int, seed: int = 0, limit: int = CAP, oracle: bool = False):
        self._vector = CartPoleShiftVectorEnv(num, limit)
        self._seed = seed
        told = {"context": ObsSpec("vector", (len(NAMES),))} if oracle else {}
        self.obs_spec = {"state": ObsSpec("vector", (4,)), **told}
        self.action_spec = ActionSpec("discrete", (2,))
        self.num = num
        self.cap = float(limit)
        self._user = np.arange(num)
        self._row: Row | None = None

    def reset(self, context: str | Sequence[str] | None = None) -> Row:
        """Starts a new episode in every slot, under `context` if one is named."""
        seed = self._seed if self._row is None else None
        obs, _ = self._vector.reset(seed=seed, options={"context": context})
        off = np.zeros(self.num, bool)
        return self._keep(obs, np.zeros((self.num, 2), np.float32), np.zeros(self.num), ~off, off)

    def step(self, action: np.ndarray) -> Row:
        """Encoded actions (N, 2)."""
        check_action(action, self.num, self.action_spec)
        first = self._vector.over
        taken = np.where(first[:, None], np.float32(0), np.asarray(action, np.float32))
        obs, reward, terminal, _, _ = self._vector.step(action[:, 1] > action[:, 0])
        return self._keep(obs, taken, reward, first, terminal)

    def _keep(self, obs, action, reward, first, terminal) -> Row:
        reward = reward.astype(np.float32)
        last = self._vector.over
        told = {key: _one_hot(self._vector.context) for key in self.obs_spec if key == "context"}
        seen = {"state": obs, **told}
        self._row = Row(seen, action, reward, first, terminal, last, self._user)
        return self._row

    def state_dict(self) -> dict[str, Any]:
        """The arrays of physics and of the current row."""
        if self._row is None:
            raise RuntimeError("reset the environments before asking for their state")
        vector, row = self._vector, self._row
        return {
            "seed": vector.seed,
            "state": vector.state.copy(),
            "steps": vector.steps.copy(),
            "episodes": vector.episodes.astype(np.int64),
            "context": vector.context.copy(),
            "action": row.action.copy(),
            "reward": row.reward.copy(),
            "first": row.first.copy(),
            "terminal": row.terminal.copy(),
            "last": row.last.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> Row:
        """Continues bit for bit from a `state_dict` of as many slots."""
        vector = self._vector
        if state["state"].shape != (4, self.num):
            raise ValueError(f"state of {state['state'].shape[1]} slots loaded into {self.num}")
        vector.load_seed(int(state["seed"]))
        vector.state, vector.steps = state["state"].copy(), state["steps"].copy()
        vector.episodes = state["episodes"].astype(np.uint64)
        vector.over = state["last"].copy()
        vector.load_context(state["context"].copy())
        action, first, terminal = (state[key].copy() for key in ("action", "first", "terminal"))
        return self._keep(vector.observe(), action, state["reward"], first, terminal)

    def close(self) -> None:
        """Nothing to free."""


def _one_hot(context: np.ndarray) -> np.ndarray:
    """Contexts by index (N,) as (N, 4) float32."""
    return np.eye(len(NAMES), dtype=np.float32)[context]
