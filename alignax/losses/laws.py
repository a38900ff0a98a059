"""Laws that a loss obeys, and a check of a new one against them on inputs made for its requests.

    @method(id="mine", system="...", arxiv="", fidelity="paper", completions=2)
    def mine(logps, ref_logps, *, beta=0.1): ...

    for law in check(from_function(mine)):
        print(law.name, law.holds, law.note)

Inputs are random with a fixed seed: lists have three completions and one shorter list, pairs two; completions differ in
length. What the laws cannot know is whether the formula is the one that was meant: golden values say that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignax.losses.loss import Loss
from alignax.ops.reductions import as_terms, reduce_terms
from alignax.types import REQUESTS

PROMPTS, TOKENS = 4, 5
_AXES = {"B": (), "BK": ("K",), "BKL": ("K", TOKENS), "BKLL": ("K", TOKENS, TOKENS), "BE": (7,), "BKC": (3, 4),
         "BKLD": ("K", TOKENS, 3), "BKLH": ("K", TOKENS, 2)}

NO_GRADIENT = frozenset(r.name for r in REQUESTS.values() if r.provider in ("policy", "reference", "head")
                        and not r.grad) | {"scores", "labels", "weights", "token_rewards", "segment_scores",
                                           "advantages"}
"""Requests whose gradient must stop in the loss: what is computed without one, and what people or judges gave."""


class Law(NamedTuple):
    """One law: holds is None where it says nothing about this loss; note: what was found, or why it does not apply."""

    name: str
    holds: bool | None
    note: str


def inputs_of(loss: Loss, *, seed: int = 0, dtype: Any = np.float32, scale: float = 1.0) -> dict[str, Any]:
    """Plausible arrays for the requests of a loss: B = 4 prompts, L = 5 slots, K = loss.info.completions or 3.

    dtype: of the floats. scale: multiplies log-probs and rewards.
    """
    size = loss.info.completions or 3
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, TOKENS + 1, (PROMPTS, size))
    lengths[1, 0] = TOKENS
    mask = np.arange(TOKENS)[None, None] < lengths[..., None]
    out = {}
    for request in (REQUESTS[r] for r in loss.requests):
        name = request.name
        shape = tuple(size if axis == "K" else axis for axis in (PROMPTS, *_AXES.get(request.axes, ())))
        if name == "key":
            value = jax.random.key(seed)
        elif name == "state":
            value = loss.init_state()
        elif name == "mask":
            value = mask
        elif name == "valid":
            value = np.ones(shape, bool)
            value[0, -1] = size == 1  # one list is shorter
        elif name == "lengths":
            value = lengths.astype(dtype)
        elif name == "labels":
            value = (rng.random(shape) < 0.5).astype(dtype)
            value[0, 0], value[1, 0] = 1, 0
        elif name == "scores":
            value = -np.sort(-rng.normal(size=shape), axis=1).astype(dtype)
        elif name in ("rewards", "margins"):
            value = (scale * rng.normal(size=shape)).astype(dtype)
        elif name == "targets":
            value = rng.integers(0, 3, shape).astype(np.int32)
            value[1, 0] = 1  # one full completion repeats itself
        elif name == "diff":
            value = rng.random(shape) < 0.5
        elif name == "steps":
            value = np.cumsum(rng.random(shape) < 0.5, -1).astype(np.int32) - 1  # -1: before the first step
        elif name in ("annotator", "ids"):
            value = np.arange(PROMPTS, dtype=np.int32) % 2
        elif name.endswith("logps") or name == "log_sum_sq":
            value = (-scale * rng.uniform(0.1, 3.0, shape)).astype(dtype)
            if name == "kl_ref_logps":
                value -= scale  # so that KTO's clamped baseline is positive and takes part
        else:
            value = (scale * rng.uniform(0.0, 1.0, shape)).astype(dtype)
        out[name] = value if name in ("key", "state") else jnp.asarray(value)
    return out


def split(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the arrays of floats, the rest: masks, integers, the key and the running state)."""
    rest = {n: v for n, v in inputs.items() if n in ("key", "state") or not jnp.issubdtype(v.dtype, jnp.floating)}
    return {n: v for n, v in inputs.items() if n not in rest}, rest


def masked_out(inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Request -> bool array, True where its entries lie outside `mask` or `valid`; those without either are absent."""
    out = {}
    for name, value in inputs.items():
        if name in ("key", "state", "mask", "valid", "diff"):
            continue
        if REQUESTS[name].axes == "BKLL":
            out[name] = ~(inputs["mask"][..., :, None] & inputs["mask"][..., None, :])
        elif value.ndim == 4 and "mask" in inputs:
            out[name] = jnp.broadcast_to(~inputs["mask"][..., None], value.shape)
        elif value.ndim == 3 and "mask" in inputs:
            out[name] = ~inputs["mask"]
        elif value.ndim == 2 and "valid" in inputs:
            out[name] = ~inputs["valid"]
    return out


def dtypes(loss: Loss, inputs: Mapping[str, Any]) -> set[str]:
    """The dtypes of the unreduced values; those of the reduced loss may be wider, since weights are floats."""
    values = jax.eval_shape(lambda given: [term.values for term in as_terms(loss(given)).values()], dict(inputs))
    return {value.dtype.name for value in values}


class _Case:
    """A loss under test: its inputs, and (scalar, gradients) of it compiled and not."""

    def __init__(self, loss: Loss, seed: int):
        self.loss, self.seed = loss, seed

        def scalar(floats, rest, override):
            return reduce_terms(loss({**floats, **rest}, **override))[0]

        self._eager = jax.value_and_grad(scalar)
        self._compiled = jax.jit(self._eager)

    def inputs(self, **settings) -> dict[str, Any]:
        return inputs_of(self.loss, seed=self.seed, **settings)

    def run(self, inputs, *, eager: bool = False, **override):
        return (self._eager if eager else self._compiled)(*split(inputs), override)

    def value(self, inputs, **override):
        return reduce_terms(self.loss(inputs, **override))[0]


Verdict = tuple[bool | None, str]


def _apart(a: Any, b: Any) -> float:
    """The largest difference of two arrays beside 1 and the size of b; NaN where either holds one."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.max(np.abs(a - b) / (1 + np.abs(b)), initial=0.0))


def _most(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    return float(np.max([_apart(a[name], b[name]) for name in b], initial=0.0))


def _compiled_is_eager(case: _Case) -> Verdict:
    inputs = case.inputs()
    gap = _apart(case.run(inputs)[0], case.value(inputs))
    return gap < 2e-5, f"apart by {gap:.1e}"


def _hyper_may_be_traced(case: _Case) -> Verdict:
    hyper = {k: v for k, v in case.loss.hyper.items() if isinstance(v, float)}
    if not hyper:
        return None, "no float hyper-parameter"
    inputs = case.inputs()
    values = jnp.asarray([[v, 0.9 * v + 0.01] for v in hyper.values()], jnp.float32)
    sweep = jax.jit(jax.vmap(lambda *row: case.value(inputs, **dict(zip(hyper, row, strict=True)))))(*values)
    single = [case.value(inputs, **{k: float(v) for k, v in zip(hyper, values[:, n], strict=True)}) for n in (0, 1)]
    gap = _apart(sweep, jnp.stack(single))
    return gap < 1e-4, f"a sweep over {', '.join(hyper)}: apart by {gap:.1e}"


def _masked_entries_change_nothing(case: _Case) -> Verdict:
    inputs = case.inputs()
    masks = masked_out(inputs)
    if not masks:
        return None, "no request with a mask"
    clean = {n: jnp.where(masks[n], 0, v) if n in masks else v for n, v in inputs.items()}
    expected, reference = case.run(clean)
    for garbage in (1e30, np.nan):
        junk = lambda v, g=garbage: jnp.asarray(g if jnp.issubdtype(v.dtype, jnp.floating) else 1, v.dtype)
        dirty = {n: jnp.where(masks[n], junk(v), v) if n in masks else v for n, v in inputs.items()}
        for eager in (False, True):
            value, gradient = case.run(dirty, eager=eager)
            if not (_apart(value, expected) < 1e-6 and _most(gradient, reference) < 2e-5):
                return False, f"{garbage:g} outside the mask changes value or gradient"
            for name in gradient.keys() & masks.keys():
                if np.any(np.asarray(gradient[name])[np.asarray(masks[name])] != 0):
                    return False, f"gradient into {name} outside the mask"
    return True, f"of {', '.join(sorted(masks))}"


def _order_does_not_matter(case: _Case) -> Verdict:
    if "key" in case.loss.requests:
        return None, "it draws by position"
    inputs, order = case.inputs(), np.array([2, 0, 3, 1])
    moved = {n: v if n == "state" else v[order] for n, v in inputs.items()}
    (value, gradient), (other, moved_gradient) = case.run(inputs), case.run(moved)
    gap = max(_apart(other, value), _most(moved_gradient, {n: g[order] for n, g in gradient.items()}))
    return gap < 2e-5, f"apart by {gap:.1e}"


def _coupling_is_declared(case: _Case) -> Verdict:
    inputs, fresh = case.inputs(), inputs_of(case.loss, seed=case.seed + 5)
    fixed = ("key", "state", "mask", "valid", "lengths")
    changed = {n: v if n in fixed else v.at[0].set(fresh[n][0]) for n, v in inputs.items()}
    parts = lambda x: [np.asarray(term.values) for term in as_terms(case.loss(x)).values()]
    moved = any(not np.array_equal(a[1:], b[1:]) if a.ndim else True
                for a, b in zip(parts(inputs), parts(changed), strict=True))
    said = case.loss.info.couples_batch
    return moved == said, f"couples_batch = {said}; one example {'moves' if moved else 'leaves'} the others"


def _extremes_stay_finite(case: _Case) -> Verdict:
    for scale in (1e4, 1e-7):
        inputs = case.inputs(scale=scale)
        flipped = {n: v[:, ::-1] if n in ("logps", "token_logps", "rewards") else v for n, v in inputs.items()}
        for given in (inputs, flipped):
            value, gradient = case.run(given)
            bad = [n for n, g in gradient.items() if not np.isfinite(g).all()]
            if bad or not np.isfinite(value):
                return False, f"log-probs times {scale:g}: value {float(value):g}" + (
                    f", gradient into {', '.join(bad)} is not finite" if bad else "")
    return True, "log-probs times 1e4 and 1e-7, both signs of the log-ratio"


def _finite_at_the_reference(case: _Case) -> Verdict:
    inputs = case.inputs()
    names = [n for n in inputs if n.startswith(("ref_", "kl_ref_"))]
    if not names:
        return None, "no reference"
    for name in names:
        inputs[name] = inputs.get(name.replace("ref_", "", 1), jnp.zeros_like(inputs[name]))
    value, gradient = case.run(inputs)
    return bool(np.isfinite(value) and all(np.isfinite(g).all() for g in gradient.values())), f"value {float(value):g}"


def _gradients_stop(case: _Case) -> Verdict:
    gradient = case.run(case.inputs())[1]
    reached = {name for name, g in gradient.items() if np.any(np.asarray(g) != 0)}
    if reached & NO_GRADIENT:
        return False, f"gradient into {', '.join(sorted(reached & NO_GRADIENT))}"
    if not any(REQUESTS[name].grad for name in reached):
        return False, "no gradient into the policy"
    return True, f"gradient into {', '.join(sorted(reached))}"


def _float64_stays(case: _Case) -> Verdict:
    with jax.enable_x64(True):
        inputs = case.inputs(dtype=np.float64)
        value, gradient = case.run(inputs)
        kinds = {value.dtype.name, *(g.dtype.name for g in gradient.values()), *dtypes(case.loss, inputs)}
    return kinds == {"float64"}, ", ".join(sorted(kinds))


def _narrow_sums_are_refused(case: _Case) -> Verdict:
    names = [n for n in case.loss.requests if n in ("logps", "ref_logps")]
    if not names:
        return None, "no sums of log-probs"
    inputs = case.inputs()
    try:
        case.loss({**inputs, names[0]: inputs[names[0]].astype(jnp.bfloat16)})
    except TypeError as error:
        return True, str(error)
    return False, f"bfloat16 {names[0]} are accepted"


def _central_differences(case: _Case) -> Verdict:
    with jax.enable_x64(True):
        inputs = case.inputs(dtype=np.float64)
        gradient, rng, width = case.run(inputs)[1], np.random.default_rng(case.seed + 1), 1e-5
        names = [n for n in gradient if REQUESTS[n].grad]
        gap = 0.0
        for _ in range(3):
            way = {n: rng.normal(size=inputs[n].shape) for n in names}
            ahead, behind = (case.run({**inputs, **{n: inputs[n] + side * width * way[n] for n in names}})[0]
                             for side in (1, -1))
            slope = sum(float((gradient[n] * way[n]).sum()) for n in names)
            gap = max(gap, _apart((ahead - behind) / (2 * width), slope))
    return gap < 1e-6, f"three directions, apart by {gap:.1e}"


_LAWS: dict[str, Callable[[_Case], Verdict]] = {
    "compiled equals eager": _compiled_is_eager,
    "hyper-parameters may be traced": _hyper_may_be_traced,
    "masked entries change nothing": _masked_entries_change_nothing,
    "the order of the batch does not matter": _order_does_not_matter,
    "examples are coupled as declared": _coupling_is_declared,
    "extremes stay finite": _extremes_stay_finite,
    "finite at the reference": _finite_at_the_reference,
    "gradients stop where they should": _gradients_stop,
    "float64 stays float64": _float64_stays,
    "narrow sums are refused": _narrow_sums_are_refused,
    "gradient equals central differences": _central_differences,
}
NAMES = tuple(_LAWS)
"""What `check` checks, in its order."""


def check(loss: Loss, *, constants: bool = False, seed: int = 0) -> tuple[Law, ...]:
    """One Law for each of NAMES: whether it holds for this loss, with what was found.

    constants: the loss holds a part constant on purpose (a weight, a baseline), so that its gradient is not that of its
    value and central differences say nothing. A loss that raises breaks the law under which it did; the note has the
    error. Seconds on a CPU; compiles a handful of tiny programs.
    """
    case, out = _Case(loss, seed), []
    for name, law in _LAWS.items():
        if constants and law is _central_differences:
            holds, note = None, "it holds a part constant"
        else:
            try:
                holds, note = law(case)
            except Exception as error:  # what a loss may raise is not known; the law is broken and the note says how
                holds, note = False, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        out.append(Law(name, None if holds is None else bool(holds), note))
    return tuple(out)
