"""config.json of well-known checkpoints, for plans without a network."""

from typing import Any

from vlm_jax.models import MODELS

KNOWN: dict[str, dict[str, Any]] = {
    name: raw for family in MODELS.values() for name, raw in family.KNOWN.items()
}
