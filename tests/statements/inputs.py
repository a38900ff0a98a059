"""Random inputs for the statements: ragged lists, masks with holes, ties, options drawn away from their defaults.

Everything that a mask cuts off is NaN, so that neither side can have read it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

B, K, L, D = 5, 4, 6, 3

# Options that are no plain floats, or floats at a special point: besides the defaults, each is tried alone.
CASES: dict[str, list[dict[str, Any]]] = {
    "ipo": [{"length_average": True}],
    "odpo": [{"offset": "ratio"}],
    "rpo": [{"form": "cumulative"}],
    "f_dpo": [{"divergence": d} for d in ("reverse_kl", "js", "alpha")],
    "aot": [{"paired": False}],
    "rdpo_refined": [{"form": "drop"}, {"form": "relabel"}],
    "lcpo": [{"drop_normaliser": True}, {"base": "ipo"}, {"base": "simpo"}, {"base": "cpo"},
             {"base": "cpo", "drop_normaliser": True}],
    "relative_po": [{"weighting": w} for w in ("uniform", "diagonal", "diagonal_loss")],
    "c2_dpo": [{"penalty": "l1"}],
    "focal_po": [{"detach": True}],
    "gpo": [{"link": f} for f in ("logistic", "hinge", "square", "exponential", "savage")],
    "rpo_reward_aware": [{"distance": "sq"}, {"distance": "fwd_kl"}],
    "mpo_mixed_loss": [{"shift": "zero"}, {"nll": "tokens"}],
    "alpha_po": [{"alpha": 0.0}],
    "cpo": [{"nll": "sequences"}],
    "bco": [{"pooled": True}],
    "sppo": [{"win_rates": "list"}, {"win_rates": "others"}],
    "lipo": [{"rax_reduction": True}] + [{"member": m} for m in ("pair_logistic", "pair_hinge", "list_mle", "softmax",
                                                                 "point_mse", "point_sigmoid")],
    "rrhf": [{"nll": "average"}],
    "aft": [{"constraint": "none"}, {"constraint": "detached"}],
    "aft:ranking": [{"constraint": "none"}, {"constraint": "detached"}],
    "sampo": [{"independent": True}],
    "bmc": [{"ref_weights": "self"}],
    "svpo": [{"link": "logistic"}],
    "sdpo": [{"unequal": "truncate"}],
    "dmpo": [{"phi_leading_discount": False}, {"gamma": 1.0}],
    "a_lol": [{"advantage": "reward"}],
    "a_lol:seq": [{"advantage": "reward"}],
    "a_lol:ref_free": [{"advantage": "reward"}],
    "a_lol:kl": [{"advantage": "reward"}],
    "d3po": [{"form": "trajectory"}],
    "prdp": [{"time_reduce": "mean"}, {"skip_ties": True}],
    "unlikelihood:token": [{"window": 2}],
    "unlikelihood:sequence": [{"ngram": 1}, {"ngram": 2}],
    "bt_rm:list": [{"flat": True}],
    "dph": [{"form": "contrastive"}],
    "goal_conditioned_rm": [{"mean_goal": True}],
}

# Where a float option is drawn, so that every clip, floor and weight acts on some of the values.
RANGES: dict[tuple[str, str], tuple[float, float]] = {
    ("r_dpo", "alpha"): (0.05, 0.3), ("ilr_dpo", "alpha"): (0.05, 0.3), ("dpop", "penalty"): (0.5, 3.0),
    ("exo", "label_smoothing"): (0.01, 0.2), ("discopop", "tau"): (0.4, 4.0), ("f_dpo", "clip"): (0.5, 2.0),
    ("discopop", "clip"): (0.1, 1.0), ("beta_dpo", "drop"): (0.0, 0.0), ("chi_po", "reward_bound"): (0.5, 3.0),
    ("chi_po", "clip"): (0.5, 2.0), ("squared_po", "clip"): (0.5, 2.0), ("gpo", "clip"): (0.3, 1.0),
    ("c2_dpo", "lam"): (0.05, 0.5), ("focal_po", "gamma"): (0.1, 1.5), ("nca", "alpha"): (0.3, 1.5),
    ("nca:info", "alpha"): (0.3, 1.5), ("bco", "low_weight"): (0.3, 0.8), ("bco", "high_weight"): (1.5, 5.0),
    ("alpha_po", "clip"): (0.1, 0.4), ("alpha_po", "alpha"): (-0.6, 0.6), ("rso:hinge_norm", "gamma"): (0.2, 1.0),
    ("bmc", "delta"): (1.2, 4.0), ("per_step_advantage", "max_log_weight"): (0.2, 1.5),
    ("ilql", "expectile"): (0.55, 0.9), ("imagined_conversations", "expectile"): (0.55, 0.9),
    ("ilql", "gamma"): (0.5, 0.95), ("imagined_conversations", "gamma"): (0.5, 0.95),
    ("ilql:mc_returns", "gamma"): (0.5, 0.95), ("a_lol", "eps"): (0.3, 0.9), ("a_lol:seq", "eps"): (0.3, 0.9),
    ("a_lol:gold", "floor"): (0.1, 0.5), ("pretraining_with_preferences:filtering", "threshold"): (-0.3, 0.3),
    ("pretraining_with_preferences:unlikelihood", "threshold"): (-0.5, 0.5),
    ("pretraining_with_preferences:unlikelihood", "clamp"): (0.2, 0.5),
    ("pretraining_with_preferences:rwr", "max_weight"): (1.0, 2.0),
    ("pretraining_with_preferences:awr", "max_weight"): (1.0, 2.0),
    ("unlikelihood", "clamp"): (0.2, 0.5), ("unlikelihood:token", "clamp"): (0.2, 0.5),
    ("unlikelihood:sequence", "clamp"): (0.2, 0.5), ("cpl", "gamma"): (0.6, 0.95), ("cpl:kl", "gamma"): (0.6, 0.95),
    ("dmpo", "gamma"): (0.4, 0.9), ("sequential_po", "lam"): (0.3, 2.0), ("dpo_shift", "shift"): (0.3, 0.9),
}

UNIT_SCORES = {"lipo", "sppo", "tpo_tree"}  # win rates, or labels in [0, 1]
BEST_FIRST = {"pro"}
NARROW = {"d3po": 0.1, "a_lol": 0.2}  # log-ratios about as wide as the window in which they act
NO_HOLES = {"step_dpo", "scdpo"}  # responses that share a beginning share its places


def options(name: str, hyper: dict[str, Any], seed: int) -> dict[str, float]:
    """Every float hyper-parameter drawn away from its default."""
    rng = np.random.default_rng([seed, 7])
    drawn = {}
    for key, default in hyper.items():
        if isinstance(default, float):
            low, high = (0.2, 1.5) if key == "beta" else (0.1, 0.4) if default == 0 else (0.6, 1.4)
            scale = default if default != 0 and key != "beta" else 1.0
            if (name, key) in RANGES:
                (low, high), scale = RANGES[name, key], 1.0
            drawn[key] = scale * rng.uniform(low, high)
    return drawn


def draw(name: str, requests: tuple[str, ...], size: int | None, state: Any, seed: int) -> dict[str, np.ndarray]:
    """Arrays for the requests of a loss; size: its completions for a prompt, None for any number."""
    rng = np.random.default_rng([seed, 3])
    k = size or (3 if name.startswith("tpo_triple") else K)
    ragged = size is None and ("valid" in requests or "mask" in requests)
    there = rng.random((B, k)) < 0.7 if ragged else np.ones((B, k), bool)
    there[:, rng.integers(k)] = True
    there[0] = True
    if ragged:
        there[1], there[1, 1] = False, True  # one completion alone
    lengths = np.where(there, rng.integers(1, L + 1, (B, k)), 0)
    if name == "sampo":
        lengths[:, 1] = lengths[:, 0]
    if name == "goal_conditioned_rm":
        lengths[:] = 1
    mask = np.arange(L) < lengths[..., None]
    if name not in NO_HOLES:
        mask = rng.permuted(mask, axis=-1)
    out = {}
    for request in requests:
        out[request] = value(name, request, rng, there, mask, state)
    if name in NO_HOLES:
        share_beginnings(out, rng)
    if "candidate_logps" in out:
        consistent_candidates(out, rng)
    cut_off(out, there)
    return out


def value(name: str, request: str, rng: np.random.Generator, there: np.ndarray, mask: np.ndarray, state: Any) -> Any:
    """One array, before masking."""
    pairs, tokens = there.shape, mask.shape
    shapes = {"old_token_logps": tokens, "log_sum_sq": tokens, "token_logps": tokens, "ref_token_logps": tokens,
              "q_logps": (*tokens, 2), "reference_sample_logps": (B, 2)}
    if request == "state":
        return {key: rng.uniform(0.3, 0.9, np.shape(v)) + (np.char.find(key, "count") >= 0) * 3.0
                for key, v in state.items()}
    if request == "candidate_logps":
        return np.zeros((*tokens, L))
    if request.endswith("logps") or request == "log_sum_sq":
        shape = shapes.get(request, pairs)
        drawn = -rng.uniform(0.1, 2.0 if len(shape) > 2 else 5.0, shape)
        if name in NARROW:
            return -1 + NARROW[name] * drawn
        return drawn - (1.5 if request == "kl_ref_logps" else 0.0)
    if request == "scores":
        drawn = np.round(rng.normal(size=pairs), 1 if name == "svpo" else 0) / 2  # with ties
        drawn[:, 0] += rng.uniform(0, 1, B)
        drawn = 1 / (1 + np.exp(-drawn)) if name in UNIT_SCORES else drawn
        return -np.sort(-drawn, axis=1) if name in BEST_FIRST else drawn
    if request == "labels":
        soft = [0.0, 1.0, 0.3] if name.startswith("cpl") else [0.0, 1.0]
        return rng.choice(soft, pairs)
    if request == "steps":
        numbers = np.cumsum(rng.random(tokens) < 0.5, -1) - 1
        return numbers.astype(np.int32)
    plain = {"mask": mask, "valid": there, "lengths": mask.sum(-1).astype(float),
             "targets": rng.integers(0, 3, tokens).astype(np.int32), "ids": np.arange(B, dtype=np.uint32),
             "annotator": rng.integers(0, 3, B).astype(np.int32), "diff": rng.random(tokens) < 0.5,
             "weights": rng.uniform(0.1, 8.0, B), "margins": rng.normal(size=B), "prompt_values": rng.normal(size=B),
             "rewards": rng.normal(size=pairs), "prompt_embedding": rng.normal(size=(B, 7)),
             "degree_logits": rng.normal(size=(B, 3, 4)), "hidden": rng.normal(size=(*tokens, D)),
             "q_values": rng.normal(size=(*tokens, 2)), "target_q_values": rng.normal(size=(*tokens, 2))}
    if request in plain:
        return plain[request]
    positive = request.endswith(("_kl", "_mask"))
    return rng.uniform(0.1, 1.5, tokens) if positive else rng.normal(size=tokens)


def share_beginnings(out: dict[str, Any], rng: np.random.Generator) -> None:
    """Let the rejected response begin as the chosen one does; a step ends with token 0, in both alike."""
    for b in range(B):
        place = min(rng.integers(0, L), int(out["mask"][b].sum(-1).min()))
        out["targets"][b, 1, :place] = out["targets"][b, 0, :place]
    ended = np.cumsum(out["targets"] == 0, -1)
    out["steps"] = (ended - (out["targets"] == 0)).astype(np.int32)


def consistent_candidates(out: dict[str, Any], rng: np.random.Generator) -> None:
    """candidate_logps and token_logps from one table, so that an id has one log-prob at a slot."""
    shape = out["targets"].shape
    table = np.log(rng.dirichlet(np.ones(4), shape))
    for at in np.ndindex(shape):
        out["token_logps"][at] = table[at][out["targets"][at]]
        for j in range(L):
            out["candidate_logps"][(*at, j)] = table[at][out["targets"][(*at[:-1], j)]]


def cut_off(out: dict[str, Any], there: np.ndarray) -> None:
    """NaN wherever a mask that the loss reads is off; 1 in integers."""
    for request, array in out.items():
        if request in ("mask", "valid", "diff", "lengths", "state", "reference_sample_logps"):
            continue
        off = None
        if request == "candidate_logps":
            off = ~(out["mask"][..., :, None] & out["mask"][..., None, :])
        elif array.ndim >= 3 and "mask" in out and array.shape[:3] == out["mask"].shape:
            off = ~out["mask"]
        elif array.shape == there.shape and "valid" in out:
            off = ~there
        if off is not None:
            array[off] = np.nan if np.issubdtype(array.dtype, np.floating) else 1
