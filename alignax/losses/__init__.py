"""The index of losses. A loss is a pure function: positional names are requests, keyword names hyper-parameters.

Adding one: write the function in its family file under `@method(...)`, import it here, list it in `_METHODS`.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

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
from alignax.losses.info import MethodInfo
from alignax.losses.inputs import sums
from alignax.losses.listwise import aft, aft_ranking, exo_list, lipo, pro, rrhf
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
from alignax.losses.pointwise import apo_zero_unpaired, bco, info_nca, kto, nca, sppo, sppo_hard
from alignax.losses.reward import bt_rm, bt_rm_list
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
from alignax.types import REQUESTS, ConfigError, Terms

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
    tdpo, tdpo1,
    cpl, cpl_kl, d3po, prdp,
    npo, simnpo, grad_diff, grad_diff_kl, unlikelihood, unlikelihood_token, unlikelihood_sequence,
    bt_rm, bt_rm_list,
)  # fmt: skip


def split_signature(function: Callable) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(requests, hyper-parameter defaults) of a loss.

    Raises ConfigError when a positional name is no request, a hyper-parameter has no default, or *args appear.
    """
    requests, hyper = [], {}
    for name, parameter in inspect.signature(function).parameters.items():
        where = f"{function.__module__}.{function.__name__}"
        if parameter.kind is parameter.KEYWORD_ONLY:
            if parameter.default is parameter.empty:
                raise ConfigError(f"{where}: hyper-parameter {name!r} has no default")
            hyper[name] = parameter.default
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name in REQUESTS:
            requests.append(name)
        else:
            raise ConfigError(f"{where}: positional argument {name!r} is not a request; "
                              f"allowed: {', '.join(sorted(REQUESTS))}")
    return tuple(requests), hyper


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
    close = difflib.get_close_matches(str(name), list(_aliases), n=3, cutoff=0.5)
    legal = close + [known for known in sorted(INDEX) if known not in close]
    hint = f" (did you mean {', '.join(close)}?)" if close else ""
    raise ConfigError(f"loss = {name!r}{hint}; allowed: {', '.join(legal)}")


def defaults(name: str) -> dict[str, Any]:
    """The hyper-parameters of a loss with their defaults; ConfigError for an unknown name."""
    return split_signature(INDEX[_resolve(name)])[1]


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity, so that `jax.jit(loss)` works
class Loss:
    """A loss with its hyper-parameters resolved.

    name: method id. fn: the pure function. requests: positional names, in order. hyper: every hyper-parameter.
    """

    name: str
    fn: Callable
    requests: tuple[str, ...]
    hyper: Mapping[str, Any]
    info: MethodInfo

    def __call__(self, inputs: Mapping[str, Any], **override: Any) -> jax.Array | Terms:
        """Evaluate on a mapping of request arrays; extra entries are ignored.

        override: hyper-parameters for this call, may be traced. Raises ConfigError for a missing input or an unknown
        override, TypeError when a sum over tokens comes as bfloat16 or float16.
        """
        missing = [name for name in self.requests if name not in inputs]
        if missing:
            raise ConfigError(f"loss {self.name!r}: inputs lack {', '.join(missing)}; found {sorted(inputs)}")
        _check_keys(self.name, override, self.hyper)
        for name in self.requests:
            request = REQUESTS[name]
            if request.axes == "BK" and request.provider in ("policy", "reference"):
                sums(f"loss {self.name!r}: {name}", inputs[name])
        return self.fn(*(inputs[name] for name in self.requests), **{**self.hyper, **override})

    def init_state(self) -> Any:
        """The running state before the first update; None for a loss without one."""
        return None if self.info.init_state is None else self.info.init_state()


def _check_keys(name: str, given: Mapping[str, Any], legal: Mapping[str, Any]) -> None:
    unknown = [key for key in given if key not in legal]
    if unknown:
        close = [m for key in unknown for m in difflib.get_close_matches(key, list(legal), n=1)]
        hint = f" (did you mean {', '.join(close)}?)" if close else ""
        raise ConfigError(f"loss {name!r}: unknown hyper-parameter {', '.join(unknown)}{hint}; "
                          f"allowed: {', '.join(legal) or 'none'}")


def get(name: str, **hyper: Any) -> Loss:
    """The loss `name` (a method id or its function's name) with `hyper` over the defaults.

    Raises ConfigError for an unknown name or key, a value whose type cannot stand for the default's, and a plain
    number outside the method's limits. Traced values are taken as they are.
    """
    id = _resolve(name)
    function = INDEX[id]
    requests, resolved = split_signature(function)
    _check_keys(id, hyper, resolved)
    for key, value in hyper.items():
        default = resolved[key]
        static = isinstance(default, (bool, str))
        if (static and not isinstance(value, type(default))) or (not static and isinstance(value, (bool, str))):
            kind = type(default).__name__
            raise ConfigError(f"loss {id!r}: {key} = {value!r} is {type(value).__name__}; allowed: {kind}")
        low, high = function.info.limits.get(key, (-float("inf"), float("inf")))
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise ConfigError(f"loss {id!r}: {key} = {value!r}; allowed: {low} to {high}")
    return Loss(id, function, requests, {**resolved, **hyper}, function.info)
