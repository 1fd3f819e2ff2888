"""Measures records as they come up, and reports those left out with their reasons."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vlm_jax.data.encode import Encoder
from vlm_jax.data.lengths import REASONS, Measures
from vlm_jax.data.records.mixture import Mixture, Records
from vlm_jax.data.records.record import BadExample
from vlm_jax.data.records.stream import Stream
from vlm_jax.data.text.template import BadTemplate
from vlm_jax.errors import UserError

# Left out under every policy but data.overlong="error": nothing is wrong with them.
ALWAYS_DROPPED = ("too_long", "too_many_patches")


class Measurer:
    """Measures records of one encoder into a shared `Measures`; pickles for worker processes.

    skip_bad: leave bad records out, counted, rather than raise for them.
    """

    def __init__(
        self,
        encoder: Encoder,
        records: Records | Mixture | Stream,
        measures: Measures,
        skip_bad: bool,
    ):
        self.encoder, self.records, self.measures = encoder, records, measures
        self.skip_bad = skip_bad

    def measure(self, indices: np.ndarray, threads: int = 1, share: float = 0.0) -> None:
        """Measure the records that have no size yet, by so many threads.

        share: how far into them to begin, so that processes that come here at once do not all
        measure the same. Raises `UserError` for a bad record unless `skip_bad`.
        """
        new = self.measures.unknown(indices)
        new = np.roll(new, -int(share * len(new)))
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(new), 16):
                part = self.measures.unknown(new[start : start + 16])  # others may have been here
                for index, error in zip(part, pool.map(self.one, part), strict=True):
                    if error is not None and not self.allowed(error):
                        raise self.named(index, error)

    def one(self, index: int) -> UserError | None:
        """Measure one record, write what came of it, and return why it is left out if it is."""
        index = int(index)
        try:
            self.measures.put(index, self.encoder.measure(self.records[index]))
        except BadTemplate:
            raise
        except UserError as error:
            if self.allowed(error):
                reason = reason_of(error)
                self.measures.drop(index, reason, lasting=reason in ALWAYS_DROPPED)
            return error
        return None

    def bad(self, indices: np.ndarray) -> int:
        """Return how many of the measured records are left out because they are bad."""
        tokens = self.measures.sizes(indices)[:, 0]
        fine = [-1 - REASONS.index(reason) for reason in ALWAYS_DROPPED]
        return int(((tokens < 0) & ~np.isin(tokens, fine)).sum())

    def why(self, index: int) -> str:
        """Return the message of a record that is left out."""
        try:
            self.encoder.encode(self.records[int(index)])
        except BadExample as error:
            return f"In {self.records.place(index)}: {error}"
        except UserError as error:
            return str(error)
        return "It can be read now: it was changed since it was measured."

    def allowed(self, error: UserError) -> bool:
        """Return whether a record may be left out for this."""
        overlong = reason_of(error) in ALWAYS_DROPPED
        return self.encoder.overlong != "error" if overlong else self.skip_bad

    def named(self, index: int, error: UserError) -> UserError:
        """Return the error with what an example does not know: its file, and the way round it."""
        where = f"In {self.records.place(index)}: " if isinstance(error, BadExample) else ""
        overlong = reason_of(error) in ALWAYS_DROPPED
        way = "set data.overlong=drop" if overlong else "and reported, set data.on_bad_example=skip"
        return BadExample(
            reason_of(error), f"{where}{error} To leave such examples out, counted, {way}."
        )


def sample(count: int, most: int, seed: int = 0) -> np.ndarray:
    """Return the numbers, in rising order, of at most so many of `count` records, drawn by seed."""
    rng = np.random.default_rng([seed, most])
    return np.arange(count) if count <= most else np.sort(rng.choice(count, most, False))


def reason_of(error: UserError) -> str:
    """Return the key under which the report counts an error's record."""
    return getattr(error, "reason", "record")
