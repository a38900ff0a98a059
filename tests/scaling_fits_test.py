"""Scaling-law fits: known constants come back from synthetic data; optima and peaks against numeric minimisers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize

from alignax.diagnostics import compare
from alignax.diagnostics import scaling_fits as fits
from alignax.types import DataError

pytestmark = pytest.mark.slow

PUBLISHED = fits.Chinchilla(np.exp(0.5267), np.exp(6.0073), np.exp(6.0179), 0.3392, 0.2849)
GRID_N, GRID_D = (x.reshape(-1) for x in np.meshgrid(10.0 ** np.linspace(7.5, 10, 6), 10.0 ** np.linspace(9, 11.5, 6)))


@pytest.fixture(scope="module")
def fitted():
    return fits.chinchilla(GRID_N, GRID_D, PUBLISHED(GRID_N, GRID_D))


def test_chinchilla_comes_back(fitted):
    """Logs of the constants, as they are fitted: E, A, B, and the exponents, to 1e-3."""
    np.testing.assert_allclose(np.log(fitted[:3]), np.log(PUBLISHED[:3]), rtol=1e-3)
    np.testing.assert_allclose(fitted[:3], PUBLISHED[:3], rtol=1e-3)
    np.testing.assert_allclose(fitted[3:], PUBLISHED[3:], rtol=1e-3)


def test_chinchilla_resists_an_outlier(fitted):
    loss = PUBLISHED(GRID_N, GRID_D)
    loss[7] *= 1.3
    again = fits.chinchilla(GRID_N, GRID_D, loss, start=fitted)
    np.testing.assert_allclose(again[3:], PUBLISHED[3:], rtol=0.02)


def test_chinchilla_interval_holds_the_truth(fitted):
    loss = PUBLISHED(GRID_N, GRID_D) * np.exp(1e-3 * np.random.default_rng(0).normal(size=GRID_N.size))
    start = fits.chinchilla(GRID_N, GRID_D, loss, start=fitted)
    found = fits.bootstrap(lambda *rows: fits.chinchilla(*rows, start=start), GRID_N, GRID_D, loss, resamples=30,
                           level=0.98)
    assert found.failed == 0
    assert (found.low <= PUBLISHED).all() and (found.high >= PUBLISHED).all()
    assert (found.high[3:] - found.low[3:] < 0.05).all()


def test_the_compute_optimum_is_the_minimum():
    for flops in (1e18, 5.76e23):
        n, d = fits.compute_optimum(PUBLISHED, flops)
        assert n * d * 6 == pytest.approx(flops)
        numeric = optimize.minimize_scalar(lambda x, c=flops: PUBLISHED(np.exp(x), c / 6 / np.exp(x)),
                                           bounds=(10, 35), method="bounded", options={"xatol": 1e-9})
        assert np.log(n) == pytest.approx(numeric.x, abs=1e-4)


def test_the_published_values_by_hand():
    """N = 70e9, D = 1.4e12 with the rounded constants: 1.69 + 406.4 / N^.34 + 410.7 / D^.28."""
    law = fits.Chinchilla(1.69, 406.4, 410.7, 0.34, 0.28)
    by_hand = 1.69 + 406.4 * 10 ** (-0.34 * np.log10(70e9)) + 410.7 * 10 ** (-0.28 * np.log10(1.4e12))
    assert law(70e9, 1.4e12) == pytest.approx(by_hand) and by_hand == pytest.approx(1.937, abs=1e-3)
    joint = fits.Kaplan(6.4e13, 1.8e13, 0.076, 0.103)
    assert joint(1e9, 1e30) == pytest.approx((6.4e13 / 1e9) ** 0.076, rel=1e-6)
    assert joint(1e40, 1e10) == pytest.approx((1.8e13 / 1e10) ** 0.103, rel=1e-6)


def test_kaplan_comes_back():
    truth = fits.Kaplan(6.4e13, 1.8e13, 0.076, 0.103)
    found = fits.kaplan(GRID_N, GRID_D, truth(GRID_N, GRID_D))
    np.testing.assert_allclose(found, truth, rtol=1e-3)


def test_jacobians_are_the_derivatives(monkeypatch):
    """What the solvers are given: residuals against central differences."""
    seen = []
    monkeypatch.setattr(fits, "_minimise", lambda r, j, starts, *_: seen.append((r, j)) or starts[0])
    fits.chinchilla(GRID_N, GRID_D, PUBLISHED(GRID_N, GRID_D))
    fits.kaplan(GRID_N, GRID_D, PUBLISHED(GRID_N, GRID_D))
    for (residuals, jacobian), at in zip(seen, ([0.5, 6.0, 6.1, 0.3, 0.25], [31.0, 30.0, -2.6, -2.3]), strict=True):
        at = np.array(at)
        numeric = np.stack([(residuals(at + h) - residuals(at - h)) / 2e-6 for h in 1e-6 * np.eye(at.size)], 1)
        np.testing.assert_allclose(jacobian(at), numeric, rtol=1e-5, atol=1e-7)


def test_batch_at_the_critical_size_doubles_both():
    s_min, e_min, critical = 1000.0, 5e6, 2e4
    assert fits.least_steps(2 * s_min, critical, critical) == s_min
    assert fits.least_tokens(2 * e_min, critical, critical) == e_min
    for batch in (1e3, 3e4):
        steps = s_min * (1 + critical / batch)
        tokens = steps * batch
        least = fits.least_tokens(tokens, batch, critical)
        assert (steps / fits.least_steps(steps, batch, critical) - 1) * (tokens / least - 1) == pytest.approx(1)


def test_the_trajectory_law_comes_back_and_predicts():
    truth = fits.Trajectory(fits.PowerLaw(1.5e14, 0.076), fits.PowerLaw(2.6e3, 0.67), 1.7e8, 0.205)
    sizes = np.array([1e6, 1e7, 6e7])
    size = fits.power_law(sizes, truth.size(sizes))
    np.testing.assert_allclose(size, truth.size, rtol=1e-8)

    levels, batches = np.array([4.0, 4.5, 5.0]), np.array([1e5, 4e5, 2e6])
    criticals = []
    for level in levels:
        critical = fits.critical_batch(level, 1.7e8, 0.205)
        found, least = fits.critical_batch_at(batches, 700.0 * (1 + critical / batches))
        assert (found, least) == pytest.approx((critical, 700.0))
        criticals.append(found)
    np.testing.assert_allclose(fits.batch_law(levels, criticals), (1.7e8, 0.205), rtol=1e-8)

    steps = np.array([1e4, 3e4, 1e5])
    loss = truth(1e7, steps, 5e5)
    least = fits.least_steps(steps, 5e5, fits.critical_batch(loss, 1.7e8, 0.205))
    np.testing.assert_allclose(loss, truth.size(1e7) + truth.steps(least), rtol=1e-12)  # the fixed point
    law = fits.steps_law(size, np.full(3, 1e7), least, loss)
    np.testing.assert_allclose(law, truth.steps, rtol=1e-6)
    whole = fits.Trajectory(size, law, 1.7e8, 0.205)
    np.testing.assert_allclose(whole(3.3e10, 5e4, 4e6), truth(3.3e10, 5e4, 4e6), rtol=1e-6)
    with pytest.raises(DataError, match="at or below the size term"):
        fits.steps_law(size, [1e7, 1e7], [1.0, 2.0], [0.1, 9.0])
    with pytest.raises(DataError, match="found slope"):
        fits.critical_batch_at([1.0, 2.0], [1.0, 2.0])


@pytest.mark.parametrize("law", ["best_of_n", "rl"])
def test_overoptimisation_comes_back(law):
    d = np.array([0.0, 0.5, 1.0, 2.0, 4.0, 8.0])
    shape = {"best_of_n": lambda x: x * (2 - 0.3 * x), "rl": lambda x: x * (2 - 0.3 * np.log(np.maximum(x, 1e-9)))}
    gold = shape[law](d)
    found = fits.overoptimisation(d, gold, law, proxy=gold + d)
    assert (found.a, found.b) == pytest.approx((2.0, 0.3))
    assert found.rmse < 1e-12 and found.r2 == pytest.approx(1)
    other = fits.overoptimisation(d, gold, {"rl": "best_of_n", "best_of_n": "rl"}[law])
    assert other.rmse > 0.05
    if law == "best_of_n":  # d* = 2 / .6, R* = 4 / 1.2; the proxy is ahead by d there
        assert found.peak == pytest.approx((10 / 3, 10 / 3), abs=1e-3)
        assert found.gap == pytest.approx(10 / 3)
    else:  # d* = e^(2/.3 - 1), far beyond what was measured
        assert found.peak == pytest.approx((289.07, 86.72), abs=5e-3) and np.isnan(found.gap)
    top = optimize.minimize_scalar(lambda x: -shape[law](x), bounds=(0.1, 600), method="bounded",
                                   options={"xatol": 1e-8})
    assert found.peak == pytest.approx((top.x, -top.fun), rel=1e-5)


def test_overoptimisation_without_a_peak_and_refusals():
    rising = fits.overoptimisation([1.0, 2.0, 3.0], [1.0, 4.0, 9.0], "best_of_n")
    assert rising.b == pytest.approx(-1) and np.isnan(rising.peak).all()
    with pytest.raises(DataError, match="found 'ppo', allowed: best_of_n, rl"):
        fits.overoptimisation([1.0, 2.0], [1.0, 2.0], "ppo")
    with pytest.raises(DataError, match="found 1 distinct"):
        fits.overoptimisation([0.0, 2.0], [0.0, 2.0], "rl")
    with pytest.raises(DataError, match=r"d=\): found -1"):
        fits.overoptimisation([-1.0, 2.0], [0.0, 2.0], "rl")
    with pytest.raises(DataError, match=r"chinchilla\(loss=\)"):
        fits.chinchilla(np.ones(5), np.ones(5), [1, 2, 3, 4, -1])
    with pytest.raises(DataError, match=r"kaplan\(n=\): found shape \[3\]"):
        fits.kaplan([1, 2, 3], [1, 2, 3], [1, 2, 3])


def test_best_of_n_kl_by_hand():
    np.testing.assert_allclose(compare.best_of_n_kl([1, 4, 16]), [0, 0.6363, 1.8351], atol=5e-5)


def test_bootstrap_of_a_mean():
    """Against the normal interval of a mean of 400 draws; a refused resample is counted."""
    x = np.random.default_rng(1).normal(size=400)
    found = fits.bootstrap(lambda v: [v.mean()], x, resamples=2000)
    half = 1.96 * x.std() / 20
    assert found.low[0] == pytest.approx(x.mean() - half, abs=0.15 * half)
    assert found.high[0] == pytest.approx(x.mean() + half, abs=0.15 * half)

    def picky(v):
        if np.ptp(v) == 0:
            raise DataError("one value")
        return [v.mean()]

    counted = fits.bootstrap(picky, np.array([0.0, 1.0]), resamples=400)
    assert 140 < counted.failed < 260 and counted.low[0] == counted.high[0] == 0.5
    with pytest.raises(DataError, match="found no resample"):
        fits.bootstrap(picky, np.zeros(3), resamples=5)
    with pytest.raises(DataError, match=r"found lengths \[2, 3\]"):
        fits.bootstrap(picky, np.zeros(3), np.zeros(2))


def test_holding_out_the_largest_run_predicts_it():
    out = fits.largest(GRID_N, GRID_D)
    assert out.sum() == 1 and GRID_N[out] == 1e10
    kept = fits.chinchilla(GRID_N[~out], GRID_D[~out], PUBLISHED(GRID_N, GRID_D)[~out],
                           start=fits.Chinchilla(2.0, 300.0, 300.0, 0.3, 0.3))
    np.testing.assert_allclose(kept(GRID_N[out], GRID_D[out]), PUBLISHED(GRID_N[out], GRID_D[out]), rtol=1e-4)
