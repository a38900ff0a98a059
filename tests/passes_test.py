"""The model passes that a traced step contains are those that the request table declares; nothing is computed.

Passes are told apart in the program by what they are given: every stream has a number of columns of its own, the
reference is bfloat16 beside a float32 policy, and a backward pass runs its loop over the layers in reverse.
"""

import collections

import jax
import jax.numpy as jnp
import optax
import pytest

from alignax import data, losses, models, planning, sharding, step
from alignax.types import REQUESTS, Batch, ConfigError, Passes, Stream, passes

pytestmark = pytest.mark.slow

LAYERS, WIDTH, VOCAB = 5, 8, 17  # no other loop of these programs has 5 turns
CONFIG = models.DecoderConfig(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=16, num_layers=LAYERS, num_heads=2,
                              num_kv_heads=1, head_dim=4, max_positions=64)
SPEC = step.ModelSpec(CONFIG)
COLUMNS = {"pair": 16, "mismatched": 24, "aux_prompt": 32, "reference_sample": 40, "degraded": 48}
B, K, L = 4, 2, 6
RECORDED = {"prompt_embedding", "activation_mask", "prompt_values", "old_token_logps"}


def shapes(dtype, *size):
    return jax.ShapeDtypeStruct(size, dtype)


def batch(**more):
    """All streams and all columns of data, as shapes; `more`: further columns."""
    def stream(columns):
        grid, slot = shapes(jnp.int32, B * K, columns), shapes(jnp.int32, B, K, L)
        return Stream(grid, grid, grid, grid, slot, slot, slot, shapes(bool, B, K, L), shapes(bool, B, K), B)

    size = {"B": B, "K": K, "L": L}
    given = {r.name: shapes(r.dtype, *(size[a] for a in r.axes)) for r in REQUESTS.values() if r.provider == "data"}
    given |= {"prompt_lengths": shapes(jnp.int32, B), **more}
    return Batch({name: stream(columns) for name, columns in COLUMNS.items()}, given, shapes(jnp.uint32, B))


def layer_loops(jaxpr):
    """(stream, dtype of the activations, whether backward, numbers of outputs) of every loop over the layers."""
    stream_of = {columns: name for name, columns in COLUMNS.items()}
    found = []
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "scan" and params["length"] == LAYERS:
            first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
            (carried,) = [v.aval for v in equation.invars[first:last] if v.aval.ndim == 3 and v.aval.shape[2] == WIDTH]
            found.append((stream_of[carried.shape[1]], carried.dtype.name, params["reverse"], len(equation.outvars)))
            continue
        for value in params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += layer_loops(inner)
    return found


def counted(jaxpr):
    """Stream -> Passes of a traced program."""
    tally = collections.Counter((stream, dtype, reverse) for stream, dtype, reverse, _ in layer_loops(jaxpr.jaxpr))
    assert not [key for key in tally if key[1:] == ("bfloat16", True)], "a backward pass through the reference"
    return {stream: Passes(tally[stream, "float32", False], tally[stream, "float32", True],
                           tally[stream, "bfloat16", False]) for stream in {key[0] for key in tally}}


def policy_of(loss):
    heads = jax.eval_shape(lambda: models.init_heads(loss.requests, WIDTH, VOCAB, jax.random.key(0)))
    return {"model": models.abstract_params(CONFIG), **heads}


def traced(loss, *, rule="frozen", accumulation=1, **more):
    """The jaxpr of one update under a reference rule."""
    reference = {"model": models.abstract_params(CONFIG, jnp.bfloat16)} if rule == "frozen" else None
    optimizer, params = optax.sgd(0.1), policy_of(loss)
    state = step.TrainState(shapes(jnp.int32), params, jax.eval_shape(optimizer.init, params),
                            jax.eval_shape(loss.init_state))
    update = step.make_update(SPEC, loss, optimizer, accumulation=accumulation)
    return jax.make_jaxpr(update)(state, reference, batch(**more), {}, jax.random.key(0))


def one_of_each():
    """The first loss of every set of requests that the model serves, as parameters of a test."""
    first = {}
    for name in losses.names():
        first.setdefault(frozenset(r for r in losses.get(name).requests if REQUESTS[r].passes), name)
    return sorted(first.values())


@pytest.mark.parametrize("name", losses.names())
def test_a_step_runs_the_declared_passes(name):
    loss = losses.get(name)
    jaxpr = traced(loss)
    assert counted(jaxpr) == passes(loss.requests)
    # What carries no gradient keeps nothing for a backward pass: its loop hands on the activations alone.
    active = {stream for stream, one in passes(loss.requests).items() if one.policy_backward}
    for stream, dtype, _, outputs in layer_loops(jaxpr.jaxpr):
        if stream not in active or dtype == "bfloat16":
            assert outputs == 1, f"{stream} ({dtype}) keeps {outputs - 1} arrays of all layers"


@pytest.mark.parametrize("name", one_of_each())
def test_exact_accumulation_runs_again_what_carries_gradients_only(name):
    loss = losses.get(name)
    found = passes(loss.requests, accumulation=2)
    assert counted(traced(loss, accumulation=2)) == found
    once = passes(loss.requests)
    for stream, one in found.items():
        assert one.policy_forward - once[stream].policy_forward in (0, 1)
        assert one.policy_backward == once[stream].policy_backward


@pytest.mark.parametrize("name", [n for n in one_of_each()
                                  if {r for r in losses.get(n).requests if REQUESTS[r].references} <= {"ref_logps"}])
def test_a_precomputed_reference_is_not_run(name):
    loss = losses.get(name)
    declared = passes(loss.requests, "precomputed")
    assert counted(traced(loss, rule="precomputed", ref_logps=shapes(jnp.float32, B, K))) == declared
    assert not any(one.reference_forward for one in declared.values())


@pytest.mark.parametrize("name", one_of_each())
def test_an_evaluation_runs_forward_only(name):
    loss = losses.get(name)
    evaluate = step.make_evaluate(SPEC, loss)
    reference = {"model": models.abstract_params(CONFIG, jnp.bfloat16)}
    jaxpr = jax.make_jaxpr(evaluate)(policy_of(loss), reference, batch(), {}, jax.random.key(0),
                                     jax.eval_shape(loss.init_state))
    assert counted(jaxpr) == passes({*loss.requests, "logps"}, training=False)  # log-probs are always reported


def test_diagnostics_of_an_evaluation_share_its_passes():
    loss = losses.get("dpo")
    evaluate = step.make_evaluate(SPEC, loss, diagnostics=("entropy", "ref_policy_kl"))
    reference = {"model": models.abstract_params(CONFIG, jnp.bfloat16)}
    jaxpr = jax.make_jaxpr(evaluate)(policy_of(loss), reference, batch(), {}, jax.random.key(0), None)
    assert counted(jaxpr) == {"pair": Passes(1, 0, 1)}


def test_what_the_batch_brings_is_not_computed():
    """With recorded embeddings of the prompts and recorded sums, no reference is run."""
    assert counted(traced(losses.get("relative_po"), rule="none", ref_logps=shapes(jnp.float32, B, K),
                          prompt_embedding=shapes(jnp.float32, B, 3))) == {"pair": Passes(1, 1, 0)}


@pytest.mark.parametrize("name", one_of_each())
def test_a_planned_update_is_the_one_that_would_run(name):
    """Its shapes hold every stream, head and column that the loss asks for, so that it traces, to the same passes."""
    loss = losses.get(name)
    declared = passes(loss.requests)
    rule = "frozen" if any(one.reference_forward for one in declared.values()) else "none"
    setup = planning.make_setup(SPEC, loss, optax.sgd(0.1), reference=rule)
    size = planning.Size(B, data.Shape(K, COLUMNS["pair"], L, K))
    arguments = planning.program.abstract_arguments(setup, size, sharding.abstract_mesh({"data": 1}))
    jaxpr = jax.make_jaxpr(step.make_update(SPEC, loss, setup.optimizer))(*arguments)
    backward = sum(reverse for *_, reverse, _ in layer_loops(jaxpr.jaxpr))
    assert backward == sum(one.policy_backward for one in declared.values())
    assert len(layer_loops(jaxpr.jaxpr)) == sum(map(sum, declared.values()))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["dpo", "kto", "tdpo", "orpo", "sr_dpo", "new_desiderata", "self_supervised_po"])
def test_a_plan_counts_the_declared_passes(name, accumulation):
    """Shown by stream, in the FLOPs by formula, which are those of the traced program, and in how often weights are
    read."""
    loss = losses.get(name)
    rule = "frozen" if any(REQUESTS[r].references for r in loss.requests) else "none"
    setup = planning.make_setup(SPEC, loss, optax.sgd(0.1), reference=rule, accumulation=accumulation)
    size = planning.Size(4 * accumulation, data.Shape(K, COLUMNS["pair"], L, K))
    found = planning.measure(setup, size, sharding.abstract_mesh({"data": 4}))
    declared = passes(loss.requests, rule, accumulation=accumulation)
    assert {stream: Passes(**one) for stream, one in found["passes"].items()} == declared
    heads = 1e-3 if name == "self_supervised_po" else 1e-9  # a head of four classes is left out of the formula
    assert found["flops"]["analytic"] == pytest.approx(found["flops"]["traced"], rel=heads)
    by_hand = {"dpo": [(2, 1), (6, 2)], "kto": [(3, 2), (8, 4)], "tdpo": [(2, 1), (6, 4)], "orpo": [(2, 0), (6, 0)]}
    if name in by_hand:
        assert tuple(found["reads"].values()) == by_hand[name][accumulation - 1]


def test_passes_by_hand():
    assert passes(("logps", "ref_logps", "lengths")) == {"pair": Passes(1, 1, 1)}
    assert passes(("logps", "ref_logps"), accumulation=4) == {"pair": Passes(2, 1, 1)}
    assert passes(("token_logps", "ref_policy_kl"), accumulation=4) == {"pair": Passes(2, 1, 2)}
    assert passes(("logps", "ref_logps"), "precomputed") == {"pair": Passes(1, 1, 0)}
    kto = ("logps", "ref_logps", "kl_logps", "kl_ref_logps", "labels")
    assert passes(kto) == {"pair": Passes(1, 1, 1), "mismatched": Passes(1, 0, 1)}
    assert passes(kto, accumulation=2) == {"pair": Passes(2, 1, 1), "mismatched": Passes(1, 0, 1)}
    assert passes(("detached_values",)) == {"pair": Passes(1, 0, 0)}
    assert passes(("prompt_values",), accumulation=2) == {"pair": Passes(0, 0, 2)}
    assert passes(("lengths", "key")) == {}
    with pytest.raises(ConfigError, match="passes: colour is no request; allowed: .*ref_logps"):
        passes(("logps", "colour"))


def test_the_table_names_the_passes_of_its_streams():
    """`policy` and `reference` are passes over the pairs; those over another stream carry its name."""
    for request in REQUESTS.values():
        for one in request.passes:
            model, _, stream = one.partition(":")
            assert model in ("policy", "reference") and (stream or "pair") == request.stream, request.name
        assert bool(request.references) == any(one.startswith("reference") for one in request.passes), request.name
        if request.provider in ("policy", "reference", "head"):
            assert request.passes, request.name
