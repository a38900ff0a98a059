"""The words every part shares: axes, the batch, the request table, and what a loss returns.

Axis letters: B prompts, K completions of a prompt, L completion tokens, V vocabulary, D model width,
R rows and T columns of the token grid, G groups of rows. In a pair, completion 0 is chosen and 1 rejected;
a list is ordered best first; pointwise data has K = 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray


class ConfigError(ValueError):
    """A setting that cannot work; the message names the key, the value found and the values allowed."""


class DataError(ValueError):
    """A record that cannot be used; the message names file, line and field."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """One set of completions laid out in token rows.

    Rows are cut into G groups of R/G rows that belong to B/G prompts; `row` counts inside the group, so that a
    batch sharded over groups never gathers across devices. A token attends to the tokens at or before its column
    whose segment equals its own `segment` or its own `prefix`. Segment 0 is padding.

    tokens, segment, prefix, position: int32 [R, T].
    row, col: int32 [B, K, L], where the hidden state that predicts slot (b, k, l) stands.
    targets: int32 [B, K, L], the token to predict. mask: bool [B, K, L], which slots are scored.
    valid: bool [B, K], which completions exist (ragged K).
    groups: static int G; divides R and B.
    """

    tokens: Array
    segment: Array
    prefix: Array
    position: Array
    row: Array
    col: Array
    targets: Array
    mask: Array
    valid: Array
    groups: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What one update sees.

    streams: name -> Stream; `pair` is the default, `mismatched` holds KTO's rotated completions.
    data: name -> array with a leading axis B (`labels` [B,K], `scores` [B,K], `margins` [B], `weights` [B],
    `ref_logps` [B,K] where precomputed, ...).
    ids: uint32 [B], the stable record ids.
    """

    streams: Mapping[str, Stream]
    data: Mapping[str, Array]
    ids: Array


@dataclasses.dataclass(frozen=True)
class Request:
    """One row of the request table: what a loss may ask for by naming a positional argument.

    provider: data, policy, reference, head, key or state. grad: whether gradients flow through it.
    stream: the stream it is computed on. passes: forward passes of a model that it needs, as names; equal names
    are shared between requests. references: the reference rules that can supply it (empty: needs none).
    """

    name: str
    axes: str
    dtype: str
    provider: str
    grad: bool = False
    stream: str = "pair"
    passes: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    about: str = ""


_ANY = ("frozen", "adapter_off", "precomputed")
_SAME_PROGRAM = ("frozen", "adapter_off")
_POLICY = ("policy",)
_REF = ("reference",)
# With a gradient for a head, and none for the policy below it.
_STOPS_AT_THE_HEAD = ("detached_values",)

REQUESTS: dict[str, Request] = {
    r.name: r
    for r in (
        Request("logps", "BK", "float32", "policy", True, passes=_POLICY,
                about="sum of the policy's log-probs over completion tokens"),
        Request("token_logps", "BKL", "float32", "policy", True, passes=_POLICY,
                about="the policy's log-prob of each completion token"),
        Request("entropy", "BKL", "float32", "policy", True, passes=_POLICY,
                about="entropy of the policy's next-token distribution, nats"),
        Request("log_sum_sq", "BKL", "float32", "policy", True, passes=_POLICY,
                about="log of the sum of squared next-token probabilities"),
        Request("ref_logps", "BK", "float32", "reference", passes=_REF, references=_ANY,
                about="sum of the reference's log-probs over completion tokens"),
        Request("ref_token_logps", "BKL", "float32", "reference", passes=_REF, references=_SAME_PROGRAM,
                about="the reference's log-prob of each completion token"),
        Request("ref_policy_kl", "BKL", "float32", "reference", True, passes=_POLICY + _REF,
                references=_SAME_PROGRAM, about="KL(ref || policy) over the vocabulary at each slot, nats"),
        Request("policy_ref_kl", "BKL", "float32", "reference", True, passes=_POLICY + _REF,
                references=_SAME_PROGRAM, about="KL(policy || ref) over the vocabulary at each slot, nats"),
        Request("kl_logps", "BK", "float32", "policy", False, "mismatched", ("policy:mismatched",),
                about="policy log-probs of KTO's mismatched completions, no gradient"),
        Request("kl_ref_logps", "BK", "float32", "reference", False, "mismatched", ("reference:mismatched",),
                _SAME_PROGRAM, about="reference log-probs of KTO's mismatched completions"),
        Request("rewards", "BK", "float32", "head", True, passes=_POLICY,
                about="scalar reward head at the last completion token"),
        Request("lengths", "BK", "float32", "data", about="number of scored completion tokens, end token included"),
        Request("mask", "BKL", "bool", "data", about="which slots hold scored completion tokens"),
        Request("valid", "BK", "bool", "data", about="which completions exist (ragged K)"),
        Request("labels", "BK", "float32", "data", about="1 for desirable, 0 for undesirable"),
        Request("scores", "BK", "float32", "data", about="external score of each completion"),
        Request("margins", "B", "float32", "data", about="external margin of the pair; 0 where the data has none"),
        Request("weights", "B", "float32", "data", about="weight of the record; 1 where the data has none"),
        Request("targets", "BKL", "int32", "data", about="ids of the completion tokens"),
        Request("ids", "B", "uint32", "data", about="the stable record numbers, from which draws are folded"),
        Request("diff", "BKL", "bool", "data",
                about="tokens that differ inside a pair: the batch's, else all between common beginning and end"),
        Request("annotator", "B", "int32", "data", about="who labelled the pair; 0 where the data has none"),
        Request("candidate_logps", "BKLL", "float32", "policy", True, passes=_POLICY,
                about="at slot t, the policy's log-prob of the completion's token j; 0 outside the mask"),
        Request("old_token_logps", "BKL", "float32", "reference", passes=_REF, references=_SAME_PROGRAM,
                about="token log-probs of the policy at the round's start: the batch's, else the stage's start"),
        Request("prompt_embedding", "BE", "float32", "reference", passes=_REF, references=_SAME_PROGRAM,
                about="a frozen encoding of the prompt: the batch's, else the mean of the reference's hidden states"),
        Request("aux_prompt_logps", "BK", "float32", "policy", False, "aux_prompt", ("policy:aux_prompt",),
                about="policy log-probs of the same completions under another prompt, no gradient"),
        Request("aux_prompt_ref_logps", "BK", "float32", "reference", False, "aux_prompt", ("reference:aux_prompt",),
                _SAME_PROGRAM, about="reference log-probs of the same completions under another prompt"),
        Request("reference_sample_logps", "BK", "float32", "policy", True, "reference_sample",
                ("policy:reference_sample",), about="policy log-probs of completions sampled from the reference"),
        Request("degree_logits", "BKC", "float32", "head", True, "degraded", ("policy:degraded",),
                about="a classifier's logits at the last token of versions with key content removed"),
        Request("steps", "BKL", "int32", "data",
                about="step or turn of each token, -1 outside: the batch's, else the runs of scored tokens"),
        Request("token_rewards", "BKL", "float32", "data",
                about="reward of each token: the batch's, else the completion's score at its last scored token"),
        Request("segment_scores", "BKL", "float32", "data",
                about="score of the segment that a token belongs to: the batch's, else the completion's score"),
        Request("advantages", "BKL", "float32", "data",
                about="advantage of a token's step: the batch's, else the completion's score less the prompt's mean"),
        Request("hidden", "BKLD", "float32", "policy", True, passes=_POLICY,
                about="the policy's last hidden state, from which each token is predicted"),
        Request("values", "BKL", "float32", "head", True, passes=_POLICY,
                about="value head on the state before each token; its gradient reaches the policy"),
        Request("detached_values", "BKL", "float32", "head", True, passes=_POLICY,
                about="value head on the state before each token; its gradient stops at the head"),
        Request("prompt_values", "B", "float32", "head", True, passes=_REF, references=_SAME_PROGRAM,
                about="value of the prompt: the batch's, else a head on the reference's state at its end"),
        Request("q_values", "BKLH", "float32", "head", True, passes=_POLICY,
                about="two Q heads over the vocabulary, at the token taken"),
        Request("q_logps", "BKLH", "float32", "head", True, passes=_POLICY,
                about="log-softmax over the vocabulary of both Q heads, at the token taken"),
        Request("target_q_values", "BKLH", "float32", "head", passes=_POLICY,
                about="what the Q heads' targets say of the token taken: a copy of the heads, else they themselves"),
        Request("reward_mask", "BKL", "float32", "head", True, passes=_REF, references=_SAME_PROGRAM,
                about="learned weight >= 0 of a token's log-ratio, from the reference's hidden state"),
        Request("kl_mask", "BKL", "float32", "head", True, passes=_REF, references=_SAME_PROGRAM,
                about="learned weight >= 0 of a token's KL, from the reference's hidden state"),
        Request("activation_mask", "BKL", "float32", "reference", passes=_REF, references=_SAME_PROGRAM,
                about="weight of a token in [0, 1]: the batch's, else from the reference's activations"),
        Request("key", "", "key", "key", about="PRNG key of this update, from the run's seed and the step"),
        Request("state", "", "pytree", "state", about="running statistics; explicit, checkpointed"),
    )
}


class Passes(NamedTuple):
    """How often a model runs over the whole batch of one stream: forward and backward of the policy, forward of the
    reference."""

    policy_forward: int = 0
    policy_backward: int = 0
    reference_forward: int = 0


def passes(requests: Iterable[str], reference: str = "frozen", *, accumulation: int = 1,
           training: bool = True) -> dict[str, Passes]:
    """Stream -> passes of one update (training=False: of an evaluation, which has no backward) for these requests.

    reference: its rule; `precomputed` and `none` run no reference. accumulation: above 1 the gradient is exact by two
    passes, so that what carries gradients runs forward once more, the reference only where a gradient needs its
    distribution or its states. Backward passes include what remat computes again; arrays that a batch may bring along
    are taken as not brought. Streams without a pass are left out. Raises ConfigError for a name that is no request.
    """
    requests = set(requests)
    if unknown := sorted(requests - REQUESTS.keys()):
        raise ConfigError(f"passes: {', '.join(unknown)} is no request; allowed: {', '.join(sorted(REQUESTS))}")
    rows = [REQUESTS[name] for name in sorted(requests)]
    runs = lambda some, model: any(one.split(":")[0] == model for row in some for one in row.passes)
    out = {}
    for stream in sorted({row.stream for row in rows}):
        first = [row for row in rows if row.stream == stream]
        active = [row for row in first if row.grad and training]
        again = active if accumulation > 1 else []
        copy = reference not in ("precomputed", "none")
        found = Passes(runs(first, "policy") + runs(again, "policy"),
                       int(runs([row for row in active if row.name not in _STOPS_AT_THE_HEAD], "policy")),
                       copy * (runs(first, "reference") + runs(again, "reference")))
        if any(found):
            out[stream] = found
    return out


class Term(NamedTuple):
    """One additive part of a loss: `scale` times a weighted mean of unreduced `values`.

    values: any of [B], [B,K], [B,K,L], or a scalar for `whole`. weight: same shape or broadcastable; its sum over
    the global batch is the denominator (it may depend on masks and lengths only, never on parameters).
    reduction: pairs, sequences, tokens (all: sum(w v) / sum(w)); seq_mean_token_mean (token mean inside each
    sequence, then mean over sequences that have tokens); fixed_len (sum(w v) / (sequences * L)); whole (a scalar
    that is already the value over the global batch).
    """

    values: Array
    weight: Any = 1.0
    reduction: str = "pairs"
    scale: Any = 1.0


class Terms(NamedTuple):
    """What a loss returns when it is more than one array: named terms, metrics as (sum, count), new state."""

    terms: dict[str, Term]
    new_state: Any = None
    metrics: dict[str, tuple[Array, Array]] = {}
