"""What the reproductions share: starts of the toy table, intervals, the verdict, and the report that `run` returns.

A reproduction is a module of this folder with a docstring in labelled paragraphs (LABELS) and
`run(out_folder, quick=False)`, which draws figures into the folder and returns `report(...)`. Numbers in a report
come from the run; the verdict is counted from checks that stand beside it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax.diagnostics import toy
from alignax.launch import compilation_cache

LABELS = ("Claim", "Published", "Here", "Command", "Small models", "At scale")
"""The paragraphs of a reproduction's docstring, after its title and source."""

SEEDS = 8
PNG_DPI, PNG_LIMIT = 110, 200_000
OUT = Path("runs/papers")

VERDICTS = ("reproduced", "partly", "not")


def verdict(checks: Mapping[str, Any]) -> tuple[str, str]:
    """(one of VERDICTS, why) from statements that held or did not: all, some or none of them."""
    held = [text for text, good in checks.items() if bool(good)]
    failed = [text for text, good in checks.items() if not bool(good)]
    why = "; ".join([*(f"holds: {text}" for text in held), *(f"does not hold: {text}" for text in failed)])
    return VERDICTS[0] if not failed else VERDICTS[1] if held else VERDICTS[2], why


def report(*, figures: Sequence[Path], published: str, ours: Mapping[str, Any], seeds: int, checks: Mapping[str, Any],
           ) -> dict[str, Any]:
    """What `run` returns: figure paths, the published number, ours, seeds, verdict and why."""
    judged, why = verdict(checks)
    return {"figures": [Path(path) for path in figures], "published": published, "ours": dict(ours), "seeds": seeds,
            "verdict": judged, "why": why}


def mean_ci(values: object) -> tuple[float, float]:
    """(mean, half-width of its 95% t interval) of [N] runs; NaN runs count for nothing, fewer than two give NaN."""
    from scipy import stats

    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if values.size < 2:
        return (float(values[0]) if values.size else float("nan")), float("nan")
    return float(values.mean()), float(stats.t.ppf(0.975, values.size - 1) * values.std(ddof=1) / values.size ** 0.5)


def said(values: object, digits: int = 2) -> str:
    """`mean ± half-width of the 95% interval` of [N] runs."""
    mean, half = mean_ci(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def at_kl(kl: object, value: object, level: float) -> np.ndarray:
    """`value` where `kl` first reaches `level` along the last axis, in proportion between records; NaN where never.

    kl, value: [..., T]; the first record must be below the level.
    """
    kl, value = np.asarray(kl, float), np.asarray(value, float)
    beyond = kl >= level
    index = np.maximum(beyond.argmax(-1), 1)[..., None]
    low, high = (np.take_along_axis(kl, index - 1, -1)[..., 0], np.take_along_axis(kl, index, -1)[..., 0])
    share = (level - low) / np.where(high > low, high - low, 1)
    before, after = (np.take_along_axis(value, i, -1)[..., 0] for i in (index - 1, index))
    return np.where(beyond.any(-1), before + share * (after - before), np.nan)


@functools.cache
def starts(seeds: int = SEEDS) -> tuple[Any, Any]:
    """(parameters, log pi) of the toy's network fitted to each of the four tables, axes [scenario, seed, ...]."""
    tables = jnp.array(list(toy.SCENARIOS.values()))
    keys = jax.random.split(jax.random.key(0), seeds)

    def both(row, key):
        params = toy.fit(toy.mlp(key), row)
        return params, toy.log_policy(toy.mlp_logits, params)

    return jax.jit(jax.vmap(lambda row: jax.vmap(lambda key: both(row, key))(keys)))(tables)


def each(function: Callable, *arguments: Any) -> Any:
    """`function` of every slice along the leading axes of `arguments`, stacked: NumPy arrays on the host.

    Compiled once and called from two threads, as the operations of a small model keep no more than one core busy.
    """
    parts = [jax.tree.map(lambda x, i=i: x[i], arguments) for i in range(len(jax.tree.leaves(arguments)[0]))]
    program = jax.jit(function).lower(*parts[0]).compile()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda part: jax.device_get(program(*part)), parts))
    return jax.tree.map(lambda *x: np.stack(x), *found)


def command_line(run: Callable, description: str) -> None:
    """Run one reproduction from the command line and write its report to the console."""
    from rich.console import Console

    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the figures (default: {OUT})")
    parser.add_argument("--quick", action="store_true", help="few seeds and steps: a check that it runs, no result")
    arguments = parser.parse_args()
    console = Console(soft_wrap=True)
    compilation_cache()  # compiling is most of a reproduction's time
    for name, value in run(arguments.out, quick=arguments.quick).items():
        console.print(f"{name}: {value}", markup=False, highlight=False)
