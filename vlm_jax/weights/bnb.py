"""bitsandbytes' tensors of a 4-bit weight: written, read, checked.

Beside `weight`, uint8 [bytes, 1], there are `weight.absmax`, `weight.quant_map`, of double
quantization `weight.nested_absmax` and `weight.nested_quant_map`, and a JSON text as uint8,
`weight.quant_state.bitsandbytes__nf4`.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.files.limits import all_finite
from vlm_jax.weights import FORMATS, dynamic8
from vlm_jax.weights.fourbit import BLOCKS, FourBit
from vlm_jax.weights.packing import (
    Flat,
    flatten_layer,
    from_bytes,
    host_device,
    leaf_of,
    to_bytes,
)

STATE = ".quant_state.bitsandbytes__"
# Suffixes of a weight's name; the state's ends in the format's name.
SUFFIXES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
DTYPES = ("float32", "bfloat16", "float16")


class Stored(NamedTuple):
    """A weight [out, in] as it was read, and what else a leaf keeps of it."""

    flat: Flat
    format: type[FourBit]
    block: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def kind(self) -> tuple[str, bool, int, str]:
        """What all layers of a stack must share."""
        return self.format.NAME, self.flat.nested is not None, self.block, self.dtype


def weight_of(name: str) -> str | None:
    """Return the weight's name that a tensor beside it belongs to, or None for any other."""
    ends = "|".join(map(re.escape, SUFFIXES))
    found = re.fullmatch(rf"(?s)(.*\.weight)(?:{ends})|(.*?){re.escape(STATE)}.*", name)
    return (found[1] or found[2]) if found else None


def to_bnb(leaf: FourBit, layer: int | None = None) -> dict[str, Any]:
    """Return bitsandbytes' arrays and settings of a leaf, or of one layer of a stacked one.

    weight: uint8 [ceil(n / 2), 1] of the weight [out, in]; absmax: float32, or uint8 with
    nested_absmax float32 and offset float32 []; quant_map, nested_quant_map: float32 [16] and
    [256]; quant_type, blocksize, dtype, shape and nested_blocksize as in its `QuantState`.
    """
    if not isinstance(leaf, FourBit):
        raise UserError(
            f"to_bnb was given a {type(leaf).__name__}, which is not a 4-bit leaf. Quantize it "
            f"first, for instance by vlm_jax.nf4.quantize."
        )
    if leaf.ndim != (2 if layer is None else 3):
        raise ValueError(f"The leaf is {list(leaf.shape)}: give a layer for a stacked one only.")
    flat = flatten_layer(leaf, layer)
    inputs, outputs = leaf.shape[-2:]
    arrays: dict[str, Any] = {
        "weight": to_bytes(flat.codes, leaf.PADDING),
        "absmax": np.ascontiguousarray(flat.absmax),
        "quant_map": np.asarray(leaf.VALUES, np.float32),
        "quant_type": leaf.NAME,
        "blocksize": leaf.block,
        "dtype": leaf.dtype,
        "shape": (outputs, inputs),
    }
    if flat.nested is not None:
        arrays |= {
            "nested_absmax": flat.nested,
            "nested_quant_map": dynamic8.dynamic_map(signed=True),
            "nested_blocksize": dynamic8.BLOCK,
            "nested_dtype": "float32",
            "offset": flat.offset,
        }
    return arrays


def suffixes(leaf: FourBit) -> list[str]:
    """Return the suffixes of `to_tensors`."""
    return ["", *SUFFIXES[: 4 if leaf.double else 2], STATE + leaf.NAME]


def to_tensors(leaf: FourBit, layer: int | None = None) -> dict[str, np.ndarray]:
    """Return {suffix of the weight's name: tensor} as bitsandbytes saves them."""
    arrays = to_bnb(leaf, layer)
    tensors = {suffix: arrays.pop(suffix[1:] or "weight") for suffix in suffixes(leaf)[:-1]}
    if "offset" in arrays:
        arrays["nested_offset"] = float(arrays.pop("offset"))
    text = json.dumps({**arrays, "shape": list(arrays["shape"])})
    return {**tensors, STATE + leaf.NAME: np.frombuffer(text.encode(), np.uint8)}


def decoded(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Return the weight [out, in] of {suffix: tensor}, in the dtype that its codes stand for."""
    stored = from_tensors(tensors, None, name)
    with jax.default_device(host_device()):
        return np.ascontiguousarray(np.asarray(leaf_of(*stored).dense(stored.dtype)).T)


def from_tensors(
    tensors: Mapping[str, np.ndarray], shape: tuple[int, ...] | None, name: str
) -> Stored:
    """Return the stored weight of {suffix: tensor}, codes unchanged.

    shape: [out, in], or what the checkpoint's config makes of it; None: as is stated.
    name: of the weight, for errors.
    Raises `UserError` for a tensor that is missing, has another length than the weight needs, or
    holds what this library does not know.
    """

    def fault(what: str) -> UserError:
        return UserError(
            f"The 4-bit tensor '{name}' cannot be read: {what} The checkpoint is damaged or was "
            f"written by another version of bitsandbytes: fetch it again, or take it in 16 bits."
        )

    keys = [suffix for suffix in tensors if suffix.startswith(STATE)]
    if len(keys) != 1:
        raise fault(f"it has {len(keys)} tensors '{name}{STATE}...', expected one.")
    try:
        state = json.loads(bytes(np.asarray(tensors[keys[0]], np.uint8)))
        kind, block, dtype = state["quant_type"], state["blocksize"], state["dtype"]
        stated = tuple(int(size) for size in state["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise fault(f"'{name}{keys[0]}' holds no settings ({error}).") from error
    for key, value, known in (
        ("quant_type", kind, tuple(FORMATS)),
        ("blocksize", block, BLOCKS),
        ("dtype", dtype, DTYPES),
    ):
        if value not in known:
            raise fault(f"its {key} is {value!r}; known are {', '.join(map(str, known))}.")
    shape = stated if shape is None else shape
    count = math.prod(shape)
    if math.prod(stated) != count or (len(shape) == 2 and stated != tuple(shape)):
        raise fault(f"it stands for {list(stated)} values, but config.json asks for {list(shape)}.")
    format, blocks, double = FORMATS[kind], -(-count // block), ".nested_absmax" in tensors
    # Suffix -> its length, its dtype and, of a map, its values.
    needed: dict[str, tuple[int, type, Any]] = {
        "": (-(-count // 2), np.uint8, None),
        ".absmax": (blocks, np.uint8 if double else np.float32, None),
        ".quant_map": (16, np.float32, np.asarray(format.VALUES, np.float32)),
    }
    if double:
        needed |= {
            ".nested_absmax": (-(-blocks // dynamic8.BLOCK), np.float32, None),
            ".nested_quant_map": (256, np.float32, dynamic8.dynamic_map(signed=True)),
        }
    if "" in tensors and tensors[""].dtype.name in DTYPES:  # bnb_4bit_quant_storage, as FSDP needs
        tensors = {**tensors, "": np.ascontiguousarray(tensors[""]).reshape(-1).view(np.uint8)}
    for suffix, (length, stored_as, values) in needed.items():
        if suffix not in tensors:
            raise fault(f"'{name}{suffix}' is missing.")
        found = tensors[suffix]
        if found.size != length or found.dtype != stored_as:
            raise fault(
                f"'{name}{suffix}' holds {found.size} values of {found.dtype}; a weight of "
                f"{list(shape)} in blocks of {block} needs {length} of {np.dtype(stored_as).name}."
            )
        if suffix.endswith("absmax") and not all_finite(found):
            raise fault(f"'{name}{suffix}' holds NaN or infinity.")
        if values is not None and not np.allclose(found, values, rtol=0, atol=1e-6):
            raise fault(f"'{name}{suffix}' is not the map of {kind}.")
    nested = offset = None
    if double:
        if state.get("nested_blocksize") != dynamic8.BLOCK:
            raise fault(f"its nested_blocksize is {state.get('nested_blocksize')!r}, not 256.")
        mean = state.get("nested_offset")
        if not isinstance(mean, int | float) or not math.isfinite(mean):
            raise fault(f"its nested_offset is {mean!r}, not a number.")
        nested, offset = tensors[".nested_absmax"].reshape(-1), np.asarray(mean, np.float32)
    codes, absmax = from_bytes(tensors[""], count), tensors[".absmax"].reshape(-1)
    return Stored(Flat(codes, absmax, nested, offset), format, block, dtype, shape)
