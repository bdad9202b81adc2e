"""What arguments of several functions are held to."""

import difflib
import math
import numbers
import operator
from collections.abc import Collection
from typing import Any

from torch import Tensor


def integer(owner: str, name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int: Python's and numpy's integers, no bool and no float."""
    try:
        number = operator.index(value) if not isinstance(value, bool) else None
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{owner}: {name} is {value!r}, expected an integer")
    if least is not None and number < least:
        raise ValueError(f"{owner}: {name} is {number}, expected at least {least}")
    return number


def tensor(owner: str, name: str, value: Any) -> Tensor:
    """`value`, which must be a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {name} is {type(value).__name__}, expected a tensor")
    return value


def instance(owner: str, name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """TypeError unless `value` is of that kind, which `expected` says in words."""
    if not isinstance(value, kind):
        raise TypeError(f"{owner}: {name} is {type(value).__name__}, expected {expected}")


def is_real(value: Any) -> bool:
    """Whether `value` is a number, Python's or numpy's, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def number(
    owner: str,
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float = -math.inf,
    below: float = math.inf,
    most: float | None = None,
) -> float:
    """`value` as a float of an interval: `above` < value or `least` <= value, value <= `most` or value < `below`; no NaN."""
    low, high = (least if above is None else above), (below if most is None else most)
    if not (is_real(value) and low <= value <= high) or value == above or (most is None and value == below):
        signs = "<=" if above is None else "<", "<" if most is None else "<="
        raise ValueError(f"{owner}: {name} is {value!r}, expected {low:g} {signs[0]} {name} {signs[1]} {high:g}")
    return float(value)


def close(value: Any, allowed: Collection[Any]) -> str:
    """The name that was probably meant, as part of a message; empty where none is near."""
    names = {name.lower(): name for name in allowed if isinstance(name, str)}
    given = value.lower() if isinstance(value, str) else ""
    found = difflib.get_close_matches(given, names, n=10, cutoff=0.65)
    found += [name for name in names if name and given and (given.startswith(name) or name.startswith(given))]

    def likeness(name: str) -> list[float]:  # letters that changed places count second
        return [difflib.SequenceMatcher(None, *both).ratio() for both in ((name, given), (sorted(name), sorted(given)))]

    best = names.get(max(found, key=likeness, default=""))
    return "" if best is None else f" (did you mean {best!r}?)"


def one_of(owner: str, name: str, value: Any, allowed: Collection[Any], other: str = "") -> None:
    """ValueError unless `value` is among `allowed`. other: what else would do, in words."""
    if value not in [*allowed]:  # a value that has no hash is no key of a dict
        meant = close(value, allowed)
        raise ValueError(f"{owner}: {name} is {value!r}{meant}, expected {', '.join(map(repr, allowed))}{other}")


def share(owner: str, name: str, value: Any) -> float:
    """`value` as a float in (0, 1]."""
    return number(owner, name, value, above=0, most=1)
