"""The one error a user's mistake ends in: which field, what value, what is wrong, the way out.

Raised by the loader, the checks and the assembly; the command line prints it in a few lines and
exits with 2.
"""

import difflib
import json
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot run.

    `field` is the dotted path (or what was asked for, such as "RUN"), `value` what was given
    there (`...` for nothing), `problem` one line, `suggestion` one line: what to write instead.
    """

    def __init__(self, field: str, value: Any, problem: str, suggestion: str = "") -> None:
        self.field, self.value = field, value
        self.problem, self.suggestion = problem, suggestion
        given = field if value is ... else f"{field} = {shown(value)}"
        lines = [given, problem, suggestion]
        super().__init__("\n".join(line for line in lines if line))

    def __reduce__(self) -> tuple:
        return ConfigError, (self.field, self.value, self.problem, self.suggestion)


def shown(value: Any, width: int = 80) -> str:
    """A value as YAML would write it in one line, cut at `width` characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = json.dumps(value, default=str) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def nearest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word closest to a mistyped one, or None; letter case does not count."""
    known = {w.lower(): w for w in words}
    found = difflib.get_close_matches(word.lower(), known, n=1, cutoff=cutoff)
    return known[found[0]] if found else None
