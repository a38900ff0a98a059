"""Every loss equals its independent float64 statement, and its gradients are the statement's differences."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from statements import STATEMENTS, Arrays, pairs, rewards, tokens
from statements.base import live
from statements.inputs import CASES, draw, options

from alignax import losses
from alignax.ops.reductions import reduce_terms
from alignax.types import REQUESTS, Terms

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)
STEP = 1e-5
# Every program runs once: what it costs is its compilation.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
COORDINATES = 4  # of each array and draw
MUST_STOP = {r.name for r in REQUESTS.values() if r.provider in ("policy", "reference", "head") and not r.grad}
MUST_STOP |= {"scores", "labels", "weights", "token_rewards", "segment_scores", "advantages"}
# Options that cannot act here: clips beyond the reach of a default member, and draws.
SILENT: set[tuple[str, str]] = {("beta_dpo", "drop")}
RUNS = [(name, case) for name in losses.names() for case in [{}, *CASES.get(name, [])]]


def title(run):
    name, case = run
    return "-".join([name, *(f"{k}={v}" for k, v in case.items())])


def inputs_of(name, seed):
    loss = losses.get(name)
    requests = tuple(r for r in loss.requests if r != "key")
    return draw(name, requests, loss.info.completions, loss.init_state(), seed)


def evaluate(name, inputs, hyper, static):
    """(value, new state, gradients) of the implementation for all draws at once, stacked."""
    loss = losses.get(name)
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *inputs)
    moving = {n: v for n, v in stacked.items() if n != "state" and np.issubdtype(v.dtype, np.floating)}
    rest = {n: v for n, v in stacked.items() if n not in moving}
    if "key" in loss.requests:
        rest["key"] = jax.random.split(jax.random.key(5), len(inputs))

    def value(moving, rest, hyper):
        result = loss({**moving, **rest}, **hyper, **static)
        return reduce_terms(result)[0], (result.new_state if isinstance(result, Terms) else None)

    floats = {k: np.asarray([h[k] for h in hyper]) for k in hyper[0]}
    run = jax.jit(jax.vmap(jax.value_and_grad(value, has_aux=True)), compiler_options=QUICK)
    (scalar, state), gradient = run(moving, rest, floats)
    return jax.tree.map(np.asarray, (scalar, state, gradient))


def split(result):
    """(scalar, new state or None) of a statement."""
    return result if isinstance(result, tuple) else (result, None)


def difference(statement, arrays, request, at, hyper):
    """Central difference of the statement, everything under a stop-gradient held."""
    fixed, sides = Arrays(arrays), []
    for sign in (1, -1):
        moved = arrays[request].copy()
        moved[at] += sign * STEP
        sides.append(split(statement(Arrays({**arrays, request: moved}, fixed), **hyper))[0])
    return (sides[0] - sides[1]) / (2 * STEP)


def assert_state(found, expected, draw):
    """A state is float32 by contract, whatever enters it."""
    for key, value in expected.items():
        np.testing.assert_allclose(found[key][draw], value, rtol=2e-6, err_msg=f"state {key}")


@pytest.mark.parametrize(("name", "case"), RUNS, ids=[title(r) for r in RUNS])
def test_a_loss_is_its_statement_in_value_and_gradient(name, case):
    statement, resolved = STATEMENTS[name], losses.get(name).hyper
    inputs = [inputs_of(name, seed) for seed in SEEDS]
    drawn = [{k: v for k, v in options(name, resolved, seed).items() if k not in case} for seed in SEEDS]
    with jax.enable_x64(True):
        values, states, gradients = evaluate(name, inputs, drawn, case)
    chosen = np.random.default_rng(11)
    for i, arrays in enumerate(inputs):
        hyper = {**resolved, **case, **drawn[i]}
        expected, state = split(statement(Arrays(arrays), **hyper))
        assert np.isfinite(expected), "the statement read a masked entry"
        np.testing.assert_allclose(values[i], expected, rtol=1e-10, atol=1e-13)
        if state is not None:
            assert_state(states, state, i)
        for request, gradient in gradients.items():
            if request in MUST_STOP:
                np.testing.assert_array_equal(gradient[i], 0, err_msg=request)
            if not REQUESTS[request].grad:
                continue
            places = np.argwhere(~np.isnan(arrays[request]))
            for at in map(tuple, places[chosen.permutation(len(places))[:COORDINATES]]):
                slope = difference(statement, arrays, request, at, hyper)
                np.testing.assert_allclose(gradient[i][at], slope, rtol=1e-6, atol=1e-7, err_msg=f"{request}{at}")


def test_every_loss_has_a_statement_and_every_option_a_case():
    assert set(STATEMENTS) == set(losses.names())
    for name in losses.names():
        fixed = {k for k, v in losses.get(name).hyper.items() if isinstance(v, (bool, str))}
        assert fixed <= {k for case in CASES.get(name, []) for k in case}, name


@pytest.mark.parametrize("name", losses.names())
def test_every_option_moves_the_statement(name):
    """Each float option, drawn as above, takes part: no clip, floor or weight is out of reach."""
    resolved = losses.get(name).hyper
    asleep = {k for k in options(name, resolved, 0) if (name, k) not in SILENT}
    for seed, case in itertools.product(SEEDS, [{}, *CASES.get(name, [])]):
        arrays, drawn = Arrays(inputs_of(name, seed)), options(name, resolved, seed)
        for key in sorted(asleep):
            at = {**resolved, **drawn, **case}
            other = 0.98 * at[key] if key != "threshold" else -9.0
            values = [split(STATEMENTS[name](arrays, **{**at, key: value})) for value in (at[key], other)]
            if repr(values[0]) != repr(values[1]):
                asleep.remove(key)
    assert not asleep


def quick(function, *arguments):
    """function(*arguments) in float64, compiled quickly."""
    with jax.enable_x64(True):
        return np.asarray(jax.jit(function, compiler_options=QUICK)(*arguments))


def nearest(value, candidates):
    """The relative distance of the nearest candidate."""
    return min(abs(value - c) / abs(c) for c in candidates)


@pytest.mark.parametrize("independent", [False, True])
def test_sampo_is_its_statement_on_some_choice_of_as_many_tokens(independent):
    arrays = draw("ld_dpo", ("token_logps", "ref_token_logps", "mask"), 2, None, 0)  # ragged, unlike sampo's above
    x = Arrays(arrays)
    loss, ids = losses.get("sampo", beta=0.7, independent=independent), np.arange(len(x.mask), dtype=np.uint32)
    values = quick(lambda key: loss({**arrays, "ids": ids, "key": key}), jax.random.key(3))
    ragged = 0
    for b in range(len(x.mask)):
        size = min(len(live(x, b, 0)), len(live(x, b, 1)))
        choices = [list(itertools.combinations(live(x, b, k), size)) for k in (0, 1)]
        kept = list(itertools.product(*choices))
        both = itertools.product(kept, kept) if independent else zip(kept, kept, strict=True)
        assert nearest(values[b], [tokens.sampled(x, b, 0.7, one, two) for one, two in both]) < 1e-10
        ragged += len(kept) > 1
    assert ragged > 2


def test_beta_dpo_is_its_statement_on_the_pairs_that_the_noise_selects():
    """Drawing without replacement in proportion to p is keeping the largest log p + Gumbel noise."""
    hyper = {"beta": 0.6, "a": 0.5, "drop": 0.4, "momentum": 0.8}
    loss, size = losses.get("beta_dpo", **hyper), 5
    with jax.enable_x64(True):
        run = jax.jit(lambda x, key: (reduce_terms(loss({**x, "key": key}))[0], jax.random.gumbel(key, (size,), float)),
                      compiler_options=QUICK)
    for seed in range(8):
        arrays = inputs_of("beta_dpo", seed)
        gap = np.array(pairs.gaps(Arrays(arrays)))
        state = pairs.running(arrays["state"], gap, hyper["momentum"])
        with jax.enable_x64(True):
            value, noise = (np.asarray(v) for v in run(arrays, jax.random.key(seed)))
        log_p = -((gap - state["mean"]) ** 2) / (2 * state["std"] ** 2)
        kept = np.argsort(-(log_p + noise))[:3]  # floor(5 (1 - 0.4))
        np.testing.assert_allclose(value, pairs.beta_dpo(Arrays(arrays), kept=kept, **hyper)[0], rtol=1e-10)


@pytest.mark.parametrize("mean_goal", [False, True])
def test_goal_contrast_is_its_statement_on_some_choice_of_places(mean_goal):
    """Two chosen tokens and one rejected: only how often the first is drawn for the second part is left to chance."""
    arrays = inputs_of("goal_conditioned_rm", 0)
    arrays["mask"] = np.zeros_like(arrays["mask"])
    arrays["mask"][:, 0, [1, 4]] = arrays["mask"][:, 1, 2] = True
    arrays["hidden"] = np.random.default_rng(0).normal(size=arrays["hidden"].shape)
    x, n = Arrays(arrays), 3
    loss = losses.get("goal_conditioned_rm", samples=n, mean_goal=mean_goal)
    values = quick(lambda key: loss({**arrays, "key": key}).terms["contrast"].values, jax.random.key(1))
    for b in range(len(values)):
        choices = [[1] * m + [4] * (n - m) for m in range(n + 1)]
        expected = [rewards.contrast(x, b, [1] * n, [4] * n, c, [2] * n, mean_goal) for c in choices]
        assert nearest(values[b], expected) < 1e-10


def test_goals_follow_their_sources_and_every_place_is_drawn():
    """One sample for each of many pairs with the same states: 3 ordered places, and 3 by 2 across the responses."""
    size, good, bad = 90, [0, 2, 3], [1, 4]
    arrays = inputs_of("goal_conditioned_rm", 0)
    one = {n: np.repeat(arrays[n][:1], size, axis=0) for n in ("rewards", "mask", "hidden")}
    one["mask"][:] = False
    one["mask"][:, 0, good] = one["mask"][:, 1, bad] = True
    one["hidden"][:] = np.random.default_rng(0).normal(size=one["hidden"].shape[1:])
    one["ids"] = np.arange(size, dtype=np.uint32)
    loss = losses.get("goal_conditioned_rm", samples=1)
    values = quick(lambda key: loss({**one, "key": key}).terms["contrast"].values, jax.random.key(2))
    options = itertools.product(itertools.combinations(good, 2), itertools.product(good, bad))
    expected = {(a, b): rewards.contrast(Arrays(one), 0, [a[0]], [a[1]], [b[0]], [b[1]], False) for a, b in options}
    found = [min(expected, key=lambda o, v=v: abs(expected[o] - v)) for v in values]
    np.testing.assert_allclose(values, [expected[o] for o in found], rtol=1e-10)
    assert set(found) == set(expected)


@pytest.mark.parametrize("name", ["tpo_triple", "tpo_triple:length"])
def test_triples_on_pairs(name):
    """Two completions: the chosen answer is the gold one."""
    arrays, hyper = draw(name, losses.get(name).requests, 2, None, 0), losses.get(name).hyper
    value = quick(lambda x: reduce_terms(losses.get(name)(x))[0], arrays)
    np.testing.assert_allclose(value, STATEMENTS[name](Arrays(arrays), **hyper), rtol=1e-10)


def test_the_golden_pair():
    """A dozen of the statements against numbers computed by hand in the catalogue."""
    pair = {"logps": np.array([[-10.0, -12.0]]), "ref_logps": np.array([[-11.0, -11.5]]),
            "lengths": np.array([[5.0, 8.0]]), "scores": np.array([[3.0, 1.0]])}
    golden = {"dpo": 0.620957, "cdpo": 0.635957, "robust_dpo": 0.602207, "ipo": 12.25, "cal_dpo": 36.451413,
              "apo:zero": 0.962523, "apo:down": 0.987549, "exo": 2.505517, "minor_dpo": 0.644397,
              "orpo": 2.104206, "asft": 2.225248, "simper": 0.087795, "odpo": 1.001152, "rebel": 0.25}
    own = {"cal_dpo": {"beta": 0.1}}
    for name, expected in golden.items():
        value = STATEMENTS[name](Arrays(pair), **{**losses.get(name).hyper, **own.get(name, {})})
        assert abs(value - expected) < 2e-6, name
