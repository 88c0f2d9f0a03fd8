"""Checks the run file's `strategy.options` against the arguments of the classes that they are for.

A strategy's `__init__` has keyword-only arguments with defaults; their annotations are the rules, as in
`v: Annotated[float, Field(gt=0)] = 10.0`. Does not know what the options mean.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from edgelam_fl.errors import ConfigError, nearest


def parameters(strategy: type) -> dict[str, inspect.Parameter]:
    """Returns the options that a class takes, by name."""
    if strategy.__init__ is object.__init__:  # type: ignore[misc]
        return {}
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {name: p for name, p in list(inspect.signature(strategy).parameters.items()) if p.kind in kinds}


def checked(strategy: type, key: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `given` options, each converted as its annotation says. `key` is their place in the run file.

    Raises ConfigError for an unknown option, with the closest known one, and for a value of a wrong type or range.
    """
    known = parameters(strategy)
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown option {key}.{name}: {_nearest(name, known)}")
    hints = get_type_hints(strategy.__init__, include_extras=True) if known else {}  # type: ignore[misc]
    fields: dict[str, Any] = {name: (hints.get(name, Any), ...) for name in given}
    model = create_model("Options", __config__=ConfigDict(strict=True, allow_inf_nan=False), **fields)
    try:
        values = model.model_validate(dict(given))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem, key) for problem in error.errors())) from error
    return {name: getattr(values, name) for name in given}


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    return nearest(name, known) if known else "it has no options"


def _explain(problem: Mapping[str, Any], key: str) -> str:
    rule = problem["msg"].replace("Input should be", "must be")
    return f"{key}.{problem['loc'][0]} = {problem['input']!r} {rule}"
