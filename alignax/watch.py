"""Live diagnostics of a train stage: its probe, the compiled functions that look at it, and when they run.

What each number is stands in alignax.diagnostics; the step is left as it is, and a stage that watches nothing makes
none of this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignax import data, distributed, models, optim, sample, sharding, step
from alignax.diagnostics import agreement, attribution, ches, entanglement, lens, live, noise, profile, squeezing
from alignax.ops.reductions import reduce_terms
from alignax.stage_setup import Setup
from alignax.types import REQUESTS, Batch, DataError

_SALT = 7000  # of the draws of unseen completions, apart from those of the sample stages


@dataclasses.dataclass(frozen=True)
class Probe:
    """texts: chosen, rejected, unseen and greedy completions of PROMPTS prompts, [n,4,...]; few: of the first PAIRS of
    them; pairs: what the loss sees of PAIRS records, padded."""

    texts: Batch
    few: Batch
    pairs: Batch


def make_probe(setup: Setup) -> Probe:
    """The probe of a stage, the same at every start: of its first records with two completions and other prompts.

    Unseen completions are those that the sample stage kept out of its pairs, else samples of the starting parameters,
    drawn from the run's seed. Raises DataError where no record has two completions.
    """
    ctx = setup.ctx
    seen: dict[bytes, int] = {}
    for index, record in enumerate(setup.train):
        if len(record.completions) >= 2 and len(seen) < live.PROMPTS:
            seen.setdefault(record.prompt.tobytes(), index)
    ways = sharding.batch_ways(ctx.mesh)
    index = list(seen.values())[:len(seen) // ways * ways]
    if not index:
        raise DataError(f"config.{setup.name}.diagnostics: {len(seen)} prompts have two completions; allowed: at least "
                        f"as many as devices along data and fsdp, {ways}")
    records = [setup.train[i] for i in index]
    unseen = _kept_out(setup)
    prompts = [(r.id, r.prompt) for r in records]
    room = min(ctx.spec.config.max_positions - max(len(r.prompt) for r in records), max(r.longest for r in records))
    draw = lambda temperature: [row[0] for row in sample.draw(
        ctx, f"{setup.name}: probe", setup.start, prompts, num_samples=1, max_new_tokens=room, temperature=temperature,
        top_p=1.0, batch_size=len(prompts), salt=_SALT)[0].tokens]
    if not all(r.id in unseen for r in records):
        unseen = dict(zip([r.id for r in records], draw(1.0), strict=True))
    greedy = draw(0.0)
    texts = [extended(r, (unseen[r.id], g), ctx.text) for r, g in zip(records, greedy, strict=True)]
    columns, slots = data.bucket_shape(texts, setup.section["bucket_multiple"])
    lay = lambda some: sharding.shard_batch(data.padded(some, K=4, T=columns, L=slots, pad_id=ctx.text.pad_id),
                                            ctx.mesh)
    few = ways * -(-min(live.PAIRS, len(index)) // ways)
    padded = dataclasses.replace(setup.laid, layout="padded", shape=None, groups=1, other_shapes={})
    return Probe(lay(texts), lay(texts[:few]), padded.make(*setup.rows(index[:few])))


def _kept_out(setup: Setup) -> dict[str, np.ndarray]:
    """record id -> a completion that the stage's pairs leave out, where a sample stage made them."""
    path = setup.section["data"]["path"]
    return sample.read_unseen(setup.ctx.stage_dir(path[len("stage:"):])) if path.startswith("stage:") else {}


def extended(record: data.TokenRecord, more, text: data.TextPolicy) -> data.TokenRecord:
    """The record's first two completions and further ones, all of whose tokens are scored."""
    scored = record.scored and (*record.scored[:2], *(np.ones(len(c), bool) for c in more))
    return dataclasses.replace(
        record, completions=(*record.completions[:2], *more), scores=None, labels=None, scored=scored, columns={},
        completion_ended=(*record.completion_ended[:2], *(text.ended(c) for c in more)))


class Watch:
    """Looks at the policy every so many updates.

    every: the interval, the stage's `diagnose_every` or by cost. ref: the reference of the update, None where it runs
    none; changes are then told from a copy of the starting parameters.
    """

    def __init__(self, setup: Setup, optimizer: optax.GradientTransformation, ref: Any):
        self.setup, self.optimizer, self.ref = setup, optimizer, ref
        self.names = tuple(setup.section["diagnostics"])
        self.spec = dataclasses.replace(setup.spec, activations=None)
        self.before = ref if ref is not None else setup.ctx.place({"model": setup.start["model"]})
        self.probe = make_probe(setup)
        self.share = 0.0
        self.every = setup.section["diagnose_every"] or self._interval()
        self._texts = jax.jit(self._of_texts)
        self._pairs = jax.jit(self._of_pairs)
        self._step = jax.jit(self._of_update)

    def _interval(self) -> int:
        cells = lambda batch: sum(s.tokens.size for s in batch.streams.values())
        size = self.setup.section["batch_size"]
        batch = cells(self.probe.pairs) / self.probe.pairs.ids.shape[0] * size
        look = live.cost(self.names, probe=cells(self.probe.texts), pairs=cells(self.probe.pairs), batch=batch,
                         layers=self.spec.config.num_layers)
        return live.interval(look, batch * (3 + self.setup.has_reference))

    def describe(self) -> str:
        """One line for the console."""
        told = "chosen by cost" if not self.setup.section["diagnose_every"] else "as configured"
        return f"{self.setup.name}: diagnostics {', '.join(self.names)} every {self.every} updates ({told})"

    def due(self, number: int) -> bool:
        """Whether to look at update `number`, from 1; the last one is always looked at."""
        return number % self.every == 0 or number == self.setup.total

    def before_update(self, state: step.TrainState, batch: Batch, hyper, key) -> Any:
        """What update `number` is about to do, from the state and the batch that it will get; None unless asked."""
        if "attribution" not in self.names:
            return None
        return self._step(state, self.setup.frozen, self.ref, batch, hyper, key, self.probe.few)

    def look(self, state: step.TrainState, hyper, key, told: Any = None) -> dict[str, float]:
        """The row of the parameters as they are; told: of before_update, for the update that led to them."""
        params, out = self.setup.frozen | state.params, {}
        if set(self.names) - {"attribution", *live.GRADIENTS}:
            out |= self._texts(params, self.before, self.probe.texts)
        if set(self.names) & set(live.GRADIENTS):
            out |= self._pairs(state, self.setup.frozen, self.ref, self.probe.pairs, hyper, key)
        out = {name: float(value) for name, value in distributed.to_host(out).items()}
        return out if told is None else out | _attributed(*distributed.to_host(told))

    # --- what is compiled ---------------------------------------------------------------------------------------------

    def _of_texts(self, params, before, batch: Batch) -> dict[str, jax.Array]:
        wanted = {"logps", "ref_logps", "lengths", "ref_policy_kl", "entropy", "mask", "hidden", "targets"}
        found = step.compute(self.spec, params, before, batch, wanted)
        pair = {name: found[name][:, :2] for name in ("logps", "ref_logps", "lengths", "mask", "hidden")}
        out: dict[str, dict[str, jax.Array]] = {}
        change = found["logps"] - found["ref_logps"]
        if "displacement" in self.names:
            out["displacement"] = {side: change[:, k].mean() for k, side in enumerate(live.SIDES)} | {
                f"logp_{side}": found["logps"][:, k].mean() for k, side in enumerate(live.SIDES)} | {
                "baseline": -found["ref_policy_kl"][:, 2].sum(-1).mean(), "displaced": (change[:, 0] < 0).mean(),
                "margin": (change[:, 0] - change[:, 1]).mean()}
        if "agreement" in self.names:
            out["agreement"] = agreement.numbers(pair["logps"], pair["ref_logps"], pair["lengths"],
                                                 self.setup.loss.hyper.get("beta"))
        if "profile" in self.names:
            drawn = found["mask"][:, 2]  # of the reference, where the KL's expectation is over its own prefixes
            out["profile"] = {f"{name}_{part}": value for name, request in (("kl", "ref_policy_kl"),
                                                                            ("entropy", "entropy"))
                              for part, value in profile.thirds(found[request][:, 2], drawn).items()}
        if "ches" in self.names:
            score, normalised = ches.ches(pair["hidden"], pair["mask"])
            out["ches"] = {"mean": score.mean(), "max": score.max(), "normalised": normalised.mean(),
                           "correlation_with_change": agreement.correlation(normalised, change[:, 0])}
        if "squeezing" in self.names:
            states = found["hidden"], step.compute(self.spec, before, None, batch, {"hidden"})["hidden"]
            out["squeezing"] = self._squeezed(params, before, states, found["targets"], found["mask"]) | {
                "greedy_probability": jnp.exp(found["logps"][:, 3]).mean(),
                "greedy_at_start": jnp.exp(found["ref_logps"][:, 3]).mean()}
        if "lens" in self.names:
            out["lens"] = self._lens(params, batch)
        return {f"{group}/{name}": value for group, values in out.items() for name, value in values.items()}

    def _model(self, params) -> Any:
        """The decoder's parameters, adapters merged."""
        if "adapters" not in params:
            return params["model"]
        return models.merge(params["model"], params["adapters"], self.spec.adapters)

    def _squeezed(self, params, before, states, targets, mask) -> dict[str, jax.Array]:
        """Of the rejected completions' slots, prompt after prompt, so that one prompt's logits are alive at once."""
        def log_pi(tree, hidden):
            found = models.logits(self.spec.config, self._model(tree), hidden)
            return jax.nn.log_softmax(found / self.spec.temperature)

        def one(item):
            now, then, target = item
            return squeezing.moved(log_pi(before, then), log_pi(params, now), target)

        found = jax.lax.map(one, (states[0][:, 1], states[1][:, 1], targets[:, 1]))
        return squeezing.numbers(found, mask[:, 1])

    def _lens(self, params, batch: Batch) -> dict[str, jax.Array]:
        stream = batch.streams["pair"]
        slot, found = profile.first_divergence(stream.targets[:, :2], stream.mask[:, :2])
        pick = lambda array: jnp.take_along_axis(array, slot[:, None], -1)[:, 0]
        row, col = pick(stream.row[:, 0]), pick(stream.col[:, 0])
        logp = lens.by_layer(self.spec.config, self._model(params), stream,
                             lambda hidden: step.gather_at(hidden, stream, row, col))
        at = lambda k: jnp.take_along_axis(logp, pick(stream.targets[:, k])[None, :, None], -1)[..., 0]
        mean = lambda values: jnp.where(found, values, 0).sum(-1) / jnp.maximum(found.sum(), 1)
        gap, top = mean(at(0) - at(1)), mean(jnp.exp(at(0)))
        return {f"{name}_{layer + 1}": values[layer] for name, values in (("gap", gap), ("chosen", top))
                for layer in range(self.spec.config.num_layers)}

    def _of_pairs(self, state, frozen, ref, batch: Batch, hyper, key) -> dict[str, jax.Array]:
        count = batch.ids.shape[0]
        parts = step.split_batch(batch, count)
        inputs, cotangent = self._cotangents(state, frozen, ref, parts, hyper, key)
        out: dict[str, jax.Array] = {}
        if "entanglement" in self.names:
            logps = lambda p, part: step.compute(self.spec, frozen | p, None, part, {"logps"})["logps"]
            each, mean = entanglement.per_example(logps, state.params, parts)
            pull = push = jnp.ones(count)
            if set(cotangent) == {"logps"}:
                pull, push = -count * cotangent["logps"][:, 0], count * cotangent["logps"][:, 1]
                out |= {"entanglement/pull": pull.mean(), "entanglement/push": push.mean()}
                for side, k, slope in (("chosen", 0, pull), ("rejected", 1, push)):
                    size = jnp.log(jnp.maximum(jnp.abs(slope), jnp.finfo(slope.dtype).tiny)) - inputs["logps"][:, k]
                    out[f"entanglement/log10_slope_{side}"] = size.mean() / np.log(10)
            out |= {f"entanglement/{n}": v for n, v in entanglement.numbers(each, mean, pull, push).items()}
        if "noise" in self.names:
            def gradient(item):
                part, g = item
                _, pull = jax.vjp(lambda p: step.compute(self.spec, frozen | p, ref, part, set(g)), state.params)
                return jax.tree.map(lambda leaf: count * leaf, pull(g)[0])

            cut = jax.tree.map(lambda a: a[:, None], cotangent)
            out |= {f"noise/{n}": v for n, v in noise.numbers(*noise.per_example(gradient, state.params,
                                                                                 (parts, cut))).items()}
        return out

    def _cotangents(self, state, frozen, ref, parts, hyper, key) -> tuple[dict, dict]:
        """(the loss's inputs over all micro-batches, its derivatives by those that carry gradients)."""
        loss = self.setup.loss
        wanted = {*loss.requests, "lengths"}
        outside = {n: {"key": key, "state": state.loss_state}[REQUESTS[n].provider] for n in wanted
                   if REQUESTS[n].provider in ("key", "state")}
        carried = wanted - outside.keys()
        _, stacked = jax.lax.scan(
            lambda _, part: (None, step.compute(self.spec, frozen | state.params, ref, part, carried)), None, parts)
        inputs = jax.tree.map(lambda a: a.reshape((-1,) + a.shape[2:]), stacked) | outside
        active = {n: inputs[n] for n in wanted if REQUESTS[n].grad}

        def value(active):
            held = inputs | active
            return reduce_terms(loss({n: held[n] for n in loss.requests}, **hyper))[0]

        return inputs, jax.grad(value)(active)

    def _of_update(self, state, frozen, ref, batch: Batch, hyper, key, probe: Batch) -> tuple[dict, jax.Array]:
        """(part -> predicted changes [n,4], measured changes) of the update on this batch."""
        section = self.setup.section
        parts = step.split_batch(batch, section["accumulation"], self.setup.spec.activations)
        _, cotangent = self._cotangents(state, frozen, ref, parts, hyper, key)
        paired = {n: REQUESTS[n].stream == "pair" and REQUESTS[n].axes.startswith("BK") for n in cotangent}
        sides = attribution.side_cotangents(cotangent, paired)
        cuts = jax.tree.map(lambda a: a.reshape((section["accumulation"], -1) + a.shape[1:]), sides)

        def add(total, part_and_cut):
            part, cut = part_and_cut
            _, pull = jax.vjp(lambda p: step.compute(self.spec, frozen | p, ref, part, set(cotangent)), state.params)
            return {side: jax.tree.map(lambda t, g: t + g.astype(t.dtype), total[side], pull(cut[side])[0])
                    for side in total}, None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(jnp.float32, p.dtype)), state.params)
        grads, _ = jax.lax.scan(add, {side: zeros for side in sides}, (parts, cuts))
        whole = jax.tree.map(lambda *g: sum(g), *grads.values())
        update, after = self.optimizer.update(jax.tree.map(lambda g, p: g.astype(p.dtype), whole, state.params),
                                              state.opt_state, state.params)
        given = section["optim"]
        clip = attribution.clip_factor(optax.tree.norm(whole), given["clip_norm"])
        clipped = {side: jax.tree.map(lambda g: clip * g, tree) for side, tree in grads.items()}
        rate = optim.schedule(given["schedule"], given["learning_rate"], self.setup.total,
                              given["warmup_steps"])(state.step)
        shares = attribution.split_update(given["name"], given["options"], rate, state.opt_state, after, clipped,
                                          state.params)
        # Kernels of attention have a backward pass and no forward mode.
        plain = dataclasses.replace(self.spec, attention="xla")
        logps = lambda p: step.compute(plain, frozen | p, None, probe, {"logps"})["logps"]
        return attribution.changes(logps, state.params, shares, update)


def _attributed(predicted: Mapping[str, np.ndarray], measured: np.ndarray) -> dict[str, float]:
    """Scalars for a log: means over the probe, and how well the sum of the parts predicts the measured change."""
    total = sum(predicted.values())
    out = {f"{side}_from_{part}": float(value[:, k].mean()) for part, value in predicted.items()
           for k, side in enumerate(live.SIDES)}
    for k, side in enumerate(live.SIDES):
        out |= {f"predicted_{side}": float(total[:, k].mean()), f"measured_{side}": float(measured[:, k].mean())}
    if np.isfinite(fit := attribution.r_squared(total, measured)):
        out["r_squared"] = fit
    return {f"attribution/{name}": value for name, value in out.items()}
