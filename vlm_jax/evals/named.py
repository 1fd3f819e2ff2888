"""The evaluators of a run: each has a name, a file and an interval of its own."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.data import Encoder
from vlm_jax.data.records.mixture import Mixture, Records
from vlm_jax.evals import Eval
from vlm_jax.model import Model


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """One of them. options: of `eval`."""

    name: str
    eval: Eval
    records: Records | Mixture
    options: Mapping[str, int]

    def figures(
        self,
        model: Model,
        params: Mapping[str, Any],
        encoder: Encoder,
        on_batch: Callable[[int, int], None],
    ) -> dict[str, float]:
        """Return {"name/metric": value}."""
        found = self.eval(model, params, encoder, self.records, on_batch=on_batch, **self.options)
        return {f"{self.name}/{metric}": value for metric, value in found.figures.items()}
