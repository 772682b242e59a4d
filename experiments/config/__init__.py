"""Configuration: models, presets, overrides and the checks before anything starts.

`load_config` gives a resolved `Config`: every field present, `timescales` written out as levels.
Nothing here imports torch or gymnasium.
"""

from .errors import ConfigError, nearest, shown
from .levels import LevelConfig, Levels, Part
from .load import levels_of, load_config, presets, resolve
from .models import SCALES, SIZES, Config

__all__ = [
    "SCALES",
    "SIZES",
    "Config",
    "ConfigError",
    "LevelConfig",
    "Levels",
    "Part",
    "levels_of",
    "load_config",
    "nearest",
    "presets",
    "resolve",
    "shown",
]
