"""Influence functions: which training examples stand behind a behaviour, as functions of a loss, parameters and data.

Score of example k for a query loss q with gradient v: I_k = -v^T (H + damping)^-1 g_k, the effect on q of giving the
example more weight: positive harms the query, negative helps. What differs is the inverse: exact or conjugate
gradients (Koh and Liang 1703.04730), DataInf (2310.00902), EK-FAC and K-FAC (2308.03296), none at all (TracIn
2002.08484, LESS 2402.04333; those two score with the opposite sign, positive helps).

A set of gradients is a tree like the parameters whose leaves have a leading axis of n examples, or one array [n, P]; a
query gradient v is the same without that axis. Adapters' parameters alone suffice, and so do projected gradients where
a formula needs inner products only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from alignax.types import ConfigError


def wide(tree: Any) -> Any:
    """Every leaf in float32, or wider where it is."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(jnp.float32, jnp.asarray(x).dtype)), tree)


def rows(grads: Any) -> jax.Array:
    """[n, P]: the leaves [n, ...] flattened and joined in the tree's order."""
    leaves = wide(jax.tree.leaves(grads))
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def gradients(loss: Callable[[Any, Any], jax.Array], params: Any, examples: Any, *,
              transform: Callable[[Any], Any] | None = None, batch: int | None = None) -> Any:
    """Per-example gradients, each passed through `transform`, stacked on a leading axis [n, ...], float32 or wider.

    loss(params, example) -> scalar; examples: leaves with a leading axis of n. transform(tree like params) -> any tree
    of arrays, for example `adam_direction`, `project` or both: only its result is kept for all examples. batch: how
    many examples are differentiated at once; all by default.
    """
    def one(example):
        found = wide(jax.grad(loss)(params, example))
        return found if transform is None else transform(found)

    if batch is None:
        return jax.vmap(one)(examples)
    return jax.lax.map(one, examples, batch_size=batch)


def mean_gradient(grads: Any) -> Any:
    """The mean over the leading axis: the query gradient v of a set of queries."""
    return jax.tree.map(lambda g: g.mean(0), wide(grads))


def project(grad: Any, key: jax.Array, width: int, *, block: int = 4096) -> jax.Array:
    """[width]: the tree's entries times a random matrix of +-1/sqrt(width) (Rademacher), which is never held whole.

    The matrix depends on the key and the block size only, so that all examples share it. Inner products keep their
    expectation; their variance falls as 1/width. Raises ConfigError for width or block < 1.
    """
    if width < 1 or block < 1:
        raise ConfigError(f"project(width=, block=): found {width} and {block}, allowed: 1 or more")
    flat = jnp.concatenate([leaf.reshape(-1) for leaf in wide(jax.tree.leaves(grad))])
    flat = jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)

    def add(total, part):
        number, entries = part
        signs = jax.random.rademacher(jax.random.fold_in(key, number), (block, width), flat.dtype)
        return total + entries @ signs, None

    total, _ = jax.lax.scan(add, jnp.zeros(width, flat.dtype), (jnp.arange(flat.shape[0]), flat))
    return total / jnp.sqrt(jnp.asarray(width, flat.dtype))


def inner(grads: Any, vector: Any) -> jax.Array:
    """[n]: inner products of n gradients with one tree of the same structure."""
    parts = jax.tree.map(lambda g, v: g.reshape(g.shape[0], -1) @ v.reshape(-1), wide(grads), wide(vector))
    return jax.tree.reduce(jnp.add, parts)


def influence(grads: Any, solved: Any) -> jax.Array:
    """I_k = -<solved, g_k>, [n], for solved = (H + damping)^-1 v; with solved = v it is minus TracIn's product."""
    return -inner(grads, solved)


def removal(scores: jax.Array, examples: int) -> jax.Array:
    """First-order change of the query loss when one of n examples leaves the mean training loss: -I_k / n."""
    return -scores / examples


def tracin(grads: Sequence[Any], queries: Sequence[Any], rates: Sequence[Any]) -> jax.Array:
    """TracIn-CP: sum over checkpoints t of rate_t <grad_t l(z_k), v_t>, [n]; positive marks a proponent (it helps).

    One entry per checkpoint in each argument. Raises ConfigError where their numbers differ or are 0.
    """
    if not len(grads) == len(queries) == len(rates) > 0:
        raise ConfigError(f"tracin: found {len(grads)} training, {len(queries)} query gradients and {len(rates)} rates,"
                          " allowed: one of each per checkpoint")
    return sum(rate * inner(g, v) for g, v, rate in zip(grads, queries, rates, strict=True))


def layer_damping(grad: jax.Array, scale: Any = 0.1) -> jax.Array:
    """DataInf's damping of one layer [n, ...]: scale * mean over examples and entries of the squared gradient."""
    return scale * (grad ** 2).mean()


def datainf(grads: Any, query: Any, *, scale: Any = 0.1) -> jax.Array:
    """DataInf's scores [n] (2310.00902): mean and inverse swapped, layer by layer; a leaf is a layer.

    r = 1/(n damping) sum_i (v - <v, g_i> / (damping + |g_i|^2) g_i), I_k = -sum over layers <r, g_k>, with
    `layer_damping`. Exact at n = 1 for H = mean_i g_i g_i^T. A layer whose gradients are all 0 adds 0.
    """
    def solve(g, v):
        flat, damping = g.reshape(g.shape[0], -1), layer_damping(g, scale)
        alive = damping > 0
        damping = jnp.where(alive, damping, 1)
        weights = (flat @ v.reshape(-1)) / (damping + (flat ** 2).sum(1))
        return jnp.where(alive, (v - ((weights @ flat) / flat.shape[0]).reshape(v.shape)) / damping, 0)

    grads, query = wide(grads), wide(query)
    return influence(grads, jax.tree.map(solve, grads, query))


def fisher(grads: Any, query: Any, *, scale: Any = 0.1, damping: Any = None) -> jax.Array:
    """Scores [n] with the exact inverse of each layer's empirical Fisher matrix, mean_i g_i g_i^T + damping.

    damping: of every layer; `layer_damping` where None. By Woodbury's identity the solve is n x n, so that layers may
    be wide: (v - G^T (n damping + G G^T)^-1 G v) / damping. One array [n, P] of all parameters is one layer. What
    `datainf` approximates. A layer whose gradients are all 0 adds 0. Raises ConfigError for a number <= 0 as damping.
    """
    if isinstance(damping, (int, float)) and damping <= 0:
        raise ConfigError(f"fisher(damping=): found {damping}, allowed: above 0, or None")

    def solve(g, v):
        flat = g.reshape(g.shape[0], -1)
        weight = layer_damping(g, scale) if damping is None else jnp.asarray(damping, g.dtype)
        weight = jnp.where(flat.any(), weight, 1)
        gram = flat @ flat.T + flat.shape[0] * weight * jnp.eye(flat.shape[0], dtype=flat.dtype)
        dual = jax.scipy.linalg.solve(gram, flat @ v.reshape(-1), assume_a="pos")
        return (v - (dual @ flat).reshape(v.shape)) / weight

    grads, query = wide(grads), wide(query)
    return influence(grads, jax.tree.map(solve, grads, query))


def hessian_product(objective: Callable[[Any], jax.Array], params: Any) -> Callable[[Any], Any]:
    """vector -> H vector (trees like params), H the Hessian of objective(params); forward over reverse mode."""
    return lambda vector: jax.jvp(jax.grad(objective), (params,), (vector,))[1]


class Solved(NamedTuple):
    """An approximate (H + damping)^-1 v and |residual| / |v|, which says whether the solver arrived."""

    vector: Any
    residual: jax.Array


def _residual(product, vector, found, damping):
    """|(H + damping) found - vector| / |vector|; 0 for a zero vector."""
    miss = jax.tree.map(lambda h, x, v: h + damping * x - v, product(found), found, vector)
    size = optax.tree.norm(vector)
    return jnp.where(size > 0, optax.tree.norm(miss) / jnp.where(size > 0, size, 1), 0.0)


def conjugate_gradients(product: Callable[[Any], Any], vector: Any, *, damping: Any = 0.0, tolerance: float = 1e-6,
                        iterations: int = 100) -> Solved:
    """(H + damping)^-1 vector by conjugate gradients from Hessian-vector products.

    H + damping must be positive definite (a convex loss, a Gauss-Newton product, or enough damping); elsewhere the
    method need not converge, and the returned residual says so.
    """
    damped = lambda x: jax.tree.map(lambda h, y: h + damping * y, product(x), x)
    found, _ = jax.scipy.sparse.linalg.cg(damped, vector, tol=tolerance, maxiter=iterations)
    return Solved(found, _residual(product, vector, found, damping))


def lissa(product: Callable[[Any], Any], vector: Any, *, damping: Any = 0.0, scale: Any = 10.0,
          iterations: int = 100) -> Solved:
    """(H + damping)^-1 vector by the truncated series r <- v + (1 - (H + damping) / scale) r, result r / scale.

    Converges where `scale` exceeds half the largest eigenvalue of the positive definite H + damping; the residual says
    whether it did.
    """
    def step(r, _):
        hr = product(r)
        return jax.tree.map(lambda v, x, h: v + x - (h + damping * x) / scale, vector, r, hr), None

    r, _ = jax.lax.scan(step, vector, None, length=iterations)
    found = jax.tree.map(lambda x: x / scale, r)
    return Solved(found, _residual(product, vector, found, damping))


class Kronecker(NamedTuple):
    """Eigenvectors (columns) and eigenvalues of a linear layer's A = E[a a^T], S = E[s s^T], and EK-FAC's spectrum.

    inputs: [A, A], [A]; outputs: [S, S], [S]; spectrum: [S, A], E[(Q_S^T s a^T Q_A)^2] entrywise.
    """

    input_basis: jax.Array
    input_values: jax.Array
    output_basis: jax.Array
    output_values: jax.Array
    spectrum: jax.Array


def kronecker(inputs: jax.Array, outputs: jax.Array) -> Kronecker:
    """The factors of one linear layer y = W a, W [S, A].

    inputs: [n, A], what enters (with a 1 appended where the layer has a bias); outputs: [n, S], the gradient by y of
    the negative log-prob of a label SAMPLED from the model. Tokens are examples: flatten them, without masked ones.
    """
    inputs, outputs = wide((inputs, outputs))
    count = inputs.shape[0]
    values_a, basis_a = jnp.linalg.eigh(inputs.T @ inputs / count)
    values_s, basis_s = jnp.linalg.eigh(outputs.T @ outputs / count)
    # (s a^T)^2 in the eigenbases is an outer product of squares: no [n, S, A] array is made.
    spectrum = ((outputs @ basis_s) ** 2).T @ ((inputs @ basis_a) ** 2) / count
    return Kronecker(basis_a, values_a, basis_s, values_s, spectrum)


def ekfac(factors: Kronecker, query: jax.Array, *, scale: Any = 0.1, corrected: bool = True) -> jax.Array:
    """(H + damping)^-1 V [..., S, A] of one layer: Q_S [(Q_S^T V Q_A) / (spectrum + damping)] Q_A^T.

    damping = scale * mean(spectrum). corrected=False is K-FAC, whose spectrum is the outer product of the factors'
    eigenvalues. Put the results of all layers into `influence`.
    """
    spectrum = factors.spectrum if corrected else jnp.outer(factors.output_values, factors.input_values)
    inside = jnp.einsum("sp,...sa,aq->...pq", factors.output_basis, wide(query), factors.input_basis)
    inside = inside / (spectrum + scale * spectrum.mean())
    return jnp.einsum("sp,...pq,aq->...sa", factors.output_basis, inside, factors.input_basis)


def adam_direction(grad: Any, first: Any, second: Any, *, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-8) -> Any:
    """LESS's training feature: m' / sqrt(v' + eps), m' = b1 m + (1 - b1) g, v' = b2 v + (1 - b2) g^2.

    first, second: the optimiser's moments at the checkpoint, trees like grad. As in the released code, eps stands
    inside the root and there is no bias correction.
    """
    return jax.tree.map(
        lambda g, m, v: (b1 * m + (1 - b1) * g) / jnp.sqrt(b2 * v + (1 - b2) * g ** 2 + eps),
        *wide((grad, first, second)))


def _unit(x):
    """Rows of norm 1; a zero row stays 0."""
    square = (x ** 2).sum(-1, keepdims=True)
    return jnp.where(square > 0, x / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def less(features: Sequence[jax.Array], queries: Sequence[jax.Array], rates: Sequence[Any],
         subtask: Sequence[int]) -> jax.Array:
    """LESS's scores [n] (2402.04333): the largest over subtasks of sum_t weight_t mean cos(feature_t, query_t).

    features: per checkpoint [n, W], projected `adam_direction`s; queries: per checkpoint [q, W], projected plain
    gradients; rates: per checkpoint its mean learning rate, normalised here to sum 1; subtask: [q], numbers of the
    queries' subtasks. Positive helps. Raises ConfigError where the numbers of checkpoints or of queries disagree.
    """
    if not len(features) == len(queries) == len(rates) > 0:
        raise ConfigError(f"less: found {len(features)} feature sets, {len(queries)} query sets and {len(rates)} rates,"
                          " allowed: one of each per checkpoint")
    if wrong := [len(q) for q in queries if len(q) != len(subtask)]:
        raise ConfigError(f"less(subtask=): found {len(subtask)} for {wrong[0]} queries, allowed: one per query")
    total = sum(rates)
    cosines = sum(rate / total * _unit(wide(x)) @ _unit(wide(q)).T
                  for x, q, rate in zip(features, queries, rates, strict=True))
    names = sorted(set(subtask))
    return jnp.stack([cosines[:, jnp.asarray([i for i, s in enumerate(subtask) if s == name])].mean(1)
                      for name in names]).max(0)


def select(scores: jax.Array, share: float = 0.05) -> jax.Array:
    """Indices of the ceil(share * n) largest scores, best first. Raises ConfigError for a share outside (0, 1]."""
    if not 0 < share <= 1:
        raise ConfigError(f"select(share=): found {share}, allowed: above 0, at most 1")
    # 0.05 * 60 is a little above 3 in floating point.
    return jnp.argsort(-scores)[:math.ceil(share * scores.shape[0] - 1e-9)]


def influence_ranking_loss(log_ratios: jax.Array, scores: jax.Array, *, scale: Any = 0.1) -> jax.Array:
    """Mean over pairs with I_i > I_j of -log sigma(scale (e_j - e_i)): what harms more shall fall the more.

    log_ratios: e [n], log pi(z) - log pi_start(z); scores: I [n]. log 2 at the start; 0 where no two scores differ.
    """
    log_ratios, scores = wide((log_ratios, scores))
    harms = scores[:, None] > scores[None, :]
    each = -jax.nn.log_sigmoid(scale * (log_ratios[None, :] - log_ratios[:, None]))
    return jnp.where(harms, each, 0).sum() / jnp.maximum(harms.sum(), 1)


def influence_correction(keep_kl: Any, params: Any, start: Any, log_ratios: jax.Array, scores: jax.Array, *,
                         proximity: Any = 1.0, strength: Any = 1.0, scale: Any = 0.1) -> jax.Array:
    """LANCET's second phase (2412.16451): a RECONSTRUCTION, since the published loss could not be verified.

    keep_kl + proximity/2 |params - start|^2 + strength * `influence_ranking_loss`. keep_kl: mean KL(pi_start || pi) on
    data to keep, the Bregman term; scores: influence of each training example on undesired outputs, positive where it
    contributes. LANCET's own curvature (LinFAC) could not be verified either: use `ekfac`.
    """
    distance = jax.tree.map(lambda p, s: ((p - s) ** 2).sum(), *wide((params, start)))
    return (keep_kl + proximity / 2 * jax.tree.reduce(jnp.add, distance)
            + strength * influence_ranking_loss(log_ratios, scores, scale=scale))
