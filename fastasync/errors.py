"""Errors that a user can act on: one line that names the field, the value and the remedy."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(Exception):
    """Bad input.  The command line prints it as one line and exits with code 2; nothing has been overwritten.

    Args:
        field: what was wrong (a config field ``section.name``, an option, a path).
        value: the offending value, as the user gave it.
        remedy: what to do about it.
    """

    exit_code = 2

    def __init__(self, field: str, value: object, remedy: str):
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(f"{field}: {value}: {remedy}" if value is not None else f"{field}: {remedy}")


def not_installed(package: str, extra: str) -> UserError:
    """The error for an optional package that is missing: names the extra which installs it."""
    return UserError(f"package {package}", "not installed", f"install it with: pip install 'fastasync[{extra}]'")


def require(package: str, extra: str) -> ModuleType:
    """Import an optional package, or raise a UserError that names the extra which installs it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != package.split(".")[0]:
            raise
        raise not_installed(package, extra) from None


def unknown_name(field: str, value: object, known: Iterable[str]) -> UserError:
    """The error for a name that is none of ``known``: suggests the nearest, or lists them all."""
    names = sorted(known)
    near = difflib.get_close_matches(str(value), names, n=1)
    choices = f"choose one of {', '.join(names)}" if names else "there are none to choose from"
    return UserError(field, repr(value), f"did you mean {near[0]!r}?" if near else choices)
