"""Steps compiled for TPU and NVIDIA devices that are not here, and what is read from them."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax import UserError, config, plan
from vlm_jax.models.reference_configs import KNOWN
from vlm_jax.plan.step import prepare
from vlm_jax.sharding import make_mesh
from vlm_jax.train.compile import OPTIONS, compile_step
from vlm_jax.train.setup import abstract_run
from vlm_jax.trees import flatten

GPU = pytest.mark.skipif(
    find_spec("jax_cuda13_plugin") is None,
    reason='the CUDA plug-in is not installed (pip install "vlm_jax[plan]")',
)
LAYERS = 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A config whose base is a directory that holds a tiny config.json, and nothing else."""
    directory = tmp_path_factory.mktemp("tiny")
    sizes = dict(
        hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=512, image_token_id=500, video_token_id=501,
        rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]},
    )  # fmt: skip
    raw = {**KNOWN["Qwen/Qwen2-VL-7B-Instruct"], **sizes}
    tower = dict(depth=2, embed_dim=128, num_heads=4, hidden_size=128)
    raw["vision_config"] = {**raw["vision_config"], **tower}
    (directory / "config.json").write_text(json.dumps(raw))
    changes = [
        "data.max_seq_length=128",
        "data.min_pixels=784",
        "data.max_pixels=12544",
        "lora.r=4",
    ]
    return config.load(None, [f"model.name_or_path={directory}", *changes])


@pytest.fixture(scope="module")
def step(tiny):
    return plan.compile_step(tiny, "v5e:2x2", mesh={"fsdp": 4})


def on_chip(function, *shapes):
    """Return the function compiled for one v5e; shapes of bfloat16."""
    mesh = make_mesh(devices=plan.devices("v5e:1x1"))
    whole = NamedSharding(mesh, PartitionSpec())
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole) for shape in shapes]
    return jax.jit(function).lower(*arrays).compile()


def test_seconds_of_a_matmul_are_those_of_a_v5e():
    seconds = plan.estimated_seconds(on_chip(jnp.matmul, (2048, 3584), (3584, 3584)))
    least = 2 * 2048 * 3584 * 3584 / 197e12  # at the chip's peak
    assert least < seconds < 1.1 * least
    assert len(jax.devices()) == 8 and jax.devices()[0].platform == "cpu"


def test_a_loop_counts_as_often_as_it_runs_and_of_a_branch_the_longest():
    def loop(x, weights):
        def body(x, w):
            return jax.lax.cond(jnp.any(x > 0), lambda x: jnp.tanh(x @ w), lambda x: x, x), None

        return jax.lax.scan(body, x, weights)[0]

    few, many = (plan.estimated_cycles(on_chip(loop, (512, 512), (n, 512, 512))) for n in (4, 12))
    one = plan.estimated_cycles(on_chip(jnp.matmul, (512, 512), (512, 512)))
    assert few > 4 * 0.5 * one
    assert 2.7 < many / few < 3.1


def test_a_run_compiles_with_the_options_of_its_devices(tiny, monkeypatch):
    monkeypatch.setitem(OPTIONS, "cpu", {"xla_no_such_option": True})
    step = prepare(tiny, jax.devices()[:1])
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        compile_step(step.run, step.state, step.frozen, step.batch)


def test_the_step_is_the_runs_own(tiny, step):
    model, _, state, frozen = abstract_run(tiny, make_mesh(1, 4, 1, jax.devices()[:4]))
    (given, froze, batch), _ = step.input_shardings
    for mine, theirs in ((state, given), (frozen, froze)):
        same = jax.tree.map(lambda a, b: a.sharding.spec == b.spec, mine, theirs)
        assert all(jax.tree.leaves(same))
    assert step.out_tree == jax.tree.structure((state, dict.fromkeys(metrics(model, state), 0)))
    rows = ("data", "fsdp")
    assert {x.spec for x in jax.tree.leaves(batch)} == {
        PartitionSpec(rows), PartitionSpec(rows, "context"), PartitionSpec(rows, None, "context"),
    }  # patches, tokens, and their positions in three axes  # fmt: skip
    assert step.args_info[0][2].tokens.shape == (4, 128)
    assert step.args_info[0][2].patches.shape[:2] == (4, 64)  # 12,544 pixels of 14 x 14


def metrics(model, state):
    parts = {model.component(path) for path in flatten(state.trainable)}
    return ["loss", "tokens", "grad_norm", *(f"grad_norm/{part}" for part in parts)]


def test_memory_adds_up_and_the_state_is_donated(step):
    memory = plan.memory(step)
    parts = memory.arguments + memory.outputs - memory.aliased + memory.temporary + memory.code
    assert memory.total == parts > 0
    assert 0 < memory.aliased <= memory.outputs < memory.arguments
    assert memory.outputs - memory.aliased < 64 * 1024  # the metrics
    assert memory.host == 0


def test_collectives_of_a_sharded_loop_run_as_often_as_it():
    mesh = make_mesh(4, 1, 1, plan.devices("v5e:2x2"))

    def array(shape, *axes):
        place = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)

    def loop(x, w):  # each sum over the rows is one over the chips
        return jax.lax.scan(lambda w, _: (jnp.tanh(x.T @ (x @ w)), None), w, length=5)[0]

    x, w = array((8192, 1024), "data"), array((1024, 1024))
    found = plan.collectives(jax.jit(loop).lower(x, w).compile())
    assert [(c.kind, c.dtype, c.times, c.bytes) for c in found] == [("all-reduce", "f32", 5, 2**22)]


def test_paged_moments_of_blocks_that_do_not_divide_meet_on_no_host(tiny):
    paged = {"training.optim": "paged_adamw_8bit"}
    compiled = plan.compile_step(tiny, "v5e:2x2", overrides=paged, mesh={"fsdp": 4})
    assert plan.memory(compiled).host > 0
    assert plan.collectives(compiled) and plan.estimated_cycles(compiled) > 0
    for exchange in ("HostExecute", "MegaScale"):  # a host's computation; through the network
        assert exchange not in compiled.as_text()


def test_parts_of_an_asynchronous_collective_are_one_and_names_with_braces_are_read():
    text = """
%body (p: u4[8,64]) -> u4[32,64] {
  %p = u4[8,64]{1,0:T(8,128)} parameter(0)
  %call = f32[2]{0} custom-call(%p), backend_config="
}}
  "
  %s = (u4[8,64]{1,0:T(8,128)}, u4[32,64]{1,0}) all-gather-start(%p), channel_id=7
  ROOT %d = u4[32,64]{1,0:T(8,128)} fusion(%s), calls=%end
}

%host (h: u8[4]) -> u8[4] {
  ROOT %h = u8[4]{0} parameter(0)
}, execution_thread="host"

%end (q: u4[8,64]) -> u4[32,64] {
  %q = u4[8,64]{1,0} parameter(0)
  ROOT %e = u4[32,64]{1,0} all-gather(%q), channel_id=7
}

%bound (n: s32[]) -> pred[] {
  %nine = s32[]{:T(128)} constant(9)
  %n = s32[]{:T(128)} parameter(0)
  ROOT %less = pred[]{:T(512)} compare(%n, %nine), direction=LT
}

ENTRY %main (a: u4[8,64]) -> u4[32,64] {
  %a = u4[8,64]{1,0} parameter(0)
  ROOT %w = u4[32,64]{1,0} while(%a), condition=%bound, body=%body
}
"""
    (found,) = plan.collectives(SimpleNamespace(as_text=lambda: text))
    assert (found.kind, found.dtype, found.shape) == ("all-gather", "u4", (32, 64))
    assert (found.bytes, found.times) == (32 * 64 // 2, 9)


@GPU
def test_a_step_for_a_gpu(tiny):
    compiled = plan.compile_step(tiny, "h100", rows=2, tokens=64, patches=16)
    assert plan.memory(compiled).total > 0
    with pytest.raises(UserError, match="only the TPU compiler"):
        plan.estimated_seconds(compiled)


@pytest.mark.parametrize(
    "topology, said",
    [
        ("v5x:2x2", "no topology 'v5x:2x2'.*did you mean 'v5.'.*v5e.*h100:8"),
        ("v5e", "write it as 'v5e:2x2'"),
        ("v5p:2x2", "write it as 'v5p:2x2x2'"),
        ("v5e:3x7", "could not be described.*not divisible"),
        ("h100:9", "a multiple of 8"),
    ],
)
def test_topologies_that_are_none(topology, said):
    with pytest.raises(UserError, match=said):
        plan.devices(topology)


@pytest.mark.parametrize("topology", ["v5e:2x2", "h100"])
def test_a_compiler_that_is_not_installed_is_named(topology, monkeypatch):
    monkeypatch.setattr("vlm_jax.plan.topologies.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "vlm_jax\[plan\]"'):
        plan.devices(topology)


def test_what_a_plan_cannot_know_is_asked_for(tiny):
    def refused(said, **changes):
        with pytest.raises(UserError, match=said):
            plan.compile_step(tiny, "v5e:2x2", overrides=changes)

    refused("could not be fetched.*Qwen/Qwen2-VL-7B-Instruct", **{"model.name_or_path": "no/body"})
    refused("names no model", **{"model.name_or_path": None})
    refused("Set data.max_pixels", **{"data.max_pixels": None})
    refused("model.adapter=none", **{"model.adapter": "somewhere"})
    refused("model.type is 'llava'", **{"model.type": "llava"})
    refused("does not cover 4 devices", **{"mesh.fsdp": 3})
    for said, sizes in (
        ("rows is 3; expected a multiple of 4", {"rows": 3}),
        ("tokens is 0; expected a multiple of 1", {"tokens": 0}),
        ("tokens is -4", {"tokens": -4}),
        ("patches is 30; expected a multiple of 4", {"patches": 30}),
        ("topology is None", {"topology": None}),
    ):
        with pytest.raises(UserError, match=said):
            plan.compile_step(tiny, **{"topology": "v5e:2x2", **sizes})


def test_a_fixed_tower_takes_one_image_of_its_size():
    c = config.load(None, ["model.name_or_path=llava-hf/llava-1.5-7b-hf"])
    model = abstract_run(c, make_mesh(devices=jax.devices()[:1]))[0]
    assert plan.step.image_patches(c, model) == 577


def test_moments_are_planned_where_a_run_has_them():
    c = config.load(
        None, ["model.name_or_path=Qwen/Qwen2-VL-2B-Instruct", "training.optim=paged_adamw"]
    )
    _, _, state, _ = abstract_run(c, make_mesh(devices=jax.devices()[:1]))
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state)}
    assert "pinned_host" in kinds
    masters = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.trainable)}
    assert "pinned_host" not in masters
