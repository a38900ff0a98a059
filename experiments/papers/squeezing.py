"""The squeezing effect of negative gradients (arXiv 2407.10490, ICLR 2025).

Claim: pushing down a response that is already unlikely moves mass to the most likely one, whatever that is; most other
responses lose too, though nothing touched them. Supervised steps on both responses before preference training weaken
it, since the rejected response is then no longer in a valley.

Published: a theorem on softmax regression, and LLM curves in which the greedy response of DPO keeps rising while chosen
and rejected fall; supervised training on both responses first improves the result. No number fits a table.

Here: softmax regression with 50 answers and 16 features, 8 seeds: the factor p'/p of one exact step against p; 200
negative steps from a peaked start; DPO with an off-policy pair, with and without supervised steps on both answers
first.

Command: python -m experiments.papers.squeezing

Small models: the theorem is about one softmax, so the table shows it exactly. For a single pair of one-token answers
it cannot show in DPO: the logits' gradient of log pi(chosen) - log pi(rejected) is +1 on one and -1 on the other, and
the pull on the greedy answer cancels. It needs a chosen that is pulled less than the rejected is pushed, as where
tokens or prompts share parameters.

At scale: train `experiments/dpo.py:loss=dpo` from a model and from one that saw 1 epoch of SFT on both responses, and
watch the greedy completion's log-prob. Prediction: it rises in the first and falls in the second during the first 100
updates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignax import losses
from alignax.diagnostics import style, toy
from experiments.papers import harness

ANSWERS, FEATURES = 50, 16


def factors(p: jax.Array, index: Any, eta: Any) -> jax.Array:
    """p'/p [V] after one gradient step of size eta on the logits that lowers log p[index] (eta < 0: raises it)."""
    logits = jnp.log(p)
    slope = jax.grad(lambda z: jax.nn.log_softmax(z)[index])(logits)
    return jnp.exp(jax.nn.log_softmax(logits - eta * slope) - logits)


def _regression(features: jax.Array) -> toy.Policy:
    """Logits [P, V] = features [P, F] @ parameters [F, V]."""
    return lambda weights: features @ weights


def _start(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(features [1, F] of unit length, weights [F, V] whose softmax has a clear peak)."""
    first, second = jax.random.split(key)
    features = jax.random.normal(first, (1, FEATURES))
    features = features / jnp.linalg.norm(features)
    logits = jnp.sort(2.0 * jax.random.normal(second, (1, ANSWERS)), axis=1)[:, ::-1]  # answer 0 is the likeliest
    return features, features.T @ logits


def push(key: jax.Array, rank: int, steps: int, lr: float) -> jax.Array:
    """log pi [steps + 1, V] while plain gradient descent lowers log pi of the answer of that rank (0: likeliest)."""
    features, weights = _start(key)
    policy = _regression(features)

    def step(weights, _):
        log_pi = toy.log_policy(policy, weights)[0]
        return weights - lr * jax.grad(lambda w: toy.log_policy(policy, w)[0, rank])(weights), log_pi

    weights, seen = jax.lax.scan(step, weights, None, steps)
    return jnp.concatenate([seen, toy.log_policy(policy, weights)])


def preference(key: jax.Array, supervised: int, steps: int, every: int) -> jax.Array:
    """log pi [T + 1, V] under DPO on a pair of unlikely answers, after `supervised` steps on both answers."""
    features, weights = _start(key)
    policy = _regression(features)
    pairs = toy.Pairs(np.array([0]), np.array([ANSWERS // 2]), np.array([ANSWERS - 5]), np.array([[1.0, 0.0]]))
    both = jnp.zeros(ANSWERS).at[jnp.array([ANSWERS // 2, ANSWERS - 5])].set(0.5)
    weights = toy.fit(weights, both, policy=policy, steps=supervised, lr=0.02) if supervised else weights
    record = toy.train(losses.get("dpo"), weights, pairs, policy=policy, steps=steps, every=every, lr=0.02)[1]
    return record.log_pi[:, 0]


def run(out_folder: str | Path, quick: bool = False) -> dict[str, Any]:
    """Figure and report; quick: two seeds, 40 steps."""
    seeds, steps, every = (2, 40, 4) if quick else (harness.SEEDS, 400, 4)
    golden = np.asarray(factors(jnp.array([0.55, 0.25, 0.15, 0.04, 0.01]), 4, 1.0))
    keys = jax.random.split(jax.random.key(2), seeds)
    draws = jax.nn.softmax(2 * jax.random.normal(jax.random.key(3), (200, ANSWERS)))
    down = np.asarray(jax.jit(jax.vmap(lambda p: factors(p, jnp.argmin(p), 1.0)))(draws))
    up = np.asarray(jax.jit(jax.vmap(lambda p: factors(p, jnp.argmin(p), -1.0)))(draws))
    p = np.asarray(draws)
    others = np.arange(ANSWERS)[None] != p.argmin(1)[:, None]
    ordered = all((np.diff(f[o][np.argsort(q[o], kind="stable")]) >= -1e-6).all()
                  for f, q, o in zip(down, p, others, strict=True))
    ranks = {"an unlikely answer": ANSWERS - 5, "a middling answer": ANSWERS // 2, "the likeliest answer": 0}
    pushed = {name: np.exp(np.asarray(jax.jit(jax.vmap(lambda k, r=rank: push(k, r, steps // 2, 0.5)))(keys)))
              for name, rank in ranks.items()}
    dpo = {"DPO": 0, "both answers first, then DPO": 20 if quick else 100}
    dpo = {name: np.asarray(jax.jit(jax.vmap(lambda k, n=n: preference(k, n, steps, every)))(keys))
           for name, n in dpo.items()}

    figure = style.figure(11.6, 3.7)
    first, second, third = (style.axes(figure, 1, 3, i) for i in (1, 2, 3))
    for values, colour, name in ((down, style.COLOURS[1], "push an unlikely answer down"),
                                 (up, style.COLOURS[0], "pull the same answer up")):
        first.plot(p[:20][others[:20]], values[:20][others[:20]], ".", color=colour, markersize=4, label=name)
    first.set_xscale("log")
    first.axhline(1, color=style.MUTED, linewidth=0.8)
    first.set_xlabel("probability p of another answer")
    first.set_ylabel("factor p′/p after one step")
    first.set_ylim(0.5, 2.0)
    style.legend(first, loc="upper left")
    for (name, values), colour, line in zip(pushed.items(), style.COLOURS[1:], style.DASHES, strict=False):
        greedy = values[..., 1 if name == "the likeliest answer" else 0]
        style.band(second, np.arange(values.shape[1]), greedy, colour=colour, label=f"pushing {name}", line=line)
    second.set_xlabel("negative gradient steps")
    second.set_ylabel("probability of the likeliest\n(other) answer")
    second.set_ylim(0, 1)
    style.legend(second, loc="lower right")
    epochs = np.arange(0, steps + 1, every)
    for (name, values), line in zip(dpo.items(), style.DASHES, strict=False):
        for answer, colour, what in ((0, style.INK, "greedy"), (ANSWERS // 2, style.COLOURS[0], "chosen")):
            style.band(third, epochs, np.log10(np.e) * values[..., answer], colour=colour, line=line,
                       label=f"{what}: {name}")
    third.set_xlabel("DPO update step")
    third.set_ylabel("log10 probability")
    third.set_ylim(-11, 0.4)
    style.legend(third, fontsize=style.NOTE, loc="lower left")
    path = style.save(figure, Path(out_folder) / "squeezing.png", dpi=harness.PNG_DPI)

    unlikely = pushed["an unlikely answer"]
    fell = (unlikely[:, -1, :-5] < unlikely[:, 0, :-5]).mean(1)
    rose = {name: values[:, -1, 0] - values[:, 0, 0] for name, values in dpo.items()}
    checks = {
        "factors of p = (.55, .25, .15, .04, .01) are (1.160, .860, .778, .697, .249)":
            np.abs(golden - (1.160, 0.860, 0.778, 0.697, 0.249)).max() < 6e-4,
        "a negative step multiplies more likely answers by more, in 200 of 200 random cases": ordered,
        "a positive step instead costs the likeliest other answer most, in all of them":
            (np.where(others, up, 9).argmin(1) == p.argmax(1)).all(),
        "200 negative steps on an unlikely answer raise the likeliest in every seed":
            (unlikely[:, -1, 0] > unlikely[:, 0, 0]).all(),
        "and lower most of the untouched answers (over three quarters)": fell.mean() > 0.75,
        "the greedy answer rises under DPO on an off-policy pair": (rose["DPO"] > 0).all(),
        "the greedy answer's log-prob ends higher without supervised steps on both answers than with":
            (rose["DPO"] > rose["both answers first, then DPO"]).all(),
        "the chosen ends more likely with supervised steps on both": (
            dpo["both answers first, then DPO"][:, -1, ANSWERS // 2] > dpo["DPO"][:, -1, ANSWERS // 2]).all(),
    }
    ours = {"share of untouched answers that fell": harness.said(fell),
            "likeliest answer before": harness.said(unlikely[:, 0, 0]),
            "likeliest answer after": harness.said(unlikely[:, -1, 0]),
            **{f"{name}: change of the greedy answer's log-prob (nats)": harness.said(value)
               for name, value in rose.items()}}
    return harness.report(figures=[path], seeds=seeds, ours=ours, checks=checks,
                          published="the ordering of the factors (a theorem); no number for a table")


if __name__ == "__main__":
    harness.command_line(run, __doc__)
