"""When and how parameters change: every parameter learns on a clock of its own.

Write a schedule as a list of `Level`s, hand it to `Timescales` with the named parameters, and call
`tick("update")` after each backward. Knows names and tensors only, no models and no files.
"""

from timescales import presets, rules
from timescales.clock import Counters, Every, Ratio
from timescales.engine import Timescales, timeline
from timescales.level import REST, Descend, Level, Pull, Relax, Reset, Rule, Weighted

__all__ = [
    "REST",
    "Counters",
    "Descend",
    "Every",
    "Level",
    "Pull",
    "Ratio",
    "Relax",
    "Reset",
    "Rule",
    "Timescales",
    "Weighted",
    "presets",
    "rules",
    "timeline",
]
