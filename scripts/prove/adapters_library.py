"""Bottleneck adapters against the `adapters` library itself, on the decoder of a tiny LLaVA.

    pip install --target DIR --no-deps adapters==1.3.0 transformers==4.57.6 tokenizers==0.22.2 \\
        "huggingface-hub<1"
    PYTHONPATH=DIR python scripts/prove/adapters_library.py

That library needs an older transformers than this one's tests, hence the directory. It knows no
vision-language models, so its Llama stands for the decoder and tensors lose or get the prefix
"model.language_model.". Of each kind our file is read there and its file here, and the final hidden
states of text are compared. Exits with 1 where they differ by more than 1e-4 of their deviation,
as logits may in the tests.
"""

import sys
import tempfile
from pathlib import Path

import adapters
import jax
import numpy as np
import torch
from adapters import DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaModel

import vlm_jax
from vlm_jax.models.layers.bottleneck import is_adapter
from vlm_jax.names import disk_places, to_disk
from vlm_jax.trees import flatten, unflatten

PREFIX = "model.language_model."
SIZES = dict(
    hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, vocab_size=120, rms_norm_eps=1e-6,
)  # fmt: skip
VISION = dict(
    model_type="clip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, image_size=28, patch_size=14,
)  # fmt: skip
LIBRARY = {"houlsby": DoubleSeqBnConfig, "pfeiffer": SeqBnConfig, "parallel": ParBnConfig}
ALLOWED = 1e-4


def library_model(model: vlm_jax.Model, params: dict) -> LlamaModel:
    """Return the library's Llama with our decoder's weights."""
    llama = LlamaModel(LlamaConfig(**SIZES, pad_token_id=0)).eval()
    flat = {path: leaf for path, leaf in flatten(params).items() if "/language_model/" in path}
    state = {}
    for name, place in disk_places(
        model, {path: leaf.shape for path, leaf in flat.items()}
    ).items():
        leaf = np.asarray(flat[place.path])[... if place.layer is None else place.layer]
        state[name.removeprefix(PREFIX)] = torch.tensor(to_disk(place, leaf))
    llama.load_state_dict(state)
    adapters.init(llama)
    return llama


def renamed(source: Path, target: Path, name: str, new: str) -> None:
    """Copy an adapter directory with one prefix of its tensors' names for another."""
    target.mkdir()
    tensors = load_file(source / "adapter.safetensors")
    held = {new + key.removeprefix(name): tensor for key, tensor in tensors.items()}
    save_file(held, target / "adapter.safetensors", metadata={"format": "pt"})
    (target / "adapter_config.json").write_text((source / "adapter_config.json").read_text())


def difference(model: vlm_jax.Model, params: dict, llama: LlamaModel) -> float:
    """Return the largest difference of final hidden states over their deviation."""
    ids = np.random.default_rng(0).integers(1, 99, (2, 17))
    ours = model.apply({"params": params}, model.batch(input_ids=ids), method="hidden")[0]
    with torch.no_grad():
        theirs = llama(input_ids=torch.from_numpy(ids)).last_hidden_state.numpy()
    return float(np.abs(np.asarray(ours) - theirs).max() / theirs.std())


def main() -> int:
    config = {"model_type": "llava", "text_config": {"model_type": "llama", **SIZES}}
    base = vlm_jax.from_config({**config, "vision_config": VISION, "image_token_index": 100})
    plain = jax.tree.map(
        lambda leaf: leaf * 5 if leaf.ndim > 1 else leaf, base.init(jax.random.key(0))
    )
    good = True
    print(f"without adapters {difference(base, plain, library_model(base, plain)):.1e}")
    for kind, there in LIBRARY.items():
        for norm in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder)
                adapter = vlm_jax.Adapter(kind, 4, norm=norm)
                model, params = vlm_jax.add_adapter(base, plain, adapter, jax.random.key(1))
                flat = flatten(params)
                flat |= {path: leaf + 0.1 for path, leaf in flat.items() if is_adapter(path)}
                params = unflatten(flat)
                vlm_jax.save_adapter(model, params, place / "ours")
                renamed(place / "ours", place / "for_library", PREFIX, "")
                llama = library_model(base, plain)
                name = llama.load_adapter(str(place / "for_library"), use_safetensors=True)
                llama.set_active_adapters(name)
                out = difference(model, params, llama)

                llama = library_model(base, plain)
                llama.add_adapter("own", config=there(reduction_factor=4, ln_before=norm))
                llama.set_active_adapters("own")
                with torch.no_grad():
                    for key, parameter in llama.named_parameters():
                        if ".adapters.own." in key:
                            parameter.add_(0.1 * torch.randn_like(parameter))
                state = {
                    k: v.numpy() for k, v in llama.state_dict().items() if ".adapters.own." in k
                }
                llama.save_adapter(str(place / "library"), "own")
                save_file(state, place / "library" / "adapter.safetensors")
                renamed(place / "library", place / "for_us", "", PREFIX)
                read = vlm_jax.load_adapter(base, plain, place / "for_us")
                back = difference(*read, llama)
            print(f"{kind:9s} norm={norm!s:5s} ours there {out:.1e}, theirs here {back:.1e}")
            good &= max(out, back) <= ALLOWED
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
