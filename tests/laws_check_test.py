"""The check of a new loss: right ones keep every law, and each law is broken by a function made to break it."""

import jax
import jax.numpy as jnp
import pytest

from alignax import losses
from alignax.losses import laws
from alignax.losses.info import method
from alignax.losses.inputs import floats, log_ratios, pair_log_ratios
from alignax.types import ConfigError, Term, Terms

pytestmark = pytest.mark.slow  # each check compiles several programs


def broken(loss, **settings):
    return {law.name for law in laws.check(loss, **settings) if law.holds is False}


def pairs(function, **facts):
    facts = {"id": "test", "system": "a test", "arxiv": "", "fidelity": "paper", "completions": 2} | facts
    return losses.from_function(method(**facts)(function))


@pytest.mark.parametrize("name, constants", [("dpo", False), ("kto", False), ("orpo", False), ("tdpo", True)])
def test_losses_of_the_index_keep_the_laws(name, constants):
    found = laws.check(losses.get(name), constants=constants)
    assert tuple(law.name for law in found) == laws.NAMES
    assert [law for law in found if law.holds is False] == []
    assert sum(law.holds for law in found if law.holds is not None) >= 8


def branches(logps, ref_logps, *, beta=0.1):
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return jax.nn.softplus(-beta * (chosen - rejected)) if beta > 0 else chosen


def by_position(logps, ref_logps, *, beta=0.1):
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return jax.nn.softplus(-beta * (chosen - rejected)) * jnp.arange(chosen.shape[0])


def trains_the_reference(logps, ref_logps, *, beta=0.1):
    ratios = logps - ref_logps
    return jax.nn.softplus(-beta * (ratios[:, 0] - ratios[:, 1]))


def overflows(logps, ref_logps, *, beta=0.1):
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return jnp.log(1 + jnp.exp(-beta * (chosen - rejected)))


def undefined_at_the_reference(logps, ref_logps):
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return jnp.sqrt(jnp.square(chosen - rejected))


def narrows(logps, ref_logps):
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return jax.nn.softplus(rejected - chosen).astype(jnp.float32)


def couples(logps, ref_logps):
    chosen, rejected = pair_log_ratios(logps, ref_logps)
    return jax.nn.softplus((rejected - chosen) - jnp.mean(rejected - chosen))


def leaks(token_logps, mask):
    return Terms({"nll": Term((-floats(token_logps) * floats(mask)).sum(-1), 1.0, "sequences")})


def half_a_gradient(logps, ref_logps):
    ratios = log_ratios(logps, ref_logps)
    return jax.nn.softplus(jax.lax.stop_gradient(ratios[:, 1]) - ratios[:, 0])


@pytest.mark.parametrize("function, law", [
    (branches, "hyper-parameters may be traced"),
    (by_position, "the order of the batch does not matter"),
    (trains_the_reference, "gradients stop where they should"),
    (overflows, "extremes stay finite"),
    (undefined_at_the_reference, "finite at the reference"),
    (narrows, "float64 stays float64"),
    (couples, "examples are coupled as declared"),
    (leaks, "masked entries change nothing"),
    (half_a_gradient, "gradient equals central differences"),
], ids=lambda x: getattr(x, "__name__", None))
def test_a_law_that_is_broken_is_named(function, law):
    assert law in broken(pairs(function))


def test_constants_on_purpose_are_said():
    assert broken(pairs(half_a_gradient), constants=True) == set()


def test_an_error_is_a_broken_law_and_is_told():
    found = {law.name: law for law in laws.check(pairs(branches))}
    assert "TracerBoolConversionError" in found["hyper-parameters may be traced"].note


def test_from_function_checks_as_the_index_does():
    loss = pairs(overflows)
    assert (loss.name, loss.requests, dict(loss.hyper)) == ("test", ("logps", "ref_logps"), {"beta": 0.1})
    with pytest.raises(ConfigError, match="unknown hyper-parameter betta.*allowed: beta"):
        losses.from_function(overflows, betta=0.2)
    with pytest.raises(ConfigError, match="beta = 'much' is str"):
        losses.from_function(overflows, beta="much")
    with pytest.raises(ConfigError, match="has no @method"):
        losses.from_function(lambda logps: logps)
