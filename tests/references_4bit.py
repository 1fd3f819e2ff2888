"""References that transformers quantizes to 4 bits by bitsandbytes, and what they stand for."""

from pathlib import Path

import bitsandbytes as bnb
import torch
from references import quiet
from transformers import BitsAndBytesConfig

# Everything outside the language model, in the names of both families.
OUTSIDE = ["lm_head", "model.visual", "model.vision_tower", "model.multi_modal_projector"]


def four_bit(cls: type, directory: Path, kind: str = "nf4-dq", skip: list[str] | None = None):
    """Return a checkpoint as transformers loads it with `load_in_4bit`, computed in float32."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind.removesuffix("-dq"),
        bnb_4bit_use_double_quant=kind.endswith("-dq"),
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skip,
    )
    with quiet():
        return cls.from_pretrained(directory, quantization_config=config, dtype=torch.float32)


def layers_4bit(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def decoded(weight) -> torch.Tensor:
    """Return a 4-bit weight's values, float32 code times scale, by plain torch.

    bitsandbytes' own decoding on the CPU is wrong where a block is longer than a row.
    """
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    pairs = weight.data.reshape(-1)
    codes = torch.stack([pairs >> 4, pairs & 15], -1).reshape(-1)[: state.shape.numel()]
    scales = absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return (state.code[codes.long()] * scales).reshape(state.shape)


def make_dense(model: torch.nn.Module) -> torch.nn.Module:
    """Put dense layers of the decoded values in place of the 4-bit ones."""
    for name, layer in layers_4bit(model).items():
        plain = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight.data = decoded(layer.weight)
        if layer.bias is not None:
            plain.bias.data = layer.bias.data
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, plain)
    return model.eval()
