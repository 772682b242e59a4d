"""Published methods as schedules: each function returns a list of levels."""

from timescales.clock import Every
from timescales.level import REST, Descend, Level, Rule


def plain(rule: Rule) -> list[Level]:
    """One level: every parameter, every update."""
    return [Level("all", match=REST, every=Every(), flow=Descend(rule))]
