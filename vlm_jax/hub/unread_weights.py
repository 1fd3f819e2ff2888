"""Weights beside the files that are read: refused by name, never ignored.

docs/DESIGN.md, section 4, lists what each directory may hold and what becomes of it.
"""

import fnmatch
from collections.abc import Iterable
from pathlib import Path

from vlm_jax.errors import UserError, refuse

PEFT_WEIGHTS = "adapter_model.safetensors"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.npz")
# How such weights and the adapter become one; own, path: the adapter's weights and the others.
ADD = (
    "It is a pickle, which can run code when opened. Add its tensors to the adapter's own file "
    'once where torch is installed, then delete it: python -c "import torch; from '
    "safetensors.torch import load_file as l, save_file as s; f = '{own}'; more = "
    "torch.load('{path}', weights_only=True); s(l(f) | {{k: v.contiguous() for k, v in "
    "more.items()}}, f, {{'format': 'pt'}})\""
)
CONVERT = (
    "Convert the whole model to its Hugging Face layout with transformers' "
    "convert_llava_weights_to_hf.py and give that as the model."
)
MERGE = "Merge both with the program that wrote them, and give that as the model."
# Of weights that trained beside the matrices: the file -> who writes it there, and the remedy.
TRAINED = {
    "non_lora_state_dict.bin": ("2U1's trainers", ADD),
    "non_lora_trainables.bin": ("LLaVA's trainer", ADD),
    "mm_projector.bin": ("LLaVA's first stage", CONVERT),
    "vit.safetensors": ("ms-swift", MERGE),
    "model_head.safetensors": ("the adapters library", MERGE),
}
# What else is called so and changes no answer: a trainer's state, the same weights once more as a
# pickle, and the value head of reinforcement learning.
HARMLESS = (
    *("optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*", "training_args*"),
    *("sampler*", "dl_state_dict*"),
    *("adapter_model.bin", "pytorch_adapter.bin", "value_head.*", "v_head.*"),
)


def adapter_weights(directory: str | Path, file: str) -> tuple[Path, Path]:
    """Return an adapter's directory and the path of its weights, which lie in a file of that name.

    Raises `UserError` where it is not there, and for other weights beside it.
    """
    directory = Path(directory).expanduser()
    path = directory / file
    if not directory.is_dir():
        raise UserError(f"There is no adapter directory '{directory}'.")
    if not path.is_file():
        remedy = (
            "LoRA is in adapter_model.safetensors, read by load_peft and load_lora, a bottleneck "
            "adapter in adapter.safetensors, read by load_adapter. A pickle (*.bin) is not read: "
            "load it with the library that wrote it and save it as safetensors."
        )
        inside = sorted(one.parent.name for one in directory.glob("*/adapter_config.json"))
        if inside:
            remedy = (
                f"Adapters lie in it: {', '.join(inside[:6])}. Give one of them, such as "
                f"'{directory / inside[0]}'."
            )
        raise UserError(f"'{directory}' holds no {file}. {remedy}")
    _check_beside(directory, file)
    return directory, path


def _check_beside(directory: Path, own: str) -> None:
    """Raise `UserError` for weights in an adapter's directory that are not its `own` file."""
    weights = [name for name in _weights(directory) if name != own]
    for name in [n for n in weights if not any(fnmatch.fnmatch(n, known) for known in HARMLESS)]:
        writer, remedy = TRAINED.get(name, (None, ""))
        if writer is None:
            raise UserError(
                f"The adapter's directory '{directory}' holds '{name}' too, which may be weights "
                f"that were trained beside it, and is not read. If it does not belong to the "
                f"adapter, move it elsewhere; otherwise merge both with the program that wrote "
                "them."
            )
        remedy = remedy.format(own=directory / PEFT_WEIGHTS, path=directory / name)
        raise UserError(
            f"The adapter's directory '{directory}' holds '{name}' too: {writer} wrote it, with "
            f"weights that were trained in full beside LoRA. It is not read, and without it the "
            f"model would not be the trained one. {remedy}"
        )


def check_base(directory: Path, read: Iterable[str]) -> None:
    """Raise `UserError` where a checkpoint's directory holds weights that change its answers.

    read: the files of weights that are read.
    """
    read, found = set(read), _weights(directory)
    for name in found:
        if name in TRAINED and name not in read:
            raise UserError(
                f"'{directory}' holds '{name}' beside a whole checkpoint: {TRAINED[name][0]} wrote "
                f"it, with weights that take the place of the checkpoint's. It is not read: merge "
                f"both with the program that wrote them, or move it elsewhere."
            )
    refuse(
        (
            PEFT_WEIGHTS in found,
            f"'{directory}' holds a whole checkpoint and an adapter, '{PEFT_WEIGHTS}', and "
            f"transformers would answer with both. Move the adapter's files to a directory of "
            f"their own, and give that as the adapter where it is meant.",
        ),
        (
            read and "model.safetensors" in found and "model.safetensors" not in read,
            f"'{directory}' holds model.safetensors and an index of other files, and readers "
            f"differ in which comes first. Delete the ones that are not meant.",
        ),
    )


def _weights(directory: Path) -> list[str]:
    return sorted({path.name for pattern in WEIGHTS for path in directory.glob(pattern)})
