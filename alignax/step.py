"""The jitted update: requests in, exact gradients out.

The loss's positional names decide what is computed. With accumulation the gradient stays exact for every loss,
also for one that couples the whole batch, by two passes: all log-probs without gradient; the cotangent of the loss
on the global [B,K] or [B,K,L] arrays; vector-Jacobian products with it, summed over micro-batches. The second pass
recomputes the forward; the gain is that a micro-batched step equals the full one for any loss.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from alignax.losses import Loss
from alignax.models import DecoderConfig, forward, head, last_token_positions, scalar_head, token_heads
from alignax.models.adapters import AdapterConfig, scaled
from alignax.ops.head import head_stats
from alignax.ops.reductions import reduce_terms
from alignax.optim import MasterState
from alignax.types import REQUESTS, Batch, DataError, Stream

_HEAD_STATS = {"logps": "logp", "token_logps": "logp", "entropy": "entropy", "log_sum_sq": "log_sum_sq"}
_PAIR_STATS = {"ref_policy_kl": "kl_other_policy", "policy_ref_kl": "kl_policy_other"}
_SUMS = ("logps", "ref_logps", "kl_logps", "kl_ref_logps", "aux_prompt_logps", "aux_prompt_ref_logps",
         "reference_sample_logps")
# Where the batch holds them, they are not computed.
_RECORDED = ("old_token_logps", "prompt_embedding", "activation_mask", "prompt_values")
_FROM_SCORES = ("token_rewards", "segment_scores", "advantages")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What a forward pass needs besides parameters: the decoder's shape, remat policy, logits' byte budget on a device,
    the temperature that divides the logits of policy and reference alike, the layers per turn of the layer loop, the
    adapters' settings where the parameters hold `adapters`, on several devices how rows and columns of activations are
    cut (sharding.over_activations), and which of models.ATTENTION reads whole rows."""

    config: DecoderConfig
    remat: str = "none"
    byte_budget: int = 64_000_000
    temperature: float = 1.0
    unroll: int = 1
    adapters: AdapterConfig | None = None
    activations: jax.sharding.NamedSharding | None = None
    attention: str = "xla"


class TrainState(NamedTuple):
    """Everything an update changes. params: {"model": decoder} or, with LoRA, {"adapters": ...}; beside either
    the heads that the loss asks for (models.init_heads)."""

    step: jax.Array
    params: Any
    opt_state: Any
    loss_state: Any


def gather_slots(hidden: jax.Array, stream: Stream) -> jax.Array:
    """hidden [R,T,D] -> [B,K,L,D]: the hidden state that predicts each slot, gathered inside each row group."""
    return gather_at(hidden, stream, stream.row, stream.col)


def gather_at(hidden: jax.Array, stream: Stream, row: jax.Array, col: jax.Array) -> jax.Array:
    """hidden [R,T,D] at (row, col) [B,...], rows counted inside the group of the prompt -> [B,...,D]."""
    groups, (rows, columns, width) = stream.groups, hidden.shape
    grouped = hidden.reshape(groups, rows // groups, columns, width)
    index = (groups, row.shape[0] // groups) + row.shape[1:]
    out = jax.vmap(lambda h, r, c: h[r, c])(grouped, row.reshape(index), col.reshape(index))
    return out.reshape(row.shape + (width,))


def _slots(spec: ModelSpec, params, stream: Stream) -> tuple[jax.Array, jax.Array]:
    hidden = forward(spec.config, params["model"], stream.tokens, stream.segment, stream.prefix, stream.position,
                     adapters=params.get("adapters"), remat=spec.remat, unroll=spec.unroll,
                     sharding=_cut(spec, stream.tokens), attention=spec.attention)
    if spec.activations and len(spec.activations.spec) > 1:
        # A slot may stand in any column: rows come together once, and their slots are cut anew.
        rows = jax.sharding.PartitionSpec(_cut(spec, stream.tokens).spec[0])
        hidden = jax.lax.with_sharding_constraint(hidden, jax.sharding.NamedSharding(spec.activations.mesh, rows))
    slots = gather_slots(hidden, stream)
    cut = _cut(spec, slots, columns=2)
    return hidden, slots if cut is None else jax.lax.with_sharding_constraint(slots, cut)


def _cut(spec: ModelSpec, array: jax.Array, columns: int = 1) -> jax.sharding.NamedSharding | None:
    """How spec.activations cuts an array whose axis `columns` is T or L; None where it does not.

    Rows stay whole where they do not divide: a micro-batch may be smaller than the devices. So do the slots of a
    completion; the columns of a row have to divide, or forward says so.
    """
    if spec.activations is None:
        return None
    mesh, (rows, *sequence) = spec.activations.mesh, spec.activations.spec
    out = [rows if array.shape[0] % _ways(spec.activations) == 0 else None]
    if sequence and (columns == 1 or array.shape[columns] % mesh.shape[sequence[0]] == 0):
        out += [None] * (columns - 1) + sequence
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*out)) if any(out) else None


def _statistics(spec: ModelSpec, slots: jax.Array, weights, targets: jax.Array, want, other=None) -> dict:
    """ops.head_stats with the settings of `spec`; where the batch is cut, every device works on its own slots.

    Inside the shard_map the chunks' loop sees the head's weight whole along D (gathered once, before the loop) and sums
    its gradient on the device (added up once, after the loop); left to the partitioner, both would happen at every
    chunk. A vocabulary that is cut over `tensor` stays cut: that axis is the partitioner's.
    """
    settings = dict(want=want, temperature=spec.temperature, byte_budget=spec.byte_budget)
    cut = _cut(spec, slots, columns=2)
    if cut is None:
        return head_stats(slots, weights, targets, other=other, **settings)
    over, whole = cut.spec, jax.sharding.PartitionSpec()
    axes = {axis for entry in spec.activations.spec for axis in ((entry,) if isinstance(entry, str) else entry)}
    settings["byte_budget"] *= math.prod(size for axis, size in cut.mesh.shape.items() if axis not in axes)

    def gathered(one):
        """Whole along D before it is widened: half the bytes of a bfloat16 weight travel, and its gradient, which
        leaves the shard_map, is summed over the devices in float32."""
        rows = jax.sharding.PartitionSpec(jax.sharding.PartitionSpec.UNCONSTRAINED, None)
        weight = jax.lax.with_sharding_constraint(one.weight, jax.sharding.NamedSharding(cut.mesh, rows))
        return dataclasses.replace(one, weight=weight.astype(jnp.promote_types(jnp.float32, weight.dtype)))

    dtypes = [weights.weight.dtype, None if other is None else other[1].weight.dtype]
    narrowed = lambda one, dtype: dataclasses.replace(one, weight=one.weight.astype(dtype))  # what it was, to the bit
    weights, other = gathered(weights), None if other is None else (other[0], gathered(other[1]))

    def local(slots, weights, targets, *other):
        other = (other[0], narrowed(other[1], dtypes[1])) if other else None
        return head_stats(slots, narrowed(weights, dtypes[0]), targets, other=other, **settings)

    # The chunks' carries begin as constants, which the check of varying values would refuse.
    run = jax.shard_map(local, mesh=cut.mesh, in_specs=(over, whole, over, over, whole)[:3 if other is None else 5],
                        out_specs=over, axis_names=axes, check_vma=False)
    return run(slots, weights, targets, *(other or ()))


def compute(spec: ModelSpec, params, ref_params, batch: Batch, wanted: Iterable[str], *, key=None,
            state=None) -> dict[str, Any]:
    """Computes the requests `wanted` (names of types.REQUESTS), sharing passes, and nothing else.

    params, ref_params: parameter trees ({"model": ...}, and "adapters" in what a LoRA policy adds to it); ref_params is
    None where the rule has no reference copy, and `ref_logps` then comes from batch.data. Log-probs outside the mask
    are 0. Returns name -> array.
    Raises KeyError when a request has neither a reference copy nor data (reference.check refuses that earlier), and
    DataError when the batch lacks the stream or the array that a request is about.
    """
    wanted = set(wanted)
    out: dict[str, Any] = {}
    if "adapters" in params:
        params = {**params, "adapters": scaled(params["adapters"], spec.adapters)}
    every = params
    for stream_name in sorted({REQUESTS[n].stream for n in wanted}):
        names = {n for n in wanted if REQUESTS[n].stream == stream_name}
        # A stream without a gradient keeps nothing for a backward pass.
        params = every if any(REQUESTS[n].grad for n in names) else jax.lax.stop_gradient(every)
        policy = {n for n in names if REQUESTS[n].provider == "policy"} | (names & _PAIR_STATS.keys())
        reference = {n for n in names if REQUESTS[n].provider == "reference"}
        if ref_params is None:
            for name in sorted(reference & batch.data.keys()):
                out[name] = batch.data[name]
            reference -= batch.data.keys()
            if reference:
                raise KeyError(f"no reference to compute {sorted(reference)} from")
        heads = {n for n in names if REQUESTS[n].provider == "head"}
        for name in sorted((reference | heads) & batch.data.keys() & set(_RECORDED)):
            out[name] = batch.data[name]
            reference.discard(name)
            heads.discard(name)
        beside = heads & set(token_heads.ON_REFERENCE)
        heads -= beside
        if not (policy or reference or heads or beside):
            continue
        if stream_name not in batch.streams:
            raise DataError(f"{', '.join(sorted(names))}: the batch has no stream {stream_name!r}; found: "
                            f"{', '.join(sorted(batch.streams))}")
        stream = batch.streams[stream_name]
        mask = stream.mask
        ref = None
        if reference or beside:
            if ref_params is None:
                raise KeyError(f"no reference to compute {sorted(reference | beside)} from")
            ref_hidden, ref_slots = jax.lax.stop_gradient(_slots(spec, ref_params, stream))
            ref = ref_slots, jax.lax.stop_gradient(head(spec.config, ref_params["model"]))
            if "prompt_embedding" in reference:
                out["prompt_embedding"] = prompt_means(ref_hidden, stream, batch.data["prompt_lengths"])
            if "activation_mask" in reference:
                out["activation_mask"] = token_heads.activation_mask(*ref, mask)
            out |= token_heads.reference_heads(beside, params, ref_slots, mask)
        if policy or heads:
            hidden, slots = _slots(spec, params, stream)
        if heads & {"rewards", "degree_logits"}:
            last = gather_at(hidden, stream, *last_token_positions(stream))
            if "rewards" in heads:
                exists = stream.valid & mask.any(-1)  # of others, no place in the rows is their own
                out["rewards"] = jnp.where(exists, scalar_head(params["reward_head"], last), 0.0)
            if "degree_logits" in heads:
                out["degree_logits"] = jax.vmap(scalar_head, (0, None), -1)(params["degree_head"], last)
        if heads:
            # Values are no log-probs: the temperature of the policy is not theirs.
            statistics = functools.partial(_statistics, dataclasses.replace(spec, temperature=1.0))
            out |= token_heads.policy_heads(heads, params, slots, stream.targets, mask, statistics)
        if "hidden" in policy:
            out["hidden"] = jnp.where(mask[..., None], slots, 0).astype(jnp.promote_types(jnp.float32, slots.dtype))
            policy -= {"hidden"}
        if policy:
            needed = {_stat(n): None for n in sorted(policy)}
            stats = _statistics(spec, slots, head(spec.config, params["model"]), stream.targets, tuple(needed),
                                ref if policy & _PAIR_STATS.keys() else None)
            for name in policy - {"candidate_logps"}:
                out[name] = _masked(name, stats[_stat(name)], mask)
            if "candidate_logps" in policy:
                out["candidate_logps"] = candidate_logps(slots, head(spec.config, params["model"]), stream.targets,
                                                         stats["logp"], mask, spec.temperature)
        plain = reference - _PAIR_STATS.keys() - {"prompt_embedding", "activation_mask"}
        if plain:
            stats = _statistics(spec, *ref, stream.targets, ("logp",))
            for name in plain:
                out[name] = _masked(name, stats["logp"], mask)
    stream = batch.streams["pair"]
    for name in wanted - out.keys():
        provider = REQUESTS[name].provider
        if name == "lengths":
            out[name] = stream.mask.sum(-1).astype(jnp.float32)
        elif name == "mask":
            out[name] = stream.mask
        elif name == "valid":
            out[name] = stream.valid
        elif name == "targets":
            out[name] = stream.targets
        elif name == "ids":
            out[name] = batch.ids
        elif name == "diff" and name not in batch.data:
            out[name] = edited(stream)
        elif name not in batch.data and (name == "steps" or (name in _FROM_SCORES and "scores" in batch.data)):
            out[name] = told(name, stream, batch.data)
        elif name == "annotator" and name not in batch.data:
            out[name] = jnp.zeros(stream.row.shape[0], jnp.int32)
        elif provider == "data":
            if name not in batch.data:
                raise DataError(f"the loss asks for {name!r} ({REQUESTS[name].about}), which the records lack; found: "
                                f"{', '.join(sorted(batch.data))}")
            out[name] = batch.data[name]
        elif provider == "key":
            out[name] = key
        elif provider == "state":
            out[name] = state
    return out


def prompt_means(hidden: jax.Array, stream: Stream, lengths: jax.Array) -> jax.Array:
    """hidden [R,T,D] -> [B,D] in float32 or wider: the mean over the prompt's tokens, 0 where it has none.

    lengths: int [B], the prompts' tokens: in every layout the columns that end where slot 0 is predicted.
    """
    row, col = stream.row[:, 0, 0], stream.col[:, 0, 0]
    groups, columns = stream.groups, jnp.arange(hidden.shape[1])[None]
    wide = hidden.astype(jnp.promote_types(jnp.float32, hidden.dtype))
    grouped = wide.reshape((groups, wide.shape[0] // groups) + wide.shape[1:])
    rows = jax.vmap(lambda one, r: one[r])(grouped, row.reshape(groups, -1)).reshape(row.shape + wide.shape[1:])
    inside = (columns <= col[:, None]) & (columns > (col - lengths)[:, None])
    return jnp.where(inside[..., None], rows, 0).sum(1) / jnp.maximum(lengths, 1)[:, None]


def candidate_logps(slots: jax.Array, head, targets: jax.Array, logps: jax.Array, mask: jax.Array,
                    temperature: float) -> jax.Array:
    """[B,K,L,L]: at slot t, the log-prob of token j of the same completion; 0 outside the mask.

    slots [B,K,L,D]; head: ops.head.Head; targets int, logps (of the targets) and mask [B,K,L]. The normaliser is
    taken from logps, so that the vocabulary is not visited again.
    """
    wide = jnp.promote_types(jnp.float32, jnp.promote_types(slots.dtype, head.weight.dtype))
    logits = jnp.einsum("bktd,bkjd->bktj", slots.astype(wide), head.weight[targets].astype(wide), precision="highest")
    if head.bias is not None:
        logits = logits + head.bias[targets].astype(wide)[:, :, None]
    if head.softcap is not None:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    logits = logits / temperature
    normaliser = jnp.diagonal(logits, axis1=2, axis2=3) - logps
    return jnp.where(mask[..., :, None] & mask[..., None, :], logits - normaliser[..., None], 0.0)


def edited(stream: Stream) -> jax.Array:
    """bool [B,2,L]: the scored tokens of a pair between what both completions begin and end with.

    A stretch that both could share counts for the beginning. Raises DataError where a prompt has not two completions.
    """
    targets, mask = stream.targets, stream.mask
    if targets.shape[1] != 2:
        raise DataError(f"diff: the batch has {targets.shape[1]} completions of a prompt; what was edited is told of 2")
    count = mask.sum(-1)
    # Scored tokens side by side, so that slots that are not scored do not shift the comparison.
    order = jnp.argsort(~mask, axis=-1)
    packed = jnp.take_along_axis(targets, order, -1)
    place = jnp.arange(targets.shape[-1])[None]
    both = count.min(-1, keepdims=True)
    same = lambda a, b: (jnp.cumprod((a == b) & (place < both), -1)).sum(-1)
    begin = same(packed[:, 0], packed[:, 1])
    back = jnp.maximum(count[..., None] - 1 - place[None], 0)
    backward = jnp.take_along_axis(packed, back, -1)
    end = jnp.minimum(same(backward[:, 0], backward[:, 1]), both[:, 0] - begin)
    rank = jnp.cumsum(mask, -1) - 1
    return mask & (rank >= begin[:, None, None]) & (rank < (count - end[:, None])[..., None])


def told(name: str, stream: Stream, given: Mapping[str, Any]) -> jax.Array:
    """[B,K,L]: what a batch without the column `name` says of its tokens: `steps`, or what comes from scores.

    steps: the runs of scored tokens (the agent's turns) numbered from 0, -1 between them. token_rewards: the score at
    the last scored token, else 0. segment_scores: the score at every scored token. advantages: the score less the mean
    of the prompt's completions, at every scored token.
    """
    mask = stream.mask
    count = jnp.cumsum(mask, -1)
    if name == "steps":
        opens = mask & ~jnp.pad(mask, ((0, 0), (0, 0), (1, 0)))[..., :-1]
        return jnp.where(mask, jnp.cumsum(opens, -1) - 1, -1).astype(jnp.int32)
    scores = jnp.where(stream.valid, given["scores"], 0)
    if name == "advantages":
        scores = scores - scores.sum(-1, keepdims=True) / jnp.maximum(stream.valid.sum(-1, keepdims=True), 1)
    where = mask & (count == count[..., -1:]) if name == "token_rewards" else mask
    return jnp.where(where, scores[..., None], 0)


def _stat(name: str) -> str:
    return _HEAD_STATS.get(name) or _PAIR_STATS.get(name) or "logp"


def _masked(name: str, values: jax.Array, mask: jax.Array) -> jax.Array:
    values = jnp.where(mask, values, 0.0)
    return values.sum(-1) if name in _SUMS else values


def split_batch(batch: Batch, parts: int, cut_over: jax.sharding.NamedSharding | None = None) -> Batch:
    """[B, ...] -> [parts, B/parts, ...] on every leaf, so that `lax.scan` sees micro-batches.

    cut_over: how the leading axis lies on the devices. Each part then takes its share of every device, so that nothing
    moves; where B does not divide that far, and on one device, parts are consecutive.
    """
    ways = 1 if cut_over is None else _ways(cut_over)
    ways = ways if batch.ids.shape[0] % (ways * parts) == 0 else 1

    def cut(leaf):
        if ways == 1:
            return leaf.reshape((parts, leaf.shape[0] // parts) + leaf.shape[1:])
        apart = leaf.reshape((ways, parts, leaf.shape[0] // (ways * parts)) + leaf.shape[1:])
        out = jnp.swapaxes(apart, 0, 1).reshape((parts, leaf.shape[0] // parts) + leaf.shape[1:])
        spec = jax.sharding.PartitionSpec(None, cut_over.spec[0])
        return jax.lax.with_sharding_constraint(out, jax.sharding.NamedSharding(cut_over.mesh, spec))

    streams = {name: dataclasses.replace(jax.tree.map(cut, s), groups=s.groups // parts)
               for name, s in batch.streams.items()}
    return Batch(streams=streams, data=jax.tree.map(cut, dict(batch.data)), ids=cut(batch.ids))


def _ways(cut_over: jax.sharding.NamedSharding) -> int:
    """Pieces that the leading axis is cut into."""
    axes = cut_over.spec[0]
    return math.prod(cut_over.mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes))


def preference_metrics(inputs: Mapping[str, Any]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """(sum, count) metrics of any batch whose log-probs were computed; those of a pair where K >= 2.

    Log-probs in nats per sequence; `margin` is the difference of log-ratios (of log-probs without a reference),
    `accuracy` the share of pairs whose margin is above 0, ties counted half.
    """
    out: dict[str, tuple[jax.Array, jax.Array]] = {}
    if "rewards" in inputs and inputs["rewards"].shape[1] >= 2:
        margin = inputs["rewards"][:, 0] - inputs["rewards"][:, 1]
        _pair(out, margin)
    logps = inputs.get("logps")
    if logps is None and "token_logps" in inputs:
        logps = inputs["token_logps"].sum(-1)
    if logps is None:
        return out
    ref = inputs.get("ref_logps")
    if ref is None and "ref_token_logps" in inputs:
        ref = inputs["ref_token_logps"].sum(-1)
    count = jnp.float32(logps.shape[0])
    sides = ("chosen", "rejected") if logps.shape[1] >= 2 else ("completion",)
    for index, side in enumerate(sides):
        out[f"logp_{side}"] = (logps[:, index].sum(), count)
        out[f"length_{side}"] = (inputs["lengths"][:, index].sum(), count)
        if ref is not None:
            out[f"ref_logp_{side}"] = (ref[:, index].sum(), count)
            out[f"change_{side}"] = ((logps - ref)[:, index].sum(), count)
    if len(sides) == 2:
        ratio = logps if ref is None else logps - ref
        _pair(out, ratio[:, 0] - ratio[:, 1])
    return jax.lax.stop_gradient(out)


def _pair(out, margin):
    count = jnp.float32(margin.shape[0])
    out["margin"] = (margin.sum(), count)
    out["accuracy"] = (((margin > 0) + 0.5 * (margin == 0)).sum(), count)


def make_update(spec: ModelSpec, loss: Loss, optimizer: optax.GradientTransformation, *, accumulation: int = 1):
    """The update as a pure function, ready for jax.jit.

    Returns update(state, ref_params, batch, hyper, key, frozen=None) -> (state, metrics). `hyper` overrides the loss's
    float hyper-parameters with traced values, so that equal structures share one program. frozen: the part of the
    policy's parameters that is not trained ({"model": base} with LoRA); no gradient is computed for it. metrics:
    (sum, count) pairs, plus `finite` (0 when loss or gradient is not finite; the state is then returned unchanged) and
    `grad_norm`.
    """
    wanted = set(loss.requests) | {"lengths"}
    differentiable = sorted(n for n in wanted if REQUESTS[n].grad)

    def evaluate_loss(inputs, hyper):
        out = loss({n: inputs[n] for n in loss.requests}, **hyper)
        scalar, parts = reduce_terms(out)
        return scalar, (parts, out)

    def whole(params, frozen, ref_params, batch, hyper, key, loss_state):
        def objective(p):
            inputs = compute(spec, frozen | p, ref_params, batch, wanted, key=key, state=loss_state)
            scalar, (parts, out) = evaluate_loss(inputs, hyper)
            return scalar, (inputs, parts, out)

        (scalar, (inputs, parts, out)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return scalar, grads, inputs, parts, out

    def in_parts(params, frozen, ref_params, batch, hyper, key, loss_state):
        micro = split_batch(batch, accumulation, spec.activations)
        carried = [n for n in wanted if REQUESTS[n].provider not in ("key", "state")]

        def first(carry, part):
            inputs = compute(spec, frozen | params, ref_params, part, carried)
            return carry, inputs

        _, stacked = jax.lax.scan(first, (), micro)
        inputs = jax.tree.map(lambda a: a.reshape((-1,) + a.shape[2:]), stacked)
        inputs |= {n: {"key": key, "state": loss_state}[REQUESTS[n].provider] for n in wanted - set(carried)}

        def of_inputs(active):
            return evaluate_loss(inputs | active, hyper)

        active = {n: inputs[n] for n in differentiable}
        (scalar, (parts, out)), cotangent = jax.value_and_grad(of_inputs, has_aux=True)(active)
        cuts = jax.tree.map(lambda a: a.reshape((accumulation, -1) + a.shape[1:]), cotangent)

        def second(total, part_and_g):
            part, g = part_and_g
            # What carries no gradient is not asked for again: neither reference nor streams without gradient run twice.
            _, pull = jax.vjp(lambda p: compute(spec, frozen | p, ref_params, part, differentiable), params)
            # The carry is the only buffer of gradients, and wide: a bfloat16 sum would lose the later parts.
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, pull(g)[0]), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(jnp.float32, p.dtype)), params)
        grads, _ = jax.lax.scan(second, zeros, (micro, cuts))
        return scalar, grads, inputs, parts, out

    def update(state: TrainState, ref_params, batch: Batch, hyper, key, frozen=None):
        run = whole if accumulation == 1 else in_parts
        scalar, grads, inputs, parts, out = run(state.params, frozen or {}, ref_params, batch, hyper, key,
                                                state.loss_state)
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.promote_types(jnp.float32, g.dtype)), grads))
        if not isinstance(state.opt_state, MasterState):  # moments keep the dtype of their parameters
            grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
        finite = jnp.isfinite(scalar) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new_loss_state = getattr(out, "new_state", None)
        new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state,
                         state.loss_state if new_loss_state is None else new_loss_state)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        one = jnp.float32(1)
        metrics = preference_metrics(inputs) | {f"loss_{k}": v for k, v in parts.items() if len(parts) > 1}
        metrics |= dict(getattr(out, "metrics", {}))
        metrics |= {"loss": (scalar, one), "grad_norm": (norm, one), "finite": (finite.astype(jnp.float32), one),
                    "tokens": (inputs["lengths"].sum(), one)}
        return new, metrics

    return update


def make_evaluate(spec: ModelSpec, loss: Loss | None, *, diagnostics: tuple[str, ...] = ()):
    """Forward only: evaluate(params, ref_params, batch, hyper, key, loss_state) -> (metrics, arrays).

    metrics: the loss, preference_metrics and, for each of `diagnostics` (per-token requests such as `entropy` or
    `ref_policy_kl`), its mean over scored tokens. arrays: the computed requests, unreduced. Running loss state is
    read and never changed.
    """
    wanted = {"lengths", "logps", "mask"} | set(diagnostics) | set(loss.requests if loss else ())
    if "rewards" in wanted and (loss is None or "logps" not in loss.requests):
        wanted -= {"logps"}

    def evaluate(params, ref_params, batch: Batch, hyper, key, loss_state):
        inputs = compute(spec, params, ref_params, batch, wanted, key=key, state=loss_state)
        metrics = preference_metrics(inputs)
        if loss is not None:
            scalar, _ = reduce_terms(loss({n: inputs[n] for n in loss.requests}, **hyper))
            metrics["loss"] = (scalar * batch.ids.shape[0], jnp.float32(batch.ids.shape[0]))
        for name in diagnostics:
            if REQUESTS[name].axes == "BKL":
                shown = {"ref_policy_kl": "kl_at_data_prefixes"}.get(name, name)
                metrics[shown] = (inputs[name].sum(), inputs["lengths"].sum())
        arrays = {n: inputs[n] for n in wanted if REQUESTS[n].provider in ("policy", "reference", "head")}
        return metrics, arrays

    return evaluate


def merge_metrics(parts: Iterable[Mapping[str, tuple]]) -> dict[str, float]:
    """Adds (sum, count) pairs over batches and divides once, at the end. A count of 0 leaves the metric out."""
    sums: dict[str, list[float]] = {}
    for part in parts:
        for name, (value, count) in jax.device_get(dict(part)).items():
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += float(value)
            total[1] += float(count)
    return {name: value / count for name, (value, count) in sums.items() if count}
