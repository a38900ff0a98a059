"""Losses made of parts, and weighted sums of losses. Both are a `Loss` like any other: requests, hyper-parameters,
state and laws follow from what they are made of. In a config they are the losses named `compose` and `sum`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from alignax.losses.info import MethodInfo
from alignax.losses.inputs import pair
from alignax.losses.loss import Loss, check_keys, check_values
from alignax.losses.parts import INIT_STATE, KINDS, LIMITS, NONE, STATIC, Piece
from alignax.ops.reductions import as_terms
from alignax.types import REQUESTS, ConfigError, Term, Terms

COMPOSE, SUM = "compose", "sum"
OWN = {"beta": 0.1, "rejected_scale": 1.0, "preference_weight": 1.0}
"""Hyper-parameters of every composed loss: m = beta (r_w - rejected_scale r_l) - offset, and the link's scale."""

CHOICES = {"reward": "log_ratio", "link": "logistic", "offset": NONE, "weight": NONE, "extra": NONE}
"""The parts of a composed loss that names none: DPO."""


def _signature(part: Callable) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(requests, hyper-parameters with their defaults) of a part; a link's margin is neither."""
    known = inspect.signature(part).parameters.values()
    return (tuple(p.name for p in known if p.kind is p.POSITIONAL_OR_KEYWORD and p.name in REQUESTS),
            {p.name: p.default for p in known if p.kind is p.KEYWORD_ONLY})


def users() -> dict[str, list[str]]:
    """Hyper-parameter -> the parts that have it, as `kind name`."""
    out: dict[str, list[str]] = {}
    for kind, table in KINDS.items():
        for name, part in table.items():
            for key in _signature(part)[1]:
                out.setdefault(key, []).append(f"{kind} {name}")
    return out


def defaults() -> dict[str, Any]:
    """Every key of a composed loss with its default: the five parts, then all hyper-parameters of all parts."""
    out = {**CHOICES, **OWN}
    for table in KINDS.values():
        for part in table.values():
            for key, value in _signature(part)[1].items():
                out.setdefault(key, value)
    return out


def _choose(kind: str, name: str) -> Callable | None:
    """The part, or None for `none`; ConfigError with the legal names."""
    table = KINDS[kind]
    legal = [*table] if CHOICES[kind] != NONE else [NONE, *table]
    if name not in legal:
        near = difflib.get_close_matches(str(name), legal, n=2, cutoff=0.5)
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        raise ConfigError(f"loss {COMPOSE!r}: {kind} = {name!r}{hint}; allowed: {', '.join(legal)}")
    return table.get(name)


def _resolve(chosen: Mapping[str, Callable], hyper: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters that the chosen parts have; ConfigError for others that differ from their default."""
    every = {key: value for key, value in defaults().items() if key not in CHOICES}
    check_keys(COMPOSE, hyper, every)
    used = dict(OWN)
    limits: dict[str, tuple[float, float]] = {}
    for part in chosen.values():
        used |= {key: value for key, value in _signature(part)[1].items() if key not in OWN}
        limits |= LIMITS.get(part, {})
    check_values(COMPOSE, hyper, every, limits)
    for key, value in hyper.items():
        # A config holds the keys of all parts, so one at its default says nothing.
        if key not in used and not (isinstance(value, type(every[key])) and value == every[key]):
            raise ConfigError(f"loss {COMPOSE!r}: {key} = {value!r} has no effect with "
                              f"{', '.join(f'{k}={p.__name__}' for k, p in chosen.items())}; it belongs to "
                              f"{', '.join(users()[key])}")
        if key in used and key in STATIC and value not in STATIC[key]:
            raise ConfigError(f"loss {COMPOSE!r}: {key} = {value!r}; allowed: {', '.join(STATIC[key])}")
    return {key: hyper.get(key, value) for key, value in used.items()}


def compose(*, reward: str = "log_ratio", link: str = "logistic", offset: str = NONE, weight: str = NONE,
            extra: str = NONE, **hyper: Any) -> Loss:
    """A pair loss from parts by name (alignax/losses/parts.py tells each one's formula, hyper-parameters and origin).

    m = beta (r(chosen) - rejected_scale r(rejected)) - offset; the term `preference` is weight times link(m), scaled by
    preference_weight, and the term named `extra` is added. Hyper-parameters keep one default each, whatever they are
    combined with (beta 0.1: set 1 for IPO, SLiC and ORPO); losses.defaults("compose") lists all.

        compose(reward="mean_logp", offset="constant", beta=2.0)                    # SimPO
        compose(link="square", beta=1.0, offset="lengths", length_alpha=0.05)       # IPO that discounts length

    State, where a part has one, is {kind of the part: its state}. Raises ConfigError for an unknown part or key, for a
    hyper-parameter that no chosen part has and that differs from its default, and for a value outside its limits.
    """
    names = {"reward": reward, "link": link, "offset": offset, "weight": weight, "extra": extra}
    chosen = {kind: part for kind, name in names.items() if (part := _choose(kind, name)) is not None}
    resolved = _resolve(chosen, hyper)
    needs = {kind: _signature(part) for kind, part in chosen.items()}
    requests = tuple(dict.fromkeys(name for kind in needs for name in needs[kind][0]))
    stateful = {kind: INIT_STATE[part] for kind, part in chosen.items() if part in INIT_STATE}

    def evaluate(*arrays, **given):
        inputs = dict(zip(requests, arrays, strict=True))
        state, new_state, metrics = inputs.get("state"), {}, {}

        def run(kind: str, *first) -> Piece:
            own = {**inputs, "state": state[kind]} if kind in stateful else inputs
            out = chosen[kind](*first, *(own[name] for name in needs[kind][0]),
                               **{key: given[key] for key in needs[kind][1]})
            out = out if isinstance(out, Piece) else Piece(out)
            if kind in stateful:
                new_state[kind] = out.new_state
            metrics.update(out.metrics)
            return out

        better, worse = pair(reward, run("reward").values)
        margin = given["beta"] * (better - given["rejected_scale"] * worse)
        kept = 1.0
        if "offset" in chosen:
            taken = run("offset")
            margin, kept = margin - taken.values, taken.weight
        values = run("link", margin).values
        if "weight" in chosen:
            factor = run("weight")
            values, kept = factor.values * values, kept * factor.weight
        terms = {"preference": Term(values, kept, scale=given["preference_weight"])}
        if "extra" in chosen:
            terms[extra] = run("extra").values
        return Terms(terms, new_state or None, metrics)

    words = " + ".join(f"{kind} {part.__name__}" for kind, part in chosen.items())
    init = (lambda: {kind: make() for kind, make in stateful.items()}) if stateful else None
    info = MethodInfo(COMPOSE, f"Composed pair loss: {words}", "", "reconstruction", couples_batch=bool(stateful),
                      completions=2, init_state=init)
    return Loss(COMPOSE, evaluate, requests, resolved, info)


def add_up(losses: Mapping[str, Loss], weights: Mapping[str, Any]) -> Loss:
    """sum over parts of weights[name] * losses[name]; terms, metrics and hyper-parameters are prefixed `name.`.

    hyper: `weights.NAME` and `NAME.KEY`. State: {name: its state} of the parts that have one. A part that trains on the
    chosen completion only sees completion 0 of each prompt. Parts that draw get keys of their own. Raises ConfigError
    for no parts, and for parts that need different numbers of completions.
    """
    if not losses:
        raise ConfigError(f"loss {SUM!r}: no parts; give weights, as {{'dpo': 1.0, 'sft': 0.2}} or dpo+0.2*sft")
    sizes = {name: loss.info.completions for name, loss in losses.items()
             if loss.info.completions is not None and not loss.info.chosen_only}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(f"loss {SUM!r}: its parts need different numbers of completions: {found}")
    requests = tuple(dict.fromkeys(request for loss in losses.values() for request in loss.requests))
    hyper = {f"weights.{name}": float(weights[name]) for name in losses}
    for name, loss in losses.items():
        hyper |= {f"{name}.{key}": value for key, value in loss.hyper.items()}
    stateful = [name for name, loss in losses.items() if "state" in loss.requests]
    drawing = [name for name, loss in losses.items() if "key" in loss.requests]

    def evaluate(*arrays, **given):
        inputs = dict(zip(requests, arrays, strict=True))
        terms, new_state, metrics = {}, {}, {}
        for name, loss in losses.items():
            own = {request: _first(request, inputs[request]) if loss.info.chosen_only else inputs[request]
                   for request in loss.requests}
            if name in stateful:
                own["state"] = inputs["state"][name]
            if name in drawing and (number := drawing.index(name)):
                own["key"] = jax.random.fold_in(inputs["key"], number)
            out = loss(own, **{key: given[f"{name}.{key}"] for key in loss.hyper})
            for term, value in as_terms(out).items():
                terms[f"{name}.{term}"] = value._replace(scale=given[f"weights.{name}"] * value.scale)
            if name in stateful:
                changed = getattr(out, "new_state", None)
                new_state[name] = own["state"] if changed is None else changed
            metrics |= {f"{name}.{key}": value for key, value in getattr(out, "metrics", {}).items()}
        return Terms(terms, new_state or None, metrics)

    every = [loss.info for loss in losses.values()]
    init = (lambda: {name: losses[name].init_state() for name in stateful}) if stateful else None
    info = MethodInfo(SUM, "Weighted sum of " + ", ".join(losses), "", "reconstruction",
                      couples_batch=any(i.couples_batch for i in every), completions=next(iter(sizes.values()), None),
                      init_state=init, chosen_only=all(i.chosen_only for i in every))
    return Loss(SUM, evaluate, requests, hyper, info)


def _first(request: str, value: Any) -> Any:
    """Completion 0 alone, of what has an axis of completions."""
    row = REQUESTS[request]
    return value[:, :1] if row.axes.startswith("BK") and row.stream == "pair" else value


def parse_sum(name: str) -> dict[str, float] | None:
    """`dpo+0.2*sft` -> {"dpo": 1.0, "sft": 0.2}; None for a name that is no such sum. ConfigError for a broken one."""
    if "+" not in name and "*" not in name:
        return None
    out: dict[str, float] = {}
    for piece in name.split("+"):
        head, star, tail = piece.rpartition("*")
        try:
            number = float(head) if star else 1.0
        except ValueError:
            raise ConfigError(f"loss = {name!r}: {head!r} is no number; expected weight*loss, as dpo+0.2*sft") from None
        if not tail.strip() or tail.strip() in out:
            raise ConfigError(f"loss = {name!r}: {piece!r} names no loss, or one twice; expected dpo+0.2*sft")
        out[tail.strip()] = number
    return out
