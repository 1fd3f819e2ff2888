"""The quantization table: the 4-bit format of each kernel, and a summary of the result."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError, nearest
from vlm_jax.files.limits import check_patterns
from vlm_jax.model import Model
from vlm_jax.models import MODELS
from vlm_jax.names import current_name, layer_names, stacked_layers
from vlm_jax.trees import Table, flatten, match, unflatten
from vlm_jax.weights import FORMATS, FourBit, dynamic8

DENSE = "dense"
# Modules of other families, or of none with a tied head, that a shared list may well name.
ELSEWHERE = {"lm_head", *(n for f in MODELS.values() for n in (f.VISION, f.PROJECTOR))}
BLOCK = 64  # bitsandbytes' default


class Storage(NamedTuple):
    """How a quantized kernel is stored."""

    format: type[FourBit]
    double: bool
    block: int = BLOCK

    def abstract(self, shape: tuple[int, ...], dtype: str) -> FourBit:
        """Return a leaf of shapes for a kernel [in, out] or [L, in, out]."""
        *layers, inputs, outputs = shape
        blocks = -(-inputs * outputs // self.block)
        aligned = inputs % self.block == 0

        def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*layers, *shape), dtype)

        return self.format(
            codes=array(jnp.uint4, inputs, outputs),
            absmax=array(
                jnp.uint8 if self.double else jnp.float32,
                *((inputs // self.block, outputs) if aligned else (blocks,)),
            ),
            nested=array(jnp.float32, -(-blocks // dynamic8.BLOCK)) if self.double else None,
            offset=array(jnp.float32) if self.double else None,
            block=self.block,
            dtype=dtype,
        )


# What `quantize` and rows of the table may say: a format, and with "-dq" double quantization.
NAMES = {
    f"{name}{suffix}": Storage(format, double)
    for name, format in FORMATS.items()
    for suffix, double in (("", False), ("-dq", True))
}


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What is quantized, by bitsandbytes' notions.

    storage: a name of `NAMES`. components: whose linear layers. skip: names of modules that stay
    dense, as in `llm_int8_skip_modules`.
    """

    storage: str
    components: tuple[str, ...] = ("language_model",)
    skip: tuple[str, ...] = ()

    def table(self, model: Model) -> Table:
        """Return the ordered (regex, storage) rows that this means for a model.

        Raises `UserError` for a component or module that the model does not have, and where no
        layer is left to quantize.
        """
        paths = _kernels(model)
        known = {model.component(path) for path in paths}
        dense = (*_skipped(model, paths, self.skip), *model.config.disk_shapes)
        rows = [(re.escape(path), DENSE) for path in dense]
        for component in self.components:
            if component not in known:
                raise UserError(
                    f"The component '{component}' has no linear layer to quantize"
                    f"{nearest(component, known)}. Those that have: {', '.join(sorted(known))}."
                )
        for pattern, owner in model.config.COMPONENTS:  # in its order, for the first row wins
            row = f"(?={pattern}$).*/kernel"
            if any(re.fullmatch(row, path) for path in paths):
                rows.append((row, self.storage if owner in self.components else DENSE))
        rows.append((".*", DENSE))
        if self.storage not in match(rows, paths, "quantization table", unused="allow").values():
            raise UserError(
                f"Nothing is left to quantize as {self.storage}: of the linear layers of "
                f"model.quantize_components, {list(self.components)}, model.llm_int8_skip_modules, "
                f"{list(self.skip)}, keeps all dense. Remove the name that covers them from the "
                f"skipped modules or add a component ({', '.join(sorted(known))}); to train a "
                f"dense base, leave model.quantize and model.load_in_4bit out."
            )
        return rows


# What `load` takes; a mapping is a `BitsAndBytesConfig` as a dict.
Quantize = str | Quantization | Table | Mapping[str, Any] | None

# Fields of `BitsAndBytesConfig` without a meaning for 4-bit weights in memory.
NO_MATTER = (
    *("quant_method", "load_in_8bit", "_load_in_8bit", "_load_in_4bit", "llm_int8_threshold"),
    *("llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "bnb_4bit_quant_storage"),
)


def from_bitsandbytes(settings: Any, dtype: Any) -> Quantization:
    """Return what transformers' `BitsAndBytesConfig`, or its dict, means for the language model.

    Raises `UserError` for 8 bits, an unknown field, and where it would compute in another dtype.
    """
    given = dict(settings if isinstance(settings, Mapping) else settings.to_dict())
    if given.get("load_in_8bit") or not given.get("load_in_4bit"):
        raise UserError(
            "The BitsAndBytesConfig in quantize does not say load_in_4bit=True; weights are "
            "quantized to 4 bits only. Set it, or leave quantize out."
        )
    fields: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": None,
        "llm_int8_skip_modules": None,
    }
    for key in given:
        if key not in fields and key not in NO_MATTER:
            raise UserError(
                f"The BitsAndBytesConfig in quantize has the field '{key}', which is not known"
                f"{nearest(key, fields)}. Known: {', '.join(fields)}."
            )
    fields |= {key: value for key, value in given.items() if key in fields}
    compute = fields["bnb_4bit_compute_dtype"]
    if compute is not None and str(compute).removeprefix("torch.") != jnp.dtype(dtype).name:
        raise UserError(
            f"The BitsAndBytesConfig in quantize has bnb_4bit_compute_dtype {compute}, but the "
            f"model computes in {jnp.dtype(dtype).name}. Load it with the same dtype, float32 or "
            f"bfloat16, in both (BitsAndBytesConfig's default is float32)."
        )
    double = "-dq" if fields["bnb_4bit_use_double_quant"] else ""
    return Quantization(
        f"{fields['bnb_4bit_quant_type']}{double}",
        skip=tuple(fields["llm_int8_skip_modules"] or ()),
    )


def described(quantize: Any) -> str:
    """Return how an error names a value of `quantize`."""
    if isinstance(quantize, str | Quantization):
        return repr(getattr(quantize, "storage", quantize))
    return f"a {'BitsAndBytesConfig' if isinstance(quantize, Mapping) else type(quantize).__name__}"


def _skipped(model: Model, kernels: list[str], skip: tuple[str, ...]) -> list[str]:
    """Return the kernels that `llm_int8_skip_modules` keeps dense, by `_skips`.

    Raises `UserError` for what means no module of any family, and only some layers of a stack.
    """
    found: dict[str, None] = {}
    modules = {path: layer_names(model, path) for path in flatten(model.abstract())}
    check_patterns(
        skip,
        [name for names in modules.values() for name in names],
        "value of model.llm_int8_skip_modules",
        lambda row: f"(?:{row}).*",
    )
    for pattern in skip:
        hits = {
            path: [_skips(model, pattern, name) for name in names]
            for path, names in modules.items()
        }
        for path in kernels:
            if any(hits[path]) and not all(hits[path]):
                raise UserError(
                    f"model.llm_int8_skip_modules names '{pattern}', which means only layers "
                    f"{[i for i, hit in enumerate(hits[path]) if hit][:8]} of '{path}'. Layers are "
                    f"stacked here, so a name must not hold a layer's number."
                )
        found |= {path: None for path in kernels if hits[path][0]}
        if pattern not in ELSEWHERE and not any(map(any, hits.values())):
            ends = {part for path in modules for part in path.split("/")}
            raise UserError(
                f"model.llm_int8_skip_modules names '{pattern}', but the model has no such module"
                f"{nearest(pattern, ends)}. A name is the end of a module's name, a module that "
                f"layers lie in, or a regex from the start of a full name such as "
                f"'{modules[kernels[0]][0]}'."
            )
    return list(found)


def _skips(model: Model, pattern: str, name: str) -> bool:
    """Return whether a module stays dense for a pattern, in transformers 5 or in transformers 4.

    5 (`should_convert_module`): a regex from the start of the full name up to a dot or its end, or
    any end of it. 4: the name of a module that it lies in, here also without layers' numbers.
    """
    if re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(pattern):
        return True
    inside = current_name(model, f"{pattern}.").removesuffix(".")
    plain = re.sub(r"\.\d+(?=\.)", "", name)
    return any(f".{inside}." in f".{full}." for full in (name, plain))


def _kernels(model: Model) -> list[str]:
    """Return the paths of linear layers: convolutions are products here, but not elsewhere."""
    others = model.config.disk_shapes
    return [p for p in flatten(model.abstract()) if p.endswith("/kernel") and p not in others]


def storages(model: Model, quantize: Quantize) -> dict[str, Storage | None]:
    """Return {path: how it is stored, None for dense} of every leaf of the base.

    quantize: a name of `NAMES` for the linear layers of the language model, a `Quantization`,
    transformers' `BitsAndBytesConfig` or its dict, or a table of (regex, name or "dense") rows over
    paths. Raises `UserError` for an unknown name and for a row that quantizes anything but a linear
    layer.
    """
    paths = list(flatten(model.abstract()))
    if quantize is None:
        return dict.fromkeys(paths)
    if isinstance(quantize, str):
        quantize = Quantization(quantize)
    if isinstance(quantize, Mapping) or type(quantize).__name__ == "BitsAndBytesConfig":
        quantize = from_bitsandbytes(quantize, model.dtype)
    if isinstance(quantize, Quantization):
        quantize = quantize.table(model)
    if not isinstance(quantize, list | tuple) or any(
        not isinstance(row, list | tuple) or len(row) != 2 for row in quantize
    ):
        raise UserError(
            f"quantize={quantize!r} does not say how weights are stored. Give one of "
            f"{', '.join(NAMES)}, a Quantization, transformers' BitsAndBytesConfig or its dict, or "
            f"a list of (regex, name or 'dense') rows over paths."
        )
    for _, name in quantize:
        if name not in (DENSE, *NAMES):
            raise UserError(
                f"quantize={name!r} is not supported{nearest(str(name), NAMES)}. Supported: "
                f"{', '.join(NAMES)} (-dq: double quantization), or None."
            )
    kernels = set(_kernels(model))
    found = match([*quantize, (".*", DENSE)], paths, "quantization table")
    for path, name in found.items():
        if name != DENSE and path not in kernels:
            raise UserError(
                f"The quantization table stores '{path}' as {name}, but only kernels of linear "
                f"layers are quantized. Let its row match names that end in '/kernel', or put a "
                f"row for it with 'dense' before."
            )
    return {path: None if name == DENSE else NAMES[name] for path, name in found.items()}


def abstract(model: Model, quantize: Quantize, dtype: Any = None) -> dict[str, Any]:
    """Return the base's parameters as shapes, as `load` with the same `quantize` stores them."""
    dtype = jnp.dtype(dtype or model.dtype)
    flat = flatten(model.abstract(dtype))
    quantized = {
        path: storage.abstract(flat[path].shape, dtype.name)
        for path, storage in storages(model, quantize).items()
        if storage is not None
    }
    return unflatten({**flat, **quantized})


# Components as a sentence names them.
PLACES = {"vision": "vision tower", "language_model": "language model"}


def summary(model: Model, params: Mapping[str, Any]) -> list[str]:
    """Return lines that say what is quantized, if only that nothing is, and why the rest is not.

    Tensors are counted as a checkpoint has them, layer by layer.
    """
    flat, kernels = flatten(params), set(_kernels(model))
    layers = {path: stacked_layers(model, path) or 1 for path in flat}
    # A checkpoint in 4 bits was quantized elsewhere.
    who = "the checkpoint" if model.hf_config.get("quantization_config") else "quantize"
    dense: Counter[str] = Counter()
    for path, leaf in flat.items():
        beside = path.endswith(("/lora_A", "/lora_B", "/lora_magnitude", "/added"))
        if beside or isinstance(leaf, FourBit):
            continue
        if path.endswith("/embedding"):
            reason = "embeddings, which are looked up"
        elif path not in kernels:
            reason = "norms, biases and convolutions, which are small"
        else:
            component = model.component(path)
            owner = PLACES.get(component, component)
            reason = f"linear layers of the {owner}, which {who} leaves dense"
        dense[reason] += layers[path]
    four = {path: leaf for path, leaf in flat.items() if isinstance(leaf, FourBit)}
    first = f"quantized: {_tensors(sum(layers[path] for path in four))}"
    if four:
        values = sum(math.prod(leaf.shape) for leaf in four.values())
        bits = 8 * sum(leaf.nbytes for leaf in four.values()) / values
        kinds = {leaf.NAME + ("-dq" if leaf.double else ""): None for leaf in four.values()}
        first += f", {values:,d} parameters, as {', '.join(kinds)}, {bits:.3f} bits each"
    return [first] + [
        f"kept dense: {_tensors(count)} ({reason})" for reason, count in dense.items()
    ]


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"
