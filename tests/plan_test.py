"""`alignax plan`: counts against hand-worked ones, sharding rules, memory of a compiled update, devices against one."""

import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignax import cli, configs, data, losses, models, optim, planning, sharding, step
from alignax.planning import hlo
from alignax.types import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = models.DecoderConfig(vocab_size=48, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4,
                              num_kv_heads=2, head_dim=4, max_positions=64)
SHAPE = data.Shape(2, 16, 8, 2)


def setup(loss="dpo", remat="none", reference="frozen", **more):
    return planning.make_setup(step.ModelSpec(CONFIG, remat=remat), losses.get(loss), optim.make(clip_norm=1.0),
                               reference=reference, **more)


PROGRAM = """HloModule jit_f, input_output_alias={ {0}: (0, {}, may-alias), {1}: (2, {}, must-alias) }

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %x)
}

%products (p: f32[4,8], q: f32[8,16]) -> f32[4,16] {
  %p = f32[4,8]{1,0} parameter(0)
  %q = f32[8,16]{1,0} parameter(1)
  ROOT %d = f32[4,16]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (t: (s32[], f32[4,16])) -> (s32[], f32[4,16]) {
  %t = (s32[], f32[4,16]{1,0}) parameter(0)
  %a = f32[4,16]{1,0} fusion(%t), kind=kCustom, calls=%products
  %g = bf16[64,8]{1,0} all-gather(%a), replica_groups=[2,4]<=[8], dimensions={0}, use_global_device_ids=true
  ROOT %r = (s32[], f32[4,16]{1,0}) tuple(%a)
}

%cond (u: (s32[], f32[4,16])) -> pred[] {
  %u = (s32[], f32[4,16]{1,0}) parameter(0)
  ROOT %c = pred[] constant(false)
}

ENTRY %main (z: f32[4,16]) -> f32[4,16] {
  %z = f32[4,16]{1,0} parameter(0)
  %w = (s32[], /*index=1*/f32[4,16]{1,0}) while(%z), condition=%cond, body=%body, b={"known_trip_count":{"n":"5"}}
  %one = f32[4,16]{1,0} all-reduce(%z), replica_groups={{0},{1}}, to_apply=%add
  %all = (f32[100]{0}, f32[]) all-reduce(%z, %z), replica_groups=mesh['a'=2,'b'=4] {'a','b'}, to_apply=%add
  %some = f32[10]{0} reduce-scatter(%z), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a':(1)2}
  %s = (f32[3]{0}, f32[6]{0}) all-gather-start(%z), replica_groups={{0,1},{2,3}}, dimensions={0}
  %e = f32[6]{0} all-gather-done(%s)
  ROOT %m = f32[7]{0} collective-permute(%z), source_target_pairs={{0,1},{1,0}}
}
"""


def test_a_program_is_counted_by_hand():
    """Bodies of loops times their turns; a group of one device sends nothing; an asynchronous pair counts once."""
    found = planning.collectives(PROGRAM, 8)
    assert found["all-gather"] == (5 + 1, 5 * 64 * 8 * 2 + 6 * 4, 5 * 1024 * 3 / 4 + 24 / 2)
    assert found["all-reduce"] == (1, 404, 2 * 404 * 7 / 8)
    assert found["reduce-scatter"] == (1, 40, 40)
    assert found["collective-permute"] == (1, 28, 28)
    assert planning.dot_flops(PROGRAM) == 5 * 2 * 4 * 8 * 16
    assert planning.aliased(PROGRAM) == 2


def test_devices_come_by_name_with_numbers():
    assert planning.device("h100").peak["bfloat16"] == 989e12
    slower = planning.device("h100,link=50e9")
    assert slower.link == 50e9 and slower.memory == planning.DEVICES["h100"].memory
    given = planning.device("peak=1e12,memory=2e9,bandwidth=3e9,link=4e9")
    assert (given.peak["float32"], given.memory, given.bandwidth, given.link) == (1e12, 2e9, 3e9, 4e9)
    for text, message in (("h300", "'h300'; allowed: one of h100"), ("link=1", "peak, memory, bandwidth missing"),
                          ("h100,speed=3", "'speed'; allowed: peak"), ("h100,link=-1", "link='-1'; allowed: a ")):
        with pytest.raises(ConfigError, match=message):
            planning.device(text)


def test_a_step_is_bound_by_the_largest_of_three():
    parts = dict(parameters=10, frozen=0, reference=4, gradients=6, optimizer=20, temporaries=100, total=90)
    flops = {"analytic": 90.0, "compiled": 80.0, "traced": 1.0, "partial": False}
    measured = {"bytes": parts, "flops": flops, "reads": {"policy": 2, "reference": 1},
                "collectives": {"all-gather": {"wire": 30.0}}}
    device = planning.device("peak=10,memory=100,bandwidth=2,link=1")
    time = planning.step_time(measured, device, "float32")
    assert (time["compute"], time["memory"], time["link"]) == (8, (2 * 10 + 4 + 2 * (6 + 20 + 10 + 100)) / 2, 30)
    assert time["bound"] == "memory" and time["overlapped"] == time["memory"] and time["fits"]
    assert time["in_turn"] == 8 + 30 + time["memory"]
    partial = measured | {"flops": flops | {"partial": True}}  # attention in loops of unknown length: by formula
    assert planning.step_time(partial, device, "float32")["compute"] == 9


def test_forward_flops_by_hand():
    parts = planning.forward_flops(CONFIG, rows=3, columns=5, slots=7)
    matrices = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32
    assert planning.matrix_parameters(CONFIG) == matrices
    assert parts == {"weights": 2 * 15 * 2 * matrices, "attention": 4 * 15 * 5 * 2 * 16, "head": 2 * 7 * 16 * 48}


@pytest.mark.parametrize("settings", [
    {}, {"remat": "full"}, {"remat": "dots"}, {"accumulation": 2}, {"reference": "precomputed"}, {"loss": "kto"},
    {"loss": "kto", "accumulation": 2, "remat": "full"}, {"layout": "shared_prefix"}, {"layout": "packed"},
], ids=str)
def test_the_formula_gives_the_traced_count_on_4096_devices(settings):
    """Nothing is compiled and no such machine exists; bytes and products are exact all the same."""
    layout = settings.get("layout", "padded")
    mesh = sharding.abstract_mesh({"data": 512, "fsdp": 8})
    found = planning.measure(setup(**{k: v for k, v in settings.items() if k != "layout"}),
                             planning.Size(8192, SHAPE._replace(rows=4 if layout == "packed" else 2), layout), mesh)
    assert found["flops"]["analytic"] == pytest.approx(found["flops"]["traced"], rel=1e-6)
    assert found["bytes"]["temporaries"] is None and found["collectives"] is None and found["devices"] == 4096


def test_bytes_of_a_device_by_hand():
    """Matrices over fsdp 2 and tensor 2; norms whole; Adam's two moments and two counts; adapters in place of all."""
    mesh = sharding.abstract_mesh({"data": 4, "fsdp": 2, "tensor": 2})
    size = planning.Size(16, SHAPE)
    matrices, norms = 48 * 16 + 2 * planning.matrix_parameters(CONFIG), 16 + 2 * 2 * 16
    found = planning.measure(setup(), size, mesh)["bytes"]
    assert found["parameters"] == found["reference"] == found["gradients"] == 4 * (matrices // 4 + norms)
    assert found["optimizer"] == 2 * found["parameters"] + 8
    lora = models.AdapterConfig(rank=2, targets=("query",))
    adapted = planning.measure(setup(adapters=lora), size, mesh)["bytes"]
    assert adapted["frozen"] == found["parameters"] and adapted["reference"] == 0
    assert adapted["parameters"] == 4 * 2 * (16 * 2 // 2 + 2 * 16 // 2)  # `a` over fsdp, `b` over tensor
    narrow = planning.measure(setup(dtype="bfloat16"), size, mesh)["bytes"]
    assert narrow["parameters"] * 2 == found["parameters"]


def test_rules_choose_the_axes_in_order():
    mesh = sharding.abstract_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    tree = {"model": models.abstract_params(CONFIG)}
    spec = lambda rules: sharding.param_shardings(tree, mesh, rules)["model"]["embedding"].spec
    P = jax.sharding.PartitionSpec
    assert spec(sharding.DEFAULT_RULES) == P("tensor", "fsdp")
    assert spec((("embedding", (None, ("fsdp", "tensor"))), ("embedding", ("fsdp",)))) == P(None, ("fsdp", "tensor"))
    assert spec(()) == P()
    assert spec((("embedding", (("data", "fsdp", "tensor"),)),)) == P(("data", "fsdp", "tensor"))
    for rules, message in (((("(", ()),), "does not compile"), ((("a", ("model",)),), "unknown axis 'model'"),
                           ((("a", ("fsdp", "fsdp")),), "an axis stands twice"), (("a", "b"), "expected .regex")):
        with pytest.raises(ConfigError, match=message):
            sharding.check_rules(rules)
        config = configs.staged(configs.single("dpo", steps=1))
        config.mesh.rules = rules
        with pytest.raises(ConfigError, match="config.mesh.rules"):
            configs.check(config)


@pytest.fixture(scope="module")
def compiled():
    return planning.measure(setup(), planning.Size(4, SHAPE), planning.simulated_mesh({"data": 1}))


def test_a_compiled_update_is_counted_and_updates_in_place(compiled):
    assert compiled["flops"]["compiled"] == compiled["flops"]["analytic"] == compiled["flops"]["traced"]
    assert compiled["donated"] == compiled["donatable"] and compiled["collectives"] == {}
    parts = compiled["bytes"]
    held = sum(parts[k] for k in ("parameters", "reference", "optimizer", "batch"))
    assert held <= parts["total"] - parts["temporaries"] <= held + 4096  # metrics, key, numbers
    assert parts["temporaries"] > parts["gradients"]


@pytest.mark.slow
def test_accumulation_keeps_one_buffer_of_gradients():
    """Where parameters dwarf activations, parts cost no further copy of the gradient beyond the loop's own sum."""
    wide = planning.make_setup(
        step.ModelSpec(models.DecoderConfig(vocab_size=8, hidden_size=256, intermediate_size=1024, num_layers=1,
                                            num_heads=2, num_kv_heads=2, head_dim=128, max_positions=8)),
        losses.get("simpo"), optax.sgd(0.1), accumulation=4)
    found = planning.measure(wide, planning.Size(4, data.Shape(2, 4, 2, 2)), planning.simulated_mesh({"data": 1}))
    assert found["bytes"]["temporaries"] < 2.5 * found["bytes"]["gradients"]  # the sum, and the part that joins it


def run_plan(arguments, capsys):
    code = cli.main(["plan", "--config", str(ROOT / "experiments" / "dpo.py") + ":tiny", *arguments])
    return code, capsys.readouterr()


@pytest.mark.parametrize("arguments, message", [
    (["--mesh", "model=2"], "'model=2'; allowed: AXIS=N with the axes data, fsdp, sequence, tensor"),
    (["--stage", "sft"], "--stage=sft; allowed, the train stages of this config: train"),
    (["--device", "abacus"], "'abacus'; allowed: one of h100"),
    (["--length", "8", "--slots", "9"], "--slots=9 is more than --length=8"),
    (["--length", "8", "--batch", "-4"], "--batch=-4; allowed: a positive number"),
    ([], "config.train.data.path is empty"),
])
def test_bad_input_is_refused(arguments, message, capsys):
    code, printed = run_plan(arguments, capsys)
    assert code == 2 and message in printed.err


def test_attention_is_planned_as_the_device_has_it(capsys):
    """A kernel holds no scores; its program cannot be compiled here, blocks stand for it."""
    def plan(device, attention, length="384"):
        code, printed = run_plan(["--length", length, "--batch", "2", "--device", device, "--json",
                                  "--config.model.max_positions=512", "--config.model.dtype=bfloat16",
                                  f"--config.model.attention={attention}"], capsys)
        assert code == 0
        return json.loads(printed.out)

    kernel, plain = plan("h100", "auto"), plan("h100", "xla")
    assert (kernel["attention"], plain["attention"]) == ("cudnn", "xla")
    heads, scores = 2, 4 * 4 * 384 * 384  # rows, bytes
    assert plain["bytes"]["temporaries"] - kernel["bytes"]["temporaries"] > heads * scores
    assert kernel["flops"]["partial"] and not plain["flops"]["partial"]
    assert kernel["flops"]["traced"] < kernel["flops"]["analytic"] == plain["flops"]["analytic"]
    assert kernel["time"]["compute"] == kernel["flops"]["analytic"] / planning.device("h100").peak["bfloat16"]
    assert plan("v5e", "auto", "16")["attention"] == "splash" and plan("cpu", "auto", "16")["attention"] == "blocked"
    given = "peak=1e14,memory=4e10,bandwidth=1e12,link=1e11"  # a kernel that is named is taken at its word
    assert [plan(given, name, "16")["attention"] for name in ("cudnn", "auto")] == ["cudnn", "blocked"]
    code, printed = run_plan(["--length", "16", "--device", "h100", "--config.model.attention=splash"], capsys)
    assert code == 2 and "the backend is gpu" in printed.err


def test_the_command_plans_without_data_and_counts_compilations_with_it(capsys, tmp_path):
    small = [f"--config.model.{k}={v}" for k, v in dict(vocab_size=0, hidden_size=8, intermediate_size=8, num_layers=1,
                                                        num_heads=1, num_kv_heads=1, head_dim=8).items()]
    small.append("--config.shapes=batch")
    code, printed = run_plan([*small, "--length", "16", "--mesh", "data=4096", "--batch", "4096", "--json"], capsys)
    report = json.loads(printed.out)
    assert code == 0 and report["devices"] == 4096 and report["compilations"]["update"] is None
    records = [{"prompt": "a", "chosen": "the dog ran " * (1 + 3 * (n % 3)), "rejected": "c"} for n in range(12)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    with_data = [*small, f"--config.data.path={path}", "--config.bucket_multiple=8", "--config.steps=0",
                 "--config.tokenizer=builtin:stories", "--batch", "1", "--config.batch_size=1"]
    code, printed = run_plan([*with_data, "--json"], capsys)
    report = json.loads(printed.out)
    assert code == 0 and report["compilations"]["update"] > 1 and report["flops"]["compiled"] > 0
    code, printed = run_plan([*with_data, "--config.shapes=global"], capsys)
    assert code == 0 and "update 1" in printed.out and "a step on h100" in printed.out


EIGHT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
sys.path.insert(0, {tests!r})
import plan_test as t
print(json.dumps(t.on_devices({sizes!r}, {accumulation})))
"""


def on_devices(sizes, accumulation):
    """Moves of an update's parameters, and what its program gathers, on a mesh of `sizes` (None: one device)."""
    mesh = None if sizes is None else sharding.make_mesh(sizes)
    over = None if mesh is None else sharding.over_batch(mesh)
    # The budget cuts the head into chunks of slots, and on one device of the vocabulary too.
    spec = step.ModelSpec(CONFIG, remat="full", activations=over, byte_budget=4_000)
    rng = np.random.default_rng(0)
    rows = [data.token_record(f"r{i}", [1, *rng.integers(3, 48, 3).tolist()],
                              [[*rng.integers(3, 48, 4).tolist(), 2] for _ in range(2)], eos_ids=(2,))
            for i in range(16)]
    double = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)
    tree = lambda key: double({"model": models.init_params(CONFIG, jax.random.key(key))})
    place = (lambda x: x) if mesh is None else (lambda x: jax.device_put(x, sharding.param_shardings(x, mesh)))
    out = {}
    for name in ("tdpo", "kto"):
        loss, optimizer = losses.get(name), optax.sgd(1.0)
        batch = data.padded(rows, K=2, T=16, L=8, pad_id=0, extra={"mismatched": data.mismatched(rows)})
        batch = batch if mesh is None else sharding.shard_batch(batch, mesh)
        params = tree(0)
        state = place(step.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), loss.init_state()))
        update = jax.jit(step.make_update(spec, loss, optimizer, accumulation=accumulation))
        lowered = update.lower(state, place(tree(1)), batch, {}, jax.random.key(0)).compile()
        new, _ = lowered(state, place(tree(1)), batch, {}, jax.random.key(0))
        moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), new.params, params)
        out[name] = [np.asarray(a).ravel()[::7].tolist() for a in jax.tree.leaves(moved)]
        out[name + "_gathered"] = [[shape, line.times] for line in hlo.instructions(lowered.as_text())
                                   if line.opcode.startswith("all-gather") for _, shape in line.arrays]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("sizes, accumulation", [({"data": 2, "fsdp": 4}, 1), ({"fsdp": 4, "tensor": 2}, 2)], ids=str)
def test_eight_devices_move_as_one_and_gather_weights_only(sizes, accumulation):
    """The same step to rounding. What is gathered is a layer's matrix or the head's rows of this device, never the
    batch's activations or logits, and with a cut vocabulary never the whole head."""
    script = EIGHT.format(tests=str(ROOT / "tests"), sizes=sizes, accumulation=accumulation)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=600,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    many = json.loads(done.stdout.splitlines()[-1])
    with jax.enable_x64(True):
        one = on_devices(None, accumulation)
    tensor = sizes.get("tensor", 1)
    for name in ("tdpo", "kto"):
        assert max(np.abs(leaf).max() for leaf in one[name]) > 1e-4
        for a, b in zip(one[name], many[name], strict=True):
            np.testing.assert_allclose(b, a, atol=1e-9)
        gathered = many[name + "_gathered"]
        assert max(math.prod(shape) for shape, _ in gathered) <= 48 * 16 // tensor, gathered
        assert not [shape for shape, _ in gathered if len(shape) > 2 and shape[-1] == 48], gathered
        # The tied embedding, of policy and reference: never once a chunk, of which there are several.
        tables = sum(times for shape, times in gathered if shape == [48 // tensor, 16])
        assert 2 <= tables <= 4 * accumulation, (tables, gathered)
        if tensor == 1:
            matrices = {(16, 16), (16, 8), (16, 32), (32, 16), (48, 16)}
            assert {tuple(shape) for shape, _ in gathered} <= matrices, gathered
