"""Attention kernels against the plain one, rows whose columns are cut over devices, and loading into shards."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignax import checkpoint, cli, configs, context, data, losses, models, sharding, step
from alignax.models import readers
from alignax.planning import hlo
from alignax.types import ConfigError

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[1]
PLAIN = models.DecoderConfig(vocab_size=48, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4,
                             num_kv_heads=2, head_dim=8, max_positions=64)
# Everything that a kernel could get wrong: a window of two positions in one of two layers, and capped scores.
WINDOWED = dataclasses.replace(PLAIN, windows=(2, 0), attention_softcap=4.0)
CONFIGS = {"plain": PLAIN, "windowed": WINDOWED,
           "alibi": dataclasses.replace(PLAIN, positions="alibi", num_kv_heads=4)}
SIZE = dict(K=2, T=24, L=8)


def records(count):
    rng = np.random.default_rng(0)
    draw = lambda least, most: rng.integers(3, 48, rng.integers(least, most)).tolist()
    return [data.token_record(f"r{i}", [1, *draw(1, 6)], [[*draw(1, 6), 2] for _ in range(2)], eos_ids=(2,))
            for i in range(count)]


def batch_of(rows, layout, groups=1):
    shape = data.Shape(*SIZE.values(), 2 * len(rows) // groups if layout == "packed" else len(rows) // groups)
    return data.fill(rows, shape, layout, pad_id=0, groups=groups)


LAYOUTS = ("padded", "packed", "shared_prefix", "shared_prefix_packed")


def params_of(config, dtype=jnp.float32, seed=0):
    # Larger than at the start of a run, so that who reads whom shows in the result.
    return jax.tree.map(lambda a: (3 * a).astype(dtype), models.init_params(config, jax.random.key(seed)))


def objective(config, stream, weights, **settings):
    """The weighted sum of the hidden states at the scored slots, as a function of the parameters."""
    def run(params):
        hidden = models.forward(config, params, stream.tokens, stream.segment, stream.prefix, stream.position,
                                **settings)
        slots = step.gather_slots(hidden, stream)
        return jnp.where(stream.mask[..., None], slots * weights, 0).sum(), slots
    return run


def same(found, expected, atol):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol * max(np.abs(b).max(), 1))


# --- kernels --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reading():
    """(mask, arrays, weights) -> attention and its gradients by splash and by the plain path; compiled once."""
    def gradients(mask, arrays, weights):
        def of(name, cap):
            reader = readers.make_reader(name, mask, interpret=True)
            out, pull = jax.vjp(lambda *arrays: readers.read(reader, *arrays, scale=0.3, softcap=cap), *arrays)
            # What padding reads means nothing, but it has to be a number.
            return jnp.where((weights == 0) & jnp.isfinite(out), 0, out), pull(weights)
        return [[of(name, cap) for name in ("splash", "xla")] for cap in (None, 2.0)]
    return jax.jit(gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [0, 3])
def test_splash_is_the_plain_attention(reading, layout, window):
    """With and without capped scores; query heads share key heads; some columns are padding, and all of the last row:
    the kernel skips all its blocks."""
    stream = batch_of(records(6), layout).streams["pair"]
    segment, prefix, position = (jnp.asarray(a[:3]).at[2].set(0) for a in (stream.segment, stream.prefix,
                                                                           stream.position))
    mask = models.attention_mask(segment, prefix)
    mask = mask & (position[:, :, None] - position[:, None] < window) if window else mask
    assert not mask.any(-1).all() and mask.any(-1).any()
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(*segment.shape, heads, 8) for heads in (4, 2, 2, 4)]
    *arrays, weights = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    weights = weights * (segment > 0)[:, :, None, None]
    for found, expected in reading(mask, arrays, weights):
        same(found, expected, 2e-6)


def test_splash_lowers_for_tpus():
    """Rows longer than a block, which do not fill the last one; forward and backward."""
    config = dataclasses.replace(PLAIN, head_dim=64, hidden_size=32, attention_softcap=4.0)
    grid = jax.ShapeDtypeStruct((2, 700), jnp.int32)
    run = lambda params, *rows: models.forward(config, params, *rows, attention="splash", remat="full").sum()
    params = models.abstract_params(config, jnp.bfloat16)
    text = jax.jit(jax.grad(run)).trace(params, *[grid] * 4).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3  # forward, queries' gradient, keys' gradient
    # Only the kernel's blocks of the scores exist: nothing else has an axis of queries and one of keys but the mask.
    assert "4x700x700" not in text and "4x768x768" not in text


def test_blocks_of_queries_are_the_plain_attention():
    """Rows that blocks do not divide evenly; the later columns are not computed. One block for short rows."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(1, 390, 4, 4), (1, 390, 2, 4), (1, 390, 2, 4), (1, 4, 390, 390), (1, 390, 4, 4)]
    with jax.enable_x64(True):
        *arrays, bias, weights = (jax.random.normal(k, s, jnp.float64) for k, s in zip(keys, shapes, strict=True))
        segment = jnp.minimum(jnp.arange(390)[None] // 150, 2).at[:, 380:].set(-1) + 1
        mask = models.attention_mask(segment, jnp.ones_like(segment))
        weights = weights * (segment > 0)[:, :, None, None]

        def of(name, arrays, mask=mask, bias=bias, weights=weights):
            reader = readers.make_reader(name, mask)
            return (readers.read(reader, *arrays, scale=0.5, softcap=3.0, bias=bias) * weights).sum()

        found, expected = (jax.jit(jax.grad(lambda a, n=name: of(n, a)))(arrays) for name in ("blocked", "xla"))
        same(found, expected, 1e-12)
        texts = [str(jax.make_jaxpr(lambda a, n=name: of(n, a))(arrays)) for name in ("blocked", "xla")]
        assert ["1,2,2,390,390]" in text for text in texts] == [False, True] and "1,2,2,130,260]" in texts[0]
        short = [a[:, :40] for a in arrays], mask[:, :40, :40], bias[:, :, :40, :40], weights[:, :40]
        assert str(jax.make_jaxpr(lambda *a: of("blocked", *a))(*short)) == str(
            jax.make_jaxpr(lambda *a: of("xla", *a))(*short))


@pytest.fixture
def cudnn_there(monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)


def test_cudnn_lowers_for_gpus(cudnn_there):
    grid = jax.ShapeDtypeStruct((2, 24), jnp.int32)
    config = dataclasses.replace(PLAIN, windows=(2, 0))
    run = lambda params, *rows: models.forward(config, params, *rows, attention="cudnn").astype(jnp.float32).sum()
    params = models.abstract_params(config, jnp.bfloat16)
    text = jax.jit(jax.grad(run)).trace(params, *[grid] * 4).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmha" in text and "Backward" in text
    plain = lambda params, *rows: models.forward(config, params, *rows).astype(jnp.float32).sum()
    text = jax.jit(jax.grad(plain)).trace(params, *[grid] * 4).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn" not in text


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_what_cudnn_is_asked_for_is_the_plain_attention(layout, monkeypatch):
    """The same arguments given to the kernel that is defined by them, on the rows that hold anything."""
    config = dataclasses.replace(PLAIN, windows=(2, 0))
    stream = jax.tree.map(jnp.asarray, batch_of(records(4), layout).streams["pair"])
    asked, attention = [], jax.nn.dot_product_attention

    def instead(*arrays, implementation, **settings):
        asked.append((implementation, settings["is_causal"]))
        return attention(*arrays, implementation="xla", **settings)

    params = params_of(config)
    plain = jax.jit(objective(config, stream, 1.0))(params)[1]
    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    found = jax.jit(objective(config, stream, 1.0, attention="cudnn"))(params)[1]
    assert set(asked) == {("cudnn", True)}
    same(np.asarray(found)[np.asarray(stream.mask)], np.asarray(plain)[np.asarray(stream.mask)], 1e-6)


def test_the_choice_of_a_kernel_and_its_reasons():
    choose = readers.choose_attention
    half, wide = "bfloat16", "float32"
    assert [choose("auto", PLAIN, half, p) for p in ("cpu", "gpu", "cuda", "rocm", "tpu")] == [
        "blocked", "cudnn", "cudnn", "xla", "splash"]
    assert choose("auto", PLAIN, wide, "gpu") == "xla" and choose("auto", PLAIN, wide, "tpu") == "splash"
    assert choose("auto", WINDOWED, half, "gpu") == "xla" and choose("auto", WINDOWED, half, "tpu") == "splash"
    assert choose("auto", CONFIGS["alibi"], half, "tpu") == choose("auto", CONFIGS["alibi"], half, "gpu") == "xla"
    assert all(choose("xla", config, "float64", "gpu") == "xla" for config in CONFIGS.values())
    for name, config, dtype, platform, words in (
            ("cudnn", PLAIN, half, "cpu", "the backend is cpu"), ("splash", PLAIN, wide, "gpu", "the backend is gpu"),
            ("cudnn", PLAIN, wide, "gpu", "model.dtype is float32"), ("cudnn", WINDOWED, half, "gpu", "at 4.0"),
            ("splash", PLAIN, "float64", "tpu", "model.dtype is float64"),
            ("splash", CONFIGS["alibi"], half, "tpu", "ALiBi"),
            ("cudnn", dataclasses.replace(PLAIN, head_dim=160), half, "gpu", "head_dim is 160"),
            ("flash", PLAIN, half, "gpu", "allowed: auto, xla, blocked, cudnn, splash")):
        with pytest.raises(ConfigError, match=f"config.model.attention='{name}'.*{words}"):
            choose(name, config, dtype, platform)
    section = configs.model_section(vocab_size=11, attention="splash").to_dict()
    with pytest.raises(ConfigError, match="the backend is cpu.*Allowed here: auto, xla, blocked"):
        context.load_model(section, vocab_size=11, seed=0)
    section.pop("attention")  # of a run that was written before there was a choice
    assert context.load_model(section, vocab_size=11, seed=0)[0].attention == "blocked"
    grid = jnp.zeros((1, 8), jnp.int32)
    for config, name in ((WINDOWED, "cudnn"), (CONFIGS["alibi"], "splash"), (PLAIN, "auto")):
        with pytest.raises(ConfigError, match=r"forward\(attention=\): found"):
            jax.eval_shape(lambda c=config, n=name: models.forward(c, params_of(c), *[grid] * 4, attention=n,
                                                                   interpret=True))


# --- columns cut over devices -----------------------------------------------------------------------------------------


def on_devices(sizes, cases):
    """{case: moves of an update's parameters, and the shapes that its program gathers} in float64."""
    mesh = None if sizes is None else sharding.make_mesh(sizes)
    over = None if mesh is None else sharding.over_activations(mesh)
    place = (lambda x: x) if mesh is None else (lambda x: jax.device_put(x, sharding.param_shardings(x, mesh)))
    out = {}
    for name, layout, method, accumulation in cases:
        spec = step.ModelSpec(CONFIGS[name], remat="dots", activations=over, byte_budget=4_000)
        loss, optimizer = losses.get(method), optax.sgd(1.0)
        batch = batch_of(records(8), layout, groups=2 * accumulation)
        batch = batch if mesh is None else sharding.shard_batch(batch, mesh)
        model = lambda seed, c=CONFIGS[name]: {"model": params_of(c, jnp.float64, seed)}
        params = model(0)
        state = place(step.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), loss.init_state()))
        update = jax.jit(step.make_update(spec, loss, optimizer, accumulation=accumulation))
        compiled = update.lower(state, place(model(1)), batch, {}, jax.random.key(0)).compile()
        new, metrics = compiled(state, place(model(1)), batch, {}, jax.random.key(0))
        moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), new.params, params)
        out[f"{name} {layout} {method}"] = {
            "moves": [np.asarray(a).ravel()[::3].tolist() for a in jax.tree.leaves(moved)],
            "loss": float(metrics["loss"][0]),
            "gathered": [shape for line in hlo.instructions(compiled.as_text()) if line.opcode.startswith("all-gather")
                         for _, shape in line.arrays]}
    return out


DEVICES = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", {count})
jax.config.update("jax_enable_x64", {wide})
sys.path.insert(0, {tests!r})
import attention_test as t
print(json.dumps(t.{call}))
"""


def in_process(call, count=4, wide=True):
    script = DEVICES.format(tests=str(ROOT / "tests"), count=count, call=call, wide=wide)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=600,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("sizes, cases", [
    ({"data": 2, "sequence": 2}, [("windowed", "shared_prefix_packed", "tdpo", 1), ("plain", "padded", "dpo", 2)]),
    ({"sequence": 2, "tensor": 2}, [("alibi", "packed", "dpo", 1)]),
    ({"sequence": 4}, [("plain", "shared_prefix", "dpo", 1)]),
], ids=str)
def test_cut_columns_move_as_whole_ones(sizes, cases):
    many = in_process(f"on_devices({sizes!r}, {cases!r})")
    with jax.enable_x64(True):
        one = on_devices(None, cases)
    for name, expected in one.items():
        assert max(np.abs(leaf).max() for leaf in expected["moves"]) > 1e-4
        np.testing.assert_allclose(many[name]["loss"], expected["loss"], atol=1e-11)
        for a, b in zip(expected["moves"], many[name]["moves"], strict=True):
            np.testing.assert_allclose(b, a, atol=1e-10, err_msg=name)
        # What is gathered of activations has a model's or heads' width: no scores, and no logits.
        shapes = [s for s in many[name]["gathered"] if len(s) > 2]
        assert shapes and all(s[-2:] != [SIZE["T"]] * 2 and s[-1] != 48 for s in shapes), shapes


def splash_on_devices(sizes):
    """(largest deviation, largest gradient) of splash on cut rows, columns and heads from the plain path."""
    stream = jax.tree.map(jnp.asarray, batch_of(records(4), "shared_prefix_packed", groups=2).streams["pair"])
    params, mesh = params_of(WINDOWED), sharding.make_mesh(sizes)
    weights = jax.random.normal(jax.random.key(1), (*stream.mask.shape, WINDOWED.hidden_size))
    cut = dict(attention="splash", interpret=True, sharding=sharding.over_activations(mesh))
    plain, found = (jax.jit(jax.grad(objective(WINDOWED, stream, weights, **settings), has_aux=True))(params)[0]
                    for settings in ({}, cut))
    largest = lambda tree: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
    return largest(jax.tree.map(lambda a, b: jnp.asarray(np.asarray(a) - np.asarray(b)), plain, found)), largest(plain)


def test_splash_runs_on_the_part_of_each_device():
    off, size = in_process("splash_on_devices({'data': 2, 'sequence': 2, 'tensor': 2})", count=8, wide=False)
    assert off < 1e-5 * size and size > 0.1


def blocks_on_devices(sizes):
    """(largest deviation, largest gradient) of 150 columns in blocks on cut rows and heads from the plain path."""
    rng = np.random.default_rng(0)
    segment = jnp.asarray(np.sort(rng.integers(1, 4, (4, 150)), axis=1).astype(np.int32))
    tokens = jnp.asarray(rng.integers(3, 48, (4, 150), dtype=np.int32))
    position = jnp.broadcast_to(jnp.arange(150, dtype=jnp.int32) % 64, (4, 150))
    weights = jax.random.normal(jax.random.key(1), (4, 150, WINDOWED.hidden_size))

    def run(params, **settings):
        return (models.forward(WINDOWED, params, tokens, segment, jnp.ones_like(segment), position, **settings)
                * weights).sum()

    params = params_of(WINDOWED)
    cut = dict(attention="blocked", sharding=sharding.over_activations(sharding.make_mesh(sizes)), remat="dots")
    plain, found = (jax.jit(jax.grad(lambda p, s=settings: run(p, **s)))(params) for settings in ({}, cut))
    largest = lambda tree: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
    return largest(jax.tree.map(lambda a, b: jnp.asarray(np.asarray(a) - np.asarray(b)), plain, found)), largest(plain)


def test_blocks_run_on_the_part_of_each_device():
    for sizes in ({"data": 2, "tensor": 2}, {"fsdp": 2, "sequence": 2}):
        off, size = in_process(f"blocks_on_devices({sizes!r})", wide=False)
        assert off < 1e-5 * size and size > 0.1


def test_columns_that_do_not_divide_are_named(capsys):
    over = sharding.over_activations(sharding.abstract_mesh({"sequence": 4}))
    grid = jax.ShapeDtypeStruct((2, 10), jnp.int32)
    with pytest.raises(ConfigError, match="rows of 10 columns do not divide over mesh.sequence=4.*bucket_multiple"):
        jax.eval_shape(lambda p, *rows: models.forward(PLAIN, p, *rows, sharding=over), models.abstract_params(PLAIN),
                       *[grid] * 4)
    # Where a device holds some of the queries and all keys, row i of its mask is not column i.
    assert not readers.make_reader("cudnn", jnp.ones((2, 8, 8), bool), over).causal
    assert readers.make_reader("cudnn", jnp.ones((2, 8, 8), bool), None).causal
    assert sharding.over_activations(sharding.abstract_mesh({"data": 1})) is None
    assert tuple(sharding.over_activations(sharding.abstract_mesh({"data": 2})).spec) == (("data", "fsdp"),)
    small = [f"--config.model.{k}={v}" for k, v in dict(vocab_size=16, hidden_size=8, intermediate_size=8,
                                                        num_layers=1, num_heads=1, num_kv_heads=1,
                                                        head_dim=8).items()]
    code = cli.main(["plan", "--config", str(ROOT / "experiments" / "dpo.py"), *small, "--length", "16", "--batch",
                     "2048", "--mesh", "data=2048,sequence=2", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 0 and report["mesh"]["sequence"] == 2 and report["devices"] == 4096


# --- loading into shards --------------------------------------------------------------------------------------------


def loaded(folder):
    """Whether each way to a model gives its shards and the bits of one device."""
    mesh, out = sharding.make_mesh({"fsdp": 2, "sequence": 1, "tensor": 2}), {}
    rules = ((r"layers/mlp/up$", (None, None, ("fsdp", "tensor"))), *sharding.DEFAULT_RULES)
    shape = dict(vocab_size=48, hidden_size=16, intermediate_size=32, head_dim=8, num_layers=3)
    for name, section in (("random", configs.model_section(**shape)),
                          ("folder", configs.model_section(path=f"{folder}/hf")),
                          ("native", configs.model_section(path=f"{folder}/native", dtype="bfloat16"))):
        section = section.to_dict()
        whole = context.load_model(section, vocab_size=48, seed=3)[1]
        tree = context.load_model(section, vocab_size=48, seed=3, mesh=mesh, rules=rules)[1]
        expected = sharding.param_shardings(tree, mesh, rules)
        bits = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), tree, whole)
        up = tree["model"]["layers"]["mlp"]["up"]
        out[name] = [jax.tree.map(lambda a: a.sharding, tree) == expected, all(jax.tree.leaves(bits)),
                     list(up.addressable_shards[0].data.shape), str(up.dtype)]
    return out


def test_parameters_are_made_where_they_lie(tmp_path):
    config = dataclasses.replace(PLAIN, num_layers=3)
    params = models.init_params(config, jax.random.key(7))
    models.save(tmp_path / "hf", config, params)
    models.describe(tmp_path / "native", config, "float32")
    checkpoint.save_tree(tmp_path / "native" / models.NATIVE, {"model": params})
    assert in_process(f"loaded({str(tmp_path)!r})", wide=False) == {
        "random": [True, True, [3, 16, 8], "float32"], "folder": [True, True, [3, 16, 8], "float32"],
        "native": [True, True, [3, 16, 8], "bfloat16"]}
