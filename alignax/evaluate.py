"""The evaluate stage: policies against their baseline on held-out prompts, with intervals and the frontier."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from alignax import data, distributed, sample, sharding, step
from alignax.context import Context
from alignax.diagnostics import compare, figures, tables
from alignax.sources import Rollouts
from alignax.types import Batch


class Drawn(NamedTuple):
    """What a job came to. out: completions of each prompt; texts: decoded; logps, base_logps: float32 [n], in an
    evaluation their sums under the policy and under the baseline by the trainer's forward."""

    out: Rollouts
    texts: list[list[str]]
    logps: np.ndarray | None
    base_logps: np.ndarray | None


def score_samples(ctx: Context, params, baseline, prompts, tokens, *, batch_size: int) -> tuple[np.ndarray, ...]:
    """Sums of log-probs, float32 [n], of one completion per prompt under policy and baseline by the trainer's
    forward. prompts: (id, ids); tokens: id arrays."""
    records = records_of(ctx, prompts, tokens)
    shape, fn, out = data.bucket_shape(records, 8), _scorer(ctx.spec), []
    for batch in score_batches(ctx, records, shape, batch_size):
        arrays = fn(params, baseline, sharding.shard_batch(batch, ctx.mesh), {}, None, None)[1]
        arrays = distributed.to_host({name: arrays[name] for name in ("logps", "ref_logps")})
        out.append(np.stack([arrays["logps"][:, 0], arrays["ref_logps"][:, 0]]))
    both = np.concatenate(out, axis=1)[:, :len(records)]
    return both[0], both[1]


def records_of(ctx: Context, prompts, tokens) -> list:
    """Records of one completion (ids) for each (id, ids) prompt."""
    return [data.token_record(name, ids, (c,), eos_ids=ctx.text.eos_ids)
            for (name, ids), c in zip(prompts, tokens, strict=True)]


def score_batches(ctx: Context, records, shape: tuple[int, int], batch_size: int) -> Iterator[Batch]:
    """The records in batches of one shape (columns, slots), the last one filled with repeats."""
    size = min(batch_size, len(records))
    for start in range(0, len(records), size):
        index = np.arange(start, start + size) % len(records)
        yield data.padded([records[i] for i in index], K=1, T=shape[0], L=shape[1], pad_id=ctx.text.pad_id)


def make_score(spec: step.ModelSpec):
    """The program that scores: evaluate(params, baseline, batch, {}, None, None), as step.make_evaluate defines it."""
    return step.make_evaluate(spec, None, diagnostics=("ref_logps",))


@functools.cache
def _scorer(spec: step.ModelSpec):
    return jax.jit(make_score(spec))


def run(ctx: Context, name: str, *, kept: dict | None = None, **section) -> dict:
    """Compares every policy with the baseline; prints the table, writes samples.jsonl and the frontier.

    section: the stage's settings (configs.evaluate_stage) but its kind. Win rate counts ties half, with a 95% interval
    over prompts; the KL is on-policy, in nats per sequence at temperature 1, with its standard error. The headline is
    the first policy that reaches the targets, or the one of the highest win rate where none does. kept: the baseline's
    samples of earlier calls, which runs that share the baseline, the prompts and the seed take from there instead of
    drawing the same ones again.
    """
    jobs, found = ask(ctx, name, **section), []
    base_params = ctx.params_of(section["baseline"])
    for index, job in enumerate(jobs):
        mark = mark_of(ctx, job, section)
        known = index == 0 and kept is not None and mark in kept
        found.append(kept[mark] if known else answer(ctx, job, section, base_params))
        if index == 0 and kept is not None:
            kept[mark] = found[0]
    return tell(ctx, jobs, found, **section)


def answer(ctx: Context, job: sample.Job, section: Mapping[str, Any], base_params: Any = None) -> Drawn:
    """Draws what a job asks for, and scores it. base_params: of the baseline, read where they are not given."""
    base_params = ctx.params_of(section["baseline"]) if base_params is None else base_params
    params = base_params if job.policy == section["baseline"] else ctx.params_of(job.policy)
    out, texts = sample.draw(ctx, job.label, params, job.prompts, salt=job.salt, **job.settings)
    return Drawn(out, texts, *score_samples(ctx, params, base_params, job.prompts, [row[0] for row in out.tokens],
                                            batch_size=job.settings["batch_size"]))


def ask(ctx: Context, name: str, *, policies, baseline: str, prompts: str, num_prompts: int, max_new_tokens: int,
        temperature: float, top_p: float, batch_size: int, lanes: int, reward: str, max_prompt: int,
        **_) -> list[sample.Job]:
    """What the stage has to draw: the baseline's completions, and every policy's."""
    sample.reward_fn(reward)
    asked = sample.load_prompts(ctx, prompts, split="eval", n=num_prompts, max_prompt=max_prompt)
    settings = dict(num_samples=1, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                    batch_size=batch_size, lanes=lanes)
    return [sample.Job(f"{name}: {policy}", policy, asked, 5000 + index, settings)
            for index, policy in enumerate((baseline, *policies))]


def place_of(ctx: Context, policy: str) -> Any:
    """Equal for runs in which a policy has the same parameters."""
    return id(ctx.initial) if policy == "model" else str(ctx.stage_dir(policy).resolve())


def mark_of(ctx: Context, job: sample.Job, section: Mapping[str, Any]) -> tuple:
    """Equal for runs in which a job comes to the same."""
    return (place_of(ctx, job.policy), section["prompts"], section["num_prompts"], section["max_prompt"], ctx.seed,
            job.salt, *sorted(job.settings.items()))


def tell(ctx: Context, jobs: Sequence[sample.Job], found: Sequence[Drawn], *, baseline: str, reward: str,
         target_win_rate: float, target_kl: float, examples: int, **_) -> dict:
    """Scores and compares what the jobs came to, writes the files, returns the result."""
    asked, score = jobs[0].prompts, sample.reward_fn(reward)
    drawn, texts, gold, points = {}, {}, {}, []
    for job, one in zip(jobs, found, strict=True):
        policy = job.policy
        drawn[policy] = [row[0] for row in one.out.tokens]
        texts[policy] = [row[0] for row in one.texts]
        gold[policy] = np.asarray(score(texts[policy]), np.float64)
        kl, kl_se = compare.kl_on_policy(one.logps, one.base_logps)
        rate, low, high = compare.win_rate(gold[policy], gold[baseline])
        lengths = np.asarray([len(t) for t in drawn[policy]])
        points.append({
            "policy": policy, "win_rate": rate, "win_low": low, "win_high": high, "kl_on_policy": kl, "kl_se": kl_se,
            "gold_reward": float(gold[policy].mean()), "gold_sd": float(gold[policy].std()),
            "length": float(lengths.mean()), "distinct_2": compare.distinct_n([t.tolist() for t in drawn[policy]], 2),
            "unfinished": int((~one.out.finished).sum()), "prompts": len(asked),
            "baseline_logp_per_token": float((one.base_logps / lengths).mean()),
            "sampler_trainer_gap": float(np.abs(one.out.logps[:, 0] - one.logps).max())})
    base_row, rest = points[0], points[1:]
    reached = [p for p in rest if p["win_rate"] >= target_win_rate and p["kl_on_policy"] <= target_kl]
    best = reached[0] if reached else max(rest, key=lambda p: p["win_rate"])
    ctx.console.print(tables.comparison(base_row, rest))
    if distributed.is_main():
        _write_samples(ctx, asked, texts, gold)
        figures.frontier([{"kl": p["kl_on_policy"], "kl_se": p["kl_se"], "win_rate": p["win_rate"], "lo": p["win_low"],
                           "hi": p["win_high"], "label": p["policy"]} for p in rest],
                         ctx.workdir / "figures" / "frontier.png")
    for i in range(min(examples, len(asked))):
        ctx.console.print(f"[bold]{ctx.tokenizer.decode([t for t in asked[i][1].tolist() if t != ctx.text.bos_id])}[/]")
        for policy in (baseline, best["policy"]):
            ctx.console.print(f"  {policy} ({gold[policy][i]:+.0f}): {texts[policy][i]}", markup=False)
    headline = {"policy": best["policy"], "win_rate": best["win_rate"],
                "win_rate_interval": [best["win_low"], best["win_high"]], "kl_on_policy": best["kl_on_policy"],
                "kl_on_policy_se": best["kl_se"], "gold_reward_baseline": base_row["gold_reward"],
                "gold_reward": best["gold_reward"], "prompts": len(asked), "targets_met": bool(reached)}
    return {"headline": headline, "points": points}


def _write_samples(ctx: Context, asked, texts, gold) -> None:
    path = ctx.workdir / "samples.jsonl"
    part = path.with_name("samples.jsonl.part")
    with part.open("w", encoding="utf-8") as file:
        for i, (name, ids) in enumerate(asked):
            file.write(json.dumps({"id": name, "prompt": ctx.tokenizer.decode(ids.tolist())} | {
                policy: {"text": texts[policy][i], "reward": float(gold[policy][i])} for policy in texts}) + "\n")
    part.replace(path)
