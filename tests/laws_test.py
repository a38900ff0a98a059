"""Laws that every loss of the index obeys, on inputs built from the shapes of its requests.

A new loss is covered the moment it enters the index; an exception must be written down in this file with its reason.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import losses
from alignax.losses import laws
from alignax.losses.laws import NO_GRADIENT, masked_out, split
from alignax.ops.reductions import reduce_terms
from alignax.types import REQUESTS

ALL = losses.names()
PERMUTED = {"beta_dpo": {"drop": 0.0}}  # its filter draws by position; with nothing dropped the draw has no effect
# D3PO's window holds log-ratios below 0.11 only; elsewhere its gradient is 0 as it should be.
NEAR = {"d3po": 0.03}


def inputs_of(name, **settings):
    return laws.inputs_of(losses.get(name), **settings)


@functools.cache
def compiled(name):
    """jit of (scalar, gradients) as a function of inputs and hyper-parameter overrides."""
    loss = losses.get(name)

    def run(floats, rest, override):
        return jax.value_and_grad(lambda f: reduce_terms(loss({**f, **rest}, **override))[0])(floats)

    return jax.jit(run)


def value_and_grad(name, inputs, **override):
    return compiled(name)(*split(inputs), override)


def eager_value_and_grad(name, inputs):
    """The same, operation by operation."""
    floats, rest = split(inputs)
    return jax.value_and_grad(lambda f: reduce_terms(losses.get(name)({**f, **rest}))[0])(floats)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 2e-5, "atol": 1e-6, **tolerance}), a, b)


@pytest.mark.parametrize("name", ALL)
def test_compiled_equals_eager(name):
    inputs, loss = inputs_of(name), losses.get(name)
    assert_close(value_and_grad(name, inputs)[0], reduce_terms(loss(inputs))[0])


@pytest.mark.parametrize("name", ALL)
def test_every_float_hyper_parameter_may_be_traced(name):
    """A sweep over each one at once equals single runs."""
    inputs, loss = inputs_of(name), losses.get(name)
    hyper = {k: v for k, v in loss.hyper.items() if isinstance(v, float)}
    if not hyper:
        pytest.skip("no float hyper-parameter")
    values = jnp.asarray([[v * f + d for f, d in ((1.0, 0.0), (0.9, 0.01))] for v in hyper.values()], jnp.float32)
    at = lambda override: reduce_terms(loss(inputs, **override))[0]

    @jax.jit
    def sweep(values):
        rows = dict(zip(hyper, values, strict=True))
        return jax.vmap(at)(rows), {key: jax.vmap(lambda x, key=key: at({key: x}))(row) for key, row in rows.items()}

    swept, single = sweep(values)
    # The default in the config and the same number as a traced float32 must agree.
    np.testing.assert_allclose(swept[0], reduce_terms(loss(inputs))[0], rtol=1e-4)
    second = reduce_terms(loss(inputs, **{k: float(v) for k, v in zip(hyper, values[:, 1], strict=True)}))[0]
    np.testing.assert_allclose(swept[1], second, rtol=1e-4)
    for key, one in single.items():  # traced alone, the others static
        assert one.shape == (2,) and np.isfinite(one).all(), key
        np.testing.assert_allclose(one[0], swept[0], rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in ALL if {"mask", "valid"} & set(losses.get(n).requests)])
@pytest.mark.parametrize("garbage", [1e30, -77.0, np.nan])
def test_masked_entries_change_nothing_and_get_no_gradient(name, garbage):
    inputs = inputs_of(name)
    masks = masked_out(inputs)
    assert masks and any(m.any() for m in masks.values())
    junk = lambda v: jnp.asarray(garbage if jnp.issubdtype(v.dtype, jnp.floating) else 1, v.dtype)
    dirty = {n: jnp.where(masks[n], junk(v), v) if n in masks else v for n, v in inputs.items()}
    clean = {n: jnp.where(masks[n], 0, v) if n in masks else v for n, v in inputs.items()}
    expected, reference = value_and_grad(name, clean)
    # Eagerly too: inside one program XLA may turn float(mask) * x into a select, hiding a product that leaks NaN.
    for run in (value_and_grad, eager_value_and_grad):
        value, gradient = run(name, dirty)
        np.testing.assert_allclose(value, expected, rtol=0 if run is value_and_grad else 1e-6)
        assert_close(gradient, reference)
        for request, masked in masks.items():
            if request in gradient:
                np.testing.assert_array_equal(np.asarray(gradient[request])[np.asarray(masked)], 0, err_msg=request)


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_the_batch_does_not_matter(name):
    inputs, override = inputs_of(name), PERMUTED.get(name, {})
    order = np.array([2, 0, 3, 1])
    moved = {n: v if n in ("key", "state") else v[order] for n, v in inputs.items()}
    (value, gradient), (permuted, moved_gradient) = (value_and_grad(name, x, **override) for x in (inputs, moved))
    np.testing.assert_allclose(permuted, value, rtol=2e-6)
    assert_close(moved_gradient, {n: g[order] for n, g in gradient.items()})


@pytest.mark.parametrize("name", ALL)
def test_examples_are_independent_unless_declared(name):
    """`couples_batch` is true exactly where changing one example moves another's unreduced value."""
    loss = losses.get(name)
    inputs = inputs_of(name)
    changed = {n: v if n in ("key", "state", "mask", "valid", "lengths") else v.at[0].set(inputs_of(name, seed=5)[n][0])
               for n, v in inputs.items()}

    def values(x):
        result = loss(x)
        terms = result.terms.values() if hasattr(result, "terms") else [result]
        return [t.values if hasattr(t, "values") else t for t in terms]

    moved = any(not np.array_equal(a[1:], b[1:]) for a, b in zip(values(inputs), values(changed), strict=True))
    assert moved == loss.info.couples_batch


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("scale", [1e4, 1e-7])
def test_extremes_stay_finite(name, scale):
    inputs = inputs_of(name, scale=scale)
    for flipped in (False, True):  # log-ratios of both signs
        if flipped:
            inputs = {n: v[:, ::-1] if n in ("logps", "token_logps", "rewards") else v for n, v in inputs.items()}
        value, gradient = value_and_grad(name, inputs)
        assert np.isfinite(value), scale
        for request, g in gradient.items():
            assert np.isfinite(g).all(), (request, scale)


@pytest.mark.parametrize("name", ALL)
def test_policy_at_the_reference_is_finite(name):
    inputs = inputs_of(name)
    for request in [n for n in inputs if n.startswith(("ref_", "kl_ref_"))]:
        inputs[request] = inputs.get(request.replace("ref_", "", 1), jnp.zeros_like(inputs[request]))
    value, gradient = value_and_grad(name, inputs)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradient.values())


@pytest.mark.parametrize("name", ALL)
def test_gradients_stop_where_the_request_table_says(name):
    _, gradient = value_and_grad(name, inputs_of(name, scale=NEAR.get(name, 1.0)))
    reached = {request for request, g in gradient.items() if np.any(np.asarray(g) != 0)}
    assert not reached & NO_GRADIENT, f"gradient into {reached & NO_GRADIENT}"
    assert any(REQUESTS[request].grad for request in reached), "no gradient into the policy"


@pytest.mark.parametrize("name", ALL)
def test_float64_stays_float64(name):
    with jax.enable_x64():
        inputs = inputs_of(name, dtype=np.float64)
        value, gradient = value_and_grad(name, inputs)
        assert value.dtype == jnp.float64 and all(g.dtype == jnp.float64 for g in gradient.values())
        assert laws.dtypes(losses.get(name), inputs) == {"float64"}
        single = {n: v.astype(jnp.float32) if n not in ("key", "state") and v.dtype == jnp.float64 else v
                  for n, v in inputs.items()}
        np.testing.assert_allclose(value_and_grad(name, single)[0], value, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in ALL if {"logps", "ref_logps"} & set(losses.get(n).requests)])
def test_bfloat16_sums_are_refused(name):
    inputs = inputs_of(name)
    with pytest.raises(TypeError, match="allowed: float32 or float64"):
        losses.get(name)({**inputs, "logps": inputs["logps"].astype(jnp.bfloat16)})


@pytest.mark.parametrize("name", ["sft", "tdpo", "wpo", "cpl", "prdp", "grad_diff:kl", "unlikelihood:token"])
def test_bfloat16_tokens_are_computed_in_float32(name):
    inputs = {n: v.astype(jnp.bfloat16) if jnp.issubdtype(v.dtype, jnp.floating) else v
              for n, v in inputs_of(name).items()}
    value = reduce_terms(losses.get(name)(inputs))[0]
    wide = {n: v.astype(jnp.float32) if v.dtype == jnp.bfloat16 else v for n, v in inputs.items()}
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, reduce_terms(losses.get(name)(wide))[0], rtol=1e-6)


def test_the_builder_covers_every_request_that_a_loss_makes():
    for name in ALL:
        assert set(inputs_of(name)) == set(losses.get(name).requests)
