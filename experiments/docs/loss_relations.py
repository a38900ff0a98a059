"""Which losses are others in disguise: the table behind "reduces to" in docs/losses.md, and the check of every row.

Command: python experiments/docs/loss_relations.py
Cost: under a minute on two cores. Expected result: one line per relation with the relative difference of its sides
on random inputs, all below 1e-9; exit status 1 where one is above. tests/docs_test.py makes the same check.

A relation is about the value of the reduced loss. Gradients agree too, unless a row says otherwise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignax import losses
from alignax.ops.reductions import reduce_terms

LIMIT = 1e-9

Change = Callable[[dict[str, Any]], Any]


class Relation(NamedTuple):
    """`name` with `hyper` equals the sum over `right` of weight * loss(hyper), under the condition `when`.

    right: (weight, loss id, hyper-parameters). change: request -> function of all inputs that gives the array of the
    condition. rows: prompts in the batch.
    """

    name: str
    hyper: Mapping[str, Any]
    right: tuple[tuple[float, str, Mapping[str, Any]], ...]
    when: str = ""
    change: Mapping[str, Change] = {}
    rows: int = 4


def is_(name: str, right: str, right_hyper: Mapping[str, Any] | None = None, *, scale: float = 1.0, when: str = "",
        change: Mapping[str, Change] | None = None, rows: int = 4, plus: tuple = (), **hyper: Any) -> Relation:
    """`name` with hyper = scale * `right` with right_hyper, plus further (weight, loss, hyper) of `plus`."""
    return Relation(name, hyper, ((scale, right, dict(right_hyper or {})), *plus), when, dict(change or {}), rows)


def _pair(first: float, second: float) -> Change:
    return lambda i: np.broadcast_to(np.array([[first, second]]), i["logps"].shape)


def _filled(request: str, value: float) -> Change:
    return lambda i: np.full_like(i[request], value)


_LABELS = {"labels": _pair(1.0, 0.0)}
_ONE_STEP = {"steps": lambda i: np.zeros_like(i["steps"])}
_WON = {"scores": _pair(1.0, 0.0)}
_OWN_STEPS = {"steps": lambda i: np.broadcast_to(np.arange(i["steps"].shape[-1]), i["steps"].shape)}
_CERTAIN = {"scores": lambda i: np.log(np.array([[0.999, 0.001]])) * np.ones_like(i["scores"])}
_ONE_PAIR = dict(when="a batch of one pair", rows=1)

RELATIONS: tuple[Relation, ...] = (
    is_("dpo", "cpo", {"beta": 0.1, "lam": 0.0}, when="a reference that gives 0 to everything",
        change={"ref_logps": _filled("ref_logps", 0.0)}),
    is_("cdpo", "dpo", {"label_smoothing": 0.1}),
    is_("robust_dpo", "dpo", label_smoothing=0.0),
    is_("dpo:ln", "dpo", beta=0.1, when="completions of one token", change={"lengths": _filled("lengths", 1.0)}),
    is_("odpo", "dpo", when="scores that differ by 1", change={"scores": _pair(2.0, 1.0)}),
    is_("odpo", "dpo", alpha=0.0, when="chosen scored higher", change=_WON),
    is_("h_dpo", "dpo", {"beta": 0.01}, alpha=1.0),
    is_("dpo_shift", "dpo", {"beta": 0.01}, shift=1.0),
    is_("flex_dpo", "dpo", beta_rejected=0.1),
    is_("flex_dpo", "dpo_shift", {"beta": 0.1, "shift": 0.8}),
    is_("sft_dpo", "dpo", gamma=0.0),
    is_("rpo", "dpo", {"beta": 0.5}, eta=0.0),
    is_("rpo", "sft_dpo", {"gamma": 0.01}, form="cumulative", beta=0.1, eta=0.1),
    is_("r_dpo", "dpo", alpha=0.0),
    is_("dpop", "dpo", {"beta": 0.3}, penalty=0.0),
    is_("f_dpo", "dpo", divergence="reverse_kl"),
    is_("cal_dpo", "dpo", {"beta": 1.0}, plus=((1.0, "sppo:hard", {"beta": 0.001}),)),
    is_("exo", "exo:list", {"beta": 0.1, "score_beta": 1.0}, when="scores log 0.999 and log 0.001", change=_CERTAIN),
    is_("wpo", "dpo", {"beta": 0.01}, when="pairs as likely as an average token draw, or more (weight 1)",
        change={"log_sum_sq": _filled("log_sum_sq", -1e3)}),
    is_("aot", "dpo", {"beta": 0.01}, **_ONE_PAIR),
    is_("beta_dpo", "dpo", a=0.0, drop=0.0),
    is_("pl_dpo", "dpo", when="two completions"),
    is_("self_supervised_po", "dpo", gamma=0.0),
    is_("rso:hinge_norm", "gpo", {"link": "hinge", "beta": 0.05}),
    is_("ilr_dpo", "r_dpo"),
    is_("rdpo_refined", "dpo", c=0.0),
    is_("sequential_po", "dpo", when="margins 0 (the first round)", change={"margins": _filled("margins", 0.0)}),
    is_("sr_dpo", "dpo", lam=0.0),
    is_("sr_dpo:ipo", "ipo", {"tau": 0.1}, lam=0.0),
    is_("lcpo", "dpo", when="annotators of reliability 1",
        change={"state": lambda i: {"eta": jnp.ones_like(i["state"]["eta"])}}),
    is_("relative_po", "dpo", weighting="diagonal_loss", alpha=1.0),
    is_("relative_po", "dpo", weighting="uniform", **_ONE_PAIR),
    is_("dr_dpo", "dpo", **_ONE_PAIR),
    is_("c2_dpo", "dpo", lam=0.0),
    is_("focal_po", "dpo", {"beta": 0.01}, gamma=0.0),
    is_("minor_dpo", "dpo", when="rejected answers at or above the reference",
        change={"ref_logps": lambda i: np.where([[False, True]], i["logps"] - 1.0, i["ref_logps"])}),
    is_("gpo", "dpo", link="logistic"),
    is_("gpo", "ipo", {"tau": 0.05}, scale=0.01, link="square"),
    is_("rpo_reward_aware", "rebel", beta=1.0, distance="sq"),
    is_("rpo_reward_aware", "exo", {"label_smoothing": 0.1}, beta=0.1, distance="fwd_kl",
        when="scores that differ by log 9", change={"scores": _pair(float(np.log(9.0)), 0.0)}),
    is_("rebel", "ipo", {"tau": 0.5}, when="scores 1 and 0", change=_WON),
    is_("mpo_mixed_loss", "dpo", scale=0.8, quality_weight=0.0, generation_weight=0.0),
    is_("ld_dpo", "dpo", alpha=1.0),
    is_("sampo", "dpo", when="completions of equal length",
        change={"mask": lambda i: np.ones_like(i["mask"]), "logps": lambda i: i["token_logps"].sum(-1),
                "ref_logps": lambda i: i["ref_token_logps"].sum(-1)}),
    is_("humanline", "dpo", log_low=-1e9, log_high=1e9),
    is_("prior_exam_suppression", "dpo", gamma=1.0),
    is_("alpha_po", "simpo", {"beta": 2.5, "gamma": 0.25}, alpha=0.0),
    is_("alpha_dpo", "simpo", {"beta": 2.5, "gamma": 1.5}, alpha=0.0),
    is_("new_desiderata", "cpo", {"beta": 1.0, "lam": 0.0}, lam=0.0),
    is_("tpo_triple", "cpo", {"beta": 0.01}, when="two completions, the chosen one as gold"),
    is_("tpo_triple:length", "simpo", alpha=0.0, when="two completions"),
    is_("kto", "apo:zero_unpaired", when="a mismatched log-ratio of 0 or less (baseline 0)",
        change={"kl_logps": lambda i: i["kl_ref_logps"]}),
    is_("nca:info", "dpo", {"beta": 0.01}, when="two completions, scores 1 and 0", change=_WON),
    is_("apo:zero_unpaired", "apo:zero", scale=0.5, when="pairs labelled 1 and 0", change=_LABELS),
    is_("sppo", "sppo:hard", scale=0.5, when="pairs with win rates 1 and 0", change=_WON),
    is_("lipo", "dpo", {"beta": 0.05}, member="pair_logistic", when="two completions, scores 1 and 0", change=_WON),
    is_("lipo", "pl_dpo", {"beta": 0.05}, member="list_mle", when="lists sorted by score", change=_WON),
    is_("pro", "simpo", {"beta": 2.0, "gamma": 0.0}, sft_weight=0.0, when="pairs whose scores differ by 2",
        change={"scores": _pair(2.0, 0.0)}),
    is_("tdpo", "dpo", alpha=0.0),
    is_("tdpo", "tdpo:tdpo1", alpha=1.0, when="in value: the gradient through the chosen KL is stopped in tdpo"),
    is_("sparse_po", "tdpo:tdpo1", {"beta": 0.8}, when="weights 1",
        change={"reward_mask": _filled("reward_mask", 1.0), "kl_mask": _filled("kl_mask", 1.0)}),
    is_("sparse_po:common", "tdpo:tdpo1", {"beta": 0.8}, when="weights 1",
        change={"reward_mask": _filled("reward_mask", 1.0)}),
    is_("sparse_po:mapo", "tdpo:tdpo1", {"beta": 0.8}, when="weights 1",
        change={"activation_mask": _filled("activation_mask", 1.0)}),
    is_("bmc", "dpo", {"beta": 0.05}, when="no edited tokens", change={"diff": lambda i: np.zeros_like(i["diff"])}),
    is_("step_dpo", "dpo", {"beta": 0.4}, when="completions of one step", change=_ONE_STEP),
    is_("scdpo", "dpo", when="pairs that share no step", change=_ONE_STEP),
    is_("svpo", "dpo", value_weight=0.0, margin_weight=0.0),
    is_("sdpo", "dpo", when="equally many turns on both sides, all in the segment", change=_ONE_STEP),
    is_("dmpo", "dpo", when="trajectories of one turn", change=_ONE_STEP),
    is_("multi_turn_dpo", "dpo"),
    is_("multi_turn_dpo:kto", "kto"),
    is_("oreo:step", "oreo", when="one token a step", change=_OWN_STEPS),
    is_("oreo:response", "oreo:step", when="one step", change=_ONE_STEP),
    is_("imagined_conversations", "ilql"),
    is_("a_lol", "a_lol:ref_free", eps=0.0),
    is_("a_lol:kl", "a_lol:ref_free", kappa=0.0),
    is_("pretraining_with_preferences:filtering", "sft", threshold=-1e9),
    is_("pretraining_with_preferences:unlikelihood", "sft", threshold=-1e9),
    is_("pretraining_with_preferences:rwr", "sft", when="scores 0",
        change={"segment_scores": _filled("segment_scores", 0.0)}),
    is_("cpl:kl", "cpl", {"alpha": 0.2, "lam": 0.75}, when="a reference that gives 0 to everything",
        change={"ref_token_logps": _filled("ref_token_logps", 0.0)}),
    is_("cpl:kl", "dpo", alpha=0.1, lam=1.0, when="labels 1 and 0", change=_LABELS),
    is_("d3po", "dpo", form="trajectory", when="labels 1 and 0", change=_LABELS),
    is_("prdp", "rebel", clip=1e9, when="two completions"),
    is_("bt_rm:list", "bt_rm", when="two completions, the chosen one scored higher", change=_WON),
    is_("implicit_prm:dpo", "dpo", {"beta": 0.05}),
    is_("dph", "cdpo", head_weight=0.0),
    is_("goal_conditioned_rm", "bt_rm", contrast_weight=0.0),
)


def inputs(name: str, change: Mapping[str, Change], *, rows: int, seed: int = 0) -> dict[str, Any]:
    """Random pairs that agree with each other (sums are the masked sums of the tokens), float64, with `change` made.

    name: the loss whose starting state is given.
    """
    rng = np.random.default_rng(seed)
    shape = (rows, 2, 6)
    lengths = rng.integers(2, 7, shape[:2])
    mask = np.arange(6)[None, None] < lengths[..., None]
    tokens, ref, old, kl_ref, aux, aux_ref, sample = (-rng.uniform(0.05, 2.0, shape) for _ in range(7))
    total = lambda x: (x * mask).sum(-1)
    out: dict[str, Any] = {
        "token_logps": tokens, "ref_token_logps": ref, "old_token_logps": old, "mask": mask,
        "logps": total(tokens), "ref_logps": total(ref), "lengths": lengths.astype(float),
        "valid": np.ones(shape[:2], bool), "kl_logps": total(old), "kl_ref_logps": total(kl_ref),
        "aux_prompt_logps": total(aux), "aux_prompt_ref_logps": total(aux_ref), "reference_sample_logps": total(sample),
        "scores": np.sort(rng.normal(size=shape[:2]))[:, ::-1], "labels": rng.integers(0, 2, shape[:2]).astype(float),
        "margins": rng.uniform(0.5, 2.0, rows), "weights": np.ones(rows), "annotator": np.zeros(rows, int),
        "ids": np.arange(rows, dtype=np.uint32), "key": jax.random.key(seed),
        "prompt_embedding": rng.normal(size=(rows, 3)), "degree_logits": rng.normal(size=(rows, 2, 3)),
        "targets": np.broadcast_to(np.array([[[1], [2]]]), shape), "steps": rng.integers(0, 3, shape),
        "diff": rng.random(shape) < 0.5, "rewards": rng.normal(size=shape[:2]), "hidden": rng.normal(size=(*shape, 3)),
        "prompt_values": rng.normal(size=rows),
    }
    for request in ("entropy", "ref_policy_kl", "policy_ref_kl", "reward_mask", "kl_mask", "activation_mask",
                    "log_sum_sq", "values", "detached_values", "token_rewards", "segment_scores", "advantages"):
        out[request] = rng.uniform(0.1, 1.0, shape)
    for request in ("q_values", "target_q_values", "q_logps"):
        out[request] = rng.normal(size=(*shape, 2))
    state = losses.get(name).init_state()
    if state is not None:
        out["state"] = state
    for request, make in change.items():
        out[request] = make(out)
    return out


def difference(relation: Relation) -> float:
    """The relative difference between both sides of a relation on random inputs, in float64; inf where one is NaN."""
    with jax.enable_x64(True):
        given = inputs(relation.name, relation.change, rows=relation.rows)
        at = lambda name, hyper: float(reduce_terms(losses.get(name, **hyper)(given))[0])
        left = at(relation.name, relation.hyper)
        right = sum(weight * at(name, hyper) for weight, name, hyper in relation.right)
    gap = abs(left - right) / max(abs(right), 1e-6)
    return gap if np.isfinite(gap) else np.inf


def main(arguments: list[str] | None = None) -> int:
    """Check every relation and print its difference; 1 where one is above LIMIT."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args(arguments)
    gaps = [(difference(relation), relation) for relation in RELATIONS]
    for gap, relation in gaps:
        print(f"{gap:.1e}  {relation.name} {dict(relation.hyper)} = {relation.right} {relation.when}")
    return int(any(gap > LIMIT for gap, _ in gaps))


if __name__ == "__main__":
    sys.exit(main())
