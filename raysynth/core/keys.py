"""The keys of an experiment: which there are, what each may hold, and the likely word behind a typo.

Knows the dataclasses of core.experiment by their type hints; does not know values that contradict each other
(core.checks) nor files (core.config).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from raysynth.core.errors import ConfigError
from raysynth.core.experiment import Experiment


def check_keys(content: Mapping[Any, Any], section: type = Experiment, prefix: str = "") -> None:
    """Raises ConfigError for the first unknown key, or a list, mapping or section that is something else."""
    hints = get_type_hints(section)
    for key, value in content.items():
        full = f"{prefix}{key}"
        if key not in hints:
            known = sorted(hints)
            raise ConfigError(full, value, f"one of {', '.join(known)}", _likely(key, known, prefix))
        hint = _without_null(hints[key])
        if isinstance(value, str) and value.startswith("${"):  # an interpolation, resolved by the loader
            continue
        if value is None and hint is not hints[key]:
            continue
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(full, value, words(hint), "Leave the section out for its defaults.")
            check_keys(value, hint, full + ".")
        elif get_origin(hint) is dict:
            if not isinstance(value, Mapping):
                raise ConfigError(full, value, words(hint))
            for name in value:
                _refuse_truth(name, full)
        elif get_origin(hint) is list:
            if not isinstance(value, list):
                raise ConfigError(full, value, words(hint), f"Write [{value}]." if value is not None else "")
            for i, item in enumerate(value):
                if get_args(hint)[0] is str:
                    _refuse_truth(item, f"{full}[{i}]")


def _refuse_truth(name: Any, full: str) -> None:
    if isinstance(name, bool):
        raise ConfigError(full, name, "text", 'YAML reads no as false and yes as true: quote the word.')


def _likely(word: Any, siblings: list[str], prefix: str) -> str:
    near = difflib.get_close_matches(str(word), siblings, n=1, cutoff=0.4)
    close = difflib.get_close_matches(str(word), siblings, n=1, cutoff=0.8)
    # The word may be right and the section wrong.
    elsewhere = [k for k in all_keys() if k.rpartition(".")[2] == word]
    guess = prefix + close[0] if close else elsewhere[0] if elsewhere else prefix + near[0] if near else ""
    return f"Did you mean {guess}?" if guess else ""


def all_keys(section: type = Experiment, prefix: str = "") -> list[str]:
    """Every key of an experiment, dotted, sections included."""
    found = []
    for key, hint in get_type_hints(section).items():
        found.append(prefix + key)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found += all_keys(hint, f"{prefix}{key}.")
    return found


def taken_apart(changes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything that dotted keys and nested sections set."""
    for key, value in changes.items():
        if isinstance(value, Mapping):
            yield from taken_apart(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def is_typed(key: str, typed: Iterable[str]) -> bool:
    """Whether `key` is one of the typed keys, a part of one such as `list[0]`, or the section that one is in."""
    at = key.replace("[", ".") + "."
    return any(at.startswith(f"{k}.") or f"{k}.".startswith(at) for k in typed)


def explain_value(key: str, got: Any) -> ConfigError:
    """The refusal of a value that `key` cannot hold."""
    hint = _hint_at(key)
    options = [str(o) for o in get_args(hint)] if get_origin(hint) is Literal else []
    near = difflib.get_close_matches(str(got), options, n=1, cutoff=0.4)
    return ConfigError(key, got, words(_full_hint(key)), f"Did you mean {near[0]}?" if near else "")


def _full_hint(key: str) -> Any:
    hint: Any = Experiment
    for part in re.findall(r"[^.\[\]]+", key):
        plain = _without_null(hint)
        if dataclasses.is_dataclass(plain):
            hint = get_type_hints(plain)[part]
        elif get_args(plain):
            # An item of a list or mapping; a mapping's keys may hold dots, so the walk ends here.
            return get_args(plain)[-1]
    return hint


def _hint_at(key: str) -> Any:
    return _without_null(_full_hint(key))


def _without_null(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(h for h in get_args(hint) if h is not type(None))
    return hint


def words(hint: Any) -> str:
    """A type hint for people: `Literal["a", "b"] | None` -> `one of a, b, or null`."""
    plain = _without_null(hint)
    if plain is not hint:
        return f"{words(plain)}, or null"
    if dataclasses.is_dataclass(hint):
        return "a section of keys"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is list:
        return "a list"
    if get_origin(hint) is dict:
        return f"a mapping whose values are each {words(get_args(hint)[1])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
