"""A run's config: keys, defaults, checks, files and command-line overrides. Names load on use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_jax.config.parse import plain
    from vlm_jax.config.schema import coerce, flatten_config, get_config, key_types, load, to_dict

__all__ = ["coerce", "flatten_config", "get_config", "key_types", "load", "plain", "to_dict"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `vlm-jax --help`, which reads `options`, does not wait for numpy.
    if name in __all__:
        home = "parse" if name == "plain" else "schema"
        return getattr(importlib.import_module(f"vlm_jax.config.{home}"), name)
    raise AttributeError(f"module 'vlm_jax.config' has no attribute '{name}'")
