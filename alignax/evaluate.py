"""The evaluate stage: policies against their baseline on held-out prompts, with intervals and the frontier."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np

from alignax import data, distributed, sample, sharding, step
from alignax.context import Context
from alignax.diagnostics import compare, figures, tables


def score_samples(ctx: Context, params, baseline, prompts, tokens, *, batch_size: int) -> tuple[np.ndarray, ...]:
    """Sums of log-probs, float32 [n], of one completion per prompt under policy and baseline by the trainer's
    forward. prompts: (id, ids); tokens: id arrays."""
    records = [data.token_record(name, ids, (c,), eos_ids=ctx.text.eos_ids)
               for (name, ids), c in zip(prompts, tokens, strict=True)]
    columns, slots = data.bucket_shape(records, 8)
    fn = _scorer(ctx.spec)
    out = []
    batch_size = min(batch_size, len(records))
    for start in range(0, len(records), batch_size):
        index = np.arange(start, start + batch_size) % len(records)
        batch = data.padded([records[i] for i in index], K=1, T=columns, L=slots, pad_id=ctx.text.pad_id)
        arrays = fn(params, baseline, sharding.shard_batch(batch, ctx.mesh), {}, None, None)[1]
        arrays = distributed.to_host({name: arrays[name] for name in ("logps", "ref_logps")})
        out.append(np.stack([arrays["logps"][:, 0], arrays["ref_logps"][:, 0]]))
    both = np.concatenate(out, axis=1)[:, :len(records)]
    return both[0], both[1]


@functools.cache
def _scorer(spec: step.ModelSpec):
    return jax.jit(step.make_evaluate(spec, None, diagnostics=("ref_logps",)))


def run(ctx: Context, name: str, *, policies, baseline: str, prompts: str, num_prompts: int, max_new_tokens: int,
        temperature: float, top_p: float, batch_size: int, reward: str, target_win_rate: float, target_kl: float,
        examples: int, max_prompt: int, kept: dict | None = None) -> dict:
    """Compares every policy with the baseline; prints the table, writes samples.jsonl and the frontier.

    Win rate counts ties half, with a 95% interval over prompts; the KL is on-policy, in nats per sequence at
    temperature 1, with its standard error. The headline is the first policy that reaches the targets, or the one
    of the highest win rate where none does. kept: the baseline's samples of earlier calls, which runs that share the
    baseline, the prompts and the seed take from there instead of drawing the same ones again.
    """
    score = sample.reward_fn(reward)
    asked = sample.load_prompts(ctx, prompts, split="eval", n=num_prompts, max_prompt=max_prompt)
    base_params = ctx.params_of(baseline)
    settings = dict(num_samples=1, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                    batch_size=batch_size)
    drawn, texts, gold, points = {}, {}, {}, []

    def sampled(index: int, policy: str) -> tuple:
        """The rollouts of a policy, their texts, and their log-probs under it and under the baseline."""
        params = base_params if policy == baseline else ctx.params_of(policy)
        rolled, words = sample.draw(ctx, f"{name}: {policy}", params, asked, salt=5000 + index, **settings)
        both = score_samples(ctx, params, base_params, asked, [row[0] for row in rolled.tokens], batch_size=batch_size)
        return rolled, words, *both

    place = id(ctx.initial) if baseline == "model" else str(ctx.stage_dir(baseline).resolve())
    mark = place, prompts, num_prompts, max_prompt, ctx.seed, *sorted(settings.items())
    for index, policy in enumerate((baseline, *policies)):
        if index or kept is None:
            found = sampled(index, policy)
        else:
            found = kept[mark] = kept.get(mark) or sampled(index, policy)
        rolled, words, logps, base_logps = found
        drawn[policy] = [row[0] for row in rolled.tokens]
        texts[policy] = [row[0] for row in words]
        gold[policy] = np.asarray(score(texts[policy]), np.float64)
        kl, kl_se = compare.kl_on_policy(logps, base_logps)
        rate, low, high = compare.win_rate(gold[policy], gold[baseline])
        lengths = np.asarray([len(t) for t in drawn[policy]])
        points.append({
            "policy": policy, "win_rate": rate, "win_low": low, "win_high": high, "kl_on_policy": kl, "kl_se": kl_se,
            "gold_reward": float(gold[policy].mean()), "gold_sd": float(gold[policy].std()),
            "length": float(lengths.mean()), "distinct_2": compare.distinct_n([t.tolist() for t in drawn[policy]], 2),
            "unfinished": int((~rolled.finished).sum()), "prompts": len(asked),
            "baseline_logp_per_token": float((base_logps / lengths).mean()),
            "sampler_trainer_gap": float(np.abs(rolled.logps[:, 0] - logps).max())})
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
                "kl_on_policy_se": best["kl_se"], "gold_reward_sft": base_row["gold_reward"],
                "gold_reward_dpo": best["gold_reward"], "prompts": len(asked), "targets_met": bool(reached)}
    return {"headline": headline, "points": points}


def _write_samples(ctx: Context, asked, texts, gold) -> None:
    path = ctx.workdir / "samples.jsonl"
    part = path.with_name("samples.jsonl.part")
    with part.open("w", encoding="utf-8") as file:
        for i, (name, ids) in enumerate(asked):
            file.write(json.dumps({"id": name, "prompt": ctx.tokenizer.decode(ids.tolist())} | {
                policy: {"text": texts[policy][i], "reward": float(gold[policy][i])} for policy in texts}) + "\n")
    part.replace(path)
