"""Attention by pairs of blocks against the plain one: values, gradients, second derivatives, what is skipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import models
from alignax.models import readers
from alignax.models.attention import attend
from alignax.models.flash import attend_blocks, prepare
from alignax.models.remat import rematerialised

ROWS, LENGTH, WIDTH = 2, 300, 4  # three blocks of 100 columns


def by_blocks(query, key, value, mask, **settings):
    return attend_blocks(query, key, value, prepare(mask), **settings)


def masks():
    """Who reads whom, by name: bool [R,T,T]."""
    column = jnp.arange(LENGTH)
    segments = jnp.stack([column // 110 + 1, jnp.where(column < 130, column // 70 + 1, 0)])
    packed = models.attention_mask(segments, jnp.zeros_like(segments))
    causal = jnp.broadcast_to(column[:, None] >= column[None], packed.shape)
    shared = jnp.broadcast_to(jnp.where(column < 80, 1, 2 + (column >= 190)), segments.shape)
    return {"causal": causal, "packed": packed, "shared": models.attention_mask(shared, jnp.ones_like(shared)),
            "window": causal & (column[:, None] - column[None] < 30)[None], "nothing": jnp.zeros_like(causal)}


def arrays_of(heads, groups, dtype, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(k, (ROWS, LENGTH, n, WIDTH), dtype)
            for k, n in zip(keys, (heads, groups, groups, heads), strict=True)]


@functools.cache
def gradients(attention, softcap):
    """(mask, query, key, value, weights) -> the weighted sum and its gradients; compiled once for all masks."""
    def run(mask, query, key, value, weights):
        weights = weights * mask.any(-1)[:, :, None, None]  # what a column without anything to read gets means nothing
        return jax.value_and_grad(lambda *a: (attention(*a, mask, scale=0.7, softcap=softcap) * weights).sum(),
                                  argnums=(0, 1, 2))(query, key, value)
    return jax.jit(run)


@pytest.mark.parametrize("name", ["causal", "packed", "shared", "window", "nothing"])
@pytest.mark.parametrize("softcap, heads, groups", [(None, 4, 2), (3.0, 2, 2), (None, 4, 1)])
def test_blocks_are_the_plain_attention(name, softcap, heads, groups):
    with jax.enable_x64(True):
        arrays = arrays_of(heads, groups, jnp.float64)
        found, expected = (gradients(attention, softcap)(masks()[name], *arrays)
                           for attention in (by_blocks, attend))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_columns_with_nothing_to_read_get_numbers():
    query, key, value, weights = arrays_of(2, 1, jnp.float32)
    assert not masks()["packed"].any(-1).all()
    out, pull = jax.vjp(lambda *a: by_blocks(*a, masks()["packed"], scale=0.7), query, key, value)
    assert all(jnp.isfinite(a).all() for a in (out, *pull(weights)))


def test_in_halves_the_softmax_is_full():
    """bfloat16 in and out: no further from float64 than the plain path."""
    half = arrays_of(4, 2, jnp.bfloat16)
    with jax.enable_x64(True):
        exact = gradients(attend, None)(masks()["shared"], *(a.astype(jnp.float64) for a in half))
    found, plain = (gradients(attention, None)(masks()["shared"], *half) for attention in (by_blocks, attend))
    off = lambda got: [float(jnp.abs(a.astype(jnp.float32) - jnp.asarray(b, jnp.float32)).max())
                       for a, b in zip(got[1], exact[1], strict=True)]
    assert {a.dtype for a in found[1]} == {jnp.dtype(jnp.bfloat16)}
    assert all(a < 1.5 * b < 0.2 for a, b in zip(off(found), off(plain), strict=True))


def test_blocks_that_nobody_reads_are_not_computed():
    """Numbers that are none stand in columns that only columns behind them read: a product with them would show."""
    query, key, value, weights = arrays_of(2, 2, jnp.float32)
    column = jnp.arange(LENGTH)
    block = column // 100
    mask = jnp.broadcast_to((column[:, None] >= column[None]) & (block[:, None] == block[None]), (ROWS, LENGTH, LENGTH))
    bad = lambda a: a.at[:, 100:200].set(jnp.nan)
    (_, found), (_, clean) = (gradients(by_blocks, None)(mask, query, k, v, weights.at[:, 100:200].set(0))
                              for k, v in ((bad(key), bad(value)), (key, value)))
    keep = np.r_[0:100, 200:300]
    for a, b in zip(found, clean, strict=True):
        np.testing.assert_array_equal(a[:, keep], b[:, keep])


def test_rows_examples_second_derivatives_and_recomputation():
    """vmap over examples and over a population's parameters, forward over reverse, jax.checkpoint."""
    with jax.enable_x64(True):
        query, key, value, weights = arrays_of(2, 1, jnp.float64)
        mask = masks()["shared"].at[1].set(masks()["window"][1])

        def through(attention):
            run = lambda q, m=mask, w=weights: (attention(q, key, value, m, scale=0.7, softcap=2.0) * w).sum()
            one = lambda q, k, v, m: attention(q[None], k[None], v[None], m[None], scale=0.7, softcap=None)[0]
            return (jax.vmap(one)(query, key, value, mask), jax.jvp(jax.grad(run), (query,), (jnp.cos(query),)),
                    jax.grad(jax.checkpoint(run))(query), jax.vmap(jax.grad(run))(jnp.stack([query, 2 * query])))

        for a, b in zip(*(jax.tree.leaves(jax.jit(lambda n=attention: through(n))())
                          for attention in (by_blocks, attend)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)


def test_under_vmap_the_loops_are_as_long_for_all():
    """Blocks that any member reads count for all; out_axes None refuses what differs between members."""
    mask = jnp.stack([masks()["window"], masks()["causal"], masks()["nothing"]])
    number = lambda m: (prepare(m).found, prepare(m).order)
    found, order = jax.jit(jax.vmap(number, out_axes=None))(mask)
    assert found.tolist() == [[1, 2, 3]] and order[0, 1].tolist() == [0, 1, 2]
    twice = jax.jit(jax.vmap(jax.vmap(number, out_axes=None), out_axes=None))(mask[:, None])
    assert twice[0].tolist() == found.tolist() and prepare(masks()["nothing"]).found.tolist() == [[0, 0, 0]]
    query, key, value, _ = arrays_of(2, 1, jnp.float32)
    out = jax.vmap(lambda m: by_blocks(query, key, value, m, scale=1.0))(mask)
    for member in range(2):
        np.testing.assert_allclose(out[member], attend(query, key, value, mask[member], scale=1.0), atol=1e-5)


def test_the_reader_takes_blocks_for_long_rows_without_bias():
    arrays = arrays_of(2, 2, jnp.float32)[:3]
    text = lambda name, length, **more: str(jax.make_jaxpr(lambda *a: readers.read(readers.make_reader(
        name, masks()["causal"][:, :length, :length]), *(x[:, :length] for x in a), scale=1.0, softcap=None, **more))(
            *arrays))
    assert "custom_vjp" in text("blocked", 300) and f"{ROWS},2,2,300,300" not in text("blocked", 300)
    assert text("blocked", 128) == text("xla", 128) != text("xla", 300)


def test_recomputation_that_keeps_products_keeps_attention():
    """dots: one forward and one backward loop; full: the forward loop once more."""
    query, key, value, _ = arrays_of(2, 2, jnp.float32)
    tiles = prepare(masks()["causal"])
    layer = lambda x, w: attend_blocks(x * w, key, value, tiles, scale=1.0)
    loops = lambda remat: str(jax.make_jaxpr(jax.grad(lambda x: rematerialised(layer, remat, looped=True)(
        x, 2.0).sum()))(query)).count("while[")
    assert loops("dots") == loops("none") == loops("full") - 1 == 2
