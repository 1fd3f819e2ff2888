"""4-bit leaves as the tensors and the config.json that `transformers` and bitsandbytes load."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm_jax.adapters.modules_to_save import owners
from vlm_jax.model import Model
from vlm_jax.names import Place
from vlm_jax.weights import FourBit, bnb

HEAD = "lm_head"  # a linear layer there even where it is tied


def tensors_4bit(
    names: Mapping[str, str],
    places: Mapping[str, Place],
    flat: Mapping[str, Any],
    leaf_of: Callable[[Place], Any],
) -> tuple[dict[str, tuple[str, int]], Callable[[str], np.ndarray]]:
    """Return ({tensor name: (name of its weight, bytes)}, name -> array) of all 4-bit weights.

    names: {name to write: its current name} of all weights; flat: {path: leaf}.
    leaf_of: what of a leaf is written, quantized, of one layer.
    """
    weights: dict[str, tuple[str, int]] = {}
    for name, current in names.items():
        leaf = flat[places[current].path] if current in places else None
        if isinstance(leaf, FourBit):
            count = math.prod(places[current].shape)
            sizes = {
                "": -(-count // 2),
                ".absmax": jnp.dtype(leaf.absmax.dtype).itemsize * -(-count // leaf.block),
            }
            weights |= {name + end: (name, sizes.get(end, 1024)) for end in bnb.suffixes(leaf)}

    @functools.lru_cache(maxsize=1)  # the tensors of one weight follow one another
    def of(weight: str) -> dict[str, np.ndarray]:
        return bnb.to_tensors(leaf_of(places[names[weight]]), None)

    def tensor(name: str) -> np.ndarray:
        weight, _ = weights[name]
        return of(weight)[name.removeprefix(weight)]

    return weights, tensor


def quantization_config(
    model: Model,
    places: Mapping[str, Place],
    flat: Mapping[str, Any],
    unread: Mapping[str, bool],
) -> dict[str, Any]:
    """Return the quantization_config of config.json: `BitsAndBytesConfig` as a dict.

    unread: {name of a tensor that nothing here reads: whether it is a 4-bit weight}.
    """
    leaf = next(leaf for leaf in flat.values() if isinstance(leaf, FourBit))
    kernels = {n: flat[place.path] for n, place in places.items() if place.path.endswith("/kernel")}
    quantized = {
        **{name: isinstance(kernel, FourBit) for name, kernel in kernels.items()},
        **{name: four for name, four in unread.items() if name.endswith(".weight")},
    }
    modules = {HEAD, *(name.removesuffix(".weight") for name in quantized)}
    four = {name.removesuffix(".weight") for name, is_four in quantized.items() if is_four}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": leaf.NAME,
        "bnb_4bit_use_double_quant": leaf.double,
        "bnb_4bit_compute_dtype": str(jnp.dtype(model.dtype)),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": _outermost(modules - four, four),
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def _outermost(dense: Iterable[str], four: set[str]) -> list[str]:
    """Return the fewest modules that hold all dense ones and no 4-bit one.

    Each is named as it is now and without "model.", as versions before 4.52 know it.
    """
    busy = {module for name in four for module in (*owners(name), name)}
    outermost = [
        next(module for module in (*owners(name), name) if module not in busy)
        for name in sorted(dense)
    ]
    return list(dict.fromkeys(n for name in outermost for n in (name, name.removeprefix("model."))))
