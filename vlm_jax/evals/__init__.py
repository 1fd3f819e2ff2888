"""What a trained model can do, measured: evaluators by name."""

from collections.abc import Callable

from vlm_jax.evals.accuracy import accuracy
from vlm_jax.evals.anls import anls
from vlm_jax.evals.answers import Scores

# A function of (model, params, encoder, records) and the options of `answers.scored`.
Eval = Callable[..., Scores]
# To add one, write a file and add a line.
EVALS: dict[str, Eval] = {"accuracy": accuracy, "anls": anls}
