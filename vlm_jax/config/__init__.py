"""A run's config: keys, defaults, checks, files and command-line overrides."""

from vlm_jax.config.parse import plain
from vlm_jax.config.schema import coerce, flatten_config, get_config, key_types, load, to_dict

__all__ = ["coerce", "flatten_config", "get_config", "key_types", "load", "plain", "to_dict"]
