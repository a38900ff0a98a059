"""Low-rank adapters: zero delta at the start, merged against unmerged, gradients, several at once, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import models
from alignax.models import adapters
from alignax.types import ConfigError

MODEL = models.DecoderConfig(vocab_size=29, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4,
                             num_kv_heads=2, head_dim=6, max_positions=64)
CONFIG = adapters.AdapterConfig(rank=4, alpha=6.0, targets=(".*",))
LINEARS = ("attention/key", "attention/output", "attention/query", "attention/value", "mlp/down", "mlp/gate", "mlp/up")


@pytest.fixture(autouse=True)
def strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module")
def params():
    return models.init_params(MODEL, jax.random.key(1))


def randomised(tree, seed):
    """The tree with random b, of a size that moves the model."""
    draw = np.random.default_rng(seed)
    return adapters.unflatten({path: {"a": leaf["a"], "b": jnp.asarray(draw.normal(size=leaf["b"].shape) * 0.3,
                                                                       leaf["b"].dtype)}
                               for path, leaf in adapters.flatten(tree).items()})


@pytest.fixture(scope="module")
def tree(params):
    return randomised(adapters.init_adapters(params, CONFIG, jax.random.key(2)), 3)


def tokens(shape=(2, 7)):
    return jnp.asarray(np.random.default_rng(5).integers(1, MODEL.vocab_size, shape), jnp.int32)


def plain(grid):
    """Arguments of forward for full, unpadded rows."""
    ones = jnp.ones_like(grid)
    return grid, ones, ones, jnp.broadcast_to(jnp.arange(grid.shape[1], dtype=jnp.int32)[None], grid.shape)


@functools.partial(jax.jit, static_argnames=("config", "remat"))
def forward(params, tree=None, config=CONFIG, remat="none"):
    """Hidden states of the fixed tokens."""
    tree = None if tree is None else adapters.scaled(tree, config)
    return models.forward(MODEL, params, *plain(tokens()), adapters=tree, remat=remat)


merge = jax.jit(adapters.merge, static_argnames=("config", "sign"))


def close(found, expected, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


def differ(left, right):
    """The paths at which two parameter trees differ."""
    flat = lambda t: {jax.tree_util.keystr(key, simple=True, separator="/"): np.asarray(leaf)
                      for key, leaf in jax.tree_util.tree_flatten_with_path(t)[0]}
    left, right = flat(left), flat(right)
    return {path for path in left if not np.array_equal(left[path], right[path])}


# --- targets and the start ---------------------------------------------------------------------------------------


def test_the_adaptable_matrices_are_those_of_the_layers(params):
    found = adapters.adaptable(params)
    assert tuple(found) == LINEARS
    assert found["attention/key"] == (3, 16, 12) and found["mlp/down"] == (3, 24, 16)
    assert found == adapters.adaptable(models.abstract_params(MODEL))


@pytest.mark.parametrize("targets, chosen", [
    (("query", "value"), ("attention/query", "attention/value")),
    (("attention/.*",), LINEARS[:4]),
    (("mlp/(gate|up)", "up"), ("mlp/gate", "mlp/up")),
    (("que.*",), ("attention/query",)),
    ((".*",), LINEARS),
])
def test_targets_are_leaf_names_or_patterns_over_paths(params, targets, chosen):
    config = dataclasses.replace(CONFIG, targets=targets)
    assert adapters.select_targets(params, config) == chosen
    assert tuple(adapters.flatten(adapters.init_adapters(params, config, jax.random.key(0)))) == chosen


@pytest.mark.parametrize("target, said", [
    ("quer", "names no matrix.*attention/query"),
    ("attention_norm", "names no matrix"),
    ("attention", "names no matrix"),
    ("lm_head", "output head.*takes an adapter"),
    ("embedding", "look-up.*takes an adapter"),
])
def test_a_target_that_cannot_be_adapted_is_refused(params, target, said):
    config = dataclasses.replace(CONFIG, targets=("query", target))
    with pytest.raises(ConfigError, match=said) as error:
        adapters.init_adapters(params, config, jax.random.key(0))
    assert repr(target) in str(error.value)


@pytest.mark.parametrize("field, value", [
    ("rank", 0), ("rank", 2.0), ("rank", True), ("alpha", 0.0), ("alpha", float("inf")), ("alpha", "8"),
    ("alpha", float("nan")), ("targets", ()), ("targets", "query"), ("targets", ("(",)), ("targets", (1,)),
    ("scaling", "alpha"),
])
def test_an_impossible_config_is_refused(field, value):
    with pytest.raises(ConfigError, match=rf"AdapterConfig\.{field}: found .*allowed: "):
        dataclasses.replace(CONFIG, **{field: value})


def test_the_config_is_hashable_and_gives_the_scale():
    assert hash(adapters.AdapterConfig(targets=["query"])) == hash(adapters.AdapterConfig(targets=("query",)))
    assert adapters.AdapterConfig(rank=16, alpha=8.0).scale == 0.5
    assert adapters.AdapterConfig(rank=16, alpha=8.0, scaling="rslora").scale == 2.0


def test_init_draws_a_like_kaiming_and_b_zero(params):
    tree = adapters.init_adapters(params, dataclasses.replace(CONFIG, rank=64), jax.random.key(0))
    for path, leaf in adapters.flatten(tree).items():
        wide = adapters.adaptable(params)[path][-2]
        assert not leaf["b"].any() and leaf["a"].dtype == jnp.float32
        # Uniform in +-1/sqrt(in): the bound is nearly reached, the deviation is bound / sqrt(3), layers differ.
        assert 0.98 * wide ** -0.5 < float(jnp.abs(leaf["a"]).max()) <= wide ** -0.5
        np.testing.assert_allclose(float(leaf["a"].std()), (3 * wide) ** -0.5, rtol=0.05)
        assert not np.allclose(leaf["a"][0], leaf["a"][1])
    query, key = (tree["attention"][name]["a"] for name in ("query", "key"))
    assert not np.allclose(query, key)


def test_init_of_a_matrix_does_not_depend_on_the_other_targets(params):
    small = adapters.init_adapters(params, dataclasses.replace(CONFIG, targets=("query",)), jax.random.key(0))
    large = adapters.init_adapters(params, CONFIG, jax.random.key(0))
    np.testing.assert_array_equal(small["attention"]["query"]["a"], large["attention"]["query"]["a"])


def test_init_from_shapes_equals_init_from_arrays_and_takes_a_dtype(params):
    real = adapters.init_adapters(params, CONFIG, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, real,
                 adapters.init_adapters(models.abstract_params(MODEL), CONFIG, jax.random.key(0)))
    half = adapters.init_adapters(params, CONFIG, jax.random.key(0), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    with jax.enable_x64(True):
        wide = adapters.init_adapters(params, CONFIG, jax.random.key(0), jnp.float64)
        assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype(jnp.float64)}


def test_count(params):
    expected = sum(3 * 4 * (shape[1] + shape[2]) for shape in adapters.adaptable(params).values())
    make = functools.partial(adapters.init_adapters, params, CONFIG)
    assert adapters.count(make(jax.random.key(0))) == expected
    assert adapters.count(jax.eval_shape(make, jax.random.key(0))) == expected


# --- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", adapters.SCALINGS)
def test_merge_adds_the_scaled_product_to_the_adapted_matrices_only(params, tree, scaling):
    config = dataclasses.replace(CONFIG, scaling=scaling)
    part = {"attention": {"value": tree["attention"]["value"]}}
    merged = adapters.merge(params, part, config)
    assert differ(params, merged) == {"layers/attention/value"}
    leaf, weight = part["attention"]["value"], params["layers"]["attention"]["value"]
    scale = 6.0 / (4 if scaling == "alpha/r" else 2)
    for layer in range(3):
        expected = np.asarray(weight[layer], np.float64) + scale * (
            np.asarray(leaf["a"][layer], np.float64) @ np.asarray(leaf["b"][layer], np.float64))
        np.testing.assert_allclose(merged["layers"]["attention"]["value"][layer], expected, atol=1e-6)
    back = adapters.unmerge(merged, part, config)
    close(back, params, atol=2e-7)


def test_rslora_is_lora_with_alpha_times_the_root_of_the_rank(params, tree):
    rs = dataclasses.replace(CONFIG, scaling="rslora")
    close(merge(params, tree, rs), merge(params, tree, dataclasses.replace(CONFIG, alpha=CONFIG.alpha * 2)), rtol=1e-6)


def test_merge_sums_in_float32_and_rounds_once():
    """-1 + (1 + 2^-9 + 2^-9): a sum or a product kept in bfloat16, whose spacing at 1 is 2^-7, would give 0."""
    params = {"layers": {"w": jnp.asarray([[[-1.0, 2.0]]], jnp.bfloat16)}}
    leaf = {"w": {"a": jnp.asarray([[[1.0, 2 ** -9, 2 ** -9]]], jnp.bfloat16),
                  "b": jnp.asarray([[[1.0, 0.0], [1.0, 0.0], [1.0, 2 ** -3]]], jnp.bfloat16)}}
    merged = adapters.merge(params, leaf, adapters.AdapterConfig(rank=3, alpha=3.0, targets=("w",)))["layers"]["w"]
    # The delta of the other entry, 2^-12, is lost in the rounding of 2: what the docstring warns of.
    assert merged.dtype == jnp.bfloat16 and merged.tolist() == [[[2 ** -8, 2.0]]]


@pytest.mark.parametrize("change, said", [
    (lambda leaf: {"attention": {"quarry": leaf}}, "'attention/quarry'.*attention/query"),
    (lambda leaf: {"attention": {"query": {**leaf, "b": leaf["b"][..., :-1]}}}, "attention/query: found shapes"),
    (lambda leaf: {"attention": {"query": {**leaf, "a": leaf["a"][:2]}}}, "attention/query: found shapes"),
    (lambda leaf: {"attention": {"query": {**leaf, "a": leaf["a"][..., :-1]}}}, "attention/query: found shapes"),
    (lambda leaf: {"attention": {"query": leaf["a"]}}, "attention/query: found .*dict of a and b"),
])
def test_adapters_that_do_not_fit_are_refused(params, tree, change, said):
    with pytest.raises(ConfigError, match=said):
        adapters.merge(params, change(tree["attention"]["query"]), CONFIG)


def test_a_sign_other_than_plus_and_minus_one_is_refused(params, tree):
    with pytest.raises(ConfigError, match="sign.*found 2"):
        adapters.merge(params, tree, CONFIG, sign=2)


# --- several adapters ----------------------------------------------------------------------------------------------


def test_combine_is_the_weighted_sum_of_the_deltas(params, tree):
    part = {"attention": {"query": tree["attention"]["query"]}, "mlp": {"up": tree["mlp"]["up"]}}
    second = randomised(adapters.init_adapters(params, CONFIG, jax.random.key(9)), 8)
    named = {"one": tree, "two": second, "part": part}
    weights = {"one": 0.25, "two": -1.5, "part": 2.0}
    mixed = adapters.combine(named, weights)
    assert mixed["attention"]["query"]["a"].shape == (3, 16, 12) and mixed["mlp"]["down"]["a"].shape == (3, 24, 8)
    found = merge(params, mixed, CONFIG)
    expected = jax.tree.map(np.asarray, params)
    for name, weight in weights.items():
        merged = merge(params, named[name], CONFIG)
        expected = jax.tree.map(lambda e, m, p, w=weight: e + w * (np.asarray(m, np.float64) - p), expected, merged,
                                params)
    close(found, expected, atol=2e-6)


def test_averaging_the_factors_is_not_the_average_of_the_deltas(params, tree):
    """Why combine concatenates: with different a, the mean of the factors gives another matrix."""
    fresh = randomised(adapters.init_adapters(params, CONFIG, jax.random.key(9)), 8)
    mean = adapters.combine({"one": tree, "two": fresh}, {"one": 0.5, "two": 0.5})
    crossed = jax.tree.map(lambda one, two: (one + two) / 2, tree, fresh)
    gap = lambda one, two: float(jnp.abs(one["layers"]["mlp"]["up"] - two["layers"]["mlp"]["up"]).max())
    base = merge(params, tree, CONFIG)
    assert gap(merge(params, mean, CONFIG), merge(params, crossed, CONFIG)) > 0.1 * gap(params, base)


def test_adapters_of_different_scale_combine_after_scaled(params, tree):
    other = dataclasses.replace(CONFIG, alpha=1.0, scaling="rslora")
    second = randomised(tree, 7)
    mixed = adapters.combine({"a": adapters.scaled(tree, CONFIG), "b": adapters.scaled(second, other)},
                             {"a": 1.0, "b": 1.0})
    one = dataclasses.replace(CONFIG, alpha=float(CONFIG.rank))
    assert one.scale == 1.0
    close(merge(params, mixed, one), merge(merge(params, tree, CONFIG), second, other), atol=2e-6)


def test_select_and_combine_name_what_is_unknown(tree):
    assert adapters.select({"one": tree}, "one") is tree
    with pytest.raises(ConfigError, match="'two', allowed: one"):
        adapters.select({"one": tree}, "two")
    with pytest.raises(ConfigError, match="'two', allowed: one"):
        adapters.combine({"one": tree}, {"two": 1.0})
    with pytest.raises(ConfigError, match="no weights"):
        adapters.combine({"one": tree}, {})


def test_stack_orders_by_name_and_refuses_unlike_trees(tree):
    second = randomised(tree, 7)
    both = adapters.stack({"b": tree, "a": second})
    np.testing.assert_array_equal(both["mlp"]["up"]["b"][0], second["mlp"]["up"]["b"])
    given = adapters.stack({"b": tree, "a": second}, ["b"])
    assert given["mlp"]["up"]["b"].shape == (1, 3, 4, 24)
    np.testing.assert_array_equal(given["mlp"]["up"]["b"][0], tree["mlp"]["up"]["b"])
    with pytest.raises(ConfigError, match="'part' unlike 'all' in attention/key"):
        adapters.stack({"all": tree, "part": {"mlp": tree["mlp"]}})
    wide = adapters.combine({"all": tree}, {"all": 1.0}) | {"mlp": adapters.combine({"x": tree, "y": tree},
                                                                                   {"x": 1.0, "y": 1.0})["mlp"]}
    with pytest.raises(ConfigError, match="in mlp/down, mlp/gate, mlp/up"):
        adapters.stack({"all": tree, "wide": wide})
    with pytest.raises(ConfigError, match="no adapters"):
        adapters.stack({})


# --- in the decoder ------------------------------------------------------------------------------------------------


def test_fresh_adapters_change_no_bit(params):
    fresh = adapters.init_adapters(params, CONFIG, jax.random.key(0))
    np.testing.assert_array_equal(forward(params, fresh), forward(params))


@pytest.mark.parametrize("target", LINEARS)
def test_every_linear_layer_takes_its_adapter(params, tree, target):
    """Each on its own moves the output, and equals the merged weights."""
    part = adapters.unflatten({target: adapters.flatten(tree)[target]})
    found, base = forward(params, part), forward(params)
    assert float(jnp.abs(found - base).max()) > 1e-2
    np.testing.assert_allclose(found, forward(merge(params, part, CONFIG)), atol=1e-5)


@pytest.mark.parametrize("remat", models.REMAT)
def test_merged_equals_unmerged(params, tree, remat):
    np.testing.assert_allclose(forward(params, tree, remat=remat), forward(merge(params, tree, CONFIG)), atol=1e-5)


def test_merged_equals_unmerged_in_float64(params, tree):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (params, tree))
        found = forward(*wide)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, forward(merge(*wide, CONFIG)), atol=1e-13)


def test_bfloat16_weights_with_float32_adapters_keep_their_dtype(params, tree):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    found = forward(half, tree)
    assert found.dtype == jnp.bfloat16
    wide = forward(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half), tree)
    np.testing.assert_allclose(found.astype(jnp.float32), wide, atol=0.25)


def test_gradients_equal_autodiff_through_merge(params, tree):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (params, tree))
        loss = lambda hidden: jnp.sum(jnp.sin(hidden))
        apart = jax.jit(jax.grad(lambda t, p: loss(forward(p, t))))(wide[1], wide[0])
        merged = jax.jit(jax.grad(lambda t, p: loss(forward(merge(p, t, CONFIG)))))(wide[1], wide[0])
        close(apart, merged, rtol=1e-9, atol=1e-11)
        assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(apart))


def test_the_first_gradient_is_that_of_b_alone(params):
    """b is zero, so a has no gradient yet; b has one in every matrix. The base gets none when it is not asked for."""
    fresh = adapters.init_adapters(params, CONFIG, jax.random.key(0))
    grads = jax.jit(jax.grad(lambda t: jnp.sum(jnp.sin(forward(params, t)))))(fresh)
    for path, leaf in adapters.flatten(grads).items():
        assert not leaf["a"].any(), path
        assert float(jnp.abs(leaf["b"]).max()) > 1e-4, path


def products(jaxpr):
    """Shapes of all matrix products in a jaxpr and the jaxprs inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def test_training_adapters_forms_no_gradient_of_a_base_matrix(params, tree):
    loss = lambda p, t: jnp.sum(models.forward(MODEL, p, *plain(tokens()), adapters=adapters.scaled(t, CONFIG)))
    weights = {shape[1:] for shape in adapters.adaptable(params).values()}
    weights |= {shape[::-1] for shape in weights}
    # The same search finds them all where the base is trained too.
    assert weights & set(products(jax.make_jaxpr(jax.grad(loss))(params, tree).jaxpr))
    assert not weights & set(products(jax.make_jaxpr(jax.grad(loss, argnums=1))(params, tree).jaxpr))


def test_a_stacked_population_equals_separate_runs(params, tree):
    named = {"one": tree, "two": randomised(tree, 7), "three": randomised(tree, 8)}
    names = sorted(named)
    together = jax.jit(jax.vmap(lambda t: forward(params, t)))(adapters.stack(named))
    for index, name in enumerate(names):
        np.testing.assert_allclose(together[index], forward(params, named[name]), atol=2e-6)
    fresh = jax.vmap(lambda key: adapters.init_adapters(params, CONFIG, key))(jax.random.split(jax.random.key(0), 2))
    assert fresh["mlp"]["up"]["a"].shape == (2, 3, 16, 4)
    assert not np.allclose(*fresh["mlp"]["up"]["a"])


def test_decoding_equals_forward(params, tree):
    grid = tokens()
    position, folded = plain(grid)[3], adapters.scaled(tree, CONFIG)
    cache, valid = models.init_cache(MODEL, 2, 7), jnp.ones((2, 7), bool)
    step = jax.jit(models.decode_step, static_argnums=0)
    first, cache = step(MODEL, params, grid[:, :5], position[:, :5], cache, 0, valid, adapters=folded)
    found = [first]
    for index in (5, 6):
        out, cache = step(MODEL, params, grid[:, index:index + 1], position[:, index:index + 1], cache, index, valid,
                          adapters=folded)
        found.append(out)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), forward(params, tree), atol=3e-6)
