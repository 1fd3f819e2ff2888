"""Wrong edits of the package that a reviewer could miss, and the tests that must notice them."""

from typing import NamedTuple


class Named(NamedTuple):
    """A wrong edit. tests: pytest's arguments, those that should fail first."""

    name: str
    file: str  # below vlm_jax/
    old: str  # must stand in the file exactly once
    new: str
    tests: tuple[str, ...]


PACKED = (
    "tests/test_packing.py::test_packed_loss_and_gradients_are_those_of_rows_of_their_own[llava]"
)
PEFT, LOGITS = "tests/parity/test_peft.py::", "tests/parity/test_logits.py::"

NAMED = (
    Named(
        "LoRA's scale is left out",
        "models/layers/lora_dot.py",
        "dense(a, dtype), jnp.float32) * scale",
        "dense(a, dtype), jnp.float32)",
        (f"{PEFT}test_our_adapter_in_peft[qwen2_vl-preset]",),
    ),
    Named(
        "rsLoRA divides by the rank",
        "models/layers/linear.py",
        "(rank**0.5 if self.rslora else rank)",
        "rank",
        (f"{PEFT}test_gradients[qwen2_vl-rsLoRA]",),
    ),
    Named(
        "dropout acts on the frozen weight's input too",
        "models/layers/lora_dot.py",
        "y = product(as_rows(x), dense(kernel, dtype))",
        "y = product(as_rows(_dropped(x, rate, seed)), dense(kernel, dtype))",
        ("tests/test_lora.py::test_dropout_acts_on_the_input_of_the_matrices_alone",),
    ),
    Named(
        "the gradient of LoRA's input is not dropped where its input was",
        "models/layers/lora_dot.py",
        "thin = _dropped(thin, rate, seed)",
        "thin = thin",
        ("tests/test_lora_dot.py::test_values_and_gradients[11-3-5-lead0-0.3]",),
    ),
    Named(
        "a run from before there was a choice resumes with other masks",
        "train/fingerprint.py",
        'BEFORE = {"dropout_rng": "threefry"}',
        'BEFORE = {"dropout_rng": "hashed"}',
        ("tests/test_dropout.py::test_a_run_from_before_resumes_with_threefry",),
    ),
    Named(
        "the norms of DoRA's columns are not constants in the backward pass",
        "models/layers/linear.py",
        "jax.lax.stop_gradient(column_norms(kernel, *whole, scale))",
        "column_norms(kernel, *whole, scale)",
        (f"{PEFT}test_gradients[qwen2_vl-DoRA]",),
    ),
    Named(
        "the causal mask shows the next token",
        "models/layers/attention/mask.py",
        "before = distance >= 0",
        "before = distance >= -1",
        ("tests/test_lora.py::test_causality_by_gradients",),
    ),
    Named(
        "attention ignores segments",
        "models/layers/attention/mask.py",
        "same = q.segments_BT[:, :, None] == k.segments_BT[:, None, :]",
        "same = (q.segments_BT[:, :, None] >= 0) & (k.segments_BT[:, None, :] >= 0)",
        (PACKED,),
    ),
    Named(
        "M-RoPE's sections are in reverse order",
        "models/layers/rope.py",
        "return np.repeat(axes, rope.mrope_section)",
        "return np.repeat(axes[::-1], rope.mrope_section)",
        (f"{LOGITS}test_qwen2_vl_logits[one image-right]",),
    ),
    Named(
        "text after an image goes on one position too late",
        "positions.py",
        "position += max(h, w) // merge",
        "position += max(h, w) // merge + 1",
        ("tests/test_positions.py",),
    ),
    Named(
        "generation begins at the prompt's last position",
        "generation.py",
        "position = jnp.max(batch.positions, axis=axes, keepdims=True) + 1",
        "position = jnp.max(batch.positions, axis=axes, keepdims=True)",
        (f"{LOGITS}test_qwen2_vl_generates_the_same_ids[mixed]",),
    ),
    Named(
        "generation does not stop at EOS",
        "generation.py",
        "done = done | (token == end)",
        "done = done | (token == -1 - end)",
        (f"{LOGITS}test_a_row_ends_with_its_eos_and_is_then_padded",),
    ),
    Named(
        "the KV cache leaves a slot empty after each token",
        "models/decoder.py",
        '"start": start + x_BTD.shape[1]',
        '"start": start + x_BTD.shape[1] + 1',
        (f"{LOGITS}test_qwen2_vl_generates_the_same_ids[mixed]",),
    ),
    Named(
        "image features lie one token late",
        "models/vlm.py",
        "index_BT1 = jnp.maximum(image_index_BT, 0)[:, :, None]",
        "index_BT1 = jnp.maximum(image_index_BT - 1, 0)[:, :, None]",
        (f"{LOGITS}test_qwen2_vl_logits[one image-right]",),
    ),
    Named(
        "the loss is divided by rows, not by answer tokens",
        "train/step.py",
        "scale = 1.0 / jnp.maximum(tokens, 1e-9)",
        "scale = 1.0 / batch.tokens.shape[0]",
        (f"{PEFT}test_twenty_steps[llava-LoRA]",),
    ),
    Named(
        "gradients of micro-batches are divided by their number once more",
        "train/step.py",
        "return jax.tree.map(jnp.add, sums, (total, count, grads)), others",
        "grads = jax.tree.map(lambda g: g / micro_batches, grads)\n"
        "        return jax.tree.map(jnp.add, sums, (total, count, grads)), others",
        ("tests/test_sharding.py::test_every_split_gives_the_same_gradient[llava-8-None]",),
    ),
    Named(
        "masters are rounded to bfloat16",
        "train/step.py",
        "masters = copied(trainable, jnp.float32)",
        "masters = copied(copied(trainable, jnp.bfloat16), jnp.float32)",
        ("tests/test_full_tuning.py::test_masters_keep_every_bit",),
    ),
    Named(
        "biases and norms decay",
        "train/optimizer.py",
        '(r"(.*/)?(bias|scale|lora_scale)", False)',
        '(r"(.*/)?(lora_scale)", False)',
        ("tests/test_optim.py::test_updates_equal_torch_adamw_with_clipping_and_groups[0.0]",),
    ),
    Named(
        "the projector's own learning rate is ignored",
        "train/optimizer.py",
        "groups[path].scale,",
        "1.0,",
        ("tests/test_optim.py::test_updates_equal_torch_adamw_with_clipping_and_groups[0.0]",),
    ),
    Named(
        "a head that trains has no gradient",
        "models/layers/cross_entropy.py",
        "if own]",
        "if False]",
        ("tests/test_cross_entropy.py::test_a_head_that_trains_has_its_gradient[lora]",),
    ),
    Named(
        "gradients by hidden states stay in the order of their weights",
        "models/layers/cross_entropy.py",
        "jnp.argsort(order_BT[:, :T])[:, :, None]",
        "order_BT[:, :T, None]",
        ("tests/test_cross_entropy.py::test_losses_and_gradients_are_the_plain_formulas",),
    ),
    Named(
        "the warm-up is a step ahead",
        "train/schedules.py",
        "jnp.where(step < warmup, step / max(1, warmup), factor)",
        "jnp.where(step < warmup, (step + 1) / max(1, warmup), factor)",
        ("tests/test_schedules.py",),
    ),
    Named(
        "the checkpoint with the worst value is the best",
        "train/selection.py",
        "sign = -1.0 if self.greater else 1.0",
        "sign = 1.0 if self.greater else -1.0",
        ("tests/test_best.py::test_the_best_value_wins_and_of_equal_ones_the_earliest",),
    ),
    Named(
        "the two codes of a 4-bit byte are swapped",
        "weights/packing.py",
        "return (pairs[:, :1] << 4) | pairs[:, 1:]",
        "return (pairs[:, 1:] << 4) | pairs[:, :1]",
        ("tests/parity/test_bnb.py::test_every_block[32]",),
    ),
    Named(
        "double quantization's offset is dropped",
        "weights/fourbit.py",
        "return product + self.offset",
        "return product",
        ("tests/parity/test_bnb.py::test_every_block[32]",),
    ),
    Named(
        "kernels are exported as they lie in the tree, not transposed",
        "names.py",
        "return np.ascontiguousarray(leaf.T).reshape(place.shape)",
        "return np.ascontiguousarray(leaf).reshape(place.shape)",
        (f"{LOGITS}test_save_is_the_identity_and_loads_in_transformers[qwen2_vl]",),
    ),
    Named(
        "merged weights lack B A",
        "adapters/lora.py",
        "summed = dense(kernel, jnp.float32) + weight_update(a, b, scale)",
        "summed = dense(kernel, jnp.float32) + 0 * weight_update(a, b, scale)",
        (f"{PEFT}test_merged_equals_adapted_and_loads_in_transformers[qwen2_vl]",),
    ),
    Named(
        "an adapter's file says the scale where alpha belongs",
        "hub/peft_config.py",
        '"lora_alpha": lora.alpha,',
        '"lora_alpha": lora.alpha / lora.rank,',
        (f"{PEFT}test_our_adapter_in_peft[qwen2_vl-preset]",),
    ),
    Named(
        "an image may lie outside the media root",
        "data/media/access.py",
        "if os.path.commonpath((root, real)) != root:",
        "if os.path.commonpath((root, str(path))) != root:",
        ("tests/test_access.py",),
    ),
    Named(
        "the user's turn carries loss",
        "data/text/answers.py",
        "return edge.start, edge.end",
        "return 0, edge.end",
        ("tests/test_chat.py::test_loss_runs_through_the_end_of_turn[plain]",),
    ),
    Named(
        "weights of labels are not shifted with their tokens",
        "batch.py",
        "targets[:-1], shifted[:-1] = tokens[1:], weights[1:]",
        "targets[:-1], shifted[:-1] = tokens[1:], weights[:-1]",
        ("tests/test_pipeline.py::test_batches_hold_their_examples_whole",),
    ),
    Named(
        "all examples of a packed row are one segment",
        "batch.py",
        "batch.segments[row, here] = number",
        "batch.segments[row, here] = 1",
        (PACKED,),
    ),
    Named(
        "every epoch has the order of the first",
        "data/records/mixture.py",
        "rng = np.random.default_rng([seed, epoch])",
        "rng = np.random.default_rng([seed, 0])",
        ("tests/test_mixture.py::test_one_source_is_permuted_by_seed_and_epoch",),
    ),
    Named(
        "a resumed run skips a row",
        "data/planner.py",
        "(cursor, i + 1, first)",
        "(cursor, i + 2, first)",
        ("tests/test_pipeline.py::test_a_resume_is_bit_for_bit",),
    ),
    Named(
        "fsdp spreads nothing",
        "sharding.py",
        '"embed": "fsdp",',
        '"embed": None,',
        ("tests/test_sharding.py::test_every_leaf_has_a_row_and_lora_follows_its_base[llava]",),
    ),
    Named(
        "an unknown key of a config is passed over",
        "config/schema.py",
        "raise unknown_keys(unknown, where, types)",
        "words = {given: words[given] for given in words if given not in unknown}",
        ("tests/test_config.py::test_what_is_wrong_is_named",),
    ),
)
