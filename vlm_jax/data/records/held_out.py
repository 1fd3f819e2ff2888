"""Held-out records: a share of the data for evaluation."""

import dataclasses

import numpy as np

from vlm_jax.data.records.mixture import Mixture, Part, Records
from vlm_jax.errors import UserError


def hold_out(
    records: Records | Mixture, share: float, seed: int
) -> tuple[Records | Mixture, Records | Mixture]:
    """Return (what is left to train on, what is held out): every record in one of the two.

    Of a mixture each source gives its share. What is held out hangs on nothing but the number of
    records and the seed, so that it is the same in every process and after a resume; it comes
    in random order, of which the first ones are a fair sample. One record at least is held out, and
    one left. Raises `UserError` where a source has only one.
    """
    if isinstance(records, Mixture):
        pairs = [(part, *_halves(part.records, share, seed)) for part in records.parts]
        return (
            Mixture([dataclasses.replace(part, records=rest) for part, rest, _ in pairs]),
            Mixture([Part(part.name, drawn) for part, _, drawn in pairs]),
        )
    return _halves(records, share, seed)


def _halves(records: Records, share: float, seed: int) -> tuple[Records, Records]:
    count = len(records)
    if count < 2:
        raise UserError(
            f"data.eval_share is {share:g}, but '{records.name}' has one record, of which nothing "
            f"can be held out. Leave data.eval_share out, or name a data.eval_file."
        )
    number = min(max(1, round(share * count)), count - 1)
    drawn = np.random.default_rng([seed, count]).permutation(count)
    return records.choose(np.sort(drawn[number:])), records.choose(drawn[:number])
