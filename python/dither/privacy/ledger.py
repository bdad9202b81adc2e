"""What was released: the phases of a private training and their epsilon. Checkpoints refuse to go on under other settings."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import noise
from .._checks import instance, integer, number, share
from .._extras import require
from .accounting import Accountant, Steps, effective_noise_multiplier, epsilon_of


@dataclass(frozen=True)
class Phase:
    """Steps under the same settings: what `Ledger` takes, and how many steps."""

    noise_multiplier: float
    sample_rate: float
    max_grad_norm: float | None
    clipping: str
    expected_batch_size: float | None
    unclipped_num_std: float | None
    mechanism: str
    steps: int = 0

    def settings(self) -> dict[str, Any]:
        """Everything but the number of steps."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "steps"}


class Ledger:
    """A record of noisy steps as they are released. Recording a step takes the same short time however many there are.

        ledger = Ledger(noise_multiplier=1.0, sample_rate=0.01, max_grad_norm=1.0, key=key)
        for batch in loader:
            ...
            ledger.record()                     # before the noisy gradient is used
        print(ledger.epsilon(delta=1e-5))

    Args:
        noise_multiplier, sample_rate: of the steps that come, see `dither.privacy.epsilon`.
        max_grad_norm, expected_batch_size: more than 0; what the accounting does not read, and a resumed run must agree in.
        clipping: a name, such as "flat".
        unclipped_num_std: of adaptive clipping, see `effective_noise_multiplier`.
        mechanism: "gaussian", the only one accounted for: fresh noise in every step, examples drawn by Poisson sampling.
        key: of the noise, as `seed` of `dither.noise`. Neither it nor anything it can be told from is saved but a salted hash,
            which a guess of a key that is not random can be tested against.
    """

    def __init__(
        self,
        *,
        noise_multiplier: float,
        sample_rate: float,
        max_grad_norm: float | None = None,
        clipping: str = "flat",
        expected_batch_size: float | None = None,
        unclipped_num_std: float | None = None,
        mechanism: str = "gaussian",
        key: noise.Seed | None = None,
    ) -> None:
        settings = (noise_multiplier, sample_rate, max_grad_norm, clipping, expected_batch_size, unclipped_num_std, mechanism)
        self._phases = [_checked(Phase(*settings))]
        self._current = 0  # steps of the last phase
        self._digest = None if key is None else digest(key)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What was recorded, oldest first; the last has the settings of the next step."""
        return (*self._phases[:-1], dataclasses.replace(self._phases[-1], steps=self._current))

    @property
    def steps(self) -> int:
        """All steps recorded."""
        return sum(phase.steps for phase in self.phases)

    @property
    def history(self) -> list[Steps]:
        """The phases as `dither.privacy.epsilon_of` takes them."""
        return [
            Steps(effective_noise_multiplier(p.noise_multiplier, p.unclipped_num_std), p.sample_rate, p.steps)
            for p in self.phases
            if p.steps
        ]

    def record(self, steps: int = 1) -> None:
        """Count `steps` more steps, at least 0, under the settings of the last phase."""
        self._current += integer("Ledger.record", "steps", steps, 0)

    def change(self, **settings: Any) -> None:
        """The steps that come have these settings, and the others as before."""
        last = self.phases[-1]
        unknown = sorted(set(settings) - set(last.settings()))
        if unknown:
            raise TypeError(f"Ledger.change: unexpected keyword {unknown[0]!r}, expected {', '.join(last.settings())}")
        new = _checked(dataclasses.replace(last, steps=0, **settings))
        if new.settings() != last.settings():
            self._phases[-1:] = [last, new] if last.steps else [new]
            self._current = 0

    def rekey(self, key: noise.Seed) -> None:
        """The noise of the steps that come is drawn with this key: `state_dict` has its hash."""
        self._digest = digest(key)

    def epsilon(self, delta: float, accountant: Accountant = "pld") -> float:
        """The epsilon of all recorded steps at `delta`; needs dp-accounting."""
        return epsilon_of(self.history, delta, accountant)

    def state_dict(self) -> dict[str, Any]:
        """Numbers and strings, for torch.save or JSON."""
        salt = os.urandom(16).hex()
        return {
            "version": 1,
            "phases": [dataclasses.asdict(phase) for phase in self.phases],
            "salt": salt,
            "fingerprint": None if self._digest is None else fingerprint(self._digest, salt),
        }

    def load_state_dict(self, state_dict: dict[str, Any], *, check_key: bool = True) -> None:
        """Go on where `state_dict` was taken, with what was spent. Other settings or another key are refused, nothing changes.

        check_key: False where this run draws its noise with a key of its own.
        A ledger that was made with the settings of the saved last phase takes it; call `change` afterwards for others.
        """
        owner = "Ledger.load_state_dict"
        for name in ("version", "phases", "salt", "fingerprint"):
            if name not in state_dict:
                raise ValueError(f"{owner}: state_dict has no {name!r}")
        if state_dict["version"] != 1:
            raise ValueError(f"{owner}: version is {state_dict['version']!r}, expected 1")
        instance(owner, "phases", state_dict["phases"], list, "a list")
        fields = {field.name for field in dataclasses.fields(Phase)}
        for saved in state_dict["phases"]:
            if set(saved) != fields:
                wrong = sorted(set(saved) ^ fields)[0]
                raise ValueError(f"{owner}: phases differ in {wrong!r}, expected {', '.join(sorted(fields))}")
        phases = [_checked(Phase(**saved)) for saved in state_dict["phases"]]
        if not phases:
            raise ValueError(f"{owner}: phases is empty, expected at least one")
        own = self.phases[-1].settings()
        for name, value in phases[-1].settings().items():
            if value != own[name]:
                raise ValueError(f"{owner}: {name} is {value!r}, expected {own[name]!r} as in this Ledger")
        if check_key:
            check_fingerprint(owner, state_dict, self._digest)
        self._phases, self._current = phases, phases[-1].steps

    def __repr__(self) -> str:
        p = self.phases[-1]
        rest = f", {len(self._phases)} phases" if len(self._phases) > 1 else ""
        return f"Ledger({self.steps} steps{rest}; noise_multiplier={p.noise_multiplier:g}, sample_rate={p.sample_rate:g})"

    def __str__(self) -> str:
        rows = [_HEADERS, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)

    def table(self) -> Any:
        """The phases as a `rich.table.Table`. Needs rich."""
        rich_table, box = (require(f"rich.{name}", extra="demo") for name in ("table", "box"))
        table = rich_table.Table(box=box.SIMPLE_HEAD)
        for header in _HEADERS:
            table.add_column(header.replace(" ", "\n"), justify="right")
        for row in self._cells():
            table.add_row(*row)
        return table

    def _cells(self) -> list[Sequence[str]]:
        def text(value: float | str | None) -> str:
            return "-" if value is None else value if isinstance(value, str) else f"{value:g}"

        return [
            [f"{p.steps:,}", *(text(getattr(p, name)) for name in _COLUMNS)]
            for p in self.phases
            if p.steps or len(self._phases) == 1
        ]


_COLUMNS = ("noise_multiplier", "sample_rate", "max_grad_norm", "clipping", "expected_batch_size", "unclipped_num_std")
_HEADERS = ["steps", *(name.replace("_", " ") for name in _COLUMNS)]


def _checked(phase: Phase) -> Phase:
    """The phase, with Python's own numbers."""
    owner = "Ledger"
    instance(owner, "clipping", phase.clipping, str, "a name")
    if phase.mechanism != "gaussian":
        raise ValueError(f"{owner}: mechanism is {phase.mechanism!r}, expected 'gaussian'")
    checked: dict[str, Any] = {
        "noise_multiplier": number(owner, "noise_multiplier", phase.noise_multiplier, least=0),
        "sample_rate": share(owner, "sample_rate", phase.sample_rate),
        "steps": integer(owner, "steps", phase.steps, 0),
    }
    for name in ("max_grad_norm", "expected_batch_size"):
        value = getattr(phase, name)
        if value is not None:
            checked[name] = number(owner, name, value, above=0)
    if phase.unclipped_num_std is not None:
        checked["unclipped_num_std"] = number(owner, "unclipped_num_std", phase.unclipped_num_std, least=0)
    return dataclasses.replace(phase, **checked)


def digest(key: noise.Seed) -> bytes:
    """A hash of a key of `dither.noise`, to make fingerprints of."""
    secret = isinstance(key, (bytes, bytearray, list, tuple))
    words = noise.key_of(key, "chacha20" if secret else "philox")
    return hashlib.sha256(b"dither.privacy key" + b"".join(word.to_bytes(8, "little", signed=True) for word in words)).digest()


def fingerprint(digest: bytes, salt: str) -> str:
    """What may be saved of a key: a hash with a salt (hexadecimal) of its own each time."""
    return hashlib.sha256(bytes.fromhex(salt) + digest).hexdigest()


def check_fingerprint(owner: str, state_dict: dict[str, Any], digest: bytes | None) -> None:
    """ValueError unless `state_dict` was saved with the key of `digest`."""
    saved = state_dict["fingerprint"]
    own = None if digest is None else fingerprint(digest, state_dict["salt"])
    if saved != own:
        given, expected = "None" if own is None else "another one", "None" if saved is None else "the one"
        raise ValueError(f"{owner}: key is {given}, expected {expected} that the state_dict was saved with")
