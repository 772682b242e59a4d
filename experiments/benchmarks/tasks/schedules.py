"""Schedules of levels for supervised streams, and the controls that kill their naive wins.

A schedule slows learning down in one way or another, and learning less forgets less. Its controls
move as far without its structure: the same groups at every update with scaled rates, one larger
batch, and for an average that is returned to a rate of the same travel.
"""

from collections.abc import Callable, Mapping

from experiments.benchmarks.tasks.supervised import Settings
from timescales import REST, Descend, Every, Level, Reset, Rule, presets, rules

Sizes = Mapping[str, int]
RULES: dict[str, Callable[..., Rule]] = {"sgd": rules.sgd, "adamw": rules.adamw}
POWER = 0.5  # a level of period n learns with lr * n**POWER


def rule_of(settings: Settings) -> Rule:
    """The rule of a schedule with one learning rate."""
    return RULES[settings.rule](lr=settings.lr)


def plain(sizes: Sizes, settings: Settings) -> list[Level]:
    """k = 1."""
    return presets.plain(rule_of(settings))


def clocked(sizes: Sizes, settings: Settings, k: int, base: int) -> list[Level]:
    """k levels by depth, the output's the fastest, with periods 1, base, base**2 ..."""
    rule = RULES[settings.rule]
    return presets.geometric(k, rule, settings.lr, base, POWER, sizes, by="depth")


def scaled(sizes: Sizes, settings: Settings, k: int, base: int) -> list[Level]:
    """The same groups at every update, each at the rate that makes up for its period.

    A window of n steps with `lr n**POWER` on its mean moves as far as n steps at
    `lr n**(POWER - 1)`: the mean size of an update is the same, the clocks are gone.
    """
    rule = RULES[settings.rule]
    return [
        Level(
            level.name,
            match=level.match,
            flow=Descend(rule(lr=settings.lr * level.every.n ** (POWER - 1))),
        )
        for level in clocked(sizes, settings, k, base)
    ]


def accumulated(sizes: Sizes, settings: Settings, n: int) -> list[Level]:
    """Every parameter on the mean gradient of n batches: one larger batch, no levels."""
    rule = RULES[settings.rule](lr=settings.lr * n**POWER)
    return [Level("all", match=REST, every=Every(n), flow=Descend(rule))]


def renewable(sizes: Sizes, settings: Settings, clear_rule: bool = False) -> list[Level]:
    """k = 1 whose weights can be put in place by `Learner.renew`."""
    reset = Reset("renewed", Every(unit="renew"), clear_rule)
    return [Level("all", match=REST, flow=Descend(rule_of(settings)), reset=(reset,))]


def l2_init(sizes: Sizes, settings: Settings) -> list[Level]:
    """Relax to the initial weights."""
    return presets.l2_init(rule_of(settings), rate=settings.lr * settings.l2_init)


def ewc(sizes: Sizes, settings: Settings) -> list[Level]:
    """Relax to the weights at the end of the last task, by importance."""
    return presets.ewc(rule_of(settings))


def hare_tortoise(sizes: Sizes, settings: Settings) -> list[Level]:
    """Return to an average of the own path."""
    return presets.hare_tortoise(rule_of(settings), settings.return_every, settings.average)


def hare_rates(sizes: Sizes, settings: Settings) -> list[Level]:
    """k = 1 at the rate with which the tortoise travels.

    While the hare runs n steps on, an average of rate r that began beside it comes
    `n - (1 - r) (1 - (1 - r)**n) / r` steps far: that is where the hare goes on.
    """
    n, rate = settings.return_every, settings.average
    steps = n - (1 - rate) * (1 - (1 - rate) ** n) / rate
    return presets.plain(RULES[settings.rule](lr=settings.lr * steps / n))


def cls_er(sizes: Sizes, settings: Settings) -> list[Level]:
    """Two averages updated by chance."""
    return presets.cls_er(rule_of(settings), rate=settings.average)
