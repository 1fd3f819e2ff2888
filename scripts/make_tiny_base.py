"""Trains the tiny base model, a small Qwen2-VL, from nothing on scenes that it draws itself.

    python scripts/make_tiny_base.py --out assets/qwen2_vl_tiny_scenes

It takes 65 to 80 minutes on two CPU cores, as estimated from the time of its steps. Interrupted,
the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import queue
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# One device a core: XLA runs operations of this size on one thread.
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={os.cpu_count()}")

import easy_vqa
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny_base import tokenizer as tiny_tokenizer
from tiny_base.probe import Predict, Probe, whether
from tiny_base.questions import conversation
from tiny_base.rows import Encoder, Kind
from tiny_base.scenes import draw_scene
from tiny_base.sight import teach
from tokenizers import Tokenizer
from transformers import Qwen2VLImageProcessorPil

import vlm_jax
from vlm_jax.sharding import replicate, shard_batch
from vlm_jax.trees import flatten, unflatten

HERE = Path(__file__).parent / "tiny_base"
IMAGE = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
# 64 x 64 stays as it is; from 16 to 256 patches.
PIXELS = {"min_pixels": 32 * 32, "max_pixels": 128 * 128}
TEXTS_FOR_TOKENIZER = 24_000
BRANCH_END = re.compile(r".*/(attn/proj|fc2|o_proj|down_proj)/kernel")

# A batch is of one kind, so that the step compiles once for each. Lengths were chosen so that at
# most the last turn of a long conversation is left out.
ONE = Kind(((64, 64),), shapes=1, turns=0, length=28, rows=32)
FEW = Kind(((64, 64),), shapes=3, turns=0, length=44, rows=32)
TALK_ONE = Kind(((64, 64),), shapes=1, turns=2, length=80, rows=32, caption=0.3)
TALK = Kind(((64, 64),), shapes=4, turns=5, length=144, rows=16)
WIDE = Kind(((96, 64), (64, 96)), shapes=4, turns=5, length=152, rows=16)
TIGHT = Kind(((48, 80), (80, 48)), shapes=3, turns=4, length=128, rows=16)

BRIEF_ONE = Kind(((64, 64),), shapes=1, turns=4, length=128, rows=32, brief=0.8)
BRIEF = Kind(((64, 64),), shapes=3, turns=3, length=104, rows=32, brief=0.8)

# Until which share of a phase: how often a batch is of which kind. As larger models do, it learns
# to name what it sees from bare pairs of picture and caption first, and to talk afterwards.
TALK_STAGES = (
    (0.10, ((1.0, ONE),)),
    (0.25, ((0.3, ONE), (0.7, FEW))),
    (1.0, ((0.10, FEW), (0.45, TALK_ONE), (0.30, TALK), (0.10, WIDE), (0.05, TIGHT))),
)
# At last it learns to answer in one word, in small letters: tokens that no sentence begins with.
# To tell whether the kind asked for is the kind seen is learned last.
BRIEF_STAGES = ((1.0, ((0.6, BRIEF_ONE), (0.25, BRIEF), (0.15, TALK))),)
# The tower has learned to see before (tiny_base/sight.py) and stays as it is from there on.
TABLE = [(r"model/visual/merger/.*", "full"), (r"model/visual/.*", "frozen"), (r".*", "full")]


def describe_architecture(tokenizer: Tokenizer) -> dict:
    """Return config.json as Hugging Face's Qwen2-VL checkpoints have it."""
    token = tokenizer.token_to_id
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "attention_dropout": 0.0,
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "vision_token_id": token("<|vision_pad|>"),
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "hidden_act": "silu",
        "hidden_size": 192,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": 1024,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [6, 9, 9]},
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": tokenizer.get_vocab_size(),
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 4,
            "embed_dim": 192,
            "hidden_act": "quick_gelu",
            "hidden_size": 192,
            "in_channels": 3,
            "mlp_ratio": 4,
            "num_heads": 4,
            "patch_size": IMAGE["patch_size"],
            "spatial_merge_size": IMAGE["merge_size"],
            "temporal_patch_size": IMAGE["temporal_patch_size"],
        },
    }


def write_companions(directory: Path, tokenizer: Tokenizer) -> None:
    """Write what stands beside the weights: tokenizer, image and generation settings."""
    directory.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer.save(tokenizer, (HERE / "chat_template.jinja").read_text(), directory)
    processor = Qwen2VLImageProcessorPil(**IMAGE, **PIXELS).to_dict()
    processor |= {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        **PIXELS,
    }
    generation = {
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": [
            tokenizer.token_to_id("<|im_end|>"),
            tokenizer.token_to_id("<|endoftext|>"),
        ],
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "do_sample": False,
    }
    for name, content in (
        ("preprocessor_config.json", processor),
        ("generation_config.json", generation),
    ):
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def texts(seed: int) -> list[str]:
    """Return what is said about many scenes: the tokenizer's corpus."""
    rng = np.random.default_rng(seed)
    said: list[str] = []
    while len(said) < TEXTS_FOR_TOKENIZER:
        scene = draw_scene(rng, 64, 64, int(rng.integers(1, 5)))
        for turn in conversation(rng, scene, 6, 0.7):
            said.extend(turn)
    return said


@dataclasses.dataclass(frozen=True)
class Phase:
    """A run of its own: steps, peak learning rate, what its batches hold, what seeds them."""

    name: str
    steps: int
    rate: float
    stages: tuple
    seed: tuple[int, ...]

    def kind(self, rng: np.random.Generator, step: int) -> Kind:
        for until, kinds in self.stages:
            if step / self.steps < until:
                return kinds[rng.choice(len(kinds), p=[share for share, _ in kinds])][1]
        raise ValueError(f"no stage of {self.name} covers step {step}")


def batches(encoder: Encoder, model: vlm_jax.Model, phase: Phase, first: int) -> Iterator:
    """Yield the batches of the steps from `first` on, made ahead by a thread.

    A batch depends on the seed and its step alone, so a resumed run goes on as if never stopped.
    """
    ready: queue.Queue = queue.Queue(maxsize=4)

    def produce() -> None:
        for step in range(first, phase.steps):
            rng = np.random.default_rng((*phase.seed, step))
            arrays = encoder.batch(rng, phase.kind(rng, step))
            ready.put(model.batch(**arrays))

    threading.Thread(target=produce, daemon=True).start()
    for _ in range(first, phase.steps):
        yield ready.get()


def make_optimizer(phase: Phase, args: argparse.Namespace) -> optax.GradientTransformation:
    warm, cool = args.warmup, phase.steps - args.warmup
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, phase.rate, warm),
            optax.cosine_decay_schedule(phase.rate, cool, 0.02),
        ],
        [warm],
    )
    decayed = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=args.decay, mask=decayed),
    )


def draw_weights(model: vlm_jax.Model, seed: int) -> dict:
    """Return random parameters with kernels of variance 1 / fan-in, smaller where a branch ends.

    The customary deviation of 0.02 is meant for widths in the thousands.
    """
    flat = flatten(model.init(jax.random.key(seed)))
    for path, leaf in flat.items():
        if path.endswith("/kernel"):
            deviation = leaf.shape[-2] ** -0.5
            if BRANCH_END.fullmatch(path):
                deviation /= (2 * leaf.shape[0]) ** 0.5  # stacked: the leading axis is the depth
            flat[path] = leaf * (deviation / leaf.std())
    return unflatten(flat)


def save_state(path: Path, state: vlm_jax.TrainState) -> None:
    leaves = jax.tree.leaves((state.step, state.trainable, state.opt_state))
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, *[np.asarray(leaf) for leaf in leaves])
    partial.replace(path)  # so that an interruption leaves a whole file


def load_state(path: Path, state: vlm_jax.TrainState) -> vlm_jax.TrainState:
    like = (state.step, state.trainable, state.opt_state)
    with np.load(path) as file:
        leaves = [jnp.asarray(file[name]) for name in file.files]
    step, trainable, opt_state = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return dataclasses.replace(state, step=step, trainable=trainable, opt_state=opt_state)


def run(phase: Phase, args, model, encoder, trainable, frozen, mesh, measure) -> dict:
    """Train one phase, from its checkpoint if there is one, and return what trained."""
    tx = make_optimizer(phase, args)
    state = vlm_jax.init_state(trainable, tx, seed=args.seed)
    checkpoint = args.work / f"{phase.name}.npz"
    if checkpoint.exists():
        state = load_state(checkpoint, state)
        print(f"{phase.name}: going on from step {int(state.step)}", flush=True)
    state = replicate(state, mesh)
    step = jax.jit(vlm_jax.make_step(model, tx), donate_argnums=0)
    first, began, saved, losses = int(state.step), time.time(), time.time(), []
    ahead = batches(encoder, model, phase, first)
    for number, batch in zip(itertools.count(first + 1), ahead):
        state, metrics = step(state, frozen, shard_batch(batch, mesh))
        losses.append(metrics["loss"])
        if number % args.log_every == 0:
            loss, losses = float(np.mean(jax.device_get(losses))), []
            seconds = time.time() - began
            print(f"{phase.name} {number}  {seconds:.0f} s  loss {loss:.4f}", flush=True)
        if number % args.probe_every == 0:
            # Before it can chat every answer would be wrong for its form alone.
            seen = measure(state.trainable, talk=number / phase.steps > phase.stages[0][0])
            line = "  ".join(f"{topic} {value:.3f}" for topic, value in seen.items())
            print(f"{phase.name} {number}  {line}", flush=True)
        if time.time() - saved > args.save_every or number == phase.steps:
            save_state(checkpoint, state)
            saved = time.time()
    return state.trainable


def train(args: argparse.Namespace) -> None:
    work = args.work
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer.json").exists():
        write_companions(work, tiny_tokenizer.train(texts(args.seed)))
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    asked = frozenset(easy_vqa.get_train_questions()[0]) | frozenset(
        easy_vqa.get_test_questions()[0]
    )
    # The fine-tuning task must stay unseen.
    encoder = Encoder(tokenizer, Qwen2VLImageProcessorPil(**IMAGE, **PIXELS), asked)
    model = vlm_jax.from_config(describe_architecture(tokenizer), dtype=args.dtype)

    params = draw_weights(model, args.seed)
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters", flush=True)
    params = teach(
        model, params, encoder.processor, steps=args.sight_steps, rate=args.sight_rate,
        seed=args.seed, work=work,
    )  # fmt: skip
    trainable, frozen = vlm_jax.split(params, TABLE)
    mesh = vlm_jax.make_mesh()
    trainable, frozen = replicate((trainable, frozen), mesh)
    likeliest = jax.jit(lambda params, batch: model.apply({"params": params}, batch).argmax(-1))
    probe = Probe(encoder)

    def predict(trainable: dict) -> Predict:
        params = vlm_jax.join(trainable, frozen)
        return lambda arrays: np.asarray(likeliest(params, model.batch(**arrays)))

    def measure(trainable: dict, talk: bool) -> dict[str, float]:
        return probe.measure(predict(trainable), talk)

    for phase in (
        Phase("talk", args.steps, args.rate, TALK_STAGES, (args.seed,)),
        Phase("brief", args.brief_steps, args.brief_rate, BRIEF_STAGES, (args.seed, 2)),
    ):
        trainable = run(phase, args, model, encoder, trainable, frozen, mesh, measure)
    vlm_jax.save_pretrained(model, vlm_jax.join(trainable, frozen), args.out, dtype="bfloat16")
    write_companions(args.out, tokenizer)
    card = (HERE / "card.md").read_text()
    for mark, seen in (
        ("MEASURED", measure(trainable, talk=True)),
        ("WHETHER", whether(encoder, predict(trainable))),
    ):
        rows = [f"| {topic} | {100 * value:.1f} % |" for topic, value in seen.items()]
        card = card.replace(mark, "\n".join(["| held-out scenes | right |", "|---|---|", *rows]))
    (args.out / "README.md").write_text(card)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/tiny_base"), help="folder of what a resume needs"
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--sight-steps", type=int, default=2600)
    parser.add_argument("--sight-rate", type=float, default=1.5e-3)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--brief-steps", type=int, default=2000)
    parser.add_argument("--brief-rate", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.01)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--probe-every", type=int, default=250)
    parser.add_argument("--save-every", type=float, default=180, help="seconds between checkpoints")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
