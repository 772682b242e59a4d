"""UserPop: stateless users and their statistics, bent physics, visits, exact continuation."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from experiments.config import ConfigError, load_config
from experiments.envs import make_envs, random_action
from experiments.envs.cartpole import FORCE, MAX_POSITION, advance
from experiments.envs.known import NATIVE, OWN
from experiments.envs.known import check_env as check_config
from experiments.envs.philox import normal, philox, uniform, words
from experiments.envs.population import (
    SIZE,
    SPLITS,
    USERS,
    ZIPF,
    Population,
    checked,
    visitors,
    zipf,
)
from experiments.envs.userpop import ID, NAMES, UserPopEnvs, features, traits
from experiments.envs.userpop import UserPopVectorEnv as VectorEnv


# ---- stateless random numbers ------------------------------------------------------------------
@pytest.mark.parametrize(("seed", "key"), [(0, 0), (7, 123_456), (2**32 - 1, 999_999)])
def test_words_are_those_of_numpys_philox(seed: int, key: int):
    found = words(seed, np.array([5, key]), 10)[:, 1]
    theirs = np.random.Philox(key=np.array([seed, key], np.uint64))
    assert found.tolist() == theirs.random_raw(10).tolist()
    later = np.random.Philox(
        key=np.array([seed, key], np.uint64), counter=np.array([2**63, 3, 0, 0], np.uint64)
    )
    one = philox(seed, np.array([key]), np.array([2**63 + 1], np.uint64), stream=3)
    assert one[:, 0].tolist() == later.random_raw(4).tolist()


def test_uniform_and_normal_have_the_moments_that_their_names_promise():
    bits = words(1, np.arange(20_000), 8)
    assert uniform(bits).mean() == pytest.approx(0.5, abs=0.003)
    draws = normal(bits)
    assert draws.shape == bits.shape
    assert np.abs(draws.mean(1)).max() < 0.03
    assert np.cov(draws) == pytest.approx(np.eye(8), abs=0.04)
    assert (draws**4).mean() == pytest.approx(3.0, abs=0.1)


# ---- who the users are -------------------------------------------------------------------------
def test_a_user_is_the_same_in_any_position_and_company():
    population, rng = Population(seed=3), np.random.default_rng(0)
    ids = rng.integers(0, USERS, 200)
    found, order = population.contexts(ids), rng.permutation(200)
    np.testing.assert_array_equal(population.contexts(ids[order]), found[order])
    np.testing.assert_array_equal(population.contexts(ids[17:18]), found[17:18])
    assert not np.isclose(Population(seed=4).contexts(ids), found).any()


def test_users_scatter_around_the_means_of_their_clusters():
    population = Population(clusters=5, held=2, within=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8))
    ids = np.arange(30_000)
    cluster, contexts = population.cluster(ids), population.contexts(ids)
    assert np.bincount(cluster, minlength=5) / 30_000 == pytest.approx(
        [1 / 3] * 3 + [0, 0], abs=0.01
    )
    deviations = contexts - population.means()[cluster]
    assert deviations.mean(0) == pytest.approx(np.zeros(SIZE), abs=0.02)
    assert np.cov(deviations.T) == pytest.approx(np.diag(np.arange(1, 9) ** 2 / 100), abs=0.012)
    many = np.concatenate([Population(seed=seed).means() for seed in range(200)])
    assert many.std() == pytest.approx(0.9, rel=0.02)


def test_splits_are_disjoint_and_hold_the_clusters_that_they_name():
    covered = np.concatenate([np.asarray(ids) for ids in SPLITS.values()])
    assert np.array_equal(np.sort(covered), np.arange(USERS))
    population = Population()
    found = {name: set(population.cluster(np.array(ids[:5000]))) for name, ids in SPLITS.items()}
    assert found["train"] == found["users"] == set(range(12))
    assert found["clusters"] == set(range(12, 16))


def test_clusters_walk_at_random_with_the_epoch_and_carry_their_users_along():
    population, ids = Population(drift=0.05), np.arange(100)
    steps = np.stack([population.means(e + 1) - population.means(e) for e in range(40)])
    assert steps.std() == pytest.approx(0.05, rel=0.03)
    one = steps.reshape(40, -1)
    assert np.corrcoef(one[0], one[1])[0, 1] == pytest.approx(0.0, abs=0.25)
    moved = population.contexts(ids, 7) - population.contexts(ids)
    walked = population.means(7) - population.means()
    np.testing.assert_allclose(moved, walked[population.cluster(ids)], atol=1e-12)
    assert Population(drift=0.0).means(9).tolist() == population.means().tolist()


def test_returning_users_follow_zipf():
    counts = np.where(np.arange(40_000) < 30_000, 1000, 50)
    ranks = zipf(1, np.arange(40_000) % 97, np.arange(40_000), counts)
    for ours, count in ((ranks[:30_000], 1000), (ranks[30_000:], 50)):
        law = np.arange(1, count + 1) ** -ZIPF
        shares = np.bincount(ours, minlength=count + 1)[1:] / len(ours)
        assert len(shares) == count
        assert shares[:20] == pytest.approx((law / law.sum())[:20], abs=0.012)
        assert shares[20:].sum() == pytest.approx((law / law.sum())[20:].sum(), abs=0.015)


def test_visitors_come_from_their_split_and_half_of_them_anew():
    splits = np.arange(6000) % 3
    ids, episodes = visitors(5, np.arange(6000), np.zeros(6000, int), splits)
    for number, name in enumerate(NAMES):
        own = ids[splits == number]
        assert np.isin(own, np.asarray(SPLITS[name])).all()
        fresh = np.mean(own - SPLITS[name].start > 0.1 * len(SPLITS[name]))
        assert 0.4 < fresh < 0.6  # nine in ten of half, and a few of the tail of Zipf's law
    assert np.bincount(episodes)[1:] / 6000 == pytest.approx([0.2] * 5, abs=0.02)
    again, _ = visitors(5, np.arange(6000)[::-1], np.zeros(6000, int), splits[::-1])
    np.testing.assert_array_equal(again, ids[::-1])


def test_what_is_no_user_is_refused():
    with pytest.raises(ValueError, match=r"leave \[0, 1000000\)"):
        checked(np.array([USERS]))
    with pytest.raises(ValueError, match="whole numbers"):
        checked(np.array([0.5]))
    with pytest.raises(ValueError, match="held=16 of clusters=16"):
        Population(held=16)
    with pytest.raises(ValueError, match="epoch=-1"):
        Population().means(-1)


# ---- the environment ---------------------------------------------------------------------------
def balance(vector: VectorEnv) -> np.ndarray:
    """Actions that balance every user's pole: from the state in which a command will act."""
    who, state, slots = vector.traits, vector.state, np.arange(vector.num_envs)
    for age in (1, 2):
        queued = vector.commands[np.maximum(who.delay - age, 0), slots]
        ahead = advance(state, queued * who.force, who.half, who.gravity)
        state = np.where(who.delay >= age, ahead, state)
    lean = state[2] + 0.3 * state[3] + 0.05 * state[0] + 0.1 * state[1]
    return (np.sign(lean) * np.sign(who.force) + 1 - who.rotation).astype(int) % 3


@pytest.mark.parametrize("split", NAMES)
def test_who_knows_the_context_balances_every_user(split: str):
    vector = VectorEnv(256, split=split)
    vector.reset(seed=2)
    for _ in range(200):
        _, reward, terminated, truncated, _ = vector.step(balance(vector))
        assert not terminated.any()
        assert 0.0 < reward.min() <= reward.max() <= 1.0
    assert truncated.all()


def test_traits_cover_what_they_say():
    who = traits(Population().contexts(np.arange(5000)))
    assert set(who.delay) == set(who.rotation) == {0, 1, 2}
    assert 0.2 < np.mean(who.force < 0) < 0.8
    assert np.abs(who.force).min() >= 0.7 * FORCE
    assert who.gravity.min() >= 4.4 and who.gravity.max() <= 21.9
    assert who.half.min() >= 0.24 and who.half.max() <= 1.01
    assert who.weights.sum(1) == pytest.approx(np.ones(5000))
    plain = traits(np.zeros((1, SIZE)))
    assert (plain.gravity[0], plain.half[0], plain.delay[0]) == (9.8, 0.5, 1)
    assert plain.weights[0].tolist() == [0.25] * 4 and not plain.alive.any()


def test_users_differ_in_what_is_named_and_else_are_plain_cartpoles():
    contexts = Population().contexts(np.arange(50))
    whole, plain = traits(contexts), traits(contexts, ())
    for found, value in zip(plain, (FORCE, 9.8, 0.5, 0, 0, 0.0, 1.0), strict=True):
        assert (found == value).all()
    some = traits(contexts, ("sign", "length"))
    assert some.force.tolist() == whole.force.tolist() and some.half.tolist() == whole.half.tolist()
    assert some.gravity.tolist() == plain.gravity.tolist() and (some.alive == 1).all()
    envs = UserPopEnvs(8, limit=50, differ=["sign"])
    assert envs.cap == 50 and UserPopEnvs(8).cap is None
    row = envs.reset()
    after = envs.step(random_action(envs.action_spec, 8, np.random.default_rng(0)))
    assert row.first.all() and (after.reward == 1).all()


def test_commands_act_after_the_delay_and_through_the_rotation():
    vector = VectorEnv(3, user_ids=[0, 1, 2])
    vector.reset(seed=0)
    vector.traits = vector.traits._replace(
        delay=np.array([0, 1, 2]), rotation=np.array([0, 1, 2]), force=np.array([10.0, -10.0, 10.0])
    )
    start = vector.state.copy()
    forces = []
    for action in ([2, 1, 0], [1, 0, 2], [1, 0, 2]):
        before = vector.state
        vector.step(np.array(action))
        push = vector.state - advance(
            before, np.zeros(3), vector.traits.half, vector.traits.gravity
        )
        forces.append(np.sign(push[1]).tolist())
    assert forces == [[1, 0, 0], [0, -1, 0], [0, 0, 1]]
    assert not np.array_equal(start, vector.state)


def test_rewards_are_the_users_weights_of_the_features():
    found = features(np.array([0.0, 1.0, -3.0]), np.array([0.0, 1.0, -1.0]), np.array([0, -1, -1]))
    assert found[0] == pytest.approx([1, 1, 1, np.exp(-2)])
    assert found[1] == pytest.approx([1 - 1 / MAX_POSITION, 0, 0, 1])
    assert found[2] == pytest.approx([0, 0, 1, 0], abs=1e-9)


def test_a_slot_neither_sees_nor_moves_the_others():
    def rollout(ids: list[int]) -> np.ndarray:
        vector, rng = VectorEnv(4, user_ids=ids), np.random.default_rng(0)
        vector.reset(seed=1)
        return np.stack([vector.step(rng.integers(0, 3, 4))[0] for _ in range(80)], 1)

    one, other = rollout([1, 2, 3, 4]), rollout([1, 9, 3, 4])
    np.testing.assert_array_equal(one[[0, 2, 3]], other[[0, 2, 3]])
    assert not np.array_equal(one[1], other[1])


def test_users_stay_for_their_visit_and_others_follow():
    vector = VectorEnv(64, max_episode_steps=3)
    _, info = vector.reset(seed=3)
    users, lengths = [info["user_id"]], vector.left.copy()
    for _ in range(40):
        users.append(vector.step(np.zeros(64, int))[4]["user_id"])
    seen = np.stack(users)
    stayed = (seen == seen[0]).cumprod(0).sum(0)
    assert set(lengths) == {1, 2, 3, 4, 5}
    once = [len(set(column)) > 2 for column in seen.T]
    assert (stayed == 4 * lengths)[np.array(once)].mean() > 0.9  # a user may come back at once
    assert len(np.unique(seen)) > 100


def test_seated_users_stay_and_a_split_sends_them_away():
    envs = UserPopEnvs(3, limit=2)
    row = envs.seat([5, 6, 7])
    for _ in range(20):
        row = envs.step(random_action(envs.action_spec, 3, np.random.default_rng(0)))
    assert row.user.tolist() == [5, 6, 7]
    assert envs.reset().user.tolist() == [5, 6, 7]
    assert np.isin(envs.reset("clusters").user, np.asarray(SPLITS["clusters"])).all()
    mixed = envs.reset(["train", "users", "clusters"]).user
    assert [next(n for n, ids in SPLITS.items() if user in ids) for user in mixed] == list(NAMES)


def test_the_context_is_hidden_unless_an_oracle_looks():
    hidden, oracle = VectorEnv(2, user_ids=[8, 9]), VectorEnv(2, user_ids=[8, 9], oracle=True)
    plain, _ = hidden.reset(seed=1)
    told, _ = oracle.reset(seed=1)
    assert plain.shape == (2, 4)
    np.testing.assert_array_equal(told[:, :4], plain)
    expected = Population().contexts(np.array([8, 9])).astype(np.float32)
    np.testing.assert_array_equal(told[:, 4:], expected)
    drifted, _ = oracle.reset(options={"epoch": 4})
    assert not np.allclose(drifted[:, 4:], expected)


def test_one_seed_one_course_and_a_state_goes_on_bit_for_bit():
    def course(envs: UserPopEnvs, steps: int) -> list[np.ndarray]:
        rng = np.random.default_rng(5)
        rows = [envs.step(random_action(envs.action_spec, envs.num, rng)) for _ in range(steps)]
        return [np.concatenate([row.obs["state"].ravel(), row.reward, row.user]) for row in rows]

    one, two = UserPopEnvs(6, seed=4, limit=9), UserPopEnvs(6, seed=4, limit=9)
    with pytest.raises(RuntimeError, match="reset the environments"):
        one.state_dict()
    one.reset("users")
    two.reset("users")
    np.testing.assert_array_equal(course(one, 60), course(two, 60))
    state = one.state_dict()
    rest = course(one, 60)
    other = UserPopEnvs(6, seed=99, limit=9)
    other.load_state_dict(state)
    np.testing.assert_array_equal(course(other, 60), rest)
    with pytest.raises(ValueError, match="6 slots loaded into 2"):
        UserPopEnvs(2).load_state_dict(state)


def test_rows_follow_the_contract():
    envs = UserPopEnvs(5, limit=4)
    row = envs.reset()
    assert row.first.all() and not row.action.any() and row.user.dtype == np.int64
    rng = np.random.default_rng(1)
    for _ in range(30):
        before, action = row, random_action(envs.action_spec, 5, rng)
        row = envs.step(action)
        np.testing.assert_array_equal(row.first, before.last)
        assert not row.action[row.first].any() and not row.reward[row.first].any()
        np.testing.assert_array_equal(row.action[~row.first], action[~row.first])
        assert (row.user[~row.first] == before.user[~row.first]).all()


def test_the_configuration_opens_it():
    assert OWN[ID] == NAMES
    config = load_config(
        "default",
        [f"env.id={ID}", "env.contexts=[train]", "env.kwargs={oracle: true, epoch: 2}"],
    )
    check_config(config)
    envs = make_envs(config.env.model_copy(update={"units": {}}), 2)
    assert envs.reset("train").obs["state"].shape == (2, 12)
    wrong = load_config("default", [f"env.id={ID}", "env.kwargs={oracle: 3}"])
    with pytest.raises(ConfigError, match="oracle: bool"):
        check_config(wrong)
    wrong = load_config("default", [f"env.id={ID}", "env.kwargs={differ: [sign, mass]}"])
    with pytest.raises(
        ConfigError, match=r"differ\.1 = mass\n.*no such trait\none of sign, gravity"
    ):
        check_config(wrong)
    assert set(NATIVE) < set(OWN)


def test_mistakes_name_the_way_out():
    with pytest.raises(ValueError, match=r"split 'test'.*\['train', 'users', 'clusters'\]"):
        VectorEnv(2, split="test")
    with pytest.raises(ValueError, match="cannot differ in 'mass'"):
        VectorEnv(2, differ=["mass"])
    with pytest.raises(ValueError, match="1 users for 2 slots"):
        VectorEnv(2, user_ids=[1])
    with pytest.raises(ValueError, match="2 splits for 3 slots"):
        UserPopEnvs(3).reset(["train", "users"])


def test_registered_with_gymnasium():
    single = gymnasium.make(ID, oracle=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*infinity")
        check_env(single.unwrapped, skip_render_check=True)
    first, info = single.reset(seed=4, options={"user_id": 31})
    assert info == {"user_id": 31}
    assert single.reset(seed=4)[0].tolist() == first.tolist()
    vector = gymnasium.make_vec(ID, 3, vectorization_mode="vector_entry_point", split="users")
    _, infos = vector.reset(seed=4)
    assert np.isin(infos["user_id"], np.asarray(SPLITS["users"])).all()
    vector.close()
