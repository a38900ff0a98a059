"""The index of losses. A loss is a pure function: positional names are requests, keyword names hyper-parameters.

Adding one: write the function in its family file under `@method(...)`, import it here, list it in `_METHODS`.
`compose` makes one from parts by name, `weighted_sum` from losses; see alignax/losses/parts.py and composed.py.
`from_function` makes one outside the index, and `laws.check` says which laws a loss obeys (alignax/losses/laws.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from alignax.losses.anchored import (
    aot,
    apo_down,
    apo_zero,
    beta_dpo,
    cal_dpo,
    cdpo,
    discopop,
    dpo,
    dpo_shift,
    dpop,
    exo,
    f_dpo,
    flex_dpo,
    h_dpo,
    ipo,
    ln_dpo,
    odpo,
    plackett_luce,
    r_dpo,
    robust_dpo,
    rpo,
    self_supervised_po,
    sft_dpo,
    wpo,
)
from alignax.losses.composed import COMPOSE, SUM, add_up, compose, parse_sum
from alignax.losses.composed import defaults as composed_defaults
from alignax.losses.direct import (
    alpha_dpo,
    alpha_po,
    asft,
    cpo,
    mapo_margin,
    orpo,
    simper,
    simpo,
    slic_hf,
    tpo_l,
    tpo_triple,
    typo,
)
from alignax.losses.graded import phf_awr, phf_filtering, phf_rwr, phf_unlikelihood
from alignax.losses.listwise import aft, aft_ranking, exo_list, lipo, pro, rrhf
from alignax.losses.loss import Loss, from_function, split_signature
from alignax.losses.margins import (
    ilr_dpo,
    lcpo,
    rdpo_refined,
    relative_po,
    rso_hinge_norm,
    sequential_po,
    sr_dpo,
    sr_ipo,
)
from alignax.losses.offline_rl import (
    a_lol,
    a_lol_gold,
    a_lol_kl,
    a_lol_ref_free,
    a_lol_seq,
    ilql,
    ilql_mc_returns,
    imagined_conversations,
    oreo,
    oreo_response,
    oreo_step,
)
from alignax.losses.pointwise import apo_zero_unpaired, bco, info_nca, kto, nca, sppo, sppo_hard
from alignax.losses.reward import bt_rm, bt_rm_list
from alignax.losses.reward_forms import dph, goal_conditioned_rm, implicit_prm, implicit_prm_dpo
from alignax.losses.selective import conf_po, conf_po_dpo, dft, humanline, ld_dpo, sampo, span_dpo
from alignax.losses.shaped import (
    bpo_balanced,
    c2_dpo,
    chi_po,
    dr_dpo,
    focal_po,
    gpo,
    kto_pair,
    minor_dpo,
    mpo_mixed_loss,
    rebel,
    rpo_reward_aware,
    squared_po,
)
from alignax.losses.stepwise import (
    dmpo,
    m_kto,
    multi_turn_dpo,
    per_step_advantage,
    scdpo,
    sdpo,
    step_dpo,
    svpo,
    tpo_tree,
)
from alignax.losses.supervised import sft
from alignax.losses.tokenwise import tdpo, tdpo1
from alignax.losses.trajectories import cpl, cpl_kl, d3po, prdp
from alignax.losses.unlearning import (
    grad_diff,
    grad_diff_kl,
    npo,
    simnpo,
    unlikelihood,
    unlikelihood_sequence,
    unlikelihood_token,
)
from alignax.losses.weighted import bmc, sparse_po, sparse_po_common, sparse_po_mapo
from alignax.types import ConfigError

_METHODS = (
    dpo, cdpo, robust_dpo, ipo, ln_dpo, odpo, h_dpo, dpo_shift, flex_dpo, sft_dpo, rpo, r_dpo, dpop, f_dpo, cal_dpo,
    apo_zero, apo_down, exo, discopop, wpo, aot, beta_dpo, plackett_luce,
    self_supervised_po,
    rso_hinge_norm, ilr_dpo, rdpo_refined, sequential_po, sr_dpo, sr_ipo, lcpo, relative_po,
    chi_po, squared_po, dr_dpo, c2_dpo, focal_po, minor_dpo, bpo_balanced, gpo, rpo_reward_aware, rebel, kto_pair,
    mpo_mixed_loss,
    ld_dpo, sampo, conf_po, conf_po_dpo, humanline, span_dpo,
    sft, dft,
    simpo, alpha_po, orpo, asft, cpo, slic_hf, typo, alpha_dpo, simper, mapo_margin, tpo_triple, tpo_l,
    kto, nca, info_nca, apo_zero_unpaired, bco, sppo, sppo_hard,
    exo_list, lipo, rrhf, pro, aft, aft_ranking,
    tdpo, tdpo1, sparse_po, sparse_po_common, sparse_po_mapo, bmc,
    step_dpo, scdpo, svpo, sdpo, dmpo, multi_turn_dpo, m_kto, per_step_advantage, tpo_tree,
    oreo, oreo_step, oreo_response, ilql, ilql_mc_returns, imagined_conversations,
    a_lol, a_lol_seq, a_lol_ref_free, a_lol_kl, a_lol_gold,
    phf_filtering, phf_unlikelihood, phf_rwr, phf_awr,
    cpl, cpl_kl, d3po, prdp,
    npo, simnpo, grad_diff, grad_diff_kl, unlikelihood, unlikelihood_token, unlikelihood_sequence,
    bt_rm, bt_rm_list, implicit_prm, implicit_prm_dpo, dph, goal_conditioned_rm,
)  # fmt: skip


def build_index(functions: tuple[Callable, ...]) -> tuple[dict[str, Callable], dict[str, str]]:
    """({id: function}, {any accepted name: id}); ConfigError when two functions claim one name."""
    index, aliases = {}, {}
    for function in functions:
        info = getattr(function, "info", None)
        if info is None:
            raise ConfigError(f"{function.__module__}.{function.__name__} has no @method(...) above it")
        requests, _ = split_signature(function)
        if ("state" in requests) != (info.init_state is not None):
            raise ConfigError(f"loss {info.id!r}: requests {requests} but init_state = {info.init_state!r}; a loss "
                              "has both `state` and init_state, or neither")
        for name in {info.id, function.__name__}:
            if name in aliases:
                raise ConfigError(f"loss name {name!r} is claimed twice: by {aliases[name]!r} and {info.id!r}")
            aliases[name] = info.id
        index[info.id] = function
    return index, aliases


_index, _aliases = build_index(_METHODS)
INDEX: Mapping[str, Callable] = MappingProxyType(_index)
"""Method id -> function, in the order of the family files."""


def names() -> tuple[str, ...]:
    """The ids of all losses."""
    return tuple(INDEX)


def _resolve(name: str) -> str:
    if name in _aliases:
        return _aliases[name]
    close = difflib.get_close_matches(str(name), [*_aliases, COMPOSE], n=3, cutoff=0.5)
    legal = close + [known for known in [*sorted(INDEX), COMPOSE, SUM] if known not in close]
    hint = f" (did you mean {', '.join(close)}?)" if close else ""
    raise ConfigError(f"loss = {name!r}{hint}; allowed: {', '.join(legal)}")


def defaults(name: str) -> dict[str, Any]:
    """The hyper-parameters of a loss with their defaults, for `compose` all keys; ConfigError for an unknown name."""
    return composed_defaults() if name == COMPOSE else split_signature(INDEX[_resolve(name)])[1]


def get(name: str, **hyper: Any) -> Loss:
    """The loss `name` (a method id or its function's name) with `hyper` over the defaults.

    `compose` and `sum` are made from their hyper-parameters: those of `compose`, and `weights` and the parts' sections
    of `weighted_sum`. Raises ConfigError for an unknown name or key, a value whose type cannot stand for the default's,
    and a plain number outside the method's limits. Traced values are taken as they are.
    """
    if name == COMPOSE:
        return compose(**hyper)
    if name == SUM:
        return weighted_sum(hyper.pop("weights", {}), **hyper)
    return from_function(INDEX[_resolve(name)], **hyper)


def weighted_sum(weights: Mapping[str, float], **hyper: Mapping[str, Any]) -> Loss:
    """The loss sum over names of weights[name] times the loss `name`; hyper: name -> hyper-parameters of that loss.

        weighted_sum({"dpo": 1.0, "sft": 0.2}, dpo={"beta": 0.2})

    Terms and metrics are named `dpo.loss`, `sft.nll`, hyper-parameters `weights.sft`, `dpo.beta`; see composed.add_up.
    Raises ConfigError for an unknown loss or key, no losses at all, and hyper-parameters of a loss that has no weight.
    """
    bare = [name for name in hyper if name not in weights]
    if bare:
        raise ConfigError(f"loss {SUM!r}: {', '.join(bare)} has no weight; allowed: {', '.join(weights) or 'none'}")
    return add_up({name: get(name, **dict(hyper.get(name, {}))) for name in weights}, weights)


def section(name: str, **hyper: Any) -> dict[str, Any]:
    """`{name, **hyper-parameters}` of a loss with every legal key, `hyper` over the defaults: what a config holds.

    name: as for `get`, or a sum as `dpo+0.2*sft`, whose section is `name`, `weights` and one section for each part.
    `from_section` turns it back. Raises ConfigError as `get`.
    """
    weights = parse_sum(name)
    if weights is None and name != SUM:
        loss = get(name, **hyper)
        return {"name": name, **({**defaults(COMPOSE), **hyper} if name == COMPOSE else loss.hyper)}
    weights = dict(hyper.pop("weights", {})) if weights is None else {**weights, **dict(hyper.pop("weights", {}))}
    weighted_sum(weights, **hyper)
    parts = {part: section(part, **dict(hyper.get(part, {}))) for part in weights}
    return {"name": SUM, "weights": weights, **{part: {k: v for k, v in own.items() if k != "name"}
                                                for part, own in parts.items()}}


def from_section(section: Mapping[str, Any]) -> Loss:
    """The loss of a config's section; ConfigError as `get`."""
    return get(section["name"], **{key: value for key, value in section.items() if key != "name"})
