"""Checkpoint directories without weights, made in memory: config, tokenizer, template, images."""

import json
from pathlib import Path

from PIL import Image
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, Gemma3Config, LlavaConfig, PreTrainedTokenizerFast

TEXT = ["What color is the ball? It is red, and the box is blue. You are a helpful assistant."] * 4

# Qwen2-VL's own template, in short.
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The same with marks around what TRL's training template marks.
CHATML_MARKED = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% for content in message['content'] %}{{ content['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# LLaVA-1.5's (llava-hf): no token ends an answer.
VICUNA_MARKED = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
VICUNA = VICUNA_MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


VISIONS = {
    "qwen2_vl": dict(depth=1, embed_dim=16, num_heads=2, hidden_size=16, patch_size=4, mlp_ratio=2),
    "qwen2_5_vl": dict(
        depth=2, hidden_size=16, num_heads=2, out_hidden_size=16, patch_size=4,
        intermediate_size=12, window_size=16, fullatt_block_indexes=[1], tokens_per_second=2,
    ),
    "qwen3_vl": dict(
        depth=2, hidden_size=16, num_heads=2, out_hidden_size=16, patch_size=4,
        intermediate_size=12, num_position_embeddings=9, deepstack_visual_indexes=[0],
    ),
}  # fmt: skip


def qwen2_vl_files(
    directory: Path, template: str = CHATML, family: str = "qwen2_vl", **image_settings
) -> Path:
    """Write a tiny Qwen2-VL's files: byte-level BPE, patches of 4 x 4, tokens of 8 x 8 pixels.

    family: or another of the line's, a key of VISIONS.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(special)
    ids = {name: tokenizer.token_to_id(name) for name in special}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.save_pretrained(directory)
    config = AutoConfig.for_model(
        family,
        vision_config=VISIONS[family],
        text_config=dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=512,
            bos_token_id=None,
            eos_token_id=ids["<|im_end|>"],
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]),
            **({"head_dim": 8} if family == "qwen3_vl" else {}),
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 4,
        "min_pixels": 8 * 8,
        "max_pixels": 8 * 8 * 40,
        **image_settings,
    }
    return _finish(directory, config, template, settings)


def llava_files(directory: Path, template: str = VICUNA_MARKED, **image_settings) -> Path:
    """Write a tiny LLaVA-1.5's files: Llama-like BPE with BOS, CLIP of 16 x 16 pixels."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    spaces = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence(
        [spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = list("▁\nABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz?.,:<>")
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=150,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens(["<image>", "<pad>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    fast.save_pretrained(directory)
    config = LlavaConfig(
        vision_config=dict(
            model_type="clip_vision_model",
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        text_config=dict(
            model_type="llama",
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=200,
        ),
        image_token_id=tokenizer.token_to_id("<image>"),
    )
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
        **image_settings,
    }
    return _finish(directory, config, template, settings)


# Gemma 3's own template, in short.
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) }}"
    "{{ '\n' }}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<start_of_image>{% else %}{{ content['text'] | trim }}{% endif %}{% endfor %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma3_files(directory: Path, template: str = GEMMA, **image_settings) -> Path:
    """Write a tiny Gemma 3's files: BPE with runs of newlines, 4 tokens for 16 x 16 pixels."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    spaces = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
    alphabet = list("▁\nABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz?.,:<>")
    tokenizer.train_from_iterator(
        ["\n" * 9, *TEXT],
        trainers.BpeTrainer(
            vocab_size=160,
            special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer.add_special_tokens(["<start_of_turn>", "<end_of_turn>", *named.values()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=named,
    )
    fast.save_pretrained(directory)
    config = Gemma3Config(
        vision_config=dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
            vision_use_head=False,
        ),
        text_config=dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            vocab_size=200,
            sliding_window=3,
            sliding_window_pattern=2,
            query_pre_attn_scalar=8,
        ),
        image_token_index=tokenizer.token_to_id("<image_soft_token>"),
        boi_token_index=tokenizer.token_to_id("<start_of_image>"),
        eoi_token_index=tokenizer.token_to_id("<end_of_image>"),
        mm_tokens_per_image=4,
    )
    settings = {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 16, "width": 16},
        **image_settings,
    }
    return _finish(directory, config, template, settings)


def _finish(directory: Path, config, template: str, settings: dict) -> Path:
    (directory / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    (directory / "chat_template.jinja").write_text(template)
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return directory


def text(role: str, words: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": words}]}


def image_and_text(words: str, images: int = 1) -> dict:
    parts = [{"type": "image"}] * images + [{"type": "text", "text": words}]
    return {"role": "user", "content": parts}


def write_image(path: Path, height: int, width: int, seed: int = 0) -> Path:
    import numpy as np

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path
