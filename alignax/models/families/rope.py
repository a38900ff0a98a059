"""Rotary settings of config.json, in the spelling of transformers 5 and in the older one.

transformers 5 keeps `rope_parameters` (with rope_type, rope_theta, partial_rotary_factor and the scaling's numbers,
for Gemma 3 once per kind of layer); older releases keep `rope_theta`, `rope_scaling` and a partial factor beside each
other. Both may be present when they agree.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from alignax.models.config import DecoderConfig, RopeScaling
from alignax.models.families.settings import Settings

_KEYS = {
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate"},
}


class Rope(NamedTuple):
    """What config.json says of rotary positions: base, scaling, and the share of a head that turns."""

    theta: float
    scaling: RopeScaling | None
    partial: float


def _one(settings: Settings, values: dict[str, Any], key: str, default: float) -> float:
    """The one value that several spellings give; refused where they disagree."""
    found = {float(value) for value in values.values() if value is not None}
    if len(found) > 1:
        settings.refuse(key, sorted(found), f"one value in {' and '.join(sorted(values))}")
    return found.pop() if found else default


def _scaling(settings: Settings, key: str, found: dict[str, Any], max_positions: int) -> RopeScaling | None:
    """The RopeScaling that a rope dict describes; refuses types and keys that the decoder does not compute."""
    kind = found.get("rope_type", found.get("type", "default"))
    if kind in (None, "default"):
        extra = set(found) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if extra:
            settings.refuse(key, found, "the keys rope_type, rope_theta and partial_rotary_factor only, with rope_type "
                            "'default'")
        return None
    if kind not in _KEYS:
        settings.refuse(key, found, f"rope_type 'default', {', '.join(map(repr, _KEYS))} ('dynamic' and 'longrope' "
                        "make a token's rotation depend on the length of its batch, so they are not computed)")
    extra = set(found) - _KEYS[kind] - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if extra or not isinstance(found.get("factor"), (int, float)):
        settings.refuse(key, found, f"rope_type {kind!r} with a number for factor and of the other keys only "
                        f"{', '.join(sorted(_KEYS[kind] - {'factor'})) or 'none'}")
    given = {name: found[name] for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate")
             if found.get(name) is not None}
    if kind == "llama3" and not {"low_freq_factor", "high_freq_factor"} <= given.keys():
        settings.refuse(key, found, "low_freq_factor and high_freq_factor with rope_type 'llama3'")
    if kind != "linear":
        given["original_max_positions"] = found.get("original_max_position_embeddings") or max_positions
    if kind == "yarn":
        given["attention_factor"] = _yarn_attention(found)
    return RopeScaling(kind, float(found["factor"]), **{
        name: float(value) if isinstance(value, int) and name not in ("truncate", "original_max_positions") else value
        for name, value in given.items()})


def _yarn_attention(found: dict[str, Any]) -> float:
    """YaRN's factor on cos and sin (arXiv 2309.00071, 0.1 ln s + 1), or the ratio of its two weighted forms."""
    if found.get("attention_factor") is not None:
        return float(found["attention_factor"])
    weigh = lambda weight: 1.0 if found["factor"] <= 1 else 0.1 * weight * math.log(found["factor"]) + 1.0
    if found.get("mscale") and found.get("mscale_all_dim"):
        return weigh(found["mscale"]) / weigh(found["mscale_all_dim"])
    return weigh(1.0)


def read_rope(settings: Settings, max_positions: int, *, theta: float = 10000.0, theta_key: str = "rope_theta",
              partial_key: str = "partial_rotary_factor", partial: float = 1.0) -> Rope:
    """The rotary settings of a family with one kind of rotation. theta, partial: what absent keys mean; theta_key,
    partial_key: what the older spelling calls them."""
    thetas, partials, scalings = {theta_key: settings.get(theta_key)}, {partial_key: settings.get(partial_key)}, {}
    for key in ("rope_scaling", "rope_parameters"):
        found = settings.get(key)
        if found is None:
            continue
        if not isinstance(found, dict):
            settings.refuse(key, found, "null or an object")
        scalings[key] = _scaling(settings, key, found, max_positions)
        thetas[key], partials[key] = found.get("rope_theta"), found.get("partial_rotary_factor")
    if len(set(scalings.values())) > 1:
        settings.refuse("rope_scaling", settings.raw["rope_scaling"], "the same scaling as rope_parameters")
    return Rope(_one(settings, thetas, "rope_theta", theta), next(iter(scalings.values()), None),
                _one(settings, partials, partial_key, partial))


def read_layered_rope(settings: Settings, max_positions: int, *, theta: float, local_theta: float) -> tuple[Rope, Rope]:
    """(of the layers that read everything, of the layers with a window) for a family with two kinds of rotation."""
    nested = settings.get("rope_parameters", {})
    kinds = {"full_attention", "sliding_attention"}
    if not isinstance(nested, dict) or set(nested) - kinds:
        settings.refuse("rope_parameters", nested, f"null or an object with the keys {' and '.join(sorted(kinds))}")
    both = []
    for kind, old_theta, default, scaled in (("full_attention", "rope_theta", theta, True),
                                             ("sliding_attention", "rope_local_base_freq", local_theta, False)):
        new = nested.get(kind) or {}
        old = (settings.get("rope_scaling") or {}) if scaled else {}
        found = [_scaling(settings, key, value, max_positions)
                 for key, value in (("rope_parameters", new), ("rope_scaling", old)) if value]
        if len(set(found)) > 1:
            settings.refuse("rope_scaling", old, "the same scaling as rope_parameters")
        thetas = {old_theta: settings.get(old_theta), f"rope_parameters.{kind}": new.get("rope_theta")}
        both.append(Rope(_one(settings, thetas, old_theta, default), found[0] if found else None, 1.0))
        if new.get("partial_rotary_factor", 1.0) != 1.0 or (not scaled and both[-1].scaling):
            settings.refuse("rope_parameters", nested, f"{kind} without partial_rotary_factor"
                            + ("" if scaled else " and unscaled"))
    return both[0], both[1]


def scaling_dict(scaling: RopeScaling | None) -> dict[str, Any]:
    """The rope_type and numbers that both spellings store."""
    if scaling is None:
        return {"rope_type": "default"}
    out = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        out["original_max_position_embeddings"] = scaling.original_max_positions
    names = {"linear": (), "llama3": ("low_freq_factor", "high_freq_factor"),
             "yarn": ("attention_factor", "beta_fast", "beta_slow", "truncate")}[scaling.kind]
    return out | {name: getattr(scaling, name) for name in names}


def write_rope(config: DecoderConfig, *, theta_key: str = "rope_theta") -> dict[str, Any]:
    """Both spellings, for a family with one kind of rotation."""
    scaling = scaling_dict(config.rope_scaling)
    out = {theta_key: config.rope_theta, "rope_scaling": None if config.rope_scaling is None else scaling,
           "rope_parameters": scaling | {"rope_theta": config.rope_theta}}
    return out
