"""Scaling-law fits on the host, in float64: Kaplan, Chinchilla, the training trajectory, over-optimisation, intervals.

N parameters, D tokens, L loss in nats per token, S update steps, B batch size in tokens, E = S B tokens processed. The
laws of L(N, D) are fitted by the Huber loss of log residuals (Chinchilla, 2203.15556): L-BFGS from several starts,
then a trust-region pass on the same objective, because the valley between A and alpha is narrow.
Constants depend on tokenizer, context and data; they do not carry over from one corpus to another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from alignax.types import DataError

HUBER = 1e-3


def _columns(place: str, positive: bool = True, at_least: int = 1, **columns) -> list[np.ndarray]:
    """Finite float64 vectors [n] of one length n >= at_least; DataError otherwise, naming the column."""
    found = [np.asarray(value, dtype=np.float64) for value in columns.values()]
    for name, value in zip(columns, found, strict=True):
        if value.ndim != 1 or value.shape != found[0].shape or value.size < at_least:
            raise DataError(f"{place}({name}=): found shape {list(value.shape)}, allowed: one vector length >= "
                            f"{at_least} for {', '.join(columns)}")
        if not np.isfinite(value).all() or (positive and (value <= 0).any()):
            raise DataError(f"{place}({name}=): found {value.min()} among the values, allowed: finite numbers"
                            + " above 0" * positive)
    return found


class PowerLaw(NamedTuple):
    """y = (scale / x)^exponent."""

    scale: float
    exponent: float

    def __call__(self, x):
        """y at x."""
        return (self.scale / np.asarray(x, np.float64)) ** self.exponent


def power_law(x, y) -> PowerLaw:
    """Least squares of log y on log x; two or more distinct x, all above 0."""
    x, y = _columns("power_law", at_least=2, x=x, y=y)
    if np.ptp(x) == 0:
        raise DataError(f"power_law(x=): found {x[0]} only, allowed: two or more distinct values")
    slope, constant = np.polyfit(np.log(x), np.log(y), 1)
    if slope == 0:
        raise DataError(f"power_law(y=): found {y[0]} only, allowed: values that change with x")
    return PowerLaw(float(np.exp(-constant / slope)), float(-slope))


class Kaplan(NamedTuple):
    """L = [(n_scale / N)^(n_exponent / d_exponent) + d_scale / D]^d_exponent (2001.08361)."""

    n_scale: float
    d_scale: float
    n_exponent: float
    d_exponent: float

    def __call__(self, n, d):
        """L at N and D, which broadcast."""
        n, d = np.asarray(n, np.float64), np.asarray(d, np.float64)
        return ((self.n_scale / n) ** (self.n_exponent / self.d_exponent) + self.d_scale / d) ** self.d_exponent


class Chinchilla(NamedTuple):
    """L = E + A / N^alpha + B / D^beta (2203.15556)."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def __call__(self, n, d):
        """L at N and D, which broadcast."""
        n, d = np.asarray(n, np.float64), np.asarray(d, np.float64)
        return self.e + self.a / n ** self.alpha + self.b / d ** self.beta


def compute_optimum(law: Chinchilla, flops):
    """(N, D) of least loss at C = 6 N D operations: N = G (C/6)^(beta / (alpha + beta)), D = C / (6 N).

    G = (alpha A / (beta B))^(1 / (alpha + beta)).
    """
    budget = np.asarray(flops, np.float64) / 6
    total = law.alpha + law.beta
    n = (law.alpha * law.a / (law.beta * law.b)) ** (1 / total) * budget ** (law.beta / total)
    return n, budget / n


def _minimise(residuals, jacobian, starts: np.ndarray, tries: int, delta: float) -> np.ndarray:
    """The best point over L-BFGS from the `tries` starts of least objective sum Huber_delta(residuals)."""
    from scipy import optimize
    from scipy.special import huber

    def cost(point):
        """Over delta^2, which moves no minimum and keeps the solver's tolerances meaningful."""
        return huber(1, residuals(point) / delta).sum()

    def objective(point):
        r = residuals(point) / delta
        return huber(1, r).sum(), np.clip(r, -1, 1) @ jacobian(point) / delta

    order = np.argsort([cost(start) for start in starts], kind="stable")[:tries]
    found = [optimize.minimize(objective, starts[i], jac=True, method="L-BFGS-B",
                               options={"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-10}) for i in order]
    best = min(found, key=lambda result: result.fun)
    final = optimize.least_squares(residuals, best.x, jac=jacobian, loss="huber", f_scale=delta, x_scale="jac",
                                   xtol=1e-14, ftol=1e-14, gtol=1e-14, max_nfev=500)
    return final.x if cost(final.x) <= best.fun else best.x


def _softmax(x):
    """Softmax over axis 0."""
    top = np.exp(x - x.max(0))
    return top / top.sum(0)


def chinchilla(n, d, loss, *, delta: float = HUBER, tries: int = 8, start: Chinchilla | None = None) -> Chinchilla:
    """Minimises sum Huber_delta(logsumexp(a - alpha log N, b - beta log D, e) - log L); a, b, e are logs of A, B, E.

    Of the published grid of 4,500 starts (alpha, beta 0..2; e -1..1; a, b 0..25) the `tries` of least objective are
    used, instead of all; start: that point alone, as for resamples. Raises DataError for fewer than 5 triples or values
    that are not above 0.
    """
    n, d, loss = _columns("chinchilla", at_least=5, n=n, d=d, loss=loss)
    x, y, target = np.log(n), np.log(d), np.log(loss)
    parts = lambda p: np.stack([p[1] - p[3] * x, p[2] - p[4] * y, np.full_like(x, p[0])])
    residuals = lambda p: np.logaddexp.reduce(parts(p), axis=0) - target

    def jacobian(p):
        of_n, of_d, floor = _softmax(parts(p))
        return np.stack([floor, of_n, of_d, -x * of_n, -y * of_d], 1)

    if start is None:
        exponents = np.linspace(0, 2, 5)
        starts = np.array([(e, a, b, alpha, beta) for alpha, beta, e, a, b in itertools.product(
            exponents, exponents, np.linspace(-1, 1, 5), np.linspace(0, 25, 6), np.linspace(0, 25, 6))])
    else:
        starts = np.array([[np.log(start.e), np.log(start.a), np.log(start.b), start.alpha, start.beta]])
    e, a, b, alpha, beta = _minimise(residuals, jacobian, starts, tries, delta)
    return Chinchilla(float(np.exp(e)), float(np.exp(a)), float(np.exp(b)), float(alpha), float(beta))


def kaplan(n, d, loss, *, delta: float = HUBER, tries: int = 8, start: Kaplan | None = None) -> Kaplan:
    """The joint law by the same objective, over the logs of its four constants, which are all above 0.

    Starts: exponents .02 to 1, scales 10^6 to 10^18 (start: that point alone). Raises DataError for fewer than 4
    triples or values that are not above 0.
    """
    n, d, loss = _columns("kaplan", at_least=4, n=n, d=d, loss=loss)
    x, y, target = np.log(n), np.log(d), np.log(loss)

    def parts(p):
        return np.stack([np.exp(p[2] - p[3]) * (p[0] - x), p[1] - y])

    residuals = lambda p: np.exp(p[3]) * np.logaddexp.reduce(parts(p), axis=0) - target

    def jacobian(p):
        terms = parts(p)
        of_n, of_d = _softmax(terms)
        power = np.exp(p[3])
        by_ratio = power * of_n * terms[0]
        by_power = power * np.logaddexp.reduce(terms, axis=0)
        return np.stack([power * of_n * np.exp(p[2] - p[3]), power * of_d, by_ratio, by_power - by_ratio], 1)

    if start is None:
        exponents, scales = np.log([0.02, 0.05, 0.1, 0.3, 1.0]), np.log(10.0 ** np.arange(6, 19, 2))
        starts = np.array(list(itertools.product(scales, scales, exponents, exponents)))
    else:
        starts = np.log([start])
    return Kaplan(*(float(v) for v in np.exp(_minimise(residuals, jacobian, starts, tries, delta))))


def critical_batch(loss, scale, exponent):
    """B_crit(L) = scale / L^(1 / exponent)."""
    return scale / np.asarray(loss, np.float64) ** (1 / exponent)


def least_steps(steps, batch, critical):
    """S_min = S / (1 + B_crit / B): the steps that a very large batch would need for the same loss."""
    return np.asarray(steps, np.float64) / (1 + np.asarray(critical, np.float64) / batch)


def least_tokens(tokens, batch, critical):
    """E_min = E / (1 + B / B_crit): the tokens that a very small batch would need for the same loss."""
    return np.asarray(tokens, np.float64) / (1 + np.asarray(batch, np.float64) / critical)


def critical_batch_at(batch, steps) -> tuple[float, float]:
    """(B_crit, S_min) of one loss level from the steps that two or more batch sizes needed to reach it.

    (S/S_min - 1)(E/E_min - 1) = 1 says S = S_min + S_min B_crit / B, a line in 1/B. Raises DataError where the fitted
    line has no positive slope and intercept: the batch sizes do not show both regimes.
    """
    batch, steps = _columns("critical_batch_at", at_least=2, batch=batch, steps=steps)
    if np.ptp(batch) == 0:
        raise DataError(f"critical_batch_at(batch=): found {batch[0]} only, allowed: two or more distinct values")
    slope, constant = np.polyfit(1 / batch, steps, 1)
    if slope <= 0 or constant <= 0:
        raise DataError(f"critical_batch_at: found slope {slope:g} and intercept {constant:g}, allowed: both above 0")
    return float(slope / constant), float(constant)


class Trajectory(NamedTuple):
    """L(N, S_min) = (N_c / N)^aN + (S_c / S_min)^aS (2403.06563), with B_crit(L) of `critical_batch`."""

    size: PowerLaw
    steps: PowerLaw
    batch_scale: float
    batch_exponent: float

    def __call__(self, n, steps, batch, iterations: int = 200):
        """L after `steps` updates of `batch` tokens: L and B_crit(L) depend on each other, solved by bisection in L.

        A higher L lowers B_crit, raises S_min and so lowers the predicted L: the two cross exactly once.
        """
        floor = self.size(np.asarray(n, np.float64))
        steps, batch, floor = np.broadcast_arrays(np.asarray(steps, np.float64), batch, floor)

        def predicted(loss):
            return floor + self.steps(least_steps(steps, batch, critical_batch(loss, self.batch_scale,
                                                                               self.batch_exponent)))

        low, high = floor, predicted(floor)
        for _ in range(iterations):
            middle = (low + high) / 2
            above = predicted(middle) > middle
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return (low + high) / 2


def batch_law(losses, criticals) -> tuple[float, float]:
    """(scale, exponent) of B_crit(L) = scale / L^(1 / exponent), from two or more loss levels."""
    law = power_law(losses, criticals)
    return law.scale ** law.exponent, 1 / law.exponent


def steps_law(size: PowerLaw, n, least, loss) -> PowerLaw:
    """The S_min term: power law of what L exceeds the size term by.

    least: S_min of each point. Raises DataError where a loss lies at or below the size term.
    """
    n, least, loss = _columns("steps_law", at_least=2, n=n, least=least, loss=loss)
    excess = loss - size(n)
    if (excess <= 0).any():
        raise DataError(f"steps_law(loss=): found {int((excess <= 0).sum())} of {loss.size} at or below the size term, "
                        "allowed: losses above it")
    return power_law(least, excess)


LAWS = {
    "best_of_n": lambda d: np.stack([d, -d ** 2], -1),
    "rl": lambda d: np.stack([d, -d * np.log(d)], -1),
}


class OverOptimisation(NamedTuple):
    """R(d) = d (a - b d) (best_of_n) or d (a - b log d) (rl), its peak, and how well it fits (2210.10760).

    peak: d* and R*, NaN where b <= 0, since the law then has none. rmse, r2: on the points that were fitted. gap: proxy
    less gold at d*, interpolated between checkpoints; NaN without a proxy and where d* lies outside what was measured.
    """

    a: float
    b: float
    peak: tuple[float, float]
    rmse: float
    r2: float
    gap: float


def peak(law: str, a: float, b: float) -> tuple[float, float]:
    """(d*, R*): a/(2b), a^2/(4b) for best_of_n; exp(a/b - 1), b d* for rl; NaN where b <= 0."""
    if b <= 0:
        return float("nan"), float("nan")
    if law == "best_of_n":
        return a / (2 * b), a * a / (4 * b)
    with np.errstate(over="ignore"):  # a law that hardly bends has its peak at infinity
        where = float(np.exp(a / b - 1))
    return where, b * where


def overoptimisation(d, gold, law: str, *, proxy=None) -> OverOptimisation:
    """Least squares of gold, linear in (a, b), over d = sqrt(KL) > 0; rows at d = 0 are left out.

    gold, proxy: [n] scores less the initial policy's. Compare `rmse` between the two laws: that of best_of_n is a
    quadratic through 0. Raises DataError for an unknown law, negative d, or fewer than 2 distinct d above 0.
    """
    if law not in LAWS:
        raise DataError(f"overoptimisation(law=): found {law!r}, allowed: {', '.join(LAWS)}")
    columns = {"d": d, "gold": gold} | ({} if proxy is None else {"proxy": proxy})
    d, gold, *rest = _columns("overoptimisation", positive=False, **columns)
    if (d < 0).any():
        raise DataError(f"overoptimisation(d=): found {d.min()}, allowed: 0 or more")
    some = d > 0
    d, gold = d[some], gold[some]
    if np.unique(d).size < 2:
        raise DataError(f"overoptimisation(d=): found {np.unique(d).size} distinct values above 0, allowed: 2 or more")
    design = LAWS[law](d)
    a, b = np.linalg.lstsq(design, gold, rcond=None)[0]
    miss, spread = gold - design @ [a, b], gold - gold.mean()
    where = peak(law, float(a), float(b))
    gap = float("nan")
    if rest and d.min() <= where[0] <= d.max():
        order = np.argsort(d)
        gap = float(np.interp(where[0], d[order], (rest[0][some] - gold)[order]))
    r2 = 1 - (miss @ miss) / (spread @ spread) if spread.any() else float("nan")
    return OverOptimisation(float(a), float(b), where, float(np.sqrt(np.mean(miss ** 2))), float(r2), gap)


class Interval(NamedTuple):
    """Percentile bounds [k] of a fit's k numbers, and how many resamples could not be fitted (DataError)."""

    low: np.ndarray
    high: np.ndarray
    failed: int


def bootstrap(fit: Callable[..., Sequence[float]], *columns, resamples: int = 4000, seed: int = 0,
              level: float = 0.95) -> Interval:
    """Percentile bootstrap over rows: fit(*columns) -> k numbers, on rows drawn with replacement.

    columns: arrays [n, ...]. A resample that the fit refuses with DataError is counted and left out. Raises DataError
    where columns differ in length, level lies outside (0, 1), or every resample is refused.
    """
    arrays = [np.asarray(column) for column in columns]
    sizes = sorted({array.shape[0] for array in arrays})
    if len(sizes) != 1 or not 0 < level < 1 or resamples < 1:
        raise DataError(f"bootstrap: found lengths {sizes}, level {level}, resamples {resamples}; allowed: one length, "
                        "a level between 0 and 1, 1 or more resamples")
    draws, found, failed = np.random.default_rng(seed), [], 0
    for _ in range(resamples):
        index = draws.integers(0, sizes[0], sizes[0])
        try:
            found.append(np.asarray(fit(*(array[index] for array in arrays)), np.float64))
        except DataError:
            failed += 1
    if not found:
        raise DataError(f"bootstrap: found no resample of {resamples} that could be fitted, allowed: one or more")
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Interval(low, high, failed)


def largest(n, d) -> np.ndarray:
    """bool [runs]: those of the most compute N D, to hold out of a fit and predict."""
    n, d = _columns("largest", n=n, d=d)
    return n * d == (n * d).max()
