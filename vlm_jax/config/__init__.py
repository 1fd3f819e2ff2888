"""A run's config: its keys, their values, checks, and the files and words they come from."""

from vlm_jax.config.parse import plain
from vlm_jax.config.schema import coerce, flatten_config, get_config, key_types, load, to_dict

__all__ = ["coerce", "flatten_config", "get_config", "key_types", "load", "plain", "to_dict"]
