"""Configuration: expansion, overrides, round trips, and every way to get it wrong."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from experiments.config import (
    SIZES,
    Config,
    ConfigError,
    LevelConfig,
    Levels,
    levels_of,
    load_config,
    presets,
)
from experiments.config.dreamer4 import load_dreamer4
from experiments.config.expand import expand
from experiments.config.explain import explain

KINDS = ("plain", "geometric", "cms", "lookahead", "diloco", "cls_er", "hare_tortoise",
         "benna_fusi", "l2_init", "ewc")  # fmt: skip
RULES = ("adamw", "laprop", "sgd", "muon", "m3")


def load(*overrides: str) -> Config:
    return load_config(None, overrides)


def periods(config: Config) -> list[int]:
    return [level.every.n for level in levels_of(config).values()]


def level(config: Config, name: str) -> LevelConfig:
    return levels_of(config)[name]


def mistake(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return caught.value


# ---- presets and round trips ---------------------------------------------------------------------
@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_says_what_it_is_for(name):
    config = load_config(name)
    assert isinstance(config.timescales, Levels)
    assert len(presets()[name]) > 20


@pytest.mark.parametrize("name", presets())
def test_dump_loads_to_the_same_configuration(name, tmp_path):
    config = load_config(name)
    (tmp_path / "config.yaml").write_text(config.dump())
    assert load_config(tmp_path / "config.yaml") == config
    assert load_config(tmp_path) == config  # a run's folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_expands_and_dumps(kind, tmp_path):
    config = load(f"timescales.kind={kind}")
    (tmp_path / "config.yaml").write_text(config.dump())
    assert load_config(tmp_path / "config.yaml") == config
    assert list(levels_of(config)) == list(config.tree()["timescales"]["levels"])


def test_default_is_three_levels_and_a_memory():
    config = load()
    assert list(levels_of(config)) == ["fast", "mid", "slow"]
    assert periods(config) == [1, 2, 4]
    assert config.model.memory.kind == "gated_delta"
    assert config.env.contexts == ("normal", "flipped", "normal")


def test_flatten_gives_scalars_by_dotted_path():
    flat = load().flatten()
    assert flat["timescales.levels.slow.every.n"] == 4
    assert flat["env.contexts"] == "['normal', 'flipped', 'normal']"
    assert all(isinstance(v, str | int | float | bool | None) for v in flat.values())


def test_configuration_is_frozen():
    with pytest.raises(ValidationError):
        load().seed = 3  # type: ignore[misc]


def test_json_schema_describes_every_field_of_the_top():
    schema = Config.model_json_schema()
    assert {"env", "model", "timescales", "frames"} <= schema["properties"].keys()
    assert schema["properties"]["frames"]["description"]


# ---- expansion -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("k", "names"),
    [
        (1, ["all"]),
        (2, ["fast", "slow"]),
        (3, ["fast", "mid", "slow"]),
        (5, ["fast", "mid1", "mid2", "mid3", "slow"]),
    ],
)
def test_geometric_names_and_periods(k, names):
    config = load("timescales.kind=geometric", f"timescales.k={k}", "timescales.base=3")
    assert list(levels_of(config)) == names
    assert periods(config) == [3**i for i in range(k)]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_levels_by_module_own_each_part_of_the_agent_once(k):
    import re

    parts = "actor critic world.reward world.continues world.decoder world.dynamics world.encoder"
    levels = levels_of(load(f"timescales.k={k}"))
    patterns = [level.match for level in levels.values()]
    if k == 1:
        assert patterns == ["REST"]
        return
    for part in parts.split():
        owners = [p for p in patterns if re.search(str(p), f"{part}.linear.weight")]
        assert len(owners) == 1, part


def test_geometric_learning_rates_grow_with_the_period():
    config = load("timescales.rule.lr=1e-4", "timescales.base=4", "timescales.lr_power=0.5")
    rates = [level.flow.rule.lr for level in levels_of(config).values()]  # type: ignore[union-attr]
    assert rates == pytest.approx([1e-4, 2e-4, 4e-4])


def test_by_depth_leaves_the_split_to_the_assembly():
    config = load("timescales.k=7", "timescales.by=depth")
    match = level(config, "slow").match
    assert not isinstance(match, str) and match is not None
    assert (match.by, match.part, match.of) == ("depth", 6, 7)


def test_levels_without_a_rule_take_the_shared_one():
    config = load("timescales={kind: levels, rule: {kind: sgd, lr: 0.5}, levels: {a: {match: .}}}")
    flow = level(config, "a").flow
    assert flow is not None and flow.kind == "descend"
    assert flow.rule is not None and (flow.rule.kind, flow.rule.lr) == ("sgd", 0.5)


def test_level_changes_inside_a_kind():
    text = "timescales={kind: geometric, k: 2, levels: {slow: {every: {n: 32}}}}"
    assert periods(load(text)) == [1, 32]


@pytest.mark.parametrize("kind", RULES)
def test_rules_have_the_fields_of_timescales_rules(kind):
    from timescales import rules

    config = load(f"timescales={{kind: geometric, k: 3, lr_power: 0, rule: {{kind: {kind}}}}}")
    flow = level(config, "fast").flow
    assert flow is not None and flow.kind == "descend" and flow.rule is not None
    factory = inspect.signature(getattr(rules, kind)).parameters
    defaults = {name: parameter.default for name, parameter in factory.items()}
    ours = flow.rule.model_dump(exclude={"kind"})
    assert {k: v for k, v in ours.items() if k != "lr"} == {
        k: v for k, v in defaults.items() if k != "lr"
    }


@pytest.mark.parametrize(
    "kind", ["plain", "lookahead", "diloco", "hare_tortoise", "benna_fusi", "l2_init"]
)
def test_published_methods_equal_their_presets(kind):
    from experiments.build import make_level
    from timescales import presets as methods
    from timescales import rules

    config = load(f"timescales={{kind: {kind}}}")
    ours = [make_level(name, level, []) for name, level in levels_of(config).items()]
    theirs = getattr(methods, kind)(rules.adamw())
    assert [told(x) for x in ours] == [told(x) for x in theirs]


def test_online_ewc_equals_its_preset_but_for_the_name_of_the_critic():
    from experiments.build import make_level
    from timescales import presets as methods
    from timescales import rules

    config = load("timescales={kind: ewc, weight: 30, decay: 0.5, n: 7, rule: {lr: 0.01}}")
    ours = [make_level(name, level, []) for name, level in levels_of(config).items()]
    theirs = methods.online_ewc(rules.adamw(0.01), 0.3, 7, 0.5, r"^(world|actor)\.")
    assert [told(x)[1:] for x in ours] == [told(x)[1:] for x in theirs]
    assert [x.start for x in ours] == [x.start for x in theirs]


def told(level) -> tuple:
    words = (str(level.flow), [str(x) for x in level.relax], [str(x) for x in level.reset])
    return (level.name, level.match, level.copy, level.every, *words)


# ---- overrides -----------------------------------------------------------------------------------
def test_numbers_are_yaml_1_2():
    config = load("agent.entropy=1e-3", "name=no", "frames=24_000")
    assert (config.agent.entropy, config.name, config.frames) == (1e-3, "no", 24_000)


def test_override_of_a_level_applies_after_expansion():
    config = load("timescales.levels.slow.every.n=64", "timescales.k=2")
    assert periods(config) == [1, 64]


def test_another_kind_drops_its_siblings_whatever_the_order():
    for words in (
        ("timescales.kind=geometric", "timescales.k=5"),
        ("timescales.k=5", "timescales.kind=geometric"),
    ):
        config = load_config("plain", words)
        assert periods(config) == [1, 4, 16, 64, 256]
    flow = level(load("timescales.levels.slow.flow={kind: pull, source: mid}"), "slow").flow
    assert flow is not None and flow.kind == "pull"


def test_another_kind_of_timescales_keeps_the_optimizer():
    words = ("timescales.kind=geometric", "timescales.k=2")
    before = level(load_config("cartpole"), "all").flow
    after = level(load_config("cartpole", words), "fast").flow
    assert before is not None and before.kind == "descend" and before.rule is not None
    assert after is not None and after.kind == "descend" and after.rule == before.rule
    assert before.rule.kind == "laprop"
    other = level(load_config("cartpole", (*words, "timescales.rule.kind=sgd")), "fast").flow
    assert other is not None and other.kind == "descend" and other.rule is not None
    assert other.rule.kind == "sgd"


def test_another_kind_of_a_phases_timescales_keeps_its_optimizer():
    before = load_dreamer4("recipes").phases.imagine.timescales
    after = load_dreamer4("recipes", ["phases.imagine.timescales.kind=lookahead"])
    assert before.kind == "plain"
    assert after.phases.imagine.timescales.kind == "lookahead"
    assert after.phases.imagine.timescales.rule == before.rule
    assert before.rule.kind == "laprop"


def test_the_same_kind_keeps_its_siblings():
    assert periods(load("timescales.base=2", "timescales.kind=geometric")) == [1, 2, 4]


def test_size_gives_widths_that_fields_override():
    model = load("model.deter=1024", "model.size=12m").model
    assert (model.deter, model.hidden, model.stoch) == (1024, SIZES["12m"]["hidden"], 32)


def test_another_environment_drops_what_only_the_former_knew():
    env = load("env.id=Pendulum-v1").env
    assert (env.contexts, env.units, env.kwargs) == ((), {}, {})
    assert env.num == load().env.num
    assert load("env.units.state=[1, 1, 1]", "env.id=Pendulum-v1").env.units["state"] == (1, 1, 1)
    assert load("env.id=CartPoleShift-v0").env == load().env


def test_phases_are_of_equal_length_or_of_their_own():
    config = load()
    assert [config.phase_at(frame) for frame in (0, 7992, 8000, 23992)] == [0, 0, 1, 2]
    config = load("env.lengths=[16, 22984, 1000]")
    assert [config.phase_at(frame) for frame in (0, 8, 16, 22992, 23000, 23992)] == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    assert load("env.id=Pendulum-v1").phase_at(100) == 0


def test_another_size_drops_the_widths_of_a_resolved_file(tmp_path):
    (tmp_path / "run.yaml").write_text(load("model.size=1m").dump())
    model = load_config(tmp_path / "run.yaml", ["model.size=25m"]).model
    assert {name: getattr(model, name) for name in SIZES["25m"]} == SIZES["25m"]


def test_a_new_level_is_given_whole():
    config = load("timescales.levels.ema={copy: ., flow: {kind: pull, rate: 0.01}}")
    assert list(levels_of(config)) == ["fast", "mid", "slow", "ema"]


def test_extends_merges_over_another_file(tmp_path):
    (tmp_path / "base.yaml").write_text("extends: k3\nseed: 3\nframes: 48000\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nseed: 4\ntimescales: {kind: plain}\n")
    config = load_config(tmp_path / "mine.yaml")
    assert (config.seed, config.frames, config.env.num) == (4, 48000, 8)
    assert periods(config) == [1]


def test_loss_scales_are_merged_with_the_defaults():
    scales = load("agent.scales={image: 2.0}").agent.scales
    assert scales["image"] == 2.0
    assert scales["rep"] == 0.1


# ---- mistakes ------------------------------------------------------------------------------------
MISTAKES = [
    ("timescales.levels.slow.evry.n=4", "timescales.levels.slow.every.n"),
    ("timescales.levels.slwo.every.n=4", "timescales.levels.slow.every.n"),
    ("timescales.levels.slow.every.n=-3", "use 1 or more"),
    ("timescales.levels.slow.every.n=often", "period"),
    ("timescales.levels.slow.every.unit=Update", "update, frame, episode"),
    ("timescales.levels.slow.flow.rule.lrr=1", "flow.rule.lr"),
    ("timescales.levels.slow.flow.rule.lr=fast", "learning rate"),
    ("timescales.levels.slow.match={by: depht, part: 0, of: 3}", "depth"),
    ("timescales.levels.fast.relax=[{to: slwo, rate: 0.1}]", "slow"),
    ("timescales.levels.fast.relax=[{to: zero, rate: 3}]", "share of the way"),
    ("timescales.levels.fast.relax.0.rate=0.1", "set the whole list"),
    ("timescales.levels.fast.relax=[{to: zero, rate: {by: slwo, times: 1}}]", "slow"),
    ("timescales.levels.fast.relax=[{to: zero, rate: {by: slow, times: -1}}]", "strength"),
    ("timescales.levels.fast.relax=[{to: zero, rate: {by: slow}}]", "strength of the pull"),
    ("timescales.levels.fast.start=zero", "write copy:"),
    ("timescales={kind: ewc, weight: -1}", "strength of the pull"),
    ("timescales={kind: ewc, decay: 1.0}", "share of the Fisher information"),
    ("timescales={kind: ewc, n: 0}", "updates between anchors"),
    ("timescales={kind: ewc, wieght: 1}", "timescales.weight"),
    ("timescales.levels.ema={copy: .}", "pull"),
    ("timescales.levels.ema={every: {n: 2}}", "match=REST"),
    ("timescales.levels.slow_critic={match: .}", "slow_critic"),
    ("timescales.levels={}", "one level at least"),
    ("timescales.kind=geometri", "geometric"),
    ("timescales.kind=levels", "one level at least"),
    ("timescales.k=7", "timescales.by=depth"),
    ("timescales=3", ""),
    ("sed=3", "seed"),
    ("seed", "seed=1"),
    ("seed=many", "seed of every random generator"),
    ("seed=[", "quote"),
    ("name=../x", "a-z"),
    ("device=gpu", "where to compute"),
    ("model.size=12", "12m"),
    ("model.memory.kind=delt", "delta"),
    ("model.memory.dims=3", "model.memory.dim"),
    ("model.blocks=7", "divisor"),
    ("agent.horizon=0", "imagined steps"),
    ("agent.scales.rewards=3", "agent.scales.reward"),
    ("env.id.x=3", "set id itself"),
    ("env.num=7", "use"),
    ("frames=1000", "1008"),
    ("frames=-1", "use 1 or more"),
    ("env.lengths=[16000,8000]", "phases of equal length"),
    ("env.lengths=[8004,8000,7996]", "use 8000"),
    ("env.lengths=[8000,8000,8008]", "use frames=24008"),
    ("train.prefill=24000", "at most"),
    ("train.prefill=100", "at least 128"),
    ("replay.capacity=200", "at least 256"),
    ("replay.length=200", "1600"),
    ("replay={kind: matching}", "use at least 4096, or a smaller replay.rollout"),
    ("replay={kind: matching, rollout: 100}", "use 128"),
    ("replay={kind: matching, rollout: 64, capacity: 1023}", "use at least 1024"),
    ("replay={kind: mixed, rollout: 64}", "capacity, batch, length"),
]


@pytest.mark.parametrize(("override", "suggestion"), MISTAKES)
def test_mistakes_name_the_field_the_value_and_the_way_out(override, suggestion):
    found = mistake(override)
    assert found.problem
    assert suggestion in found.suggestion
    assert found.field in str(found)


def test_the_field_and_value_are_those_that_were_typed():
    found = mistake("timescales.levels.slow.evry.n=4")
    assert (found.field, found.value) == ("timescales.levels.slow.evry.n", 4)


def test_field_of_another_kind_points_at_the_kind():
    found = mistake("timescales.kind=plain", "timescales.k=3")
    assert "timescales.kind" in found.suggestion


def test_shared_rule_that_no_level_takes_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text(load().dump())
    with pytest.raises(ConfigError, match="names its own rule"):
        load_config(tmp_path / "run.yaml", ["timescales.rule.lr=1"])


def test_outer_rule_and_rate_exclude_each_other():
    outer = "timescales.levels.outer.flow.rate=0.5"
    assert "outer.lr" in mistake("timescales.kind=diloco", outer).suggestion


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: 1\nseed: 2\n", "twice"),
        ("seed: [1\n", "not YAML"),
        ("- seed\n", "not a mapping"),
        ("env: {id: CartPole-v1, nmu: 3}\n", "no field nmu"),
        ("timescales: {levels: {a: {match: .}}}\n", "kind is missing"),
        ("extends: nosuch\n", "no such preset"),
        ("extends: mine.yaml\n", "extends itself"),
        ("evaluate: {every: !!python/name:os.system ''}\n", "not YAML"),
    ],
)
def test_bad_files(text, problem, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load_config(path)


def test_duplicate_key_names_file_and_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("frames: 24\nseed: 1\nseed: 2\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert (caught.value.field, caught.value.value) == ("mine.yaml:3", "seed")


def test_unknown_preset_suggests_one():
    with pytest.raises(ConfigError, match="did you mean cartpole"):
        load_config("cartpol")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(Path("nowhere/mine.yaml"))


def test_explain_tells_a_misspelt_name_before_what_it_leaves_missing():
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"timescales": {"kind": "levels", "levles": {}}})
    assert "timescales.levels" in explain(caught.value, []).suggestion


def test_expand_of_resolved_levels_changes_nothing():
    config = load()
    assert expand(config.timescales) == config.tree()["timescales"]


# ---- cost ----------------------------------------------------------------------------------------
def test_importing_configuration_imports_neither_torch_nor_gymnasium():
    code = (
        "import sys, experiments; from experiments import load_config; load_config('default');"
        "print([m for m in ('torch', 'gymnasium', 'mlflow', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_package_gives_functions_though_files_share_their_names():
    import experiments
    import experiments.train

    assert callable(experiments.train)
    assert experiments.Config is Config
    with pytest.raises(AttributeError, match="nosuch"):
        _ = experiments.nosuch  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "field"),
    [("agent.starts=1", "agent.starts"), ("agent.starts=99", "agent.starts")],
)
def test_starts_that_a_sequence_does_not_have_are_refused(words, field):
    assert mistake(words).field == field
