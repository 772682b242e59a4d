"""Any gymnasium environment as `Envs`: N slots behind gymnasium's vector environments.

Cheap environments are stepped in this process, slow ones in a worker process each; the rows are
the same. Continuing replays the recorded actions of each slot's current episode, in its hidden
context.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

from experiments.envs.rows import Envs, Row, check_action, random_action
from experiments.envs.slot import FIRST, LAST, REWARD, TERMINAL, Slot

SLOW = 1e-3  # seconds a step above which a process a slot pays for its messages
MakeSlot = Callable[[int], Slot]  # slot number -> slot


class GymEnvs(Envs):
    """N slots of one environment; `make_slot` must be picklable for worker processes."""

    def __init__(
        self,
        make_slot: MakeSlot,
        num: int,
        workers: Literal["auto", "inprocess", "process"] = "auto",
        cap: float | None = None,
    ):
        probe = make_slot(0)
        self.obs_spec, self.action_spec = probe.observations.spec, probe.actions.spec
        self.contexts = probe.contexts
        self.num, self.cap = num, cap
        if workers == "auto":
            several = num > 1 and len(os.sched_getaffinity(0)) > 1
            workers = "process" if several and seconds_per_step(probe) > SLOW else "inprocess"
        probe.close()
        self.workers = workers
        self._vector = _vector([partial(make_slot, slot) for slot in range(num)], workers)
        self._user = np.arange(num)

    def reset(self, context: str | Sequence[str] | None = None) -> Row:
        """Starts a new episode in every slot, under `context` if one is named, or one a slot."""
        options = None if context is None else {"context": self._named(context)}
        return self._row(self._vector.reset(options=options)[0])

    def step(self, action: np.ndarray) -> Row:
        """Encoded actions (N, A)."""
        check_action(action, self.num, self.action_spec)
        action = np.asarray(action, np.float32)
        return self._row(self._vector.step(action)[0], action)

    def state_dict(self) -> dict[str, Any]:
        """Each slot's seed, episode and actions so far."""
        states = self._vector.call("state")
        return {f"slot{slot}": state for slot, state in enumerate(states)}

    def load_state_dict(self, state: dict[str, Any]) -> Row:
        """Replays each slot's episode; bit for bit where the environment is deterministic."""
        if len(state) != self.num:
            raise ValueError(f"state of {len(state)} slots loaded into {self.num}")
        states = [state[f"slot{slot}"] for slot in range(self.num)]
        row = self._row(self._vector.reset(options={"restore": states})[0])
        for slot, past in enumerate(states):
            if len(past["actions"]):
                row.action[slot] = past["actions"][-1]
        return row

    def close(self) -> None:
        """Closes the environments and their processes."""
        self._vector.close()

    def _named(self, context: str | Sequence[str]) -> list[str]:
        """The name of each slot's context."""
        if not self.contexts:
            raise ValueError(f"context {context!r}: this environment has no hidden contexts")
        names = [context] * self.num if isinstance(context, str) else list(context)
        for name in names:
            if name not in self.contexts:
                raise ValueError(
                    f"context {name!r} is unknown; choose from {', '.join(self.contexts)}"
                )
        if len(names) != self.num:
            raise ValueError(f"{len(names)} contexts for {self.num} slots")
        return names

    def _row(self, observed: dict[str, Any], action: np.ndarray | None = None) -> Row:
        flags = observed["flags"]
        first = flags[:, FIRST] > 0
        if action is None:
            action = np.zeros((self.num, self.action_spec.dim), np.float32)
        return Row(
            obs=dict(observed["obs"]),
            action=np.where(first[:, None], np.float32(0), action),
            reward=flags[:, REWARD].astype(np.float32),
            first=first,
            terminal=flags[:, TERMINAL] > 0,
            last=flags[:, LAST] > 0,
            user=self._user,
        )


def seconds_per_step(slot: Slot, steps: int = 20) -> float:
    """Median seconds of a step under random actions."""
    rng = np.random.default_rng(0)
    slot.reset()
    took = []
    for _ in range(steps):
        action = random_action(slot.actions.spec, 1, rng)[0]
        start = time.perf_counter()
        slot.step(action)
        took.append(time.perf_counter() - start)
    return float(np.median(took))


def _vector(makers: Sequence[Callable[[], gymnasium.Env]], workers: str):
    if workers == "inprocess":
        return SyncVectorEnv(makers)
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    return AsyncVectorEnv(makers, context="forkserver")
