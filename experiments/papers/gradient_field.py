"""The gradient field of DPO and its limits (arXiv 2404.04626).

Claim: in x1 = pi/pi_ref of the chosen and x2 of the rejected, the two slopes stand in the ratio x2/x1: once the chosen
is ahead, DPO mostly lowers the rejected and hardly raises the chosen; where training ends depends on where it starts.

Published: the field as a figure, and the ratio |dL/dx1| / |dL/dx2| = x2/x1.

Here: the field by differentiating the library's own DPO in float64, and full DPO runs of a free table of 10 responses
from nine starts of (pi(chosen), pi(rejected)), beta 0.1, with the reference equal to the start, by plain gradient
descent (Adam would rescale the very slopes in question). Runs are compared where their margin of log-ratios reaches
4 nats, at equal loss; trained without end, every start of a free table goes to 1.

Command: python -m experiments.papers.gradient_field

Small models: the field is exact for any model; a free table has no shared parameters, so the falls of the chosen that
sharing causes are not here (see three_d_properties).

At scale: DPO from a weak and from a strong SFT model on one set of pairs. Prediction: the strong start ends with the
higher chosen log-prob at equal reward margin.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignax import losses
from alignax.diagnostics import style, toy
from experiments.papers import harness

BETA, MARGIN = 0.1, 4.0


def slopes(x1: Any, x2: Any, beta: float = BETA) -> tuple[np.ndarray, np.ndarray]:
    """(dL/dx1, dL/dx2) of the library's DPO at the ratios x1, x2 [N], in float64."""
    with jax.enable_x64(True):
        def loss(x):
            return losses.dpo(jnp.log(x)[None], jnp.zeros((1, 2)), beta=beta).sum()

        found = jax.vmap(jax.grad(loss))(jnp.stack([jnp.asarray(x1, float), jnp.asarray(x2, float)], -1))
        return np.asarray(found[:, 0]), np.asarray(found[:, 1])


def ends(steps: int, every: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts [9, 2], probabilities of chosen and rejected [9, T + 1, 2]) of DPO on a free table."""
    starts = np.array([(a, b) for a in (0.02, 0.1, 0.4) for b in (0.02, 0.1, 0.4)])
    rest = (1 - starts.sum(1, keepdims=True)) / 8
    table = jnp.log(jnp.asarray(np.concatenate([starts, np.repeat(rest, 8, 1)], 1), jnp.float32))
    pairs = toy.Pairs(np.array([0]), np.array([0]), np.array([1]), np.array([[1.0, 0.0]]))
    runs = jax.jit(jax.vmap(lambda row: toy.train(losses.get("dpo", beta=BETA), row[None], pairs, steps=steps,
                                                  every=every, lr=0.5, policy=toy.table_logits,
                                                  optimiser=optax.sgd)[1].log_pi))(table)
    return starts, np.exp(np.asarray(runs, np.float64))[:, :, 0, :2]


def run(out_folder: str | Path, quick: bool = False) -> dict[str, Any]:
    """Figure and report; quick: 50 steps."""
    steps, every = (50, 5) if quick else (400, 4)
    axis = np.linspace(0.05, 2.0, 40)
    x1, x2 = (x.ravel() for x in np.meshgrid(axis, axis))
    d1, d2 = slopes(x1, x2)
    starts, runs = ends(steps, every)

    figure = style.figure(11.6, 3.8)
    field, size, tables = (style.axes(figure, 1, 3, i) for i in (1, 2, 3))
    some = np.zeros((axis.size, axis.size), bool)
    some[1::3, 1::3] = True
    some = some.ravel()
    length = np.hypot(d1, d2)
    arrows = field.quiver(x1[some], x2[some], (-d1 / length)[some], (-d2 / length)[some], np.log10(length)[some],
                          cmap=style.MAP, angles="xy", scale=20, width=0.007)
    figure.colorbar(arrows, ax=field, label="log10 size of the gradient")
    field.plot(1, 1, "o", color=style.COLOURS[1], markersize=7)
    field.annotate("start", (1, 1), xytext=(7, 5), textcoords="offset points", color=style.COLOURS[1],
                   fontsize=style.LABEL)
    field.set_xlabel("x₁ = π/π_ref of the chosen")
    field.set_ylabel("x₂ = π/π_ref of the rejected")
    field.set_xlim(0, 2.05)
    field.set_ylim(0, 2.05)
    style.title(field, "direction of descent")
    along = np.isclose(x2, 1.0)
    size.plot(x1[along], np.abs(d1)[along], color=style.COLOURS[0], linewidth=1.8, label="|∂L/∂x₁| along x₂ = 1")
    across = np.isclose(x1, 1.0)
    size.plot(x2[across], np.abs(d2)[across], color=style.COLOURS[1], linewidth=1.8, linestyle="--",
              label="|∂L/∂x₂| along x₁ = 1")
    size.set_yscale("log")
    size.set_xlabel("x₁, x₂")
    size.set_ylabel("size of the slope")
    style.legend(size)
    style.title(size, "the two slopes")
    margin = np.diff(np.log(runs / runs[:, :1]), axis=-1)[..., 0]
    stops = (margin < -MARGIN).argmax(1)  # the first record beyond; 0 where a run never gets there
    for (_, rejected), path, stop in zip(starts, runs, stops, strict=True):
        colour = style.COLOURS[{0.02: 0, 0.1: 2, 0.4: 1}[rejected]]
        tables.plot(path[:stop + 1, 0], np.log10(path[:stop + 1, 1]), color=colour, linewidth=1.4)
        tables.plot(path[0, 0], np.log10(path[0, 1]), "o", color=colour, markersize=5)
        tables.plot(path[stop, 0], np.log10(path[stop, 1]), "s", color=colour, markersize=4, markerfacecolor="white")
    tables.set_xlabel("π(chosen)")
    tables.set_ylabel("log10 π(rejected)")
    tables.set_xlim(0, 1)
    style.title(tables, f"DPO from nine starts (●) to {MARGIN:g} nats (□)")
    path = style.save(figure, Path(out_folder) / "gradient_field.png", dpi=harness.PNG_DPI)

    one = slopes([1.0], [1.0])
    error = np.abs(np.abs(d1 / d2) / (x2 / x1) - 1).max()
    ahead = x1 > 1.5 * x2
    final = runs[np.arange(9), stops, 0]
    gain = final - runs[:, 0, 0]
    low = starts[:, 1] == 0.02
    checks = {
        "|dL/dx1| / |dL/dx2| = x2/x1 to 1e-9 on the whole grid": error < 1e-9,
        "both slopes are beta/2 at the start": np.allclose(np.abs(one), BETA / 2, rtol=1e-12),
        "where the chosen is ahead the rejected moves faster, on the whole grid":
            (np.abs(d2) > np.abs(d1))[ahead].all(),
        "where training ends depends on the start: at equal loss pi(chosen) spans over 0.3": np.ptp(final) > 0.3,
        "a likely rejected response frees more mass for the chosen (0.4 against 0.02, every start of the chosen)":
            (gain[starts[:, 1] == 0.4] > gain[low]).all(),
    }
    ours = {"largest relative error of the ratio": f"{error:.1e}",
            "pi(chosen) at that margin from a start of 0.02 / 0.1 / 0.4 (rejected 0.1)":
                ", ".join(f"{v:.2f}" for v in final[starts[:, 1] == 0.1])}
    return harness.report(figures=[path], seeds=1, ours=ours, checks=checks,
                          published="|dL/dx1| / |dL/dx2| = x2/x1; both beta/2 at (1, 1)")


if __name__ == "__main__":
    harness.command_line(run, __doc__)
