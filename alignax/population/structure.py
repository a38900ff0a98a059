"""Which members may share a program, and which stages they share altogether; told from configs alone."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from alignax import configs, optim
from alignax.types import ConfigError

SEEDS = ("shared", "own")
NUMBER = "<number>"  # what stands for a number that may differ inside one program


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a population. config: resolved. folder: where its results go, as `alignax train` would leave them."""

    name: str
    config: ConfigDict
    folder: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Base:
    """Stages that several members share and that run once. config: of those stages alone; members: who shares them."""

    config: ConfigDict
    members: tuple[str, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        """Its stages in order."""
        return tuple(self.config.stages)


def signature(plain: Mapping[str, Any], stage: str) -> str:
    """What has to be equal for two members to train a stage in one program; `plain`: a member's config as JSON.

    Open are the seed, and with it the order of the data and the random draws, the float hyper-parameters of the loss,
    the numbers of the optimiser (optim.TRACED), and everything about other stages.
    """
    section = dict(plain[stage])
    held = optim.numbers(section["optim"])
    optimizer = {k: NUMBER if k in held else v for k, v in section["optim"].items() if k != "options"}
    optimizer["options"] = {k: NUMBER if k in held else v for k, v in section["optim"]["options"].items()}
    run = {k: plain[k] for k in configs.base() if k in plain and k not in ("seed", "stages", "profile_steps")}
    return _key([run, section | {"loss": without_numbers(section["loss"]), "optim": optimizer}])


def seedless(plain: Mapping[str, Any]) -> str:
    """What is equal for members that differ in the seed only; plain: a member's config as JSON."""
    return _key({key: value for key, value in plain.items() if key != "seed"})


def without_numbers(section: Any) -> Any:
    """A loss's section with NUMBER for every float, which travels as an argument."""
    if isinstance(section, Mapping):
        return {key: without_numbers(value) for key, value in section.items()}
    return NUMBER if isinstance(section, float) else section


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def groups(members: Iterable[Any]) -> list[list[str]]:
    """Names of the members by groups that can train together: those whose train stages are all alike in structure.

    Stages that a group shares with others, and what the data decide (unequal numbers of steps), may regroup them.
    """
    found = defaultdict(list)
    for one in members:
        config = configs.staged(one.config)
        plain = configs.plain_of(config)
        key = [signature(plain, s) if plain[s]["kind"] == "train" else _key(plain[s]) for s in plain["stages"]]
        found[_key(key)].append(one.name)
    return list(found.values())


def bases(members: Sequence[Any], *, seeds: str = "shared") -> list[Base]:
    """The stages that members share, shortest first: equal settings of the run and of every stage up to there.

    seeds=shared: members that differ in the seed share stages all the same, which run with their lowest seed. Members
    that differ in nothing but the seed share what comes before the last stage that they train, or what lies up to their
    last sample stage. seeds=own: equal seeds are needed, so that every member is what it would be alone.
    Raises ConfigError for another value of seeds.
    """
    if seeds not in SEEDS:
        raise ConfigError(f"seeds={seeds!r}; allowed: {', '.join(SEEDS)}")
    chains, whole, plains = {}, {}, {}
    for one in members:
        config = configs.staged(one.config)
        plain = plains[one.name] = configs.plain_of(config)
        run = {k: plain[k] for k in configs.base() if k in plain and k not in ("seed", "stages")}
        run |= {"seed": plain["seed"]} if seeds == "own" else {}
        names = plain["stages"]
        chains[one.name] = [_key([run, [(s, plain[s]) for s in names[:i + 1]]]) for i in range(len(names))]
        whole[one.name] = chains[one.name][-1]
    # Every setting counts once, however many seeds it has.
    counts = Counter(key for last in set(whole.values())
                     for key in next(chains[name] for name in whole if whole[name] == last))
    copies = Counter(whole.values())
    shared = defaultdict(list)
    for one in members:
        plain, keys = plains[one.name], chains[one.name]
        length = sum(counts[key] > 1 for key in keys)
        if copies[whole[one.name]] > 1:
            length = max(length, _before_training(plain))
        if length:
            shared[keys[length - 1]].append((one, length))
    out = []
    for sharing in shared.values():
        first, length = min(sharing, key=lambda pair: plains[pair[0].name]["seed"])
        config = configs.staged(first.config)
        kept = {k: config[k] for k in config if k in configs.base()}
        kept |= {s: config[s] for s in plains[first.name]["stages"][:length]}
        made = ConfigDict(kept)
        made.stages = tuple(plains[first.name]["stages"][:length])
        made.profile_steps = (0, 0)
        out.append(Base(made, tuple(one.name for one, _ in sharing)))
    return sorted(out, key=lambda base: len(base.stages))


def _before_training(plain: Mapping[str, Any]) -> int:
    """How many stages lie before what members of different seeds train: up to the last sample stage, else up to the
    last train stage, which is left out."""
    kinds = [plain[s]["kind"] for s in plain["stages"]]
    if "sample" in kinds:
        return len(kinds) - kinds[::-1].index("sample")
    return len(kinds) - 1 - kinds[::-1].index("train") if "train" in kinds else 0
