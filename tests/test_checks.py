"""What arguments are held to: names and what was probably meant by them."""

from __future__ import annotations

from typing import Any

import pytest

from dither._checks import close, one_of


@pytest.mark.parametrize(
    ("value", "meant"),
    [("midpiont", "midpoint"), ("ddmi", "ddim"), ("heunn", "heun"), *((v, None) for v in ("rk4", "", 2, None, []))],
)
def test_the_nearest_name_is_suggested(value: Any, meant: str | None) -> None:
    allowed = {"midpoint": 0, "ddim": 1, "rddm": 2, "heun": 3, None: 4, 2.5: 5}
    suggestion = f" (did you mean {meant!r}?)" if meant else ""
    assert close(value, allowed) == suggestion
    if value is not None:
        with pytest.raises(ValueError) as error:
            one_of("op", "method", value, allowed, " or a function")
        names = "'midpoint', 'ddim', 'rddm', 'heun', None, 2.5"
        assert str(error.value) == f"op: method is {value!r}{suggestion}, expected {names} or a function"
    for name in allowed:
        one_of("op", "method", name, allowed)
