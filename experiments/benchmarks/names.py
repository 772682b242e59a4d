"""Names in an option of a suite, as in `--methods plain,k3`: each known, each once."""

from collections.abc import Iterable

from experiments.config import ConfigError, nearest


def names_in(text: str | None, known: Iterable[str], option: str, what: str) -> tuple[str, ...]:
    """The names in `a,b`, in order and each once; none for none.

    what: the word for one of them. Raises ConfigError at the first that is not known.
    """
    names = () if text is None else tuple(dict.fromkeys(text.split(",")))
    choices = list(known)
    for name in names:
        if name not in choices:
            near = nearest(name, choices)
            listed = f"choose from {','.join(choices)}"
            way_out = f"did you mean {near}? {listed}" if near else listed
            raise ConfigError(option, name, f"no such {what}", way_out)
    return names
