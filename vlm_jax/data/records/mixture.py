"""Mixtures of sources: records by index, and the order of an epoch."""

import bisect
import collections
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from vlm_jax.data.records.record import Record, canonical
from vlm_jax.errors import UserError, refuse


class Records(Sequence):
    """Raw rows of one source that become canonical when they are asked for.

    name: the file or data set, for errors. folder: where relative image paths start. columns:
    {our name: the rows'}. chosen: int64 [N], the only rows there are, in this order; their ids and
    places stay their own. Rows of a file are read by index; what holds them pickles by path.
    """

    def __init__(
        self,
        rows: Any,
        name: str,
        folder: str | None,
        columns: Mapping[str, str] | None = None,
        fingerprint: str | None = None,
        chosen: np.ndarray | None = None,
    ):
        self.rows, self.name, self.folder, self.chosen = rows, name, folder, chosen
        self.columns = dict(columns or {})
        self._given = fingerprint
        self._line = getattr(rows, "line", None)

    def __len__(self) -> int:
        return len(self.rows if self.chosen is None else self.chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index, line = self._place(range(len(self))[index])
        return canonical(
            self.rows[index], index, self.folder, self.name, line=line, columns=self.columns
        )

    def place(self, index: int) -> str:
        """Return where a record stands, for errors: "'data.jsonl', line 17"."""
        index, line = self._place(int(index))
        return f"'{self.name}'" + (f", line {line}" if line else f", record {index}")

    def _place(self, index: int) -> tuple[int, int | None]:
        """Return a record's number in its file, and the line where that is known."""
        own = index if self.chosen is None else int(self.chosen[index])
        return own, self._line and self._line(own)

    def choose(self, indices: np.ndarray) -> "Records":
        """Return these of the records alone, in this order. indices: int64 [N]."""
        return Records(
            self.rows,
            self.name,
            self.folder,
            self.columns,
            fingerprint=self._given,
            chosen=indices if self.chosen is None else self.chosen[indices],
        )

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """The identity of the rows and how they are read, or None where they are not plain values.

        Of a file it is a hash of its bytes. What images hold is not in it, nor where they lie.
        """
        known = self._given or _hash_rows(self.rows)
        if known and self.chosen is not None:
            known = _hash([known, hashlib.blake2b(self.chosen.tobytes()).hexdigest()])
        return known and (_hash([known, self.columns]) if self.columns else known)

    def order(self, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
        """Return int64 [N]: the records that an epoch visits, in order."""
        rng = np.random.default_rng([seed, epoch])
        return rng.permutation(len(self)) if shuffle else np.arange(len(self))


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of a mixture, and how much of it an epoch visits: one of the two is set, or none.

    epochs: how often each record comes. weight: its share of the examples, beside the others'.
    """

    name: str
    records: Records
    weight: float | None = None
    epochs: float | None = None


class Mixture(Sequence):
    """The records of several sources, one behind the other, and what an epoch visits of each.

    A record's index counts over all sources; its own "index", and errors, count within its source.
    Its id has the source's name in front, since ids of two files are often the same.
    Raises `UserError` for weights and epochs that do not go together.
    """

    def __init__(self, parts: Sequence[Part]):
        self.parts = list(parts)
        self.ends = np.cumsum([len(part.records) for part in self.parts]).tolist()
        self.name = ", ".join(part.records.name for part in self.parts)
        self.folder = None  # each record has its own
        (name, count), *_ = collections.Counter(part.name for part in self.parts).most_common(1)
        if count > 1:
            raise UserError(f"Two sources of data are called '{name}': give each its own name.")
        weighted = next((part.name for part in self.parts if part.weight is not None), None)
        for part in self.parts:
            shares = {"weight": part.weight, "epochs": part.epochs}
            given = {f"{key} {value}": value for key, value in shares.items() if value is not None}
            refuse(
                (
                    len(given) == 2,
                    f"The source '{part.name}' has a weight and epochs, which both say how often "
                    f"its records come: keep one.",
                ),
                (
                    not all(0 < value < math.inf for value in given.values()),
                    f"The source '{part.name}' has {' and '.join(given)}; expected a number above "
                    f"0. To leave a source out, take it off the list.",
                ),
                (
                    weighted is not None and part.weight is None,
                    f"The source '{weighted}' has a weight and '{part.name}' has none. Give all "
                    f"sources a weight, or none.",
                ),
            )
        self._quota = self._quotas()
        if not any(math.floor(quota) for quota in self._quota):
            raise UserError(
                f"An epoch visits not one whole record of '{self.name}': with epochs "
                f"{[float(part.epochs or 1) for part in self.parts]} of "
                f"{[len(part.records) for part in self.parts]} records. Raise epochs of a source."
            )

    def __len__(self) -> int:
        return self.ends[-1]

    def _find(self, index: int) -> tuple[Part, int]:
        index = range(len(self))[index]
        i = bisect.bisect_right(self.ends, index)
        return self.parts[i], index - (self.ends[i - 1] if i else 0)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        part, own = self._find(index)
        record: Record = part.records[own]
        return {**record, "id": f"{part.name}:{record['id']}"}

    def place(self, index: int) -> str:
        """Return where a record stands, for errors, in its source's own file."""
        part, own = self._find(index)
        return part.records.place(own)

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """The identity of all sources' rows in their order, or None where one has none."""
        known = [part.records.fingerprint for part in self.parts]
        return None if None in known else _hash(known)

    def _quotas(self) -> list[Fraction]:
        """Return how many records of each source an epoch visits, on average over epochs."""
        sizes = [len(part.records) for part in self.parts]
        if self.parts[0].weight is None:
            return [len(part.records) * _exact(part.epochs or 1) for part in self.parts]
        weights = [_exact(part.weight or 0) for part in self.parts]
        shares = [sum(sizes) * w / sum(weights) for w in weights]
        whole = [int(share) for share in shares]
        by_rest = sorted(range(len(shares)), key=lambda i: whole[i] - shares[i])
        for i in by_rest[: sum(sizes) - sum(whole)]:
            whole[i] += 1
        return [Fraction(n) for n in whole]

    def order(self, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
        """Return int64: the records that an epoch visits, in order; lengths differ by epoch.

        Each source is walked through one seeded permutation of it after the other, an epoch going
        on where the last one stopped: with epochs 0.5 two epochs together visit each record once.
        What an epoch takes of all sources is then shuffled together. Without `shuffle` each
        source's records come in its own order, source by source.
        """
        sizes = [len(part.records) for part in self.parts]
        taken = [
            end - size + _walk(size, quota * epoch, quota * (epoch + 1), [seed, number], shuffle)
            for number, (size, end, quota) in enumerate(
                zip(sizes, self.ends, self._quota, strict=True)
            )
        ]
        order = np.concatenate(taken)
        if shuffle:
            order = order[np.random.default_rng([seed, epoch]).permutation(len(order))]
        return order


def _walk(size: int, begin: Fraction, end: Fraction, seed: list[int], shuffle: bool) -> np.ndarray:
    """Return the members of endless permutations of `size`, from `begin` to before `end`, rounded.

    A permutation that is taken whole is not drawn: what an epoch takes is shuffled anyway.
    """
    start, stop = math.floor(begin), math.floor(end)
    pieces = [np.zeros(0, np.int64)]
    for turn in range(start // size, -(-stop // size)):
        a, b = max(start - turn * size, 0), min(stop - turn * size, size)
        whole = (
            np.random.default_rng([*seed, turn, size]).permutation(size)
            if shuffle and b - a < size
            else np.arange(size)
        )
        pieces.append(whole[a:b])
    return np.concatenate(pieces)


def _exact(number: float) -> Fraction:
    return Fraction(str(number))  # 0.1 is a tenth, not the nearest binary fraction


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _hash_rows(rows: Any) -> str | None:
    digest = hashlib.blake2b(digest_size=16)
    try:
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    except (TypeError, ValueError):  # PIL images, bytes, a row that holds itself
        return None
    return digest.hexdigest()
