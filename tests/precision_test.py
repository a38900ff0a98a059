"""Mixed precision: float32 master weights around bfloat16 parameters, their state, and how far bfloat16 strays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignax import checkpoint, configs, context, data, losses, models, optim, sharding, step
from alignax.ops.head import Head, head_stats
from alignax.types import ConfigError

CONFIG = models.DecoderConfig(vocab_size=17, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2,
                              num_kv_heads=1, head_dim=4, max_positions=64)
SPEC = step.ModelSpec(CONFIG, unroll=2)


def records(n=8):
    rng = np.random.default_rng(0)
    return [data.token_record(f"r{i}", [1, *rng.integers(3, 17, rng.integers(1, 5)).tolist()],
                              [[*rng.integers(3, 17, rng.integers(1, 6)).tolist(), 2] for _ in range(2)],
                              eos_ids=(2,)) for i in range(n)]


def parameters(dtype):
    wide = {"model": models.init_params(CONFIG, jax.random.key(0))}
    # Values that both dtypes hold, so that the runs start from the same point.
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(dtype), wide)


def descend(optimizer, start, steps=20):
    """`steps` of a quadratic whose minimum is 0; the gradient is the parameter, in the parameter's dtype."""
    @jax.jit
    def move(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params, state = start, optimizer.init(start)
    for _ in range(steps):
        params, state = move(params, state)
    return params, state


def test_master_weights_keep_the_updates_that_bfloat16_loses():
    """A step of 1/1000 of a value is below half a unit of bfloat16's last place: alone it changes nothing."""
    start = {"w": jnp.asarray([1.0, -2.0, 0.375], jnp.bfloat16)}
    exact = np.asarray(start["w"], np.float64) * (1 - 1e-3) ** 20
    plain, _ = descend(optim.make(name="sgd", learning_rate=1e-3), start)
    held, state = descend(optim.make(name="sgd", learning_rate=1e-3, master=True), start)
    np.testing.assert_array_equal(plain["w"], start["w"])
    assert held["w"].dtype == jnp.bfloat16 and state.master["w"].dtype == jnp.float32
    # The gradient is the rounded parameter, so it is off by one part in 512 at most; so is the sum of the moves.
    moved = np.asarray(start["w"], np.float64) - exact
    assert np.all(np.abs(np.asarray(state.master["w"], np.float64) - exact) <= np.abs(moved) * 2**-8)
    np.testing.assert_array_equal(held["w"], state.master["w"].astype(jnp.bfloat16))


def test_parameters_are_the_rounded_master_after_every_step():
    """Also where a parameter falls through many powers of two in one step, and Adam's moments are float32."""
    optimizer = optim.make(name="adam", learning_rate=0.3, clip_norm=0.5, master=True)
    params = {"w": jnp.asarray([1.0, 1e-3, -300.0], jnp.bfloat16)}
    state = optimizer.init(params)
    for _ in range(6):
        updates, state = optimizer.update(params, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params["w"], state.master["w"].astype(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.inner)} == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_wide_parameters_have_no_copy_and_move_as_without():
    start = {"wide": jnp.asarray([1.0, 3.0]), "narrow": jnp.asarray([2.0], jnp.bfloat16)}
    params, state = descend(optim.make(name="adam", learning_rate=0.1, master=True), start, 3)
    alone, _ = descend(optim.make(name="adam", learning_rate=0.1), {"wide": start["wide"]}, 3)
    np.testing.assert_array_equal(params["wide"], alone["wide"])
    assert [leaf.shape for leaf in jax.tree.leaves(state.master)] == [(1,)]
    with pytest.raises(ValueError, match="needs the parameters"):
        optim.make(master=True).update(start, optim.make(master=True).init(start))


def test_the_master_is_cut_like_its_parameter():
    mesh = sharding.abstract_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    params = {"model": models.abstract_params(CONFIG, jnp.bfloat16)}
    state = jax.eval_shape(optim.make(clip_norm=1.0, master=True).init, params)
    specs = lambda tree: [s.spec for s in jax.tree.leaves(sharding.param_shardings(tree, mesh))]
    assert specs(state.master) == specs(params)
    assert any(specs(params))
    moments = [s for s in jax.tree.leaves(state.inner) if s.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(params)) and specs(state.inner).count(specs(params)[0]) >= 2


def trained(dtype, steps, master, accumulation=1):
    """(losses, state) of DPO at a small learning rate."""
    loss = losses.get("dpo")
    params, ref = parameters(dtype), parameters(dtype)
    optimizer = optim.make(name="sgd", learning_rate=2e-3, master=master)
    batch = data.padded(records(), K=2, T=16, L=8, pad_id=0)
    state = step.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), loss.init_state())
    update = jax.jit(step.make_update(SPEC, loss, optimizer, accumulation=accumulation))
    seen = []
    for number in range(steps):
        state, metrics = update(state, ref, batch, {}, jax.random.key(number))
        seen.append(float(metrics["loss"][0]))
        assert metrics["grad_norm"][0].dtype == jnp.float32
    assert update._cache_size() == 1  # the state keeps its dtypes
    return seen, state


@pytest.fixture(scope="module")
def runs():
    return {"float32": trained(jnp.float32, 20, False), "master": trained(jnp.bfloat16, 20, True),
            "plain": trained(jnp.bfloat16, 20, False)}


def distance(state, other):
    """Of the held values (the master where there is one), in float64."""
    held = lambda s: s.opt_state.master if isinstance(s.opt_state, optim.MasterState) else s.params
    flat = lambda s: np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(held(s))])
    return np.linalg.norm(flat(state) - flat(other))


@pytest.mark.slow
def test_bfloat16_with_a_master_follows_float32(runs):
    """20 steps: the master moves as float32 does, to bfloat16's rounding of the gradient; without it most is lost."""
    start = step.TrainState(None, parameters(jnp.float32), (), ())
    exact = runs["float32"][1]
    move = distance(exact, start)
    assert move > 1e-3
    assert distance(runs["master"][1], exact) <= 0.05 * move
    assert distance(runs["plain"][1], exact) >= 0.3 * move
    np.testing.assert_allclose(runs["master"][0], runs["float32"][0], atol=1e-3)
    assert runs["float32"][0][-1] < runs["float32"][0][0] - 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 0.0), (jnp.bfloat16, 1e-3)])
def test_log_ratios_before_training(dtype, bound):
    """Exactly 0 in float32; in bfloat16 within a thousandth of a nat for each token, in every sequence."""
    batch = data.padded(records(), K=2, T=16, L=8, pad_id=0)
    evaluate = jax.jit(step.make_evaluate(SPEC, None, diagnostics=("ref_logps",)))
    arrays = evaluate(parameters(dtype), parameters(dtype), batch, {}, None, None)[1]
    ratio = np.abs(np.asarray(arrays["logps"] - arrays["ref_logps"])) / np.asarray(batch.streams["pair"].mask.sum(-1))
    assert arrays["logps"].dtype == jnp.float32 and ratio.max() <= bound


@pytest.mark.slow
def test_parts_of_a_bfloat16_batch_are_summed_in_float32(runs):
    """Four micro-batches give the step of one; the sum of their gradients is not rounded between them."""
    start = step.TrainState(None, parameters(jnp.float32), (), ())
    _, parts = trained(jnp.bfloat16, 1, True, accumulation=4)
    _, whole = trained(jnp.bfloat16, 1, True)
    assert distance(parts, whole) <= 0.01 * distance(whole, start)


@pytest.mark.slow
def test_a_checkpoint_holds_the_master_to_the_bit(runs, tmp_path):
    state = runs["master"][1]
    saved = checkpoint.Checkpoints(tmp_path / "checkpoints")
    saved.save(20, state, {"plan": {}, "total": 20, "eval": {}}, None)
    saved.wait()
    back, _ = saved.restore(20, jax.tree.map(jnp.zeros_like, state))
    saved.close()
    assert isinstance(back.opt_state, optim.MasterState)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def long_sequences():
    """Final states of policy and reference for completions of 1,000 tokens, head and targets, all float64; the logits'
    standard deviation is 2, and the policy's states differ from the reference's by a twentieth."""
    rng = np.random.default_rng(0)
    shape, vocab, width = (2, 2, 1000), 256, 64
    narrow = lambda a: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64)
    weight = narrow(rng.normal(size=(vocab, width)) * 2 / np.sqrt(width))
    reference = rng.normal(size=(*shape, width))
    policy = reference + 0.05 * rng.normal(size=reference.shape)
    return narrow, policy, reference, weight, rng.integers(vocab, size=shape)


def token_logps(states, weight, targets):
    """log p(target) at every slot in NumPy's float64."""
    logits = states @ weight.T
    logits -= logits.max(-1, keepdims=True)
    return np.take_along_axis(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), targets[..., None], -1)[..., 0]


@pytest.mark.slow
def test_the_head_on_bfloat16_states_at_a_thousand_tokens(long_sequences):
    """Log-ratios of sequences within 0.05 nats of float64 on the same states. Measured: within 0.0015 nats, on average
    2.5e-4 too low; what is left is float32's spacing at sums of 7,000 nats, since a token's log-prob is off by 3e-7
    (standard deviation) and its mean by 1e-9."""
    narrow, policy, reference, weight, targets = long_sequences
    head = Head(jnp.asarray(weight, jnp.bfloat16))
    run = jax.jit(lambda h: head_stats(h, head, jnp.asarray(targets), byte_budget=400_000)["logp"])  # many chunks
    ours = [np.asarray(run(jnp.asarray(h, jnp.bfloat16))) for h in (policy, reference)]
    assert ours[0].dtype == np.float32
    ratio = np.asarray(jnp.asarray(ours[0]).sum(-1) - jnp.asarray(ours[1]).sum(-1), np.float64)
    exact = [token_logps(narrow(h), weight, targets) for h in (policy, reference)]
    error = ratio - (exact[0] - exact[1]).sum(-1)
    assert np.abs(error).max() <= 0.05 and abs(error.mean()) <= 0.005, error
    assert abs((ours[0] - exact[0]).mean()) <= 1e-7, "a token's log-prob has a bias, which adds up"


@pytest.mark.slow
def test_what_rounding_the_states_costs(long_sequences):
    """Not the head's doing: states that were rounded to bfloat16 before it are off by 0.005 nats for each token
    (standard deviation), which adds up like a random walk to 0.16 nats in 1,000 tokens, and without a bias."""
    narrow, policy, reference, weight, targets = long_sequences
    at = lambda change: token_logps(change(policy), weight, targets) - token_logps(change(reference), weight, targets)
    error = at(narrow) - at(lambda a: a)
    assert 0.003 < error.std() < 0.008
    assert abs(error.mean()) < 3 * error.std() / np.sqrt(error.size)
    assert np.abs(error.sum(-1)).max() < 4 * error.std() * np.sqrt(error.shape[-1])


def test_the_config_makes_a_bfloat16_model_and_refuses_a_useless_master():
    section = configs.model_section(hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1,
                                    head_dim=8, dtype="bfloat16").to_dict()
    spec, params = context.load_model(section, vocab_size=11, seed=0)
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")} and spec.config.vocab_size == 11
    config = configs.staged(configs.single("dpo", steps=1))
    config.train.optim.master = True
    with pytest.raises(ConfigError, match="config.train.optim.master=True .*float32"):
        configs.check(config)
    config.model.dtype = "bfloat16"
    configs.check(config)
    config.model.dtype = "float16"
    with pytest.raises(ConfigError, match="config.model.dtype='float16'; allowed: float32, bfloat16"):
        configs.check(config)


@pytest.mark.parametrize("remat", models.OFFLOADED)
def test_offloading_is_lowered_for_accelerators_and_refused_on_cpus(remat):
    """The transfers stand in the program of a GPU; a CPU would drop them without a word."""
    params = models.abstract_params(CONFIG)
    grid = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    run = jax.jit(jax.grad(lambda p, g, kind: models.forward(CONFIG, p, g, g, g, g, remat=kind).sum()),
                  static_argnums=2)
    text = lambda kind: run.trace(params, grid, kind).lower(lowering_platforms=("cuda",)).as_text()
    assert "pinned_host" in text(remat) and "pinned_host" not in text("full")
    with pytest.raises(ConfigError, match=f"config.model.remat='{remat}' .* this is cpu .*here: none, full, dots"):
        models.check_remat(remat, jax.devices("cpu")[0], "config.model.remat")
    with pytest.raises(ConfigError, match="remat='some'; allowed: none, full"):
        models.check_remat("some", jax.devices("cpu")[0])


def test_spec_is_one_dataclass():
    """Replacing a field keeps the others: the loop and the plan set the devices' part by it."""
    spec = dataclasses.replace(SPEC, activations=sharding.over_batch(sharding.abstract_mesh({"data": 2})))
    assert spec.config is CONFIG and spec.activations.spec == jax.sharding.PartitionSpec(("data", "fsdp"))
