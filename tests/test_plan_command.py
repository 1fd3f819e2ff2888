"""`vlm-jax plan`: what it counts, held against the compiler and other counts, and what it says."""

import dataclasses
import io
import json
import math
import re
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from test_plan import on_chip
from tiers import fast

from vlm_jax import UserError, config, plan
from vlm_jax.cli import main
from vlm_jax.hardware import DEVICES, hardware, slice_shape
from vlm_jax.models.layers.cross_entropy import CHUNK_POSITIONS
from vlm_jax.models.reference_configs import KNOWN
from vlm_jax.plan import leaves, work
from vlm_jax.plan.fit import settings
from vlm_jax.plan.program import Collective, collectives
from vlm_jax.plan.report import ESTIMATED, plan_step, refused
from vlm_jax.plan.show import flops, seconds, show, size
from vlm_jax.plan.speed import sent, speed
from vlm_jax.plan.step import prepare, readable
from vlm_jax.plan.traffic import bytes_accessed
from vlm_jax.sharding import make_mesh
from vlm_jax.train.losses import loss
from vlm_jax.trees import flatten

WIDTH = 256
# Parts of the peak that are no arguments.
BESIDE = ("gradients, activations, temporaries", "results", "code", "alignment")


def qwen(directory, layers=2):
    """Write the config.json of a Qwen2-VL whose shards over 2 x 2 devices fill a TPU's tiles."""
    sizes = dict(
        hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=512, image_token_id=500, video_token_id=501,
        rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]},
    )  # fmt: skip
    raw = {**KNOWN["Qwen/Qwen2-VL-7B-Instruct"], **sizes}
    tower = dict(depth=2, embed_dim=WIDTH, num_heads=4, hidden_size=WIDTH)
    raw["vision_config"] = {**raw["vision_config"], **tower}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def llava(directory):
    """Write the config.json of a LLaVA, whose tower's last layer is never run."""
    raw = json.loads(json.dumps(KNOWN["llava-hf/llava-1.5-7b-hf"]))
    raw["text_config"].update(
        hidden_size=128, intermediate_size=256, num_attention_heads=4, num_hidden_layers=3,
        vocab_size=512,
    )  # fmt: skip
    raw["vision_config"].update(
        hidden_size=64, image_size=56, intermediate_size=128, num_attention_heads=4,
        num_hidden_layers=4,
    )  # fmt: skip
    raw.update(vocab_size=512, image_token_index=500, pad_token_id=1)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def configured(directory, *changes):
    return config.load(
        None,
        [
            f"model.name_or_path={directory}",
            "data.max_seq_length=128",
            "data.max_pixels=12544",
            *changes,
        ],
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A config file of the Qwen2-VL above."""
    place = tmp_path_factory.mktemp("plan")
    qwen(place / "base")
    text = json.dumps(config.to_dict(configured(place / "base", "lora.r=128")))
    (place / "tiny.json").write_text(text)
    return place / "tiny.json"


@pytest.fixture(scope="module")
def report(tiny):
    mesh = {"mesh.fsdp": 2, "mesh.tensor": 2}
    return plan_step(tiny, "v5e-4", overrides=mesh, parameters=True)


# What is counted


def test_arguments_counted_leaf_by_leaf_are_the_compilers(report):
    counted = report.peak - sum(report.parts[name] for name in BESIDE)
    # A patch of 1,176 values is stored as 1,280, a row of a few values as one of eight.
    assert 0 <= report.parts["alignment"] < 0.03 * counted


def test_arguments_of_4_bit_kernels_too(tiny):
    changes = {"mesh.fsdp": 2, "mesh.tensor": 2, "model.quantize": "nf4-dq"}
    step = prepare(config.load(tiny, changes), plan.devices("v5e:2x2"))
    counted, compiled = leaves.parts(step).device, plan.memory(step.compile()).arguments
    assert counted <= compiled < 1.03 * counted


def dots(jaxpr):
    """Return the FLOPs of all products of a program, loops as often as they run."""
    found = 0
    for equation in jaxpr.eqns:
        inner = [
            part.jaxpr if hasattr(part, "jaxpr") else part
            for value in equation.params.values()
            for part in (value if isinstance(value, tuple | list) else [value])
            if hasattr(part, "jaxpr") or hasattr(part, "eqns")
        ]
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            over = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            found += 2 * math.prod(equation.outvars[0].aval.shape) * over
        elif name == "cond":
            found += max(map(dots, inner))
        else:
            found += sum(map(dots, inner)) * equation.params.get("length", 1)
    return found


EVERYWHERE = ["lora.target_modules=.*", "model.vision_encoder_lr_scale=1"]


@pytest.mark.parametrize("family", [qwen, llava])
@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["training.gradient_checkpointing=false"],
        ["training.remat_policy=block_save_attention"],
        ["training.remat_policy=dots"],
        ["training.remat_policy=offload"],
        ["training.remat_policy=qkv", "lora.enabled=false"],
        ["training.remat_policy=residual", "training.dropout_rng=threefry"],
        ["training.remat_policy=gate", "method=houlsby"],
        ["training.remat_policy=products"],
        ["training.remat_policy=products", *EVERYWHERE],
        ["training.remat_policy=products_offload", "method=houlsby"],
        ["model.quantize=nf4-dq"],
        ["lora.enabled=false", "model.vision_encoder_lr_scale=0.1"],
        ["lora.enabled=false", "model.language_model_lr_scale=0"],
        ["model.projector_lr_scale=0", "lora.modules_to_save=lm_head"],
        EVERYWHERE,
        ["method=pfeiffer"],
        ["method=parallel"],
    ],
    ids=[
        "lora",
        "no remat",
        "attention kept",
        "all products",
        "offload",
        "qkv, full",
        "residual, threefry",
        "gate, Houlsby",
        "products",
        "products everywhere",
        "products offloaded, Houlsby",
        "nf4",
        "full",
        "projector",
        "head",
        "lora everywhere",
        "adapters",
        "parallel adapters",
    ],
)
def test_flops_are_those_of_the_program(tmp_path, family, changes):
    # Work is that of the formula, which is plain attention's.
    fixed = ["lora.r=4", "model.attention=xla"]
    fixed += ["data.max_pixels=none"] if family is llava else []
    step = prepare(configured(family(tmp_path), *fixed, *changes), hardware("rtx4090"), rows=2)
    counted = work.total(
        work.count(step.model, step.state.trainable, step.frozen, step.rows, *step.shape).values()
    )

    def value(trainable, frozen, batch):
        return loss(step.model, trainable, frozen, batch, {"dropout": jax.random.key(0)})[0]

    arguments = step.state.trainable, step.frozen, step.batch
    assert counted.forward == dots(jax.make_jaxpr(value)(*arguments).jaxpr)
    backward = jax.make_jaxpr(jax.value_and_grad(value))(*arguments).jaxpr
    used, _ = dce_jaxpr(backward, [True] * len(backward.outvars))  # as compilers take it
    assert counted.total == dots(used)
    assert counted.model == counted.total - counted.recomputed
    assert (counted.recomputed == 0) == ("training.gradient_checkpointing=false" in changes)


def test_memory_traffic_counts_loops_as_often_as_they_run_and_of_a_stack_the_slice():
    def loop(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    rows, width = 8192, 4096
    few, many = (bytes_accessed(on_chip(loop, (rows, width), (n, width, width))) for n in (4, 12))
    each = 2 * (2 * rows * width + width * width)  # bfloat16: values in and out, a kernel
    assert many - few == pytest.approx(8 * each, rel=0.01)
    assert few < 5.1 * each
    product = on_chip(jnp.matmul, (8192, 8192), (8192, 8192))
    assert bytes_accessed(product) == product.cost_analysis()["bytes accessed"] == 3 * 2 * 8192**2


IN_FLIGHT = """
HloModule step

%carried (p0: bf16[100,25], p1: bf16[100,100], p2: bf16[8,8]) -> (bf16[8,8], bf16[100,25], bf16[100,100]) {
  %p0 = bf16[100,25]{1,0} parameter(0)
  %p1 = bf16[100,100]{1,0} parameter(1)
  %p2 = bf16[8,8]{1,0} parameter(2)
  %gathered = bf16[100,100]{1,0} all-gather(%p0), channel_id=7, replica_groups={{0,1,2,3}}
  %twice = bf16[8,8]{1,0} add(%p2, %p2)
  ROOT %all = (bf16[8,8]{1,0}, bf16[100,25]{1,0}, bf16[100,100]{1,0}) tuple(%twice, %p0, %gathered)
}

%body (state: (bf16[8,8], bf16[100,25], bf16[100,100])) -> (bf16[8,8], bf16[100,25], bf16[100,100]) {
  %state = (bf16[8,8]{1,0}, bf16[100,25]{1,0}, bf16[100,100]{1,0}) parameter(0)
  %x = bf16[8,8]{1,0} get-tuple-element(%state), index=0
  %part = bf16[100,25]{1,0} get-tuple-element(%state), index=1
  %whole = bf16[100,100]{1,0} get-tuple-element(%state), index=2
  ROOT %next = (bf16[8,8]{1,0}, bf16[100,25]{1,0}, bf16[100,100]{1,0}) fusion(%part, %whole, %x), kind=kLoop, calls=%carried
}

%start (q0: bf16[100,25]) -> bf16[100,100] {
  %q0 = bf16[100,25]{1,0} parameter(0)
  ROOT %begun = bf16[100,100]{1,0} all-gather(%q0), channel_id=7, replica_groups={{0,1,2,3}}
}

ENTRY %main (x: bf16[8,8], part: bf16[100,25]) -> bf16[100,100] {
  %x = bf16[8,8]{1,0} parameter(0)
  %part = bf16[100,25]{1,0} parameter(1)
  %begin = bf16[100,100]{1,0} fusion(%part), kind=kCustom, calls=%start
  %in = (bf16[8,8]{1,0}, bf16[100,25]{1,0}, bf16[100,100]{1,0}) tuple(%x, %part, %begin)
  %loop = (bf16[8,8]{1,0}, bf16[100,25]{1,0}, bf16[100,100]{1,0}) while(%in), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"28"}}
  ROOT %out = bf16[100,100]{1,0} get-tuple-element(%loop), index=2
}
"""  # noqa: E501


def test_a_gather_in_flight_through_a_loop_counts_once():
    compiled = SimpleNamespace(as_text=lambda: IN_FLIGHT)
    (gather,) = collectives(compiled)
    assert (gather.kind, gather.times, gather.bytes, gather.group) == ("all-gather", 1, 20_000, 4)
    assert bytes_accessed(compiled) == 28 * 2 * 128 + (20_000 + 5_000)


def test_a_program_that_jaxlib_cannot_read_is_read_from_the_compilers_file(tmp_path):
    class Unreadable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction")

    with pytest.raises(jax.errors.JaxRuntimeError):
        readable(Unreadable(), tmp_path)
    (tmp_path / "module_0000.jit_step.after_codegen.txt").write_text(IN_FLIGHT)
    compiled = readable(Unreadable(), tmp_path)
    assert compiled.as_text() == IN_FLIGHT and len(collectives(compiled)) == 1


def test_what_is_sent_and_how_fast():
    def one(kind, group=0):
        return Collective(kind, "bf16", (8,), 1000, 3, "", group)

    assert sent([one("all-gather", 4)], 8) == 3 * 750
    assert sent([one("all-reduce")], 8) == 3 * 1750
    assert sent([one("reduce-scatter", 2), one("collective-permute")], 8) == 3 * 2000
    made = speed(
        DEVICES["v5e"], 4, tokens=1000, model_flops=3 * 197 * 10**12, flops=4 * 197 * 10**12,
        bytes_accessed=819 * 10**8, sent=200 * 10**9, compiler=2.0,
    )  # fmt: skip
    assert (made.compute, made.memory, made.network, made.step) == (1.0, 0.1, 1.0, 2.0)
    assert made.tokens_per_second == 500 and made.mfu == pytest.approx(3 / 8)
    unknown = speed(
        DEVICES["a10g"],
        1,
        tokens=1,
        model_flops=1,
        flops=1,
        bytes_accessed=1,
        sent=0,
        compiler=None,
    )
    assert unknown.step is unknown.mfu is unknown.memory is None


def test_groups_of_collectives_are_read():
    mesh = make_mesh(2, 2, 1, plan.devices("v5e:2x2"))

    def array(shape, *axes):
        place = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)

    compiled = jax.jit(lambda x, y: x.T @ y).lower(
        array((4096, 512), "data"), array((4096, 512), "data")
    )
    (found,) = plan.collectives(compiled.compile())
    assert (found.kind, found.group) == ("all-reduce", 2)


def test_what_has_no_estimate_takes_no_time():
    text = """
ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %b = f32[4]{0} copy(%a), backend_config={"estimated_cycles":"18446744073709551615"}
  ROOT %c = f32[4]{0} copy(%b), backend_config={"estimated_cycles":"7"}
}
"""
    assert plan.estimated_cycles(SimpleNamespace(as_text=lambda: text)) == 7


# What is said


def test_the_peak_is_the_sum_of_its_parts(report):
    assert report.fits and report.basis == "compiled"
    assert report.peak == sum(report.parts.values()) < report.capacity
    assert report.mesh == {"data": 1, "fsdp": 2, "tensor": 2, "context": 1} and report.devices == 4
    assert report.speed.step >= report.speed.compiler > report.speed.compute > 0
    assert {one.kind for one in report.exchanges} >= {"all-gather", "all-reduce"}


def test_the_table_shows_what_the_json_holds(report):
    tree = json.loads(json.dumps(report.to_json()))
    assert list(tree) == [field.name for field in dataclasses.fields(report)]
    text = io.StringIO()
    show(report, Console(file=text, width=200))
    shown = text.getvalue()
    expected = [
        tree["verdict"], tree["said"], tree["basis"], tree["topology"], size(tree["peak"]),
        size(tree["capacity"]), flops(tree["flops"]["all"]["model"]), size(tree["bytes_accessed"]),
        seconds(tree["speed"]["step"]), f"{tree['speed']['tokens_per_second']:,.0f}",
        size(tree["host_memory"]), f"{tree['speed']['mfu']:.1%}",
        *(size(part) for part in tree["parts"].values() if part),
        *(f"{one['kind']} {one['dtype']}" for one in tree["exchanges"]),
        *(f"{one['count']:,} per step" for one in tree["exchanges"]),
    ]  # fmt: skip
    assert [words for words in expected if words not in shown] == []


def test_every_parameter_is_listed_with_its_place(report, tiny):
    step = prepare(config.load(tiny), hardware("rtx4090"))
    paths = {*flatten(step.frozen), *flatten(step.state.trainable)}
    assert [leaf.path for leaf in report.parameters] == sorted(paths)
    by_path = {leaf.path: leaf for leaf in report.parameters}
    kernel = by_path["model/language_model/layers/mlp/gate_proj/kernel"]
    assert (kernel.storage, kernel.spec, kernel.trains) == ("bfloat16", "None, fsdp, tensor", False)
    assert kernel.bytes == 2 * 2 * WIDTH * 512 // 4
    assert sum(leaf.bytes for leaf in report.parameters) == (
        report.parts["base weights"] + report.parts["LoRA"] + report.parts["other trained weights"]
    )
    text = io.StringIO()
    show(report, Console(file=text, width=200))
    assert not [path for path in paths if path not in text.getvalue()]


@pytest.mark.nightly
def test_a_step_too_large_is_a_report_and_one_just_below_fits(tmp_path, tiny, capsys):
    """Layers of a stack change its arrays and not the program: 16 GB compile as fast as few."""
    deep = {str(n): str(qwen(tmp_path / str(n), n)) for n in (9_000, 12_500)}
    said = {}
    for layers, base in deep.items():
        arguments = ["plan", "--config", str(tiny), "--topology", "v5e-1", "--json"]
        arguments += [f"--config.model.name_or_path={base}", "--config.lora.r=4", "--patches", "0"]
        arguments += [
            "--config.lora.target_modules=[q_proj]",
            "--config.model.projector_lr_scale=0",
        ]
        code = main(arguments)
        tree = json.loads(capsys.readouterr().out)
        assert tree["basis"] == "compiled"
        said[layers] = code, tree["verdict"], tree["peak"] > tree["capacity"]
        assert sum(tree["parts"].values()) == tree["peak"]
    assert said == {"9000": (0, "FITS", False), "12500": (1, "DOES NOT FIT", True)}
    assert "GiB of the 15.75 GiB" in tree["said"] and tree["speed"]["compiler"] is None


def test_weights_that_are_too_large_alone_are_told_without_a_compiler(tiny, capsys):
    command = ["plan", "--config", str(tiny), "--topology", "v5e-1", "--json"]
    assert main([*command, "--config.model.name_or_path=Qwen/Qwen2-VL-72B-Instruct"]) == 1
    tree = json.loads(capsys.readouterr().out)
    assert tree["basis"] == ESTIMATED and tree["compile_seconds"] is None
    assert re.match(r"weights and moments alone take 1\d\d\.\d\d of 15\.75 GiB", tree["said"])
    assert tree["peak"] == sum(tree["parts"].values()) > tree["capacity"]


def test_what_compilers_say_of_memory():
    new = "RESOURCE_EXHAUSTED: ... for HLO temporaries (25.70G) exceeds available HBM (15.75G)."
    old = "Ran out of memory in memory space hbm. Used 17.1G of 15.75G hbm. Exceeded by 1.3G."
    assert refused(new) == (int(25.7 * 2**30), int(15.75 * 2**30))
    assert refused(old) == (int(17.1 * 2**30), int(15.75 * 2**30))
    assert refused("something else") == (0, 0)


def test_a_gpu_without_a_compiler_is_estimated_and_says_so(tiny, capsys):
    command = ["plan", "--config", str(tiny), "--topology", "a100:2"]
    paged = [
        "--config.training.optim=paged_adamw",
        "--config.training.gradient_accumulation_steps=4",
    ]
    assert main([*command, *paged]) == 0
    assert ESTIMATED in " ".join(capsys.readouterr().out.split())
    assert main([*command, *paged, "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["basis"] == ESTIMATED
    assert tree["exchanges"] is tree["bytes_accessed"] is tree["compile_seconds"] is None
    assert tree["moments_host"] > 0 and tree["rows"] == 8 and tree["micro_batches"] == 4
    assert tree["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1, "context": 1}
    assert tree["peak"] == sum(tree["parts"].values())
    # float32 gradients of a micro-batch and of all so far, and bfloat16 copies.
    masters = tree["parts"]["LoRA"] + tree["parts"]["other trained weights"]
    assert tree["parts"]["gradients and copies of what trains"] == 2.5 * masters
    long = "--config.data.max_seq_length=400000"
    assert main([*command, long, "--config.model.attention=xla"]) == 1  # scores of 4 heads alone


def test_bad_input_is_told_with_code_2(tiny, capsys, monkeypatch):
    def refusal(*arguments):
        assert main(["plan", "--config", str(tiny), *arguments]) == 2
        return " ".join(capsys.readouterr().err.split())

    told = refusal("--topology", "v5x-4")
    assert "Known are v4, v5e" in told and "did you mean" in told
    assert "does not cover 4 devices" in refusal("--topology", "v5e-4", "--config.mesh.fsdp=3")
    eleven = refusal("--topology", "rtx4090:11", "--config.mesh.tensor=11")
    assert "mesh.tensor is 11, which divides 0% of this model's parameters" in eleven
    six = ["--topology", "rtx4090:6", "--config.mesh.fsdp=6", "--config.mesh.data=1"]
    llava = "--config.model.name_or_path=llava-hf/llava-1.5-7b-hf"
    six = refusal(*six, llava)
    assert "mesh.fsdp is 6, which divides 0% of" in six and "whole, as 'model/language_model" in six
    assert "could not be described" in refusal("--topology", "v5e-3")
    assert "multiple of 4" in refusal("--topology", "v5e-1", "--patches", "30")
    for there, topology in (("jax_cuda13_plugin", "v5e-1"), ("libtpu", "h100")):
        monkeypatch.setattr("vlm_jax.plan.topologies.find_spec", {there: True}.get)
        assert 'pip install "vlm_jax[plan]"' in refusal("--topology", topology)


@pytest.mark.parametrize("topology", ["v5e-4", "h100:8"])
def test_without_any_compiler_it_is_estimated_and_said(tiny, capsys, monkeypatch, topology):
    monkeypatch.setattr("vlm_jax.plan.topologies.find_spec", lambda name: None)
    command = ["plan", "--config", str(tiny), "--topology", topology]
    assert main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("There is no compiler for it here") and "pip install" in err
    tree = json.loads(out)
    assert (tree["verdict"], tree["basis"]) == ("FITS", "estimated from shapes, not compiled")
    assert 'pip install "vlm_jax[plan]"' in tree["remedy"] and tree["exchanges"] is None
    assert main(command) == 0
    table, below = capsys.readouterr().out.split("└")
    assert "Install" not in table and 'pip install "vlm_jax[plan]"' in below
    with pytest.raises(UserError, match="vlm_jax.plan"):
        plan.compile_step(tiny, topology)


def test_the_fastest_setting_that_fits(tiny, capsys):
    """Of 8 rows a device and step: the policy that keeps most, and others for rows beyond it."""
    rows = ["--config.training.per_device_train_batch_size=2"]
    rows += ["--config.training.gradient_accumulation_steps=4", "--config.model.attention=xla"]
    command = ["plan", "--config", str(tiny), "--topology", "a100", "--fit", *rows]

    def found(tokens):
        code = main([*command, f"--config.data.max_seq_length={tokens}", "--json"])
        tree = json.loads(capsys.readouterr().out)
        for trial in tree["trials"]:
            batch, parts, _ = trial["overrides"].values()
            assert batch * parts == 8
        return code, tree

    code, easy = found(128)
    assert code == 0 and len(easy["trials"]) == 4
    assert easy["overrides"]["training.remat_policy"] == "products"
    assert easy["best"]["verdict"] == "FITS"
    rates = [trial["tokens_per_second"] for trial in easy["trials"]]
    assert easy["best"]["speed"]["tokens_per_second"] == max(rates)
    peaks = [trial["peak"] for trial in easy["trials"]]
    assert peaks == sorted(set(peaks))
    code, hard = found(32_000)  # scores of 4 heads: 16 GB a row and layer, of which there are two
    tried = [
        (*list(trial["overrides"].values())[::2], trial["verdict"] == "FITS")
        for trial in hard["trials"]
    ]
    assert code == 0 and tried == [
        *((1, "products", True), (2, "products", True), (4, "products", False)),
        *((4, policy, False) for policy in ("gate", "residual", "qkv", "block", "offload")),
    ]
    assert main([*command, "--config.data.max_seq_length=400000"]) == 1
    assert "No setting fits" in capsys.readouterr().out
    assert main([*command, "--shardings"]) == 2
    six = config.load(tiny, {"training.per_device_train_batch_size": 6})
    batch = "training.per_device_train_batch_size"  # those that divide the rows of a step
    assert [one[batch] for one in settings(six, "dots")] == [1, 2]


@pytest.mark.skipif(
    find_spec("jax_cuda13_plugin") is None,
    reason='the CUDA plug-in is not installed (pip install "vlm_jax[plan]")',
)
def test_a_gpu_with_a_compiler_is_compiled_for(tiny):
    made = plan_step(tiny, "h100")
    assert made.basis == "compiled" and made.cycles is None
    assert made.speed.step == max(made.speed.compute, made.speed.memory)


@pytest.mark.parametrize(
    ("name", "topology", "count"),
    [
        ("v5e-1", "v5e:1x1", 1),
        ("v5e-4", "v5e:2x2", 4),
        ("v5e-8", "v5e:2x4", 8),
        ("v5e-16", "v5e:4x4", 16),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-32", "v5p:2x2x4", 16),
        ("v6e-8", "v6e:2x4", 8),
        ("v5p:2x2x1", "v5p:2x2x1", 4),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 8),  # halves of chips
        ("8xh100", "h100:8", 8),
        ("a100-80", "a100:1", 1),
        ("rtx4090", "rtx4090:1", 1),
    ],
)
def test_names_of_topologies(name, topology, count):
    found = hardware(name)
    assert (found.topology, found.count) == (topology, count)
    if DEVICES[found.device].is_tpu:
        assert len(plan.devices(found.topology)) == count


def test_shapes_of_slices_are_cubes_where_they_can_be():
    assert [slice_shape(2**n, 2) for n in range(5)] == ["1x1", "2x1", "2x2", "2x4", "4x4"]
    assert [slice_shape(2**n, 3) for n in (0, 2, 3, 4, 5)] == [
        "1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4",
    ]  # fmt: skip


def test_the_known_figures_are_plausible():
    for name, device in DEVICES.items():
        assert device.compiles == (name in ("v5e", "v5p", "v6e", "tpu7x", "h100")), name
        if device.limit is not None:
            assert 0.95 * device.memory < device.limit < 1.06 * device.memory
        if device.clock is not None:  # a whole number of matrix units of 128 x 128
            units = device.flops / device.clock / (2 * 128 * 128)
            assert units == pytest.approx(round(units), rel=0.01)


@pytest.mark.parametrize(
    ("tied", "chunk", "tokens"),
    fast([(True, 128, 256)], [(True, 128, 256), (False, 128, 256), (True, 1024, 2048)]),
)
def test_the_head_is_gathered_once_however_many_chunks_of_the_loss_there_are(
    tmp_path, tied, chunk, tokens, monkeypatch
):
    """Of 8 rows on 4 devices, whose positions are four chunks a device."""
    monkeypatch.setitem(CHUNK_POSITIONS, "tpu", (chunk, chunk))
    raw = json.loads((qwen(tmp_path, layers=1) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": tied}))
    changes = {"model.quantize": "nf4-dq", "training.remat_policy": "block"}
    made = config.load(None, [f"model.name_or_path={tmp_path}", "data.max_pixels=12544"])
    compiled = plan.compile_step(
        made, "v5e:2x2", mesh={"fsdp": 4, "data": 1}, overrides=changes, rows=8, tokens=tokens
    )
    sizes = {(WIDTH, 512), (512, WIDTH)}
    times = [
        one.times
        for one in plan.collectives(compiled)
        if one.dtype == "bf16" and tuple(one.shape[-2:]) in sizes
    ]
    assert 1 <= sum(times) <= 2, times  # and once for the lookup of a tied one
