"""The sample stage: roll out a policy, score, label by Bradley-Terry, and write pairs with the sampled ids."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from alignax import data, distributed, rewards
from alignax import metrics as metrics_lib
from alignax.context import Context, Preempted
from alignax.sources import Rollouts, rollout
from alignax.types import ConfigError, DataError

REWARDS: dict[str, Callable[[Sequence[str]], np.ndarray]] = {"lexicon": rewards.lexicon_reward}


def reward_fn(name: str) -> Callable[[Sequence[str]], np.ndarray]:
    """A reward of texts by name. Raises ConfigError listing the legal ones."""
    if name not in REWARDS:
        raise ConfigError(f"reward={name!r}; allowed: {', '.join(REWARDS)}")
    return REWARDS[name]


def load_prompts(ctx: Context, source: str, *, split: str, n: int, max_prompt: int) -> list[tuple[str, np.ndarray]]:
    """(id, token ids) of n prompts. Raises DataError for a prompt longer than `max_prompt` (0: no bound)."""
    out = []
    for name, text in data.prompt_texts(source, split=split, seed=ctx.seed, n=n):
        ids = np.asarray(ctx.text.prompt(ctx.tokenizer.encode_prompt(text)), np.int32)
        if not len(ids):
            raise DataError(f"{source}: prompt {name!r} has no tokens and there is no BOS")
        if max_prompt and len(ids) > max_prompt:
            raise DataError(f"{source}: prompt {name!r} has {len(ids)} tokens; max_prompt is {max_prompt}")
        out.append((name, ids))
    return out


def check(ctx: Context, name: str, section: dict, *, split: str) -> None:
    """Refuses a sample or evaluate section that cannot work: reward, prompts, lengths, samples per prompt.

    Raises ConfigError or DataError, so that a long run does not end at a late stage. Samples nothing.
    """
    try:
        reward_fn(section["reward"])
        prompts = load_prompts(ctx, section["prompts"], split=split, n=section["num_prompts"],
                               max_prompt=section["max_prompt"])
    except (ConfigError, DataError) as error:
        raise type(error)(f"config.{name}: {error}") from error
    if not prompts:
        raise DataError(f"config.{name}.prompts={section['prompts']!r}: there are no prompts")
    _check_fit(ctx, f"config.{name}", prompts, section["max_new_tokens"])
    if "unseen" in section:
        _check_unseen(name, section["unseen"], section["num_samples"])


def _check_unseen(name: str, unseen: int, num_samples: int) -> None:
    if not 0 <= unseen <= num_samples - 2:
        raise ConfigError(f"config.{name}.unseen={unseen}: pairs need two of num_samples={num_samples} completions")


def _check_fit(ctx: Context, label: str, prompts, max_new_tokens: int) -> None:
    longest = max(len(ids) for _, ids in prompts)
    limit = ctx.spec.config.max_positions
    if longest + max_new_tokens > limit:
        raise ConfigError(f"{label}: a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the "
                          f"model's {limit} positions")


class Job(NamedTuple):
    """Completions that a stage asks for. policy: a train stage, or `model`; prompts: (id, token ids); salt separates
    the draws of a run; settings: the other arguments of `draw`."""

    label: str
    policy: str
    prompts: list[tuple[str, np.ndarray]]
    salt: int
    settings: dict[str, Any]


def draw(ctx: Context, label: str, params, prompts, *, num_samples: int, max_new_tokens: int, temperature: float,
         top_p: float, batch_size: int, salt: int, lanes: int = 0) -> tuple[Rollouts, list[list[str]]]:
    """Samples and decodes completions of (id, ids) prompts, with a progress line; `salt` separates the draws, lanes as
    in sources.rollout."""
    _check_fit(ctx, label, prompts, max_new_tokens)
    with metrics_lib.progress(ctx.console) as bar:
        task = bar.add_task(label, total=len(prompts), numbers="")

        def advance(count: int) -> None:
            bar.advance(task, count)
            stop_here(ctx, label)

        out = rollout(ctx.spec.config, params["model"], [ids for _, ids in prompts], numbers_of(prompts),
                      key_of(ctx, salt), num_samples=num_samples, max_new_tokens=max_new_tokens,
                      temperature=temperature, top_p=top_p, eos_ids=sorted(ctx.text.eos_ids), pad_id=ctx.text.pad_id,
                      batch_size=batch_size, lanes=lanes, advance=advance)
    return out, decoded(ctx, prompts, out)


def stop_here(ctx: Context, label: str) -> None:
    """Raises Preempted where the run has been asked to stop."""
    if distributed.stop_now(ctx.stop.requested):
        raise Preempted(f"stopped while sampling for {label}; run the same command again")


def numbers_of(prompts) -> list[int]:
    """The record numbers of (id, ids) prompts, from which their draws' keys are folded."""
    return [data.record_number(name) for name, _ in prompts]


def key_of(ctx: Context, salt: int) -> jax.Array:
    """The key of the run's draws with this salt."""
    return jax.random.fold_in(jax.random.key(ctx.seed), salt)


def decoded(ctx: Context, prompts, out: Rollouts) -> list[list[str]]:
    """The texts of the completions of (id, ids) prompts."""
    return [[ctx.tokenizer.decode_completion(ids.tolist(), [int(t) for t in c if int(t) not in ctx.text.eos_ids])
             for c in row] for (_, ids), row in zip(prompts, out.tokens, strict=True)]


def run(ctx: Context, name: str, **section) -> dict:
    """Writes pairs.jsonl (text, ids, scores, the unseen completions) in the stage's folder; returns counts.

    section: the stage's settings (configs.sample_stage) but its kind; policy: a train stage, or `model`. A tenth of the
    prompts goes to the evaluation split. Pairs whose two texts are identical are left out and counted.
    """
    job = ask(ctx, name, **section)
    return tell(ctx, name, job, *draw(ctx, job.label, ctx.params_of(job.policy), job.prompts, salt=job.salt,
                                      **job.settings), **section)


def ask(ctx: Context, name: str, *, policy: str, prompts: str, num_prompts: int, num_samples: int, unseen: int,
        max_new_tokens: int, temperature: float, top_p: float, batch_size: int, lanes: int, reward: str,
        max_prompt: int, seed_offset: int, **_) -> Job:
    """What the stage has to draw."""
    _check_unseen(name, unseen, num_samples)
    reward_fn(reward)
    chosen = load_prompts(ctx, prompts, split="train", n=num_prompts, max_prompt=max_prompt)
    return Job(name, policy, chosen, 1000 + seed_offset, dict(
        num_samples=num_samples, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        batch_size=batch_size, lanes=lanes))


def tell(ctx: Context, name: str, job: Job, out: Rollouts, texts: list[list[str]], *, num_samples: int, unseen: int,
         reward: str, pairs: str, label_scale: float, seed_offset: int, **_) -> dict:
    """Scores and labels what was drawn, writes the pairs, returns the counts."""
    scores = reward_fn(reward)([t for row in texts for t in row]).reshape(len(texts), num_samples)
    used = num_samples - unseen
    made = rewards.bradley_terry_pairs(scores[:, :used], np.random.default_rng([ctx.seed, seed_offset, 11]),
                                       scale=label_scale, strategy=pairs, texts=[row[:used] for row in texts])
    path = ctx.stage_dir(name) / "pairs.jsonl"
    if distributed.is_main():
        _write_pairs(ctx, path, made, job.prompts, texts, out, scores, used)
    distributed.await_file(path)
    counts = {"prompts": len(job.prompts), "completions": int(out.finished.size), "pairs": len(made.prompt),
              "identical_left_out": int(made.identical), "unfinished": int((~out.finished).sum()),
              "reward_mean": float(scores.mean()), "reward_sd": float(scores.std()),
              "label_agreement": float(np.mean([scores[i, w] >= scores[i, r] for i, w, r in
                                                zip(made.prompt, made.chosen, made.rejected, strict=True)]))}
    ctx.console.print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in counts.items()))
    return counts


def _write_pairs(ctx: Context, path: pathlib.Path, made, prompts, texts, out: Rollouts, scores: np.ndarray,
                 used: int) -> None:
    """One line for each pair; completions from number `used` on are those that the pairs leave out."""
    part = path.with_name("pairs.jsonl.part")
    with part.open("w", encoding="utf-8") as file:
        for count, (i, w, r) in enumerate(zip(made.prompt, made.chosen, made.rejected, strict=True)):
            prompt_id, ids = prompts[i]
            file.write(json.dumps({
                "id": f"{prompt_id}/{count}", "prompt_id": prompt_id, "split": "eval" if i % 10 == 9 else "train",
                "prompt": ctx.tokenizer.decode([t for t in ids.tolist() if t != ctx.text.bos_id]),
                "chosen": texts[i][w], "rejected": texts[i][r], "prompt_ids": ids.tolist(),
                "chosen_ids": out.tokens[i][w].tolist(), "rejected_ids": out.tokens[i][r].tolist(),
                "unseen_ids": [tokens.tolist() for tokens in out.tokens[i][used:]],
                "scores": [float(scores[i, w]), float(scores[i, r])]}) + "\n")
    part.replace(path)


def _rows(folder: pathlib.Path) -> list[dict]:
    path = folder / "pairs.jsonl"
    if not path.exists():
        raise ConfigError(f"{path}: no pairs there; the sample stage has to come first")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_pairs(folder: pathlib.Path, eos_ids: Sequence[int]) -> tuple[list, list]:
    """(train, eval) token records of a sample stage: the ids that were sampled, never tokenised again."""
    splits: dict[str, list] = {"train": [], "eval": []}
    for line, row in enumerate(_rows(folder), 1):
        splits[row["split"]].append(data.token_record(
            row["id"], row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"]), eos_ids=eos_ids,
            scores=row["scores"], file=str(folder / "pairs.jsonl"), line=line))
    return splits["train"], splits["eval"]


def read_unseen(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """record id -> the first completion that was kept out of the pairs."""
    return {row["id"]: np.asarray(row["unseen_ids"][0], np.int32) for row in _rows(folder) if row["unseen_ids"]}
