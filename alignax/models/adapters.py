"""Low-rank adapters (LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732) as pure functions on trees.

An adapter tree mirrors `params["layers"]` and holds the adapted matrices only. A matrix W [..., in, out] (its leading
axes are the stacked layers) has a leaf {"a": [..., in, rank], "b": [..., rank, out]}, and stands for W + scale a b,
where scale is alpha / rank, or alpha / sqrt(rank) with rank-stabilised scaling. The decoder computes
x W + (x a) b and knows no scale: `scaled` folds it into b. b starts at zero, so the adapted model starts as the base.

    tree = init_adapters(params, config, key)
    hidden = forward(model_config, params, ..., adapters=scaled(tree, config))
    whole = merge(params, tree, config)

`scale` belongs to the config, never to the width of a leaf: a leaf may be wider than config.rank (`combine` and
adapters read from files make such leaves) and is still multiplied by the same number. Left out: dropout on the
adapter's input, adapters of biases, of the embedding and of the output head.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from alignax.types import Array, ConfigError

Adapters = dict[str, Any]

SCALINGS = ("alpha/r", "rslora")

# What other libraries call the matrices outside of the layers, for a refusal that says why.
_OUTSIDE = ("embedding", "embed_tokens", "embed_in", "wte", "wpe", "head", "lm_head", "embed_out")
OUTSIDE_REASON = ("adapters work on the linear layers inside the blocks; the embedding is a look-up and the output "
                  "head is read in chunks, and neither takes an adapter")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Which matrices get an adapter, and how it is scaled; hashable, so it can be a static argument.

    rank: the inner width. alpha: the numerator of the scale. targets: each one a leaf name (`query`) or a regular
    expression that matches a leaf name or a whole path (`attention/query`, `attention/.*`, `.*`). scaling: `alpha/r`
    (LoRA) or `rslora` (alpha / sqrt(rank)). Raises ConfigError on an impossible value; whether the targets exist is
    checked against a model, by init_adapters.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "value")
    scaling: str = "alpha/r"

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"AdapterConfig.rank: found {self.rank!r}, allowed: an integer >= 1")
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if not number or not 0 < self.alpha < float("inf"):
            raise ConfigError(f"AdapterConfig.alpha: found {self.alpha!r}, allowed: a finite number > 0")
        if self.scaling not in SCALINGS:
            raise ConfigError(f"AdapterConfig.scaling: found {self.scaling!r}, allowed: {', '.join(SCALINGS)}")
        if not isinstance(self.targets, (tuple, list)) or not self.targets or not all(
                isinstance(target, str) and target for target in self.targets):
            raise ConfigError(f"AdapterConfig.targets: found {self.targets!r}, allowed: a tuple of one or more leaf "
                              "names or regular expressions over paths")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ConfigError(f"AdapterConfig.targets: found {target!r}, which is no regular expression ({error}), "
                                  "allowed: leaf names or regular expressions over paths") from error
        object.__setattr__(self, "targets", tuple(self.targets))

    @property
    def scale(self) -> float:
        """The factor of a b: alpha / rank, or alpha / sqrt(rank)."""
        return self.alpha / (self.rank if self.scaling == "alpha/r" else math.sqrt(self.rank))


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of a nested dict, in sorted order; an adapter's {"a", "b"} counts as one leaf."""
    for name in sorted(tree):
        inner = tree[name]
        if isinstance(inner, Mapping) and not set(inner) == {"a", "b"}:
            yield from _leaves(inner, f"{path}{name}/")
        else:
            yield path + name, inner


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of {"attention/query": leaf, ...}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = leaf
    return tree


def flatten(adapters: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
    """{"attention/query": {"a", "b"}, ...} of an adapter tree, sorted by path. ConfigError where a leaf is no pair."""
    flat = dict(_leaves(adapters))
    for path, leaf in flat.items():
        if not isinstance(leaf, Mapping):
            raise ConfigError(f"adapters: {path}: found {type(leaf).__name__}, allowed: a dict of a and b")
    return flat


def unflatten(flat: Mapping[str, Mapping[str, Array]]) -> Adapters:
    """The adapter tree of {"attention/query": {"a", "b"}, ...}; the inverse of flatten."""
    return _nest({path: dict(leaf) for path, leaf in flat.items()})


def adaptable(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """{path inside params["layers"]: shape [..., in, out]} of every matrix that can take an adapter.

    params may be abstract. A leaf is a matrix where it has two axes besides the stacked layers: norms and biases have
    one.
    """
    return {path: tuple(leaf.shape) for path, leaf in _leaves(params["layers"]) if len(leaf.shape) >= 3}


def select_targets(params: Mapping[str, Any], config: AdapterConfig) -> tuple[str, ...]:
    """The paths that config.targets name in this model, sorted. ConfigError for a target that names none."""
    paths = adaptable(params)
    chosen = set()
    for target in config.targets:
        found = [path for path in paths if re.fullmatch(target, path) or re.fullmatch(target, path.split("/")[-1])]
        if not found:
            outside = target in _OUTSIDE or target in params
            raise ConfigError(f"AdapterConfig.targets: found {target!r}"
                              + (f" ({OUTSIDE_REASON})" if outside else ", which names no matrix of this model")
                              + f", allowed: {', '.join(paths)}, their last parts, or regular expressions over them")
        chosen.update(found)
    return tuple(sorted(chosen))


def init_adapters(params: Mapping[str, Any], config: AdapterConfig, key: Array, dtype=jnp.float32) -> Adapters:
    """Fresh adapters for the targets of `params` (arrays or shapes): a random, b zero, so that the delta is zero.

    a is uniform in +-1/sqrt(in), which is what Kaiming's rule with slope sqrt(5) gives and what PEFT draws. Each
    matrix draws from a key of its own path, so that a further target changes no other matrix. Raises ConfigError for
    a target that names no matrix.
    """
    shapes, flat = adaptable(params), {}
    for path in select_targets(params, config):
        *layers, wide, narrow = shapes[path]
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        full = jnp.promote_types(jnp.float32, dtype)
        a = jax.random.uniform(own, (*layers, wide, config.rank), full, -1.0, 1.0) / jnp.sqrt(jnp.asarray(wide, full))
        flat[path] = {"a": a.astype(dtype), "b": jnp.zeros((*layers, config.rank, narrow), dtype)}
    return unflatten(flat)


def check(params: Mapping[str, Any], adapters: Mapping[str, Any]) -> None:
    """ConfigError, naming the path, where `adapters` do not fit `params`; both may be abstract."""
    shapes = adaptable(params)
    for path, leaf in flatten(adapters).items():
        if path not in shapes:
            raise ConfigError(f"adapters: found {path!r}, which is no matrix of this model, allowed: "
                              f"{', '.join(shapes)}")
        *layers, wide, narrow = shapes[path]
        a, b = tuple(leaf["a"].shape), tuple(leaf["b"].shape)
        rank = a[-1] if a else 0
        if a != (*layers, wide, rank) or b != (*layers, rank, narrow):
            raise ConfigError(f"adapters: {path}: found shapes a {a} and b {b}, allowed: a {(*layers, wide, 'rank')} "
                              f"and b {(*layers, 'rank', narrow)}")


def scaled(adapters: Mapping[str, Any], config: AdapterConfig) -> Adapters:
    """The tree that the decoder takes: b times config.scale, in b's dtype."""
    return unflatten({path: {"a": leaf["a"], "b": leaf["b"] * jnp.asarray(config.scale, leaf["b"].dtype)}
                      for path, leaf in flatten(adapters).items()})


def delta(leaf: Mapping[str, Array], scale) -> Array:
    """scale a b of one leaf, [..., in, out], in float32 or wider and without reduced-precision products."""
    full = jnp.promote_types(jnp.float32, jnp.promote_types(leaf["a"].dtype, leaf["b"].dtype))
    product = jnp.matmul(leaf["a"].astype(full), leaf["b"].astype(full), precision=jax.lax.Precision.HIGHEST)
    return product * jnp.asarray(scale, full)


def merge(params: Mapping[str, Any], adapters: Mapping[str, Any], config: AdapterConfig,
          sign: int = 1) -> dict[str, Any]:
    """Parameters with W + sign * scale a b in place of each adapted W; the other leaves are passed through.

    The sum is taken in float32 or wider and rounded once to W's dtype. With bfloat16 weights, a delta below half a
    unit in W's last place is lost: keep such adapters apart, or merge into float32 weights. Raises ConfigError where
    the adapters do not fit and for a sign other than 1 and -1.
    """
    if sign not in (1, -1):
        raise ConfigError(f"merge(sign=): found {sign!r}, allowed: 1, -1")
    check(params, adapters)
    layers = dict(_leaves(params["layers"]))
    for path, leaf in flatten(adapters).items():
        change = delta(leaf, sign * config.scale)
        full = jnp.promote_types(change.dtype, layers[path].dtype)
        layers[path] = (layers[path].astype(full) + change.astype(full)).astype(layers[path].dtype)
    return {**params, "layers": _nest(layers)}


def unmerge(params: Mapping[str, Any], adapters: Mapping[str, Any], config: AdapterConfig) -> dict[str, Any]:
    """Takes merged adapters out again: merge with sign -1. Equal to the base up to the rounding of W's dtype."""
    return merge(params, adapters, config, sign=-1)


def count(adapters: Mapping[str, Any]) -> int:
    """How many numbers the tree holds; it may be abstract."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(adapters))


def select(named: Mapping[str, Adapters], name: str) -> Adapters:
    """One tree of several on the same base. ConfigError lists the names for an unknown one."""
    if name not in named:
        raise ConfigError(f"select(name=): found {name!r}, allowed: {', '.join(sorted(named)) or 'none'}")
    return named[name]


def stack(named: Mapping[str, Adapters], names: Sequence[str] | None = None) -> Adapters:
    """The trees `names` (default: all, sorted) as one with a leading axis for the population, to be vmapped over.

    Raises ConfigError where they do not adapt the same matrices with the same ranks and dtypes.
    """
    names = sorted(named) if names is None else names
    if not names:
        raise ConfigError("stack(named=): found no adapters, allowed: one or more")
    trees = [select(named, name) for name in names]
    first, *others = [{path: {part: (leaf[part].shape, leaf[part].dtype) for part in ("a", "b")}
                       for path, leaf in flatten(tree).items()} for tree in trees]
    for name, other in zip(names[1:], others, strict=True):
        differing = sorted(path for path in first.keys() | other.keys() if first.get(path) != other.get(path))
        if differing:
            raise ConfigError(f"stack(named=): found {name!r} unlike {names[0]!r} in {', '.join(differing)}, allowed: "
                              "equal matrices, ranks and dtypes")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def combine(named: Mapping[str, Adapters], weights: Mapping[str, Any]) -> Adapters:
    """One tree whose delta is the weighted sum of the deltas: sum_n weights[n] a_n b_n, exactly.

    Averaging a and b apart would give products of sums. Here the ranks are concatenated, so that the result is
    [a_1 a_2 ...] [w_1 b_1; w_2 b_2; ...] and its rank the sum of theirs; a matrix that only some of them adapt has
    their ranks only. The trees share one config, whose scale then holds for the result too; adapters of different
    configs go through `scaled` first, and the result has scale 1 (a config with alpha = rank). Weights may be traced.
    """
    if not weights:
        raise ConfigError("combine(weights=): found no weights, allowed: a weight for one or more of "
                          + ", ".join(sorted(named)))
    parts: dict[str, list[dict[str, Array]]] = {}
    for name, weight in weights.items():
        for path, leaf in flatten(select(named, name)).items():
            parts.setdefault(path, []).append(
                {"a": leaf["a"], "b": leaf["b"] * jnp.asarray(weight, leaf["b"].dtype)})
    return unflatten({path: {"a": jnp.concatenate([leaf["a"] for leaf in leaves], axis=-1),
                             "b": jnp.concatenate([leaf["b"] for leaf in leaves], axis=-2)}
                      for path, leaves in parts.items()})
