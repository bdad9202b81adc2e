"""Packages that the library itself does without: pip installs them with an extra."""

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

_T = TypeVar("_T")
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "dp_accounting": "dp-accounting"}


class MissingExtra(ModuleNotFoundError):
    """A package of an extra is not installed; the message is the pip command."""


def require(module: str, extra: str) -> ModuleType:
    """The imported `module`; where its package is missing, `MissingExtra` names the package and the extra of dither."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:  # the package is there and lacks something else
            raise
        name = _DISTRIBUTIONS.get(package, package)
        raise MissingExtra(f"this needs {name}: pip install 'dither[{extra}]'", name=package) from error


def with_progress(items: Iterable[_T], title: str, unit: str) -> Iterable[_T]:
    """The items; where tqdm is installed and stderr is a terminal, with a bar while they last."""
    try:
        tqdm = require("tqdm", extra="demo").tqdm
    except MissingExtra:
        return items
    return tqdm(items, desc=title, unit=unit, disable=None, leave=False)  # type: ignore[no-any-return]


@contextmanager
def progress(total: int, disable: bool | None) -> Iterator[Callable[[], object] | None]:
    """A bar of tqdm's, `disable` being its (None: shown on terminals); what moves it on, or None where there is none."""
    try:
        tqdm = None if disable else require("tqdm.auto", extra="sampling").tqdm
    except MissingExtra:
        tqdm = None
    if tqdm is None:
        yield None
        return
    with tqdm(total=total, disable=disable) as bar:
        yield None if bar.disable else bar.update
