"""Poisson sampling, which the accounting assumes: every batch takes each example with the same probability, by itself.

The draws are addressed (`dither.noise`, ChaCha20): whether example i is in batch t is a function of (key, t, i), on any number
of processes, and a resumed run draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader, IterableDataset, Sampler, default_collate

from .. import noise
from .._checks import integer, share
from .accounting import steps_of_epoch
from .ledger import check_fingerprint, digest, fingerprint

STREAM = 2**32 - 1
"""The stream of the draws; a key that makes other uniform noise too has to leave it to them."""
_CHUNK = 1 << 22


class PoissonSampler(Sampler[list[int]]):
    """A batch sampler: batch t is the set of the examples i whose uniform number at (key, STREAM, t, i) is below the rate.

        loader = DataLoader(data, batch_sampler=PoissonSampler(len(data), 64 / len(data), key=key))

    but `poisson_loader` also makes empty batches and resumes where training was, not where workers have read ahead.

    Args:
        num_samples: of the data set, at least 1.
        sample_rate: 0 < sample_rate <= 1; batches have num_samples * sample_rate examples on average, and may have none.
        steps: batches in an epoch, at least 1; 1 / sample_rate, rounded, if None.
        key: 32 bytes or 4 integers, secret: who knows it knows who was in which batch. None: from os.urandom, and such a run
            cannot be resumed.
        rank, world_size: this process draws its part of the batches from examples rank * num_samples // world_size up to
            (rank + 1) * num_samples // world_size: all together draw the batches of one process. None: torch.distributed's
            where it is initialised, and without a key all processes get the first one's; else 0 and 1. The same key on all.

    step: the number of the next batch, below 2**32; an epoch ends before a multiple of `steps`.
    """

    def __init__(
        self,
        num_samples: int,
        sample_rate: float,
        *,
        steps: int | None = None,
        key: noise.Seed | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        owner = type(self).__name__
        self.num_samples = integer(owner, "num_samples", num_samples, 1)
        self.sample_rate = share(owner, "sample_rate", sample_rate)
        self.steps = steps_of_epoch(self.sample_rate) if steps is None else integer(owner, "steps", steps, 1)
        if (rank is None) != (world_size is None):
            raise ValueError(f"{owner}: rank is {rank} and world_size is {world_size}, expected both or none")
        if rank is None or world_size is None:
            joined = dist.is_available() and dist.is_initialized()
            rank, world_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
            key = shared_key(os.urandom(32)) if key is None and world_size > 1 else key
        self.world_size = integer(owner, "world_size", world_size, 1)
        self.rank = integer(owner, "rank", rank, 0)
        if self.rank >= self.world_size:
            raise ValueError(f"{owner}: rank is {self.rank}, expected less than world_size = {self.world_size}")
        if key is None and self.world_size > 1:
            raise ValueError(f"{owner}: key is None, expected the same one on all {self.world_size} processes")
        if not isinstance(key, (bytes, bytearray, list, tuple, type(None))):
            raise TypeError(f"{owner}: key is {type(key).__name__}, expected 32 bytes or 4 integers")
        self._key = noise.key_of(os.urandom(32) if key is None else key, "chacha20")
        self.step = 0

    def indices(self, step: int) -> Tensor:
        """The examples of batch `step` that are this process's: int64, ascending."""
        start, stop = self._edges()[self.rank : self.rank + 2]
        return self._drawn(integer(f"{type(self).__name__}.indices", "step", step, 0), start, stop)

    def has_key(self, key: noise.Seed) -> bool:
        """Whether the draws are those of this key."""
        return noise.key_of(key, "chacha20") == self._key

    def seed_of(self, step: int) -> int:
        """Of other things that are random in the epoch or what is left of it from batch `step` on; tells nothing of the key."""
        return int.from_bytes(hashlib.blake2b(repr(step).encode(), key=digest(self._key), digest_size=7).digest(), "little")

    def most(self, step: int) -> int:
        """How many examples of batch `step` are of the process that has most; every process draws all, and needs no other."""
        edges = torch.tensor(self._edges())
        return int(torch.searchsorted(self._drawn(step, 0, self.num_samples), edges).diff().max())

    def _edges(self) -> list[int]:
        """Process r has the examples from edge r up to edge r + 1."""
        return [r * self.num_samples // self.world_size for r in range(self.world_size + 1)]

    def _drawn(self, step: int, start: int, stop: int) -> Tensor:
        found = []
        for begin in range(start, stop, _CHUNK):
            size = min(_CHUNK, stop - begin)
            where: noise.Address = {"seed": self._key, "engine": "chacha20", "stream": STREAM, "step": step, "start": begin}
            draws = noise.uniform(size, dtype=torch.float64, device="cpu", **where)
            found.append((draws < self.sample_rate).nonzero().flatten() + begin)
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)

    def __iter__(self) -> Iterator[list[int]]:
        """The batches up to the end of the epoch."""
        for _ in range(len(self)):
            indices = self.indices(self.step).tolist()
            self.step += 1
            yield indices

    def __len__(self) -> int:
        """Batches up to the end of the epoch: `steps` at its beginning."""
        return self.steps - self.step % self.steps

    def state_dict(self) -> dict[str, Any]:
        """Numbers and strings; of the key a salted hash."""
        salt = os.urandom(16).hex()
        saved = {name: getattr(self, name) for name in ("step", *_AGREE)}
        return {**saved, "salt": salt, "fingerprint": fingerprint(digest(self._key), salt)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on at the batch where `state_dict` was taken, on any number of processes. Another key, size or rate is refused."""
        owner = f"{type(self).__name__}.load_state_dict"
        for name in ("step", *_AGREE, "salt", "fingerprint"):
            if name not in state_dict:
                raise ValueError(f"{owner}: state_dict has no {name!r}")
        for name in _AGREE:
            if state_dict[name] != getattr(self, name):
                raise ValueError(f"{owner}: {name} is {state_dict[name]!r}, expected {getattr(self, name)!r}")
        check_fingerprint(owner, dict(state_dict), digest(self._key))
        step = integer(owner, "step", state_dict["step"], 0)
        if step >= 2**32:
            raise ValueError(f"{owner}: step is {step}, expected less than 2**32")
        self.step = step


_AGREE = ("num_samples", "sample_rate", "steps")


def shared_key(key: bytes, device: torch.device | None = None) -> bytes:
    """The key of the first process of torch.distributed, sent by way of `device`."""
    keys = [key]
    dist.broadcast_object_list(keys, device=device)
    return keys[0]


def sampler_of(owner: str, loader: Any) -> PoissonSampler:
    """The sampler that draws the batches of a loader; TypeError where none does."""
    for sampler in (loader, getattr(loader, "poisson", None), getattr(loader, "batch_sampler", None)):
        if isinstance(sampler, PoissonSampler):
            return sampler
    raise TypeError(
        f"{owner}: loader is {type(loader).__name__}, expected one of poisson_loader: epsilon holds for Poisson sampling alone"
    )


class PoissonLoader(DataLoader):
    """A DataLoader of Poisson batches, made by `poisson_loader`. step: the number of the next batch that it will give. given:
    the number of the one that it gave last, all or a piece of it; -1 before the first.

    An iteration ends with the epoch; one that was left in its midst goes on after the last batch that was given.
    """

    def __init__(self, dataset: Any, sampler: PoissonSampler, collate_fn: Callable[[list[Any]], Any], **options: Any) -> None:
        self._pieces = _Pieces(sampler)
        self._own = options.get("generator") is None  # torch draws seeds of workers: from a generator that no model draws from
        options = {**options, "generator": torch.Generator()} if self._own else options
        super().__init__(dataset, batch_sampler=self._pieces, collate_fn=_Collate(collate_fn, dataset), **options)
        self.poisson = sampler
        self.step, self.given = 0, -1

    @property
    def sample_rate(self) -> float:
        """The probability of an example to be in a batch."""
        return self.poisson.sample_rate

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return (batch for batch, _ in self._iterate(None))

    def __len__(self) -> int:
        """Batches up to the end of the epoch: `steps` at its beginning."""
        return self.poisson.steps - self.step % self.poisson.steps

    def _iterate(self, size: int | None) -> Iterator[tuple[Any, bool]]:
        self.poisson.step, self._pieces.size = self.step, size
        if self._own:
            self.generator.manual_seed(self.poisson.seed_of(self.step))
        self._pieces.last = deque()  # workers read ahead of us
        last = self._pieces.last
        for batch in super().__iter__():
            ends = last.popleft()
            self.given = self.step
            self.step += ends
            yield batch, ends

    def state_dict(self) -> dict[str, Any]:
        """As of `PoissonSampler`, at the batch after the last that was given."""
        return {**self.poisson.state_dict(), "step": self.step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As of `PoissonSampler`."""
        self.poisson.load_state_dict(state_dict)
        self.step = self.poisson.step


def poisson_loader(
    data: Any,
    sample_rate: float | None = None,
    *,
    steps: int | None = None,
    key: noise.Seed | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    **options: Any,
) -> PoissonLoader:
    """A loader of Poisson batches. An empty batch has the structure, dtypes and shapes of others, with 0 examples.

    What an empty batch looks like is learnt from collating the first example once and twice: what grows is the batch.

    Args:
        data: a data set with __len__ and __getitem__; or a DataLoader, whose data set, collate_fn, workers and the like are
            taken over, but not its order or the size of its batches.
        sample_rate: 0 < sample_rate <= 1; of a DataLoader by default its batch_size / len(dataset).
        steps, key, rank, world_size: see `PoissonSampler`.
        collate_fn: torch's default_collate if None.
        options: of DataLoader: num_workers, pin_memory, ...
    """
    owner = "poisson_loader"
    dataset = data
    if isinstance(data, DataLoader):
        dataset = data.dataset
        collate_fn = data.collate_fn if collate_fn is None else collate_fn
        workers = options.get("num_workers", data.num_workers)
        taken = {name: getattr(data, name) for name in _TAKEN if name not in _OF_WORKERS or (workers and data.num_workers)}
        options = {**taken, **options}
        if sample_rate is None and data.batch_size is not None:
            sample_rate = min(1.0, data.batch_size / len(dataset)) if hasattr(dataset, "__len__") else None
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"{owner}: data is {type(dataset).__name__}, expected a data set with __len__ and __getitem__")
    if sample_rate is None:
        raise ValueError(f"{owner}: sample_rate is None, expected 0 < sample_rate <= 1, or a DataLoader with a batch_size")
    for name in ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last"):
        if name in options:
            raise TypeError(f"{owner}: unexpected keyword {name!r}, expected sample_rate to say what a batch is")
    if not options.get("in_order", True):
        raise ValueError(f"{owner}: in_order is False, expected True")
    sampler = PoissonSampler(len(dataset), sample_rate, steps=steps, key=key, rank=rank, world_size=world_size)
    return PoissonLoader(dataset, sampler, default_collate if collate_fn is None else collate_fn, **options)


_OF_WORKERS = ("timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor", "persistent_workers")
_TAKEN = ("num_workers", "pin_memory", "generator", *_OF_WORKERS)


def split(loader: PoissonLoader, max_physical_batch_size: int) -> Iterator[tuple[Any, bool]]:
    """The batches of an epoch in pieces that fit in memory, and whether a piece is the last of its batch.

        for (x, y), is_last in split(loader, 64):
            loss(model(x), y).backward()            # clips, and adds to what the batch has so far
            if is_last:
                optimizer.step()                    # adds the noise, once a batch

    Pieces are cut before they are loaded; an empty batch is one empty piece. All processes get the same number of pieces of a
    batch, some of them empty: a model that is sharded needs all in every pass. Who leaves the loop in the midst of a batch
    calls `optimizer.zero_grad()` before the next: that batch comes again, and its first pieces would count twice.

    max_physical_batch_size: at least 1, of examples on this process.
    """
    if not isinstance(loader, PoissonLoader):
        raise TypeError(f"split: loader is {type(loader).__name__}, expected a PoissonLoader, see poisson_loader")
    return loader._iterate(integer("split", "max_physical_batch_size", max_physical_batch_size, 1))


class _Pieces(Sampler[list[int]]):
    """The batches of a sampler, cut; which pieces were last ones waits in `last` until the loader has them."""

    def __init__(self, sampler: PoissonSampler) -> None:
        self.sampler = sampler
        self.size: int | None = None
        self.last: deque[bool] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        for indices in self.sampler:
            size = self.size or max(1, len(indices))
            most = self.sampler.most(self.sampler.step - 1) if self.size and self.sampler.world_size > 1 else len(indices)
            count = max(1, math.ceil(most / size))
            for i in range(count):
                self.last.append(i == count - 1)
                yield indices[i * size : (i + 1) * size]

    def __len__(self) -> int:
        return len(self.sampler)


class _Collate:
    """collate_fn, and an empty batch of nothing."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any], dataset: Any) -> None:
        self.collate_fn, self.dataset = collate_fn, dataset
        self.template: tuple[Any, Any] | None = None

    def __call__(self, samples: list[Any]) -> Any:
        if samples:
            return self.collate_fn(samples)
        if self.template is None:
            sample = self.dataset[0]
            self.template = self.collate_fn([sample]), self.collate_fn([sample, sample])
        return _empty(*self.template)


def _empty(one: Any, two: Any) -> Any:
    """What one example and two examples, collated, have in common, with the batch at size 0."""
    if isinstance(one, Tensor):
        grown = [dim for dim in range(one.dim()) if one.shape[dim] != two.shape[dim]]
        return one.narrow(grown[0], 0, 0).clone() if grown else one
    if isinstance(one, Mapping):
        items = {name: _empty(value, two[name]) for name, value in one.items()}
        try:
            return type(one)(items)  # type: ignore[call-arg]
        except TypeError:
            return items
    if isinstance(one, Sequence) and not isinstance(one, (str, bytes)):
        parts = [] if len(one) != len(two) else [_empty(*pair) for pair in zip(one, two)]
        return type(one)(*parts) if hasattr(one, "_fields") else type(one)(parts)  # type: ignore[call-arg]
    return one
