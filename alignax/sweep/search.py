"""Members that optuna chooses: numbered trials, asked for in batches and told what they came to.

A config file says what is searched in a function beside `get_config`:

    def search(trial):
        return {"method.loss.beta": trial.suggest_float("beta", 0.03, 1.0, log=True)}

Nothing is kept but the trials themselves, in the sweep's plan, and the table of results: every batch is asked from a
study that is made of those, with a sampler (optuna's TPE) seeded by how many there are. A search that was interrupted
therefore asks for what it would have asked for.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignax.sweep.algebra import Point, collect
from alignax.types import ConfigError

MODES = ("min", "max")
_TRIES = 64  # draws in a row of settings that are known already, before a space counts as used up


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched for. metric: a number of results.jsonl, mode: min or max; at_once: trials of a batch."""

    metric: str
    mode: str
    at_once: int
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial. params, distributions (JSON): as optuna has them; settings: what they set in the config."""

    params: Mapping[str, Any]
    distributions: Mapping[str, str]
    settings: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """What the sweep's plan holds of it."""
        return dataclasses.asdict(self)


def points(trials: Sequence[Trial]) -> list[Point]:
    """The points of a sweep, named by the trials' numbers."""
    return [Point(trial.settings, f"{number:04d}") for number, trial in enumerate(trials)]


def check(function: Callable[[Any], Mapping[str, Any]], trials: Sequence[Trial]) -> None:
    """Refuses trials that `function` no longer makes: ConfigError with what differs."""
    optuna = _optuna()
    for number, trial in enumerate(trials):
        where = f"trial {number:04d}"
        fixed = optuna.trial.FixedTrial(dict(trial.params))
        try:
            settings = _settings(function, fixed, where)
        except ValueError as error:  # a name that the trial does not have; a ConfigError is one too
            raise ConfigError(f"search(trial) of the config file has changed since {where}: {error}") from error
        found = Trial(dict(fixed.params), _texts(optuna, fixed.distributions), settings).record()
        old, new = (json.loads(json.dumps(record)) for record in (trial.record(), found))
        for key in ("params", "distributions", "settings"):
            if old[key] != new[key]:
                raise ConfigError(f"search(trial) of the config file has changed since {where}; choose another folder. "
                                  f"Stored {key} {old[key]}, now {new[key]}")


def ask(function: Callable[[Any], Mapping[str, Any]], search: Search, trials: Sequence[Trial],
        values: Sequence[float | str | None], count: int) -> list[Trial]:
    """Up to `count` further trials; fewer, or none, where the space seems to hold no other settings.

    values: of each trial, its metric, `dropped` where a rung dropped it (optuna counts it as worse than all others), or
    None where it failed or is not done (left out). Raises ConfigError without optuna, or for a function that returns no
    settings.
    """
    optuna = _optuna()
    with warnings.catch_warnings():  # in versions before 5, constant_liar is called experimental
        warnings.simplefilter("ignore")
        sampler = optuna.samplers.TPESampler(seed=search.seed + len(trials), constant_liar=True)
    study = optuna.create_study(direction={"min": "minimize", "max": "maximize"}[search.mode], sampler=sampler)
    states = optuna.trial.TrialState
    for trial, value in zip(trials, values, strict=True):
        known = isinstance(value, (int, float)) and math.isfinite(value)
        state = states.COMPLETE if known else states.PRUNED if value == "dropped" else states.FAIL
        spaces = {k: optuna.distributions.json_to_distribution(v) for k, v in trial.distributions.items()}
        study.add_trial(optuna.trial.create_trial(state=state, value=value if known else None,
                                                  params=dict(trial.params), distributions=spaces))
    seen = {json.dumps(dict(trial.settings), sort_keys=True) for trial in trials}
    out: list[Trial] = []
    tries = 0
    while len(out) < count and tries < _TRIES:
        asked = study.ask()
        settings = _settings(function, asked, f"trial {len(trials) + len(out):04d}")
        mark = json.dumps(settings, sort_keys=True)
        if mark in seen:
            study.tell(asked, state=states.FAIL)
            tries += 1
            continue
        tries = 0
        seen.add(mark)
        out.append(Trial(dict(asked.params), _texts(optuna, asked.distributions), settings))
    return out


def _settings(function: Callable[[Any], Mapping[str, Any]], trial: Any, where: str) -> dict[str, Any]:
    found = function(trial)
    if not isinstance(found, Mapping) or not found or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"search(trial), {where}: it returned {found!r}; expected a dict from a config's dotted keys "
                          "to values")
    return dict(collect(lambda add: add(**found))[0].settings)


def _texts(optuna: Any, distributions: Mapping[str, Any]) -> dict[str, str]:
    return {name: optuna.distributions.distribution_to_json(one) for name, one in distributions.items()}


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("--trials needs optuna: pip install 'alignax[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
