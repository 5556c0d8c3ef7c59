"""Cache methods, one file each, found by its name; page scores beside them."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from flexijax.policies.base import Policy


@functools.cache
def names() -> tuple[str, ...]:
    """The names of all methods: every file here that defines a `Policy`, in alphabetical order."""
    files = (found.name for found in pkgutil.iter_modules(__path__))
    return tuple(name for name in sorted(files) if _class_in(name) is not None)


def find(name: str) -> Policy:
    """The method of that name, with its defaults. Raises ValueError where there is none."""
    if name not in names():
        listed = ", ".join(map(repr, names()))
        raise ValueError(f"policy={name!r} must be one of {listed}, or a Policy object")
    found = _class_in(name)
    assert found is not None
    return found()


def _class_in(name: str) -> type[Policy] | None:
    """The one class of a file of this folder that is a method of its own."""
    module = importlib.import_module(f"{__name__}.{name}")
    return next(
        (
            found
            for found in vars(module).values()
            if isinstance(found, type)
            and issubclass(found, Policy)
            and found is not Policy
            and found.__module__ == module.__name__
        ),
        None,
    )
