"""The errors a person sees, each with the exit code a scheduler acts on.

Exit codes: 2 the file or the data is wrong; 3 finished but a gate failed; 4 an environment fault, the only one
worth retrying.
"""

from __future__ import annotations


class RaysynthError(Exception):
    """Base of every error that ends a command with a message instead of a traceback."""

    exit_code = 1


class ConfigError(RaysynthError):
    """A key of the experiment cannot be used: says the key, what was got, what is allowed, and the remedy."""

    exit_code = 2

    def __init__(self, key: str, got: object, allowed: str, remedy: str = "") -> None:
        self.key, self.got, self.allowed, self.remedy = key, got, allowed, remedy
        super().__init__(f"{key}: got {got!r}, must be {allowed}." + (f" {remedy}" if remedy else ""))

    def __reduce__(self) -> tuple:
        return type(self), (self.key, self.got, self.allowed, self.remedy)


def require(ok: bool, key: str, got: object, allowed: str, remedy: str = "") -> None:
    """Raises ConfigError unless `ok`."""
    if not ok:
        raise ConfigError(key, got, allowed, remedy)


class DataError(ConfigError):
    """The user's data cannot be used as the experiment describes it (same four parts as `ConfigError`)."""


class GateFailed(RaysynthError):
    """The stage finished, but more was lost than the experiment allows."""

    exit_code = 3


class EnvironmentFault(RaysynthError):
    """Storage, cluster or device is at fault; nothing is lost and the same command works once it is mended."""

    exit_code = 4


class NotReady(EnvironmentFault):
    """An earlier stage must be run first; the same command alone would never help."""

    exit_code = 2


class Damaged(EnvironmentFault):
    """Bytes are not what was committed: `raysynth verify --repair` must be run first."""

    exit_code = 3
