"""Populations of preference losses on the quickstart's model: its SFT model, its pairs, and what every run becomes.

One population is one loss at every strength, learning rate and seed, trained as one compiled program and measured at a
few updates on the way, so that a run gives a curve of gold reward over KL and not one point. A seed draws its own
labels on the same pairs, its own order of the data, and its own completions in the evaluation: runs of one seed are
paired over losses. No loss sees the gold reward; those that take scores are given 1 for chosen and 0 for rejected.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from alignax import configs, context, data, losses, optim, population, rewards, sample, stage_data, step, train
from alignax.rollout import generate
from alignax.types import REQUESTS, Batch, Stream

LAYOUT, MULTIPLE = "shared_prefix_packed", 8
NEW_TOKENS = 40
SFT, SAMPLE = "sft", "sample"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What every loss is given. marks: the updates after which a run is measured, multiples of the first of them, up to
    which the learning rate rises.

    pairs: of one update. prompts: of an evaluation, one completion each. probe: training pairs on which the change of
    log-probs is measured. best_of: completions of every prompt from which best-of-n is computed.
    """

    strengths: int = 4
    rates: tuple[float, ...] = (3e-4, 8e-4)
    seeds: int = 3
    marks: tuple[int, ...] = (6, 12, 24, 48)
    pairs: int = 32
    prompts: int = 80
    probe: int = 32
    best_of: int = 256
    tiny: bool = False


@dataclasses.dataclass(frozen=True)
class Entry:
    """One loss of the comparison. key: the hyper-parameter that is its strength, `learning_rate` where it has none
    (the rates are then multiplied by the values). values: from strong to weak ties to the reference, or the like.
    fixed: other hyper-parameters that differ from the defaults. why: of the values. scale: of the Bradley-Terry labels;
    0 turns them at random."""

    loss: str
    key: str
    values: tuple[float, ...]
    why: str
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scale: float = 1.0


class World:
    """The starting point of all runs: model, tokenizer, pairs with their gold rewards, prompts of the evaluation."""

    def __init__(self, config: Any, folder: Path, sizes: Sizes, console: Any):
        self.sizes = sizes
        config = configs.staged(config)
        config.stages = (SFT, SAMPLE)
        first = [jax.devices()[0]]
        train.run(config, folder / "base", console=console, devices=first)
        self.ctx: context.Context = train.make_context(config, folder / "base", console, devices=first)
        self.mesh = population.make_mesh()
        self.params = jax.device_get(self.ctx.params_of(SFT))
        text = (self.ctx.stage_dir(SAMPLE) / "pairs.jsonl").read_text(encoding="utf-8")
        self.rows = furthest([row for line in text.splitlines() if (row := json.loads(line))["split"] == "train"])
        tokenizer = self.ctx.tokenizer
        # The tokens are words and the reward counts words, so a completion's reward is a sum over its tokens.
        self.worth = rewards.lexicon_reward(tokenizer.token(i) for i in range(tokenizer.vocab_size))
        asked = sample.load_prompts(self.ctx, "builtin:stories", split="eval", n=sizes.prompts, max_prompt=0)
        width = max(len(ids) for _, ids in asked)
        self.prompts = np.full((len(asked), width), self.ctx.text.pad_id, np.int32)
        self.prompt_mask = np.zeros((len(asked), width), bool)
        for i, (_, ids) in enumerate(asked):
            self.prompts[i, width - len(ids):], self.prompt_mask[i, width - len(ids):] = ids, True
        self.numbers = np.asarray([data.record_number(name) for name, _ in asked], np.uint32)
        self._score = jax.jit(step.make_evaluate(self.ctx.spec, None))
        self._measure: Callable | None = None
        self.start: dict[str, np.ndarray] | None = None

    @property
    def updates(self) -> int:
        """The updates of a run."""
        return self.sizes.marks[-1]

    def pairs(self, seed: int, scale: float) -> tuple[list, list[np.ndarray]]:
        """(records that the seed's updates use, the records' numbers in every update): labels drawn for this seed from
        the Bradley-Terry model of scale * gold reward; an order of its own."""
        order = list(data.Plan(len(self.rows), self.sizes.pairs, seed).sequence(self.updates))
        used = list(dict.fromkeys(int(i) for batch in order for i in batch))
        coins = np.random.default_rng([seed, 21]).random(len(self.rows))
        records = []
        for i in used:
            row = self.rows[i]
            gap = scale * (row["scores"][0] - row["scores"][1])
            sides = [row["chosen_ids"], row["rejected_ids"]]
            ordered = sides if coins[i] < 1 / (1 + np.exp(-gap)) else sides[::-1]
            records.append(data.token_record(row["id"], row["prompt_ids"], ordered,
                                             eos_ids=sorted(self.ctx.text.eos_ids), scores=(1.0, 0.0)))
        place = {number: at for at, number in enumerate(used)}
        return records, [np.asarray([place[int(i)] for i in batch]) for batch in order]

    def reference(self, records: Sequence[Any]) -> np.ndarray:
        """float32 [n, K]: log-probs of the records' completions under the SFT model."""
        size = 64
        columns, slots = data.bucket_shape(records, MULTIPLE)
        out = []
        for start in range(0, len(records), size):
            some = [records[i % len(records)] for i in range(start, start + size)]
            batch = data.padded(some, K=len(some[0].completions), T=columns, L=slots, pad_id=self.ctx.text.pad_id)
            out.append(np.asarray(self._score(self.params, None, batch, {}, None, None)[1]["logps"]))
        return np.concatenate(out)[:len(records)]

    def probe(self, records: Sequence[Any], reference: np.ndarray) -> Batch:
        """The first pairs of a seed as a batch that carries the reference's log-probs."""
        some = records[:self.sizes.probe]
        batch = data.padded(some, K=2, T=24 + NEW_TOKENS, L=NEW_TOKENS, pad_id=self.ctx.text.pad_id)
        return dataclasses.replace(batch, data={"ref_logps": reference[:len(some)]})

    def measure(self, params: Any, seeds: np.ndarray, probes: Batch) -> dict[str, np.ndarray]:
        """What the policies of a population are; params: leaves [N, ...], seeds: int [N], probes: leaves [seeds, ...].

        gold, kl, length, entropy: [N, M] for each prompt's completion: gold reward, the sum over its tokens of
        KL(policy || SFT model) over the whole vocabulary, its tokens, and its mean entropy. chosen, rejected: [N],
        mean change of the log-prob of the probe's pairs. The completions are drawn at temperature 1 with keys of the
        seed and the prompt, the same for every policy.
        """
        if self._measure is None:
            shared = self.params, self.prompts, self.prompt_mask, self.numbers, jnp.asarray(self.worth)
            one = lambda member, rest: self._one(*member, *rest)
            whole = lambda members, rest: jax.lax.map(lambda m: one(m, rest), members)
            if self.mesh is not None:
                lead, all_of = PartitionSpec(population.AXIS), PartitionSpec()
                whole = jax.shard_map(whole, mesh=self.mesh, in_specs=(lead, all_of), out_specs=lead, check_vma=False)
            run = jax.jit(whole)
            self._measure = lambda members, found: run(members, (*shared, found))
        return dict(jax.device_get(self._measure((params, jnp.asarray(seeds)), probes)))

    def _one(self, params, seed, reference, prompts, prompt_mask, numbers, worth, probes) -> dict[str, jax.Array]:
        spec, eos = self.ctx.spec, tuple(sorted(self.ctx.text.eos_ids))
        out = generate(spec.config, params["model"], prompts, prompt_mask, numbers,
                       jax.random.fold_in(jax.random.key(5000), seed), max_new_tokens=NEW_TOKENS, eos_ids=eos,
                       pad_id=self.ctx.text.pad_id)
        count, width = prompts.shape
        every = jnp.concatenate([prompt_mask, out.mask[:, 0]], 1)
        segment = every.astype(jnp.int32)
        position = jnp.maximum(jnp.cumsum(segment, 1) - 1, 0)
        col = jnp.broadcast_to(width - 1 + jnp.arange(NEW_TOKENS), (count, 1, NEW_TOKENS))
        stream = Stream(jnp.concatenate([prompts, out.tokens[:, 0]], 1), segment, segment, position,
                        jnp.zeros_like(col), col, out.tokens, out.mask, jnp.ones((count, 1), bool), groups=count)
        found = step.compute(spec, params, reference, Batch({"pair": stream}, {}, numbers),
                             ("policy_ref_kl", "entropy", "lengths"))
        lengths = found["lengths"][:, 0]
        pairs = jax.tree.map(lambda leaf: leaf[seed], probes)
        change = step.compute(spec, params, None, pairs, ("logps",))["logps"] - pairs.data["ref_logps"]
        return {"gold": jnp.where(out.mask, worth[out.tokens], 0).sum((1, 2)),
                "kl": found["policy_ref_kl"].sum((1, 2)), "length": lengths,
                "entropy": found["entropy"].sum((1, 2)) / lengths,
                "chosen": change[:, 0].mean(), "rejected": change[:, 1].mean()}

    def best_of_n(self) -> dict[str, list]:
        """{n, kl, gold [points][M]}: expected gold reward of the best of n completions of the SFT model for each
        prompt, from order statistics of `best_of` of them, and log n - (n - 1) / n, which bounds its KL."""
        total, gold = self.sizes.best_of, []
        size = max(4096 // total, 1)
        for start in range(0, len(self.prompts), size):
            some = slice(start, start + size)
            out = generate(self.ctx.spec.config, self.params["model"], self.prompts[some], self.prompt_mask[some],
                           self.numbers[some], jax.random.key(7000), num_samples=total, max_new_tokens=NEW_TOKENS,
                           eos_ids=tuple(sorted(self.ctx.text.eos_ids)), pad_id=self.ctx.text.pad_id)
            gold.append(np.where(out.mask, self.worth[np.asarray(out.tokens)], 0).sum(-1))
        gold = np.concatenate(gold)
        counts = [int(n) for n in 2 ** np.arange(20) if n <= total // 2]
        return {"n": counts, "kl": [float(np.log(n) - (n - 1) / n) for n in counts],
                "gold": [np.round(best_of(gold, n), 4).tolist() for n in counts]}


def best_of(rewards: np.ndarray, n: int) -> np.ndarray:
    """[M]: the expected largest of n of the rewards [M, K] of each prompt, drawn without replacement."""
    ranked, total = np.sort(rewards, axis=1), rewards.shape[1]
    rank = np.arange(1, total + 1)
    # The largest has rank r with probability C(r - 1, n - 1) / C(total, n).
    log_choose = lambda a, b: np.where(a >= b, _log_factorial(a) - _log_factorial(b)
                                       - _log_factorial(np.maximum(a - b, 0)), -np.inf)
    return (ranked * np.exp(log_choose(rank - 1, n - 1) - log_choose(np.asarray(total), n))).sum(1)


def _log_factorial(n: Any) -> np.ndarray:
    from scipy import special

    return special.gammaln(np.asarray(n, float) + 1)


def furthest(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of every prompt the pair whose gold rewards differ most (the first of equals): a run sees few pairs, and the
    others tell it little."""
    best: dict[str, Mapping[str, Any]] = {}
    gap = lambda row: abs(row["scores"][0] - row["scores"][1])
    for row in rows:
        if row["prompt_id"] not in best or gap(row) > gap(best[row["prompt_id"]]):
            best[row["prompt_id"]] = row
    return list(best.values())


def members(entry: Entry, sizes: Sizes) -> list[tuple[float, float, int]]:
    """(strength, learning rate, seed) of every member of a population, seeds innermost."""
    values = entry.values[:sizes.strengths]
    return list(itertools.product(values, sizes.rates, range(sizes.seeds)))


def run(world: World, entry: Entry) -> dict[str, Any]:
    """Trains and measures the population of one loss; [settings, seeds, marks (with 0 updates first), ...] arrays.

    gold, kl: also [..., M] by prompts; length, entropy, chosen, rejected: means. diverged: members that stopped at a
    step that was not finite, whose later measurements are those of their last finite state.
    """
    sizes, spec, mesh = world.sizes, world.ctx.spec, world.mesh
    own = {} if entry.key == "learning_rate" else {entry.key: entry.values[0]}
    loss = losses.from_section(losses.section(entry.loss, **{**entry.fixed, **own}))
    drawn = [world.pairs(seed, entry.scale) for seed in range(sizes.seeds)]
    reference = [world.reference(records) for records, _ in drawn]
    probes = jax.tree.map(lambda *leaves: np.stack(leaves),
                          *(world.probe(records, ref) for (records, _), ref in zip(drawn, reference, strict=True)))
    several = members(entry, sizes)
    seeds = np.asarray([seed for _, _, seed in several], np.int32)
    batches = _batches(world, loss, drawn, reference)
    strength = np.asarray([value for value, _, _ in several], np.float32)
    rates = np.asarray([rate for _, rate, _ in several], np.float32)
    hyper = {"loss": {}, "optim": {"learning_rate": rates}}
    if entry.key == "learning_rate":
        hyper["optim"]["learning_rate"] = rates * strength
    else:
        hyper["loss"] = {entry.key: strength}
    section = configs.optim_section(warmup_steps=sizes.marks[0]).to_dict()
    copied = any(REQUESTS[name].references and name != "ref_logps" for name in loss.requests)

    def update(state, ref, batch, values, key, frozen):
        optimizer = optim.from_section(section, world.updates, values["optim"])
        return step.make_update(spec, loss, optimizer)(state, ref, batch, values["loss"], key, frozen)

    def initial(params, values):
        made = jax.vmap(lambda p, v: optim.from_section(section, world.updates, v).init(p))(params, values)
        spread = lambda leaf: jnp.broadcast_to(jnp.asarray(leaf), (len(several), *np.shape(leaf)))
        return step.TrainState(jnp.zeros(len(several), jnp.int32), params, made,
                               jax.tree.map(spread, loss.init_state()))

    params = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (len(several), *leaf.shape)), world.params)
    state = population.start(initial(params, hyper["optim"]), mesh=mesh)
    hyper = population.place(hyper, mesh)
    ref = population.place(world.params, mesh, axis=None) if copied else None
    steps = population.make_steps(update, own=("batch",), mesh=mesh)
    keys = jax.vmap(jax.random.key)(seeds)
    if world.start is None:  # the same for every loss: the probe's pairs have not moved yet
        world.start = world.measure(state.state.params, seeds, probes)
    each, at, curves = sizes.marks[0], 0, [world.start]
    for mark in sizes.marks:
        while at < mark:
            index = range(at, at + each)
            batch = jax.tree.map(lambda *leaves: np.stack(leaves)[:, seeds], *(batches[i] for i in index))
            folded = jnp.stack([jax.vmap(jax.random.fold_in, (0, None))(keys, i + 1) for i in index])
            state, _ = steps(state, ref, population.place(batch, mesh, axis=1), hyper,
                             population.place(folded, mesh, axis=1))
            at += each
        curves.append(world.measure(state.state.params, seeds, probes))
    shaped = lambda name: np.stack([c[name] for c in curves], 1).reshape(
        len(several) // sizes.seeds, sizes.seeds, len(curves), *curves[0][name].shape[1:])
    out = {name: shaped(name) for name in curves[0]}
    diverged = np.asarray(state.diverged).reshape(-1, sizes.seeds)
    return out | {"length": out["length"].mean(-1), "entropy": out["entropy"].mean(-1), "diverged": diverged}


def _batches(world: World, loss: losses.Loss, drawn: Sequence[tuple], reference: Sequence[np.ndarray]) -> list[Batch]:
    """The batch of every update, leaves [seeds, ...]."""
    mismatched = any(REQUESTS[name].stream == "mismatched" for name in loss.requests)
    only = loss.info.chosen_only
    every, planned = [], []
    for records, order in drawn:
        planned += [len(every) + index for index in order]
        every += [stage_data.first_only(r) for r in records] if only else records
    scores = np.concatenate(reference)
    shape = data.plan_shape(every, LAYOUT, MULTIPLE, batches=planned, mismatched=mismatched, columns=96)

    def one(index):
        some = [every[i] for i in index]
        extra = {"mismatched": data.mismatched(some)} if mismatched else {}
        batch = data.fill(some, shape, LAYOUT, pad_id=world.ctx.text.pad_id, extra=extra)
        return dataclasses.replace(batch, data={**batch.data, "ref_logps": scores[index][:, :shape.K]})

    made, count = [one(index) for index in planned], world.updates
    return [jax.tree.map(lambda *leaves: np.stack(leaves), *made[i::count]) for i in range(count)]


def stored(found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What a line of the results holds: numbers to four digits after the point (rewards are whole)."""
    return {name: (value.astype(int) if name in ("gold", "diverged") else np.round(value.astype(float), 4)).tolist()
            for name, value in found.items()}


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """(result, the `seconds` that it took and those of all cores, `cpu_seconds`, which other jobs touch less)."""
    began = time.monotonic(), time.process_time()
    out = call()
    return out, {"seconds": round(time.monotonic() - began[0], 1),
                 "cpu_seconds": round(time.process_time() - began[1], 1)}
