"""Users in the training loop: whose fast weights are where, what they teach, and through kills.

Visits are drawn from five users for four slots, so that all come back, and now and then one sits in
two slots at once.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments import load_config, train
from experiments.benchmarks.kill import differences, stored
from experiments.config import ConfigError
from experiments.data.users import UserShards
from experiments.loop import Loop
from experiments.record import Checkpoints
from experiments.record.metrics import read
from tests.experiments.test_resume import interrupt
from worldmodel.types import NOBODY

FIELDS = (
    "frames=96 env.num=4 env.time_limit=3 threads=1 device=cpu "
    "model.deter=8 model.hidden=8 model.classes=4 model.stoch=2 model.units=8 model.blocks=2 "
    "agent.horizon=2 agent.layers=1 agent.bins=15 train.ratio=2 train.prefill=16 "
    "replay.capacity=96 replay.batch=2 replay.length=4 log.every=48 checkpoint.every=0 "
    "evaluate.every=0 evaluate.episodes=1 tracking.mlflow=false"
)
SIX = "timescales.levels.start.every.n=6 evaluate.contexts=[users] model.memory.dim=4"  # visits
POOL = f"{SIX} users.slots=4"
START = "world.dynamics.memory.start"
RATE = 0.5  # of the preset's pull


def configure(fields: str = "", root: str = "runs", preset: str = "users"):
    return load_config(preset, [*f"{FIELDS} {fields}".split(), f"tracking.root={root}"])


def few(seed: int, slots: np.ndarray, visits: np.ndarray, splits: np.ndarray):
    """Ids (n,) of five users, and one or two episodes each."""
    return (slots + 2 * visits) % 5, 1 + (slots + visits) % 2


@pytest.fixture(autouse=True)
def lean(monkeypatch: pytest.MonkeyPatch):
    """Few users; runs draw no pictures and do not ask git for the revision."""
    monkeypatch.setattr("experiments.envs.userpop.visitors", few)
    monkeypatch.setattr(Loop, "draw", lambda loop, finished: None)
    monkeypatch.setattr("experiments.record.run.revision", lambda: None)


def parameters(loop: Loop) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in loop.agent.named_parameters()}


@pytest.mark.parametrize("store", ["disk", "null"])
def test_users_find_what_they_learned_and_teach_the_start(store: str):
    """Every state that comes is the one that went; the start moves by the mean, and nothing else.

    Without a store a pool of six is large enough for all.
    """
    slots = 4 if store == "disk" else 6
    loop = Loop.start(configure(f"{SIX} users.store={store} users.slots={slots}"))
    left: dict[int, Tensor] = {}
    taught: list[Tensor] = []
    visits, moves, returned = 0, 0, 0
    with loop:
        while not loop.done:
            loop.enter_phase()
            step, before = loop.driver.step(loop.random), parameters(loop)
            learned = loop.driver.carry.fast.weights.clone()
            loop.count(step)
            row, start = loop.driver.row, before[START]
            assert row is not None
            changed = np.flatnonzero(row.user != step.row.user)
            for slot in changed:
                left[int(step.row.user[slot])] = learned[slot]
                taught.append(learned[slot] - start)
            for slot in range(4):
                came = loop.driver.carry.fast.weights[slot]
                if slot in changed:
                    returned += int(row.user[slot]) in left
                    assert torch.equal(came, left.get(int(row.user[slot]), start))
                else:
                    assert torch.equal(came, learned[slot])
            assert loop.driver.carry.user.tolist() == row.user.tolist()
            after = parameters(loop)
            moved = [name for name in after if not torch.equal(after[name], before[name])]
            if (visits + len(changed)) // 6 > visits // 6:
                assert moved == [START]
                expected = start + RATE * torch.stack(taught).mean(0)
                assert torch.allclose(after[START], expected, atol=1e-7)
                taught, moves = [], moves + 1
            else:
                assert moved == []
            visits += len(changed)
        counters = loop.timescales.state_dict()["counters"]
    assert counters["session"] == visits < counters["episode"]
    assert moves > 1 and returned > 3


def test_a_user_in_two_slots_leaves_with_the_last():
    """Both begin with what is known of them; who goes last is remembered."""
    loop = Loop.start(configure(f"{POOL} users.store=null"))
    with loop:
        loop.enter_phase()
        seats, driver = loop.sessions, loop.driver

        def seat(*users: int) -> Tensor:
            assert driver.row is not None
            here = driver.row.user != np.array(users)
            driver.row = driver.row._replace(user=np.array(users), first=here)
            seats.follow(driver)
            return driver.carry.fast.weights

        seat(7, 7, 8, 9)
        fast = driver.carry.fast
        weights = fast.weights + torch.arange(1.0, 5.0).view(4, 1, 1, 1)
        driver.carry = driver.carry._replace(fast=fast._replace(weights=weights))
        assert torch.equal(seat(7, 6, 8, 9)[0], weights[0])
        assert torch.equal(seat(6, 7, 8, 9)[1], weights[0])
        assert torch.equal(seat(7, 7, 7, 9)[[0, 2]], weights[[0, 0]])


def kept(path: Path) -> tuple[list[int], list[bytes]]:
    """Who is in the store of a run among all that it saw, and their states."""
    loaded = Checkpoints(path / "checkpoints").load()
    assert loaded is not None
    ids = np.unique(stored(loaded.segments["replay"])["user"]).tolist()
    store = UserShards(path / "users", loaded.state["sessions"]["pool"]["start"])
    which, records = store.get(ids)
    store.close()
    return which.tolist(), [x.numpy().tobytes() for x in records.fields.values()]


@pytest.mark.parametrize("fields", ["users.store=disk", "users.store=null", "users.keep=false"])
def test_interrupted_and_resumed_equals_one_that_was_not(monkeypatch, fields: str):
    whole = train(configure(f"{POOL} {fields}", "whole"))
    config = configure(f"{POOL} {fields} checkpoint.every=40", "pieces")
    interrupt(monkeypatch, lambda: train(config), 14)
    (path,) = Path("pieces").iterdir()
    loaded = Checkpoints(path / "checkpoints").load()
    assert loaded is not None and loaded.step == 40
    assert train(config, resume=path) == path
    assert differences(path, whole) == []
    if "disk" in fields:
        assert kept(path) == kept(whole) and len(kept(path)[0]) == 5


def test_a_run_with_users_and_what_it_reports():
    path = train(configure(f"{POOL} evaluate.contexts=[users,clusters]"))
    rows = read(path / "metrics.jsonl")
    contexts = ("users", "users_off", "clusters", "clusters_off")
    kinds = ("return", "score")
    assert {f"eval/{name}/{kind}" for name in contexts for kind in kinds} == set(rows[0].metrics)
    last = rows[-2].metrics
    assert last["train/visits"] > 6 and last["train/users"] == 4
    assert last["levels/start/updates"] == last["train/visits"] // 6
    assert {name.split("/")[0] for row in rows for name in row.metrics} <= {
        *("train", "eval", "loss", "agent", "levels", "time")
    }


def test_where_a_slot_is_a_user_an_episode_is_a_session():
    fields = "env.id=CartPoleShift-v0 evaluate.contexts=[flipped] model.memory.kind=delta"
    loop = Loop.start(configure(fields, preset="plain"))
    with loop:
        while loop.frame < 48:
            loop.enter_phase()
            loop.count(loop.driver.step(loop.random))
    counters = loop.timescales.state_dict()["counters"]
    assert counters["session"] == counters["episode"] > 4
    assert loop.driver.carry.user == ()


def test_without_a_pool_the_model_forgets():
    """The carry is left as it was; the next step begins the newcomer's fast weights anew."""
    loop = Loop.start(configure(f"{SIX} users=null"))
    with loop:
        loop.enter_phase()
        assert loop.driver.carry.user.tolist() == [NOBODY] * 4
        anew = 0
        while not loop.done:
            assert loop.driver.row is not None
            came = loop.driver.row.first & (loop.driver.row.user != loop.driver.carry.user.numpy())
            fresh = loop.agent.initial(4)
            carry = loop.driver.carry._replace(fast=fresh.fast, user=fresh.user)
            batch, generator = loop.driver.batch(), torch.Generator()
            generator.set_state(loop.driver.generator.get_state())
            _, expected = loop.agent.act(carry, batch, generator)
            loop.count(loop.driver.step(loop.random))
            same = (loop.driver.carry.fast.weights == expected.fast.weights).flatten(1).all(1)
            assert same.numpy()[came].all()
            anew += int(came.sum())
            assert loop.frame < 8 or not same.numpy()[~came].any()
        assert anew > 8


@pytest.mark.parametrize(
    ("fields", "field", "told"),
    [
        ("env.id=CartPole-v1", "users", "do not change hands"),
        ("model.memory.kind=none", "users", "no fast weights"),
        ("model.memory.forget=never", "model.memory.forget", "fast weights of their own"),
        ("users.slots=3", "users.slots", "env.num=4"),
        ("timescales.levels.start.every.unit=episode", "timescales.levels.start.every.unit", "vis"),
        ("users=null env.id=CartPole-v1", "timescales.levels.start.flow.source", "no users"),
    ],
)
def test_what_cannot_run_is_told(fields: str, field: str, told: str):
    with pytest.raises(ConfigError, match=told) as caught:
        configure(fields)
    assert caught.value.field == field


def test_users_teach_their_start_only():
    with pytest.raises(ConfigError, match=r"not world\.dynamics\.memory"):
        Loop.start(configure(r"timescales.levels.start.match=^world\.dynamics\.memory\."))
    assert not Path("runs").exists()
