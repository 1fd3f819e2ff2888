"""Print what the weights of 7B and 13B models take, in 16 bits and in NF4: nothing is allocated.

    python scripts/prove/memory_table.py [TOPOLOGY]

With a topology, as "h100:1" (`pip install "vlm_jax[plan]"`), the recipes' steps are compiled for
it too, and what they take as arguments and in all is printed.
"""

import math
import sys
from pathlib import Path

import jax.numpy as jnp

import vlm_jax
from vlm_jax import plan, quantization
from vlm_jax.models.reference_configs import KNOWN
from vlm_jax.trees import flatten
from vlm_jax.weights import FourBit

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = {
    "llava-hf/llava-1.5-7b-hf": "llava15_7b",
    "llava-hf/llava-1.5-13b-hf": "llava15_13b",
    "Qwen/Qwen2-VL-7B-Instruct": "qwen2_vl_7b",
    "Qwen/Qwen2-VL-72B-Instruct": "qwen2_vl_72b",
}


def nbytes(leaf) -> int:
    if isinstance(leaf, FourBit):
        return leaf.nbytes
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize


def main(topology: str | None) -> None:
    print("GB of weights               all   language model   embeddings, head   tower, projector")
    for name, recipe in RECIPES.items():
        model = vlm_jax.from_config(KNOWN[name], "bfloat16")
        for quantize in (None, "nf4-dq"):
            parts = dict.fromkeys(
                ("language_model", "embeddings", "head", "vision", "projector"), 0
            )
            for path, leaf in flatten(quantization.abstract(model, quantize)).items():
                parts[model.component(path)] += nbytes(leaf)
            gb = {part: size / 1e9 for part, size in parts.items()}
            print(
                f"{recipe:13} {quantize or '16 bits':7} {sum(gb.values()):9.2f} "
                f"{gb['language_model']:16.2f} {gb['embeddings'] + gb['head']:18.2f} "
                f"{gb['vision'] + gb['projector']:18.2f}"
            )
    for recipe in RECIPES.values() if topology else ():
        config = str(CONFIGS / f"{recipe}_qlora.py")
        once = {"training.gradient_accumulation_steps": 1, "training.optim": "adamw"}
        for storage, change in (("nf4-dq", {}), ("16 bits", {"model.quantize": None})):
            try:
                found = plan.memory(
                    plan.compile_step(config, topology, overrides={**once, **change})
                )
            except vlm_jax.UserError as error:
                print(f"{recipe} in {storage} on {topology}: {error!s:.60}")
                continue
            print(
                f"{recipe} in {storage} on {topology}: {found.arguments / 1e9:.2f} GB of arguments "
                f"(weights, LoRA, moments, a batch), {found.total / 1e9:.2f} GB in all"
            )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
