"""Mixtures of training data: which sources, which of their rows, and how often a row comes in an epoch (Table A4)."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

ROWS_SHUFFLED = 256


@dataclass(frozen=True)
class SourceShare:
    """What a mixture takes of one source.

    Args:
        weight: how often a row comes in an epoch. 1: once. 2: twice. 0.5: half of the rows come, and each epoch draws
            another half. 1.25: all rows once, and a quarter of them twice.
        cap: rows to take at most, drawn once for all epochs, before the weight counts: the source then is as if it had no
            others.
        subsets: names in the column `subset` to take; all if empty. They are chosen before the cap counts.
    """

    weight: float = 1.0
    cap: int | None = None
    subsets: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "subsets", tuple(self.subsets))
        if not 0 < self.weight < float("inf"):
            raise ValueError(
                f"A weight must be positive; leave a source out of the mixture instead, got {self.weight}."
            )
        if self.cap is not None and self.cap < 1:
            raise ValueError(
                f"A cap must be at least 1 row; leave a source out of the mixture instead, got {self.cap}."
            )


@dataclass(frozen=True)
class Mixture:
    """Sources and their shares; an epoch holds `weight * rows` of each, in a random order.

    The order of an epoch depends on `seed`, the number of the epoch, and the ids of the rows, on nothing else.

    Args:
        sources: name of a source, as in the column `source` -> [`SourceShare`].
        seed: of all random choices.
    """

    sources: Mapping[str, SourceShare]
    seed: int = 0

    def __post_init__(self):
        if not self.sources:
            raise ValueError("A mixture needs at least one source.")

    @classmethod
    def named(cls, name: str, seed: int = 0) -> "Mixture":
        """A row of Table A4: "V", "V+W", "V+W+R" or "V+W+R+S". Raises: `ValueError` for another name.

        The paper gives no weights: every row comes once in an epoch.
        """
        if name not in TABLE_A4:
            raise ValueError(f"{name!r} is no row of Table A4; expected one of {', '.join(TABLE_A4)}.")
        return cls({source: SourceShare() for source in TABLE_A4[name]}, seed)

    @classmethod
    def from_yaml(cls, file: str | Path) -> "Mixture":
        """Read a file such as

            seed: 0
            sources:
              vsti: {weight: 0.5, subsets: [camera_displacement, camera_obj_abs_dist]}
              sat: {cap: 20000}
              robofac: {}

        Raises: `ValueError` for unknown keys or values out of range; it names the file.
        """
        read = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        if not isinstance(read, dict) or not isinstance(read.get("sources"), dict):
            raise ValueError(f"{file} needs a mapping `sources`: name of a source -> its share.")
        known = {one.name for one in fields(SourceShare)}
        unknown = sorted({*read} - {"seed", "sources"}) + sorted(
            f"{name}.{key}" for name, share in read["sources"].items() for key in {*(share or {})} - known
        )
        if unknown:
            raise ValueError(f"{file}: unknown keys {unknown}; a share has {sorted(known)}.")
        try:
            return cls(
                {name: SourceShare(**(share or {})) for name, share in read["sources"].items()}, read.get("seed", 0)
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """As `from_yaml` reads it."""
        shares = {name: {**asdict(share), "subsets": list(share.subsets)} for name, share in self.sources.items()}
        return {"seed": self.seed, "sources": shares}

    def chosen(self, source: str, rows: Dataset) -> Dataset:
        """The rows of a source that the mixture knows at all: its subsets, at most `cap` of them, in their order.

        Raises: `ValueError` for a subset that no row has.
        """
        share = self._share(source)
        if share.subsets:
            subsets = np.array(rows["subset"][:], dtype=object)
            missing = sorted({*share.subsets} - {*subsets})
            if missing:
                raise ValueError(f"{source} has no subset {missing}; it has {sorted({*subsets})}.")
            rows = rows.select(np.flatnonzero(np.isin(subsets, share.subsets)))
        if share.cap is not None and share.cap < len(rows):
            rows = rows.select(np.sort(np.argsort(self._chances(source, rows, "cap"))[: share.cap]))
        return rows

    def in_epoch(self, source: str, rows: Dataset, epoch: int = 0) -> Dataset:
        """What an epoch holds of the `chosen` rows, in their order: `round(weight * len(rows))` rows, at least one."""
        weight = self._share(source).weight
        times, more = divmod(max(round(weight * len(rows)), 1), len(rows)) if len(rows) else (0, 0)
        again = np.argsort(self._chances(source, rows, epoch))[:more] if more else np.array([], dtype=np.int64)
        return rows.select(np.sort(np.concatenate([np.tile(np.arange(len(rows)), times), again])))

    def epoch(self, sources: Mapping[str, Dataset], epoch: int = 0) -> Dataset:
        """One epoch, shuffled, with all columns of the sources; other sources than the mixture's are left aside.

        To go on after row `n`, take `.skip(n)`; or take `.to_iterable_dataset()`, whose `state_dict` says where it is.

        Raises: `ValueError` if a source is missing or has no row.
        """
        parts = [self.in_epoch(name, self.chosen(name, rows), epoch) for name, rows in self._in_order(sources)]
        empty = [name for (name, _), part in zip(self._in_order(sources), parts, strict=True) if not len(part)]
        if empty:
            raise ValueError(f"The mixture's sources {empty} have no rows.")
        mixed = concatenate_datasets(parts)
        return mixed.select(np.random.default_rng([self.seed, epoch]).permutation(len(mixed)))

    def stream(
        self,
        sources: Mapping[str, IterableDataset],
        num_rows: Mapping[str, int],
        epoch: int = 0,
        rows_shuffled: int = ROWS_SHUFFLED,
    ) -> IterableDataset:
        """One epoch of sources that are read as they come, for example from the Hub. Every row comes as often as in `epoch`;
        where `weight` is no whole number, each row of the rest is drawn by itself, and their count varies as that of coins.

        The order is less random than that of `epoch`: sources take turns at random, by the rows that they have, and each is
        shuffled within blocks of `rows_shuffled` rows, which stand in memory with their media. `state_dict` and
        `load_state_dict` give exactly the rows that would have followed; the block is read again. Where data loader
        workers or `split_dataset_by_node` share the stream, each mixes the shards that it reads.

        Args:
            num_rows: of each source, about: how often it takes its turn.

        Raises: `ValueError` if a source is missing, or has a cap: what a stream holds is not known before its end.
        """
        parts, sizes = [], []
        for number, (name, rows) in enumerate(self._in_order(sources)):
            share = self._share(name)
            if share.cap is not None:
                raise ValueError(f"{name} has a cap, which a stream cannot keep; cap it with examples/prepare_data.py.")
            if share.subsets:
                rows = rows.filter(_is_in, fn_kwargs={"subsets": share.subsets}, input_columns="subset")
            times, rest = divmod(share.weight, 1)
            for turn in range(int(times) + (rest > 0)):
                drawn, size = rows, num_rows[name]
                if turn == times:
                    drawn = rows.filter(
                        _is_drawn, fn_kwargs={"salt": self._salt(name, epoch), "part": rest}, input_columns="id"
                    )
                    size *= rest
                parts.append(
                    drawn.map(
                        _shuffled,
                        with_indices=True,
                        batched=True,
                        batch_size=rows_shuffled,
                        features=rows.features,
                        fn_kwargs={"seed": [self.seed, epoch, number, turn]},
                    )
                )
                sizes.append(size)
        return interleave_datasets(
            parts,
            probabilities=[size / sum(sizes) for size in sizes],
            seed=int(np.random.default_rng([self.seed, epoch]).integers(2**31)),
            stopping_strategy="all_exhausted_without_replacement",
        )

    def _share(self, source: str) -> SourceShare:
        if source not in self.sources:
            raise ValueError(f"The mixture has no source {source!r}; it has {sorted(self.sources)}.")
        return self.sources[source]

    def _in_order(self, sources: Mapping[str, Any]) -> list[tuple[str, Any]]:
        missing = sorted({*self.sources} - {*sources})
        if missing:
            raise ValueError(f"The mixture's sources {missing} are missing; there are {sorted(sources)}.")
        return [(name, sources[name]) for name in sorted(self.sources)]

    def _salt(self, source: str, purpose: str | int) -> str:
        return f"{self.seed} {purpose} {source} "

    def _chances(self, source: str, rows: Dataset, purpose: str | int) -> np.ndarray:
        salt = self._salt(source, purpose)
        return np.array([_chance(salt, id) for id in rows["id"][:]])


def _chance(salt: str, id: str) -> float:
    """Uniform in [0, 1), the same wherever and in whatever order rows are read."""
    return int.from_bytes(hashlib.sha256((salt + id).encode()).digest()[:8]) / 2**64


def _is_in(subset: str, subsets: tuple[str, ...]) -> bool:
    return subset in subsets


def _is_drawn(id: str, salt: str, part: float) -> bool:
    return _chance(salt, id) < part


def _shuffled(rows: dict[str, list], indices: list[int], seed: list[int]) -> dict[str, list]:
    order = np.random.default_rng([*seed, indices[0]]).permutation(len(indices))
    return {name: [values[index] for index in order] for name, values in rows.items()}


TABLE_A4 = {
    "V": ("vsti",),
    "V+W": ("vsti", "wolf"),
    "V+W+R": ("vsti", "wolf", "robofac"),
    "V+W+R+S": ("vsti", "wolf", "robofac", "sat"),
}
