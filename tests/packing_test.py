"""Packed layouts: the packing, the shapes of a plan, and that no loss can tell one layout from another."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignax import losses, models, sharding, step
from alignax.data import (
    LAYOUT_NAMES,
    Plan,
    Shape,
    bucket,
    fill,
    mismatched,
    occupancy,
    plan_shape,
    token_record,
)
from alignax.data.layouts import first_fit_decreasing
from alignax.ops.reductions import reduce_terms
from alignax.types import REQUESTS, Batch, ConfigError, DataError

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKED = ("packed", "shared_prefix_packed")
CONFIG = models.DecoderConfig(vocab_size=13, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2,
                              num_kv_heads=1, head_dim=4, max_positions=64)
SPEC = step.ModelSpec(CONFIG, unroll=1)


def records(n=8, K=2, *, ragged=False, seed=0):
    """Ragged lengths: prompts of 0 to 6 tokens, completions of 1 to 6, some with turns that are not scored."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        prompt = rng.integers(3, 13, i % 7)
        count = 1 + i % K if ragged else K
        # A single token after an empty prompt has nothing to predict it, and data refuses it.
        texts = [[*rng.integers(3, 13, max(int(rng.integers(0, 6)), 2 * (not len(prompt)))), 2] for _ in range(count)]
        if i == 3:
            texts[0] = [5, 5, 5, 5, 5, 2]  # a repeated run, which unlikelihood losses look for
        one = token_record(f"r{i}", prompt, texts, eos_ids=(2,), scores=sorted(rng.normal(size=count), reverse=True),
                           labels=[float(j % 2 == i % 2) for j in range(count)], margin=float(rng.normal()),
                           file="f.jsonl", line=i)
        if i % 3 == 1:
            scored = tuple(np.arange(len(text)) % 2 == (len(text) - 1) % 2 for text in texts)
            one = dataclasses.replace(one, scored=scored)
        out.append(one)
    return out


# --- the packing ------------------------------------------------------------------------------------------------


def test_first_fit_decreasing_by_hand():
    row, start, rows = first_fit_decreasing(np.array([[2, 5, 3, 3, 4], [1, 0, 0, 0, 0]]), 6)
    # 5 and 4 open rows; the two 3s fit beside neither, share a third row; 2 joins the 4.
    assert row.tolist() == [[1, 0, 2, 2, 1], [0, 0, 0, 0, 0]]
    assert start.tolist() == [[4, 0, 0, 3, 0], [0, 1, 1, 1, 1]] and rows.tolist() == [3, 1]
    with pytest.raises(ConfigError, match="1 to 7, expected 0 to capacity = 6"):
        first_fit_decreasing(np.array([[1, 7]]), 6)


@settings(max_examples=60, deadline=None)
@given(lanes=st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=6),
       capacity=st.integers(9, 20))
def test_packing_never_overlaps_and_first_fit_is_what_it_does(lanes, capacity):
    sizes = np.array(lanes)
    row, start, rows = first_fit_decreasing(sizes, capacity)
    for lane in range(len(sizes)):
        free = []  # the definition, in plain Python
        for item in sorted(range(4), key=lambda i, lane=lane: (-sizes[lane, i], i)):
            r = next((r for r, room in enumerate(free) if room >= sizes[lane, item]), len(free))
            free += [capacity] * (r == len(free))
            if sizes[lane, item]:
                assert (row[lane, item], start[lane, item]) == (r, capacity - free[r])
            free[r] -= sizes[lane, item]
        cells = np.zeros((4, capacity), int)
        for item in range(4):
            cells[row[lane, item], start[lane, item]:start[lane, item] + sizes[lane, item]] += 1
        assert cells.max() <= 1 and cells.sum() == sizes[lane].sum()
        assert rows[lane] == max(int((cells.sum(1) > 0).sum()), 1)


def test_lanes_are_packed_alone_whatever_is_held_in_memory(monkeypatch):
    sizes = np.random.default_rng(0).integers(0, 12, (7, 9))
    whole = first_fit_decreasing(sizes, 12)
    monkeypatch.setattr("alignax.data.layouts.packing._LANE_CELLS", 20)
    for a, b in zip(whole, first_fit_decreasing(sizes, 12), strict=True):
        np.testing.assert_array_equal(a, b)


# --- rows by hand -----------------------------------------------------------------------------------------------

A = token_record("a", [1, 5, 6], [[7, 8, 2], [9, 2]], eos_ids=[2], file="f.jsonl", line=1)
B = token_record("b", [1], [[7, 2]], eos_ids=[2], file="f.jsonl", line=2)


def test_packed_by_hand():
    batch = fill([A, B], Shape(K=2, T=9, L=3, rows=2), "packed", pad_id=0)
    pair = batch.streams["pair"]
    assert pair.tokens.tolist() == [[1, 5, 6, 7, 8, 2, 1, 7, 2], [1, 5, 6, 9, 2, 0, 0, 0, 0]]
    assert pair.segment.tolist() == [[1] * 6 + [2] * 3, [1] * 5 + [0] * 4]
    assert pair.prefix.tolist() == pair.segment.tolist()
    assert pair.position[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert pair.row.tolist() == [[[0, 0, 0], [1, 1, 0]], [[0, 0, 0], [0, 0, 0]]]
    assert pair.col.tolist() == [[[2, 3, 4], [2, 3, 0]], [[6, 7, 0], [0, 0, 0]]]
    assert pair.valid.tolist() == [[True, True], [True, False]] and pair.groups == 1
    assert occupancy(batch) == (6 + 5 + 3, 18)


def test_shared_prefix_packed_by_hand():
    batch = fill([B, A], Shape(K=2, T=11, L=3, rows=1), "shared_prefix_packed", pad_id=0)
    pair = batch.streams["pair"]
    assert pair.tokens.tolist() == [[1, 5, 6, 7, 8, 2, 9, 2, 1, 7, 2]]
    assert pair.segment.tolist() == [[1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5]]
    assert pair.prefix.tolist() == [[1] * 8 + [4] * 3]
    assert pair.position.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2]]
    assert pair.col.tolist() == [[[8, 9, 0], [0, 0, 0]], [[2, 3, 4], [2, 6, 0]]]
    assert occupancy(batch) == (11, 11)


@pytest.mark.parametrize("layout", PACKED)
def test_groups_are_packed_apart(layout):
    """Each group's rows are those of its records alone, so a device needs nothing from another."""
    rows = records(8, ragged=True, K=3)
    shape = plan_shape(rows, layout, 4, groups=4)
    whole = fill(rows, shape, layout, pad_id=0, groups=4).streams["pair"]
    assert whole.groups == 4 and whole.tokens.shape == (4 * shape.rows, shape.T)
    for g in range(4):
        part = fill(rows[2 * g:2 * g + 2], shape, layout, pad_id=0).streams["pair"]
        for name, size in (("tokens", shape.rows), ("segment", shape.rows), ("row", 2), ("col", 2), ("mask", 2)):
            np.testing.assert_array_equal(getattr(whole, name)[g * size:(g + 1) * size], getattr(part, name))
    for G in (3, 0):
        with pytest.raises(ConfigError, match=f"groups is {G}, expected a divisor of the batch of 8"):
            fill(rows, shape, layout, pad_id=0, groups=G)
        with pytest.raises(ConfigError, match=f"groups is {G}, expected a divisor of the batch of 8"):
            plan_shape(rows, layout, 4, groups=G)


# --- shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("groups", [1, 2])
def test_one_shape_holds_every_batch_of_the_plan_and_no_smaller_one_does(layout, groups):
    rows = records(23, K=3, ragged=True)
    # Neighbours of the last batch: the longest prompt meets the longest completion in `mismatched` only.
    rows[4] = token_record("p", [1] * 12, [[5, 2]], eos_ids=[2])
    rows[5] = token_record("c", [1], [[5] * 11 + [2]], eos_ids=[2])
    plan = Plan(23, 4, seed=3)
    batches = [*plan.sequence(12), np.arange(23 - 23 % 2)]  # the last: an evaluation on all of them
    shape = plan_shape(rows, layout, 1, batches=batches, groups=groups, mismatched=True)
    full = {"T": False, "rows": False}
    for index in batches:
        some = [rows[i] for i in index]
        make = lambda s, some=some: fill(some, s, layout, pad_id=0, groups=groups,
                                         extra={"mismatched": mismatched(some)})
        batch = make(shape)
        assert {s.tokens.shape for s in batch.streams.values()} == {
            ((groups if layout in PACKED else len(some)) * shape.rows, shape.T)}
        for name in full:
            try:
                make(shape._replace(**{name: shape._asdict()[name] - 1}))
            except DataError:
                full[name] = True
    assert full["T"] and full["rows"] == (layout in PACKED)


def test_sequence_is_the_plan():
    plan = Plan(7, 3, seed=1)
    np.testing.assert_array_equal(np.stack(list(plan.sequence(4, 2))), [plan.batch_indices(s) for s in range(2, 6)])


def test_unpacked_shapes_are_those_of_bucket_shape():
    rows = records(6, K=3, ragged=True)
    width, widest = (max(f(r) for r in rows) for f in (lambda r: len(r.prompt) + r.longest,
                                                       lambda r: len(r.prompt) + sum(map(len, r.completions))))
    longest = max(r.longest for r in rows)
    assert plan_shape(rows, "padded", (4, 2)) == (3, bucket(width, 4), bucket(longest, 2), 3)
    assert plan_shape(rows, "shared_prefix", (4, 2)) == (3, bucket(widest, 4), bucket(longest, 2), 1)
    assert plan_shape(rows, "padded", 64, least=Shape(5, 80, 1, 1)) == (5, 80, 64, 5)
    with pytest.raises(ConfigError, match="layout is 'rows', allowed are .*shared_prefix_packed"):
        plan_shape(rows, "rows")
    with pytest.raises(ConfigError, match="an int or a pair"):
        plan_shape(rows, "packed", (1, 2, 3))


def test_rows_come_in_few_buckets():
    same = [token_record(f"s{i}", [1] * 4, [[5, 2], [6, 2]]) for i in range(32)]
    sizes = {plan_shape(same[:n] + [B] * (32 - n), "packed", 1, columns=12).rows for n in range(33)}
    # 64 pieces of 6 columns: two to a row of 12; with B, whose one piece has 3 columns, fewer. Eighths of 64 rows.
    assert sizes == {8, 16, 24, 32}
    assert plan_shape(same, "packed", 1, columns=12, row_multiple=5).rows == 35
    assert plan_shape(same, "packed", 1, columns=12, row_multiple=[20, 40]).rows == 40
    assert plan_shape([B], "packed", 1).rows == 1


@pytest.mark.parametrize("layout", PACKED)
def test_a_batch_that_needs_more_rows_is_refused_and_gets_the_next_bucket(layout):
    rows = records(8, seed=1)
    small = plan_shape(rows, layout, 8, batches=[[0, 1, 2, 3]], groups=2, row_multiple=1)
    some = rows[4:] + [rows[6], rows[6]] + rows[4:6]
    with pytest.raises(DataError, match=rf"f.jsonl:\d: {layout}: the group of 4 records .* given is {small.rows} of"):
        fill(some, small, layout, pad_id=0, groups=2)
    larger = plan_shape(some, layout, 8, groups=2, row_multiple=2, least=small)
    assert larger.rows > small.rows and larger[:3] == small[:3] and larger.rows % 2 == 0
    assert fill(some, larger, layout, pad_id=0, groups=2).streams["pair"].valid.all()
    # Where it fits, the shape stays, so nothing is compiled again.
    assert plan_shape(rows[:4], layout, 8, groups=2, row_multiple=2, least=larger) == larger


def test_packing_fills_rows_that_padding_leaves_empty():
    rows = records(32, seed=5)
    share = {}
    for layout in LAYOUT_NAMES:
        batch = fill(rows, plan_shape(rows, layout, 1, row_multiple=1, columns=32), layout, pad_id=0)
        tokens, cells = occupancy(batch)
        assert tokens == sum((s.segment > 0).sum() for s in batch.streams.values())
        share[layout] = tokens / cells
    assert min(share[p] for p in PACKED) > 0.9 > 0.75 > max(share["padded"], share["shared_prefix"])


# --- laws: no loss can tell one layout from another ---------------------------------------------------------------


def attend64(config, params, tokens, segment, prefix, position, **_):
    """A decoder of one layer in float64 that follows the contract of Stream and nothing else.

    The real one runs its softmax in float32, which would blur the law.
    """
    x = params["embedding"][tokens] + jnp.sin(position[..., None] * jnp.arange(1.0, 9.0)[None, None])
    related = (segment[:, None] == segment[:, :, None]) | (segment[:, None] == prefix[:, :, None])
    columns = jnp.arange(tokens.shape[1])
    seen = related & (segment[:, None] > 0) & (columns[None, :] <= columns[:, None])[None]
    scores = jnp.einsum("rid,rjd->rij", x @ params["query"], x @ params["key"])
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    return jnp.tanh(x + jnp.einsum("rij,rjd->rid", weights, x @ params["value"]))


@functools.cache
def model(seed):
    """Parameters, and the heads that losses ask for; seed 1, the reference, lies near the policy, as in training:
    far from it the gradient of some losses is 0."""
    rng = np.random.default_rng(0)
    tree = {name: rng.normal(size=(8, 8)) for name in ("query", "key", "value")}
    heads = {"reward_head": {"weight": rng.normal(size=8), "bias": rng.normal(size=())},
             "degree_head": {"weight": rng.normal(size=(4, 8)), "bias": rng.normal(size=4)}}
    for name in ("value_head", "prompt_value_head"):
        heads[name] = {"weight": rng.normal(size=8), "bias": rng.normal(size=())}
    heads["q_head"] = {"weight": rng.normal(size=(2, 13, 8)), "bias": rng.normal(size=(2, 13))}
    for name in ("reward_mask_head", "kl_mask_head"):
        heads[name] = {"weight": 0.1 * rng.normal(size=8), "bias": np.ones(()), "mix": np.ones(()),
                       "scale": rng.normal(size=8), "shift": rng.normal(size=8)}
    tree |= {"embedding": rng.normal(size=(13, 8))}
    near = np.random.default_rng(seed)
    return {"model": {n: v + 3e-3 * seed * near.normal(size=v.shape) for n, v in tree.items()}, **heads}


def lists(name):
    return losses.get(name).info.completions is None


def needed(ragged):
    """Everything that the losses on pairs, or on ragged lists, ask to be computed, and the rewards of both."""
    asked = {"rewards", *(r for n in losses.names() if lists(n) == ragged for r in losses.get(n).requests)}
    return sorted(r for r in asked if REQUESTS[r].provider not in ("key", "state"))


def batch_of(layout, ragged, groups=2, rows=None):
    rows = rows or (records(8, K=3, ragged=True) if ragged else records(8, K=2))
    streams = sorted({REQUESTS[r].stream for r in REQUESTS} - {"pair"})
    shape = plan_shape(rows, layout, (4, 8), groups=groups, mismatched=True)
    batch = fill(rows, shape, layout, pad_id=0, groups=groups, extra={name: mismatched(rows) for name in streams})
    rng = np.random.default_rng(9)
    sizes = {"B": len(rows), "K": shape.K, "L": shape.L}
    given = {r.name: rng.uniform(0.1, 1.0, [sizes[a] for a in r.axes]).astype(r.dtype) for r in REQUESTS.values()
             if r.provider == "data" and r.name not in (*batch.data, "lengths", "mask", "valid", "targets")}
    return Batch(batch.streams, {**given, **batch.data}, batch.ids)


def alike(batch, groups, rows, T):
    """The same rows in grids of one size, cut into `groups`, so that one compiled program serves all layouts."""

    def one(stream):
        B, G, (R, width) = len(stream.valid), stream.groups, stream.tokens.shape
        empty = ((0, 0), (0, rows - R // groups), (0, T - width))
        grid = lambda a: np.pad(a.reshape(groups, R // groups, width), empty).reshape(groups * rows, T)
        shift = np.arange(B) // (B // G) % (G // groups) * (R // G)
        grids = {name: grid(getattr(stream, name)) for name in ("tokens", "segment", "prefix", "position")}
        return dataclasses.replace(stream, **grids, row=stream.row + shift[:, None, None].astype(np.int32),
                                   groups=groups)

    return Batch({name: one(s) for name, s in batch.streams.items()}, batch.data, batch.ids)


@functools.cache
def program(ragged):
    """batch -> (pullback, arrays) of all requests of pairs or of ragged lists, and the pullback's own program."""
    names = needed(ragged)

    def run(params, other, batch):
        def requests(p):
            out = step.compute(SPEC, p, other, batch, names)
            return {n: v for n, v in out.items() if REQUESTS[n].grad}, out

        return jax.vjp(requests, params, has_aux=True)[1:]

    return jax.jit(run), jax.jit(lambda pull, cotangent: pull(cotangent)[0])


@functools.cache
def laid_out(layout, ragged):
    """(arrays of all requests, pullback of those with a gradient) at the law's batch and parameters."""
    run, pull_back = program(ragged)
    pull, arrays = run(model(0), model(1), alike(batch_of(layout, ragged), groups=2, rows=12, T=24))
    return arrays, functools.partial(pull_back, pull)


@functools.cache
def scalar_of(name):
    loss = losses.get(name)

    def run(active, rest):
        return reduce_terms(loss({**rest, **active}))[0]

    return jax.jit(jax.value_and_grad(run))


def loss_and_gradient(name, layout):
    """The loss of the law's batch and its gradient in the parameters, by two passes."""
    out, pull = laid_out(layout, lists(name))
    extra = {"key": jax.random.key(3), "state": losses.get(name).init_state()}
    inputs = {r: extra[r] if r in extra else out[r] for r in losses.get(name).requests}
    active = {r: v for r, v in inputs.items() if REQUESTS[r].grad}
    value, cotangent = scalar_of(name)(active, {r: v for r, v in inputs.items() if r not in active})
    return float(value), pull({r: cotangent.get(r, jnp.zeros_like(v)) for r, v in out.items() if REQUESTS[r].grad})


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(step, "forward", attend64)
    with jax.enable_x64(True):
        yield


def flat(tree):
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])


# One loss of each shape of inputs in the first tier; all others in the second.
FIRST_TIER = ("dpo", "kto", "tdpo", "bt_rm", "pl_dpo", "sft", "relative_po", "sr_dpo")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FIRST_TIER else pytest.mark.slow)
                                  for n in losses.names()])
def test_every_loss_and_its_gradient_are_those_of_the_padded_layout(name, exact):
    value, gradient = loss_and_gradient(name, "padded")
    expected = flat(gradient)
    assert np.isfinite(value) and np.isfinite(expected).all() and np.linalg.norm(expected) > 1e-6
    for layout in ("shared_prefix", *PACKED):
        again, other = loss_and_gradient(name, layout)
        np.testing.assert_allclose(again, value, rtol=1e-10, err_msg=layout)
        apart = np.linalg.norm(flat(other) - expected)
        assert apart <= 1e-10 * np.linalg.norm(expected), (layout, apart)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_the_law_s_requests_are_those_of_each_sequence_alone(layout, exact):
    """Each completion laid out in a row of its own, by hand, gives the same log-probs and rewards."""
    rows = records(8, K=3, ragged=True)
    out = jax.device_get(laid_out(layout, True)[0])
    for b, record in enumerate(rows):
        P = len(record.prompt)
        for k, text in enumerate(record.completions):
            tokens = np.concatenate([record.prompt, text])[None].astype(np.int32)
            ones, place = np.ones_like(tokens), np.arange(tokens.shape[1], dtype=np.int32)[None]
            hidden = attend64(CONFIG, model(0)["model"], tokens, ones, ones, place)[0]
            logps = jax.nn.log_softmax(hidden @ model(0)["model"]["embedding"].T, axis=-1)
            scored = np.ones(len(text), bool) if record.scored is None else record.scored[k]
            slots = [i for i in range(len(text)) if scored[i] and P + i > 0]
            np.testing.assert_allclose(out["logps"][b, k], sum(logps[P + i - 1, text[i]] for i in slots), rtol=1e-12)
            last = hidden[P + slots[-1]]
            np.testing.assert_allclose(out["rewards"][b, k], last @ model(0)["reward_head"]["weight"]
                                       + model(0)["reward_head"]["bias"], rtol=1e-12)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_a_completion_without_scored_tokens_has_the_reward_zero(layout, exact):
    rows = [dataclasses.replace(r, scored=(np.ones(len(r.completions[0]), bool), np.zeros(len(r.completions[1]), bool)))
            for r in records(2, seed=4)]
    batch = fill(rows, plan_shape(rows, layout, 4), layout, pad_id=0)
    found = step.compute(SPEC, model(0), None, batch, ("rewards",))["rewards"]
    assert (np.asarray(found[:, 1]) == 0).all() and (np.asarray(found[:, 0]) != 0).all()


@pytest.mark.parametrize("layout", PACKED)
def test_the_number_of_groups_changes_no_value(layout, exact):
    wanted = ("logps", "ref_logps", "kl_logps", "rewards")
    compute = jax.jit(lambda p, q, b: step.compute(SPEC, p, q, b, wanted))
    one, *more = (jax.device_get(compute(model(0), model(1), batch_of(layout, True, groups=G))) for G in (1, 4, 8))
    for other in more:
        for name in wanted:
            np.testing.assert_allclose(other[name], one[name], rtol=1e-12, atol=1e-14)


def test_the_decoder_gives_the_same_log_probs_in_all_layouts():
    """The real decoder, float32."""
    tree = lambda key: {"model": jax.tree.map(lambda a: 3 * a, models.init_params(CONFIG, jax.random.key(key)))}
    head = models.init_scalar_head(jax.random.key(5), CONFIG.hidden_size)
    wanted = ("logps", "ref_logps", "ref_policy_kl", "rewards", "kl_logps")
    compute = jax.jit(lambda p, q, b: step.compute(SPEC, p, q, b, wanted))
    out = {layout: jax.device_get(compute(tree(0) | {"reward_head": head}, tree(1), batch_of(layout, False)))
           for layout in LAYOUT_NAMES}
    for layout in LAYOUT_NAMES[1:]:
        for name in wanted:
            np.testing.assert_allclose(out[layout][name], out["padded"][name], rtol=1e-5, atol=1e-5,
                                       err_msg=f"{layout} {name}")


# --- devices ------------------------------------------------------------------------------------------------------

DEVICES = ("dpo", "kto", "bt_rm", "tdpo")
_EIGHT = """
import json, sys
sys.path.insert(0, {tests!r})
import packing_test as t
print(json.dumps(t.moves({{"data": 4, "fsdp": 2}})))
"""


def moves(mesh_sizes, accumulation=1, names=DEVICES):
    """{loss layout: [loss, parameters after one step...]} with eight groups, on a mesh or, with None, as it is."""
    out = {}
    with jax.enable_x64(True):
        mesh = sharding.make_mesh(mesh_sizes) if mesh_sizes else None
        tree = lambda key: {"model": jax.tree.map(lambda a: 3 * jnp.asarray(a, jnp.float64),
                                                  models.init_params(CONFIG, jax.random.key(key)))}
        place = lambda p: jax.device_put(p, sharding.param_shardings(p, mesh)) if mesh else p
        for name in names:
            loss = losses.get(name)
            params = tree(0)
            if "rewards" in loss.requests:
                params["reward_head"] = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64),
                                                     models.init_scalar_head(jax.random.key(5), CONFIG.hidden_size))
            optimizer = optax.sgd(0.1)
            update = jax.jit(step.make_update(SPEC, loss, optimizer, accumulation=accumulation))
            for layout in PACKED:
                batch = batch_of(layout, False, groups=8)
                batch = sharding.shard_batch(batch, mesh) if mesh else batch
                policy = place(params)
                state = step.TrainState(jnp.zeros((), jnp.int32), policy, optimizer.init(policy), loss.init_state())
                state, metrics = update(state, place(tree(1)), batch, {}, jax.random.key(7))
                out[f"{name} {layout}"] = [float(metrics["loss"][0]), *flat(state.params).tolist()]
    return out


@pytest.fixture(scope="module")
def single():
    """One device, one batch."""
    return moves(None)


def assert_same_moves(found, expected):
    for name, values in found.items():
        # The real decoder: its softmax runs in float32, and the order of its sums may change with the cut.
        np.testing.assert_allclose(values, expected[name], rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.slow
def test_eight_devices_give_the_step_of_one(single):
    env = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu")
    script = _EIGHT.format(tests=str(ROOT / "tests"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=ROOT,
                          check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    sharded = json.loads(done.stdout.splitlines()[-1])
    assert sharded.keys() == single.keys()
    assert_same_moves(sharded, single)


@pytest.mark.slow
def test_micro_batches_of_packed_rows_give_the_whole_step(single):
    assert_same_moves(moves(None, accumulation=4, names=("kto",)), single)


@pytest.mark.slow
def test_the_benchmark_of_layouts_runs(tmp_path):
    script = ROOT / "experiments" / "benchmarks" / "layouts.py"
    done = subprocess.run([sys.executable, script, "--quick", "--json", tmp_path / "out" / "layouts.json"],
                          capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(name in done.stdout for name in LAYOUT_NAMES)
    result = json.loads((tmp_path / "out" / "layouts.json").read_text())
    rows = result["data"]["layouts"]
    assert [row["layout"] for row in rows] == list(LAYOUT_NAMES) and result["quick"]
    for row in rows:
        low, middle, high = row["tokens_per_second"]
        assert 0 < low <= middle <= high and 0 < row["fill"] <= 1 and row["log_probs_apart"] <= 1e-4
    assert rows[0]["speed_against_padded"] == [1, 1, 1] and len(result["tables"][0]["rows"]) == len(rows)
