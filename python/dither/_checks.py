"""What arguments of several functions are held to."""

import operator
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
