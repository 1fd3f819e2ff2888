"""Which layers and modules a Linen module has: found by a trace of a call, given or guessed."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.linen.parts import Found, Layer, Other, Site, owners
from vlm_jax.linen.stacks import joined, unboxed
from vlm_jax.linen.trace import Seen, see


def look(
    module: nn.Module, params: Mapping[str, Any], flat: Mapping[str, Any], inputs: Any
) -> Found:
    """Return what a module has; flat: params by path.

    inputs: what the module is called with, or None: then calls with such arrays as the parameters'
    shapes suggest are tried. Where none works, a kernel of two axes counts as nn.Dense's, which
    `apply` checks, and others are `Other`. Raises `UserError` where a call with `inputs` fails.
    """
    seen: Seen | None = None
    if inputs is not None:
        try:
            seen = see(module, params, flat, *as_arguments(inputs))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"The module could not be called with the `inputs` that adapt was given: "
                f"{type(error).__name__}: {str(error)[:300]}. Give what `module.apply` takes "
                f"behind the variables: an array, a tuple of arguments, or a dict of named ones."
            ) from error
    else:
        for arguments in guesses(flat):
            try:
                seen = see(module, params, flat, arguments, {})
                break
            except UserError:
                raise
            except Exception:  # whatever a foreign module raises for what it does not take
                continue
    layers = [_found(path, name, flat, seen) for path, name in owners(flat).items()]
    above = {path[:i] for path in flat for i in range(len(path)) if path[i] == "/"}
    sites: dict[str, Site | None] = dict.fromkeys(("", *sorted(above)))
    return Found(layers, {**sites, **(seen.sites if seen else {})})


def as_arguments(inputs: Any) -> tuple[tuple, dict]:
    """Return (args, kwargs) of `adapt`'s inputs."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def guesses(flat: Mapping[str, Any]) -> Iterator[tuple]:
    """Yield arguments that a module with such parameters may take: tokens, images, vectors.

    What is found does not hang on them: a layer's kind and axes are the same for any call.
    """
    shapes = {path: tuple(unboxed(leaf).shape) for path, leaf in flat.items()}
    if any(path.split("/")[-1] == "embedding" for path in shapes):
        yield (jax.ShapeDtypeStruct((1, 4), jnp.int32),)
    kernels = {path: shape for path, shape in shapes.items() if path.split("/")[-1] == "kernel"}
    patches = next((shape for shape in kernels.values() if len(shape) == 4), None)
    if patches is not None:  # as many as a table of positions has rows, with a class token or not
        height, width, channels, _ = patches
        tables = [shape for shape in shapes.values() if shape[-2:-1] and set(shape[:-2]) <= {1}]
        counts = dict.fromkeys(shape[-2] - extra for shape in tables for extra in (0, 1))
        sides = dict.fromkeys(math.isqrt(count) for count in counts if _is_square(count))
        for side in (*sides, 8):
            image = (1, side * height, side * width, channels)
            yield (jax.ShapeDtypeStruct(image, jnp.float32),)
    firsts = [shape[0] for shape in kernels.values()]  # a stack's is the number of its layers
    for width in dict.fromkeys((*firsts, *(shape[1] for shape in kernels.values()))):
        yield (jax.ShapeDtypeStruct((1, 4, width), jnp.float32),)
        yield (jax.ShapeDtypeStruct((1, width), jnp.float32),)


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _found(path: str, name: str, flat: Mapping[str, Any], seen: Seen | None) -> Layer | Other:
    if seen is not None and path in seen.layers:
        return seen.layers[path]
    shape = tuple(unboxed(flat[joined(path, name)]).shape)
    if name == "kernel" and len(shape) == 2:
        return Layer(path, name, shape, (0,), (1,))
    return Other(
        path,
        f"no call that was tried reached it, and its {name} {list(shape)} alone does not tell "
        f"which axes are heads, layers or inputs: give adapt `inputs=`, what `module.apply` takes "
        f"behind the variables",
        unknown=True,
    )
