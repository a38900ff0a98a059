"""Runs of many members from their configs: shared stages once, train stages together, the rest together or one after
another.

A member's folder ends as `alignax train` would leave it (config.json, metrics.jsonl, stages/, result.json), so that
every command works on it; stages that it shares are links to the folder where they ran.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import queue
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console

from alignax import checkpoint, configs, context, memory, presence, sharding, stage_setup
from alignax import train as train_lib
from alignax.population import arrays, generation, rules, structure, training
from alignax.types import ConfigError, DataError

FOLDER = "population"
DROPPED = "dropped.json"
_RANKED = "ranked-"
_FAILED = "failed.json"


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a member: the contents of its result.json, or why there is none: it failed (`error`), or it was
    dropped at a rung (`dropped`: stage, step, metric, value, place among so many settings, evaluated, reason)."""

    summary: Mapping[str, Any] | None
    error: str = ""
    dropped: Mapping[str, Any] | None = None


@dataclasses.dataclass
class _Live:
    """A member on its way through its stages."""

    name: str
    config: ConfigDict
    plain: dict[str, Any]
    ctx: context.Context
    before: dict[str, str]
    results: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self.config.stages)

    def done(self, stage: str) -> pathlib.Path:
        return self.ctx.stage_dir(stage) / "done.json"


def run(members: Sequence[Any], workdir: pathlib.Path | str, *, console: Console | None = None, seeds: str = "shared",
        steps_per_call: int = 16, memory_limit: int | None = None, devices: Sequence[jax.Device] | None = None,
        ended: Callable[[str, Result], None] | None = None, halving: rules.Halving | None = None,
        early_stop: rules.EarlyStop | None = None, generate: str = "auto") -> dict[str, Result]:
    """Runs or resumes `members` (structure.Member, or anything with name, config and folder); name -> Result.

    workdir: for what they share: `<workdir>/population` holds the shared stages and the populations' checkpoints.
    seeds: whether members of different seeds share the stages before the first one that differs (`shared`: they run
    once, with the lowest seed) or not (`own`: every member is what it would be alone); see structure.bases.
    steps_per_call: the most updates in one call of the compiled program. memory_limit: bytes on one device; members
    that do not fit together are trained in rounds. devices: over which members are divided, all by default; every
    member is on one. ended: called with each member as soon as its result is written, it has failed or was dropped.
    halving: members that train a stage in one program are ranked at its rungs and the worse ones dropped; what a
    dropped member came to stands in its dropped.json. early_stop: ends the training of a member that gets no better;
    its later stages run. generate: whether sample and evaluate stages of members that draw alike run as one program
    too (`together`), or one after another on each device (`apart`); `auto`: see generation.is_together.

    A member that cannot work or diverges fails alone, and so do those of a program that runs out of memory with one
    member at a time. Raises ConfigError for what concerns all of them, and context.Preempted after SIGTERM, when
    everything is saved.
    """
    console = console or Console()
    workdir = pathlib.Path(workdir).absolute()
    if jax.process_count() > 1:
        raise ConfigError("a population runs in one process; members that need several run as `alignax train` each")
    names = [one.name for one in members]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"population: members={names}; allowed: one or more, each name once")
    if steps_per_call < 1:
        raise ConfigError(f"steps_per_call={steps_per_call}; allowed: 1 or more")
    structure.bases((), seeds=seeds)  # refuses another rule before anything is written
    generation.check_mode(generate)
    for name, rule in (("halving", halving), ("early_stop", early_stop)):
        for plain in (configs.plain_of(configs.staged(one.config)) for one in members if rule):
            rules.check(rule, plain, name)
    home = workdir / FOLDER
    home.mkdir(parents=True, exist_ok=True)
    devices = list(jax.devices() if devices is None else devices)
    engine = _Engine(home, console, devices, steps_per_call, memory_limit, ended, halving, early_stop,
                     generation.is_together(generate, devices[0].platform))
    with contextlib.ExitStack() as held:
        if note := held.enter_context(presence.locked(home)):
            console.print(note, markup=False)
        for one in members:
            engine.open(one)
        working = [one for one in members if not (one.name in engine.results and engine.results[one.name].error)]
        engine.share(structure.bases(working, seeds=seeds))
        with engine.stop.listening(), jax.default_device(engine.device):
            engine.go()
    return {name: engine.results[name] for name in names}


class _Engine:
    """The members that are still to run, and what they share."""

    def __init__(self, home: pathlib.Path, console: Console, devices: list[jax.Device], steps_per_call: int,
                 memory_limit: int | None, ended, halving: rules.Halving | None, early_stop: rules.EarlyStop | None,
                 together: bool):
        self.home, self.console, self.devices, self.device = home, console, devices, devices[0]
        self.mesh = arrays.make_mesh(devices)
        self.settings = dict(steps_per_call=steps_per_call, memory_limit=memory_limit)
        self.stop, self.ended = context.Stop(), ended
        self.halving, self.early_stop, self.together = halving, early_stop, together
        self.live: dict[str, _Live] = {}
        self.results: dict[str, Result] = {}
        self._contexts: dict[str, context.Context] = {}
        self._checked: dict[str, dict[str, str]] = {}
        self._starts: dict[Any, Any] = {}
        self._records: dict[str, Any] = {}
        self._sums: dict[Any, Any] = {}
        self._bases: dict[pathlib.Path, dict] = {}
        self._drawn: dict[Any, Any] = {}  # the baselines' samples

    def settle(self, name: str, result: Result) -> None:
        """Notes how a member ended."""
        self.results[name] = result
        self.live.pop(name, None)
        if self.ended:
            self.ended(name, result)

    @contextlib.contextmanager
    def alone(self, name: str):
        """What goes wrong with a member inside the block ends this member only."""
        try:
            yield
        except (ConfigError, DataError, FloatingPointError) as error:
            self.settle(name, Result(None, str(error)))

    # Opening and sharing

    def open(self, one: Any) -> None:
        """Checks a member, claims its folder, and finds what of it is done."""
        with self.alone(one.name):
            config = configs.staged(one.config)
            configs.check(config)
            plain, folder = configs.plain_of(config), pathlib.Path(one.folder).absolute()
            train_lib.claim(folder, plain)
            if (done := folder / "result.json").exists():
                self.settle(one.name, Result(json.loads(done.read_text(encoding="utf-8"))))
                return
            if (gone := presence.read_json(folder / DROPPED)) is not None:
                self.settle(one.name, Result(None, dropped=gone))
                return
            _refuse(config)
            ctx = self._context(config, plain, folder)
            live = _Live(one.name, config, plain, ctx, self._check(ctx, config, plain))
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_json(folder / "config.json", plain)
            checkpoint.write_json(folder / "environment.json",
                                  context.environment() | {"attention": ctx.spec.attention})
            (folder / "figures").mkdir(exist_ok=True)
            self.live[one.name] = live

    def _context(self, config: ConfigDict, plain: Mapping[str, Any], folder: pathlib.Path) -> context.Context:
        """The member's context on one device; members of one model share its starting parameters."""
        seed = None if plain["model"]["path"] else plain["seed"]
        key = json.dumps([{k: plain[k] for k in ("model", "tokenizer", "text", "mesh")}, seed], sort_keys=True)
        if key not in self._contexts:
            self._contexts[key] = train_lib.make_context(config, folder, self.console, devices=[self.device])
        return dataclasses.replace(self._contexts[key], workdir=folder, seed=config.seed, stop=self.stop)

    def _check(self, ctx: context.Context, config: ConfigDict, plain: Mapping[str, Any]) -> dict[str, str]:
        """Stage -> the train stage before it; the checks of a run, once for all members of one structure."""
        key = json.dumps([structure.signature(plain, s) if plain[s]["kind"] == "train" else plain[s]
                          for s in plain["stages"]], sort_keys=True)
        if key not in self._checked:
            self._checked[key] = train_lib.check_stages(ctx, config, read=False)[0]
        return self._checked[key]

    def share(self, bases: Sequence[structure.Base]) -> None:
        """Runs the stages that members share, and links them into the members' folders."""
        for base in bases:
            waiting = [self.live[n] for n in base.members if n in self.live]
            if not any(not live.done(s).exists() for live in waiting for s in base.stages):
                continue
            plain = configs.plain_of(base.config)
            folder = self.home / f"base-{_short(plain)}"
            for earlier, known in self._bases.items():
                if _begins(plain, known) and not (folder / "config.json").exists():
                    checkpoint.write_json(folder / "config.json", plain)
                    _link(earlier, folder, known["stages"])
            self._bases[folder] = plain
            stages = ", ".join(base.stages)
            self.console.rule(f"[bold]{stages}[/] (shared by {len(waiting)} members)", align="left")
            try:
                # A run of its own would use the devices of an accelerator for one model; a CPU's are its cores anyway.
                own = [self.device] if self.device.platform == "cpu" else None
                train_lib.run(base.config, folder, console=self.console, devices=own)
            except (ConfigError, DataError, FloatingPointError) as error:
                for live in waiting:
                    self.settle(live.name, Result(None, f"shared stages {stages}: {error}"))
                continue
            for live in waiting:
                with self.alone(live.name):
                    _link(folder, live.ctx.workdir, base.stages)

    # Going on, stage by stage

    def go(self) -> None:
        """Takes all members through their stages, side by side."""
        for position in range(max((len(live.stages) for live in self.live.values()), default=0)):
            here = [live for live in list(self.live.values()) if position < len(live.stages)]
            train = [live for live in here if live.config[live.stages[position]].kind == "train"]
            self._train(position, [live for live in train if not self._read(live, position)])
            rest = [live for live in here if live not in train and live.name in self.live]
            self._apply_all(position, [live for live in rest if not self._read(live, position)])
            for live in here:
                if live.name in self.live and position == len(live.stages) - 1:
                    self._finish(live)

    def _read(self, live: _Live, position: int) -> bool:
        """Whether the stage is done, or failed for good, and what it left is taken over."""
        stage = live.stages[position]
        if live.done(stage).exists():
            live.results[stage] = json.loads(live.done(stage).read_text(encoding="utf-8"))
            return True
        failed = live.ctx.stage_dir(stage) / _FAILED
        if failed.exists():
            self.settle(live.name, Result(None, json.loads(failed.read_text(encoding="utf-8"))["error"]))
            return True
        return False

    def _apply_all(self, position: int, waiting: list[_Live]) -> None:
        """A stage that trains nothing, of all members: together where that is wanted and they draw alike, else one
        after another."""
        groups: dict[Any, list[tuple[_Live, generation.Stage]]] = defaultdict(list)
        for live in waiting if self.together else ():
            with self.alone(live.name):
                stage = self._asked(live, position)
                groups[generation.key_of(stage) or live.name].append((live, stage))
        for group in groups.values():
            if len(group) > 1:
                self._answer(group)
        left = [live for live in waiting if live.name in self.live and not live.done(live.stages[position]).exists()]
        self._one_by_one(position, left)

    def _asked(self, live: _Live, position: int) -> generation.Stage:
        """What the stage of one member draws."""
        name = live.stages[position]
        section = live.config[name]
        ctx = dataclasses.replace(live.ctx, console=Console(quiet=True))
        return generation.opened(ctx, name, section.kind, train_lib.settled(section, live.before[name]))

    def _answer(self, group: Sequence[tuple[_Live, generation.Stage]]) -> None:
        """Stages of members that draw alike, as one program; where one does not fit, they are left as they are."""
        names = ", ".join(sorted({stage.name for _, stage in group}))
        self.console.rule(f"[bold]{names}[/] ({len(group)} members in one program)", align="left")
        owners, number = {id(stage): live for live, stage in group}, 0
        rounds = generation.answers([stage for _, stage in group], mesh=self.mesh, console=self.console,
                                    memory_limit=self.settings["memory_limit"], known=self._drawn)
        while True:
            began = time.monotonic()
            try:
                answered = next(rounds, None)
            except ConfigError as error:
                self.console.print(f"{names}: {error}; one after another instead", markup=False, highlight=False)
                return
            if answered is None:
                return
            seconds = round(time.monotonic() - began, 2)
            share = {"seconds": round(seconds / len(answered), 2),
                     "population": {"members": len(answered), "seconds": seconds}}
            for stage, found in answered:
                live, number = owners[id(stage)], number + 1
                with self.alone(live.name):
                    live.ctx.stage_dir(stage.name).mkdir(parents=True, exist_ok=True)
                    with self._disk(live, stage.name):
                        out = stage.finish(found)
                    self._note(live, stage.name, out | share, f"{number}/{len(group)}")

    def _one_by_one(self, position: int, waiting: list[_Live]) -> None:
        """A stage that trains nothing, for one member after another on every device; what is compiled for a device's
        first serves the others."""
        if not waiting:
            return
        names, count = sorted({live.stages[position] for live in waiting}), len(waiting)
        self.console.rule(f"[bold]{', '.join(names)}[/] ({count} members, one after another)", align="left")
        free = queue.SimpleQueue()
        for device in self.devices:
            free.put(device)

        def one(live: _Live) -> dict | Exception:
            device = free.get()
            try:
                with jax.default_device(device):
                    return self._applied(live, position, device)
            except (ConfigError, DataError, FloatingPointError) as error:
                return error
            finally:
                free.put(device)

        def note(number: int, live: _Live, out: dict | Exception) -> None:
            if isinstance(out, Exception):
                self.settle(live.name, Result(None, str(out)))
            else:
                self._note(live, live.stages[position], out, f"{number}/{count}")

        note(1, waiting[0], one(waiting[0]))  # what it draws of the baseline, the others take over
        rest = waiting[1:]
        with concurrent.futures.ThreadPoolExecutor(len(self.devices)) as pool:
            for number, (live, out) in enumerate(zip(rest, pool.map(one, rest), strict=True), 2):
                note(number, live, out)

    def _applied(self, live: _Live, position: int, device: jax.Device) -> dict:
        """The result of the stage of one member, which works on `device`."""
        name = live.stages[position]
        live.ctx.stage_dir(name).mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        ctx = dataclasses.replace(live.ctx, mesh=sharding.make_mesh({}, [device]), console=Console(quiet=True))
        with self._disk(live, name):
            out = train_lib.apply_stage(ctx, name, live.config[name], live.before[name], kept=self._drawn)
        return out | {"seconds": round(time.monotonic() - began, 2)}

    def _disk(self, live: _Live, stage: str):
        return checkpoint.disk(f"{stage}: a file of the stage in {live.ctx.workdir}")

    def _note(self, live: _Live, stage: str, out: dict, place: str) -> None:
        """Writes and tells what a stage that trains nothing came to; place: as in 3/8."""
        self._write(live, stage, out)
        shown = "  ".join(f"{k} {v:.3f}" for k, v in out.get("headline", out).items() if isinstance(v, float))
        self.console.print(f"{stage} {place} {live.name}: {shown}", markup=False, highlight=False)

    def _write(self, live: _Live, stage: str, out: dict) -> None:
        live.results[stage] = out
        checkpoint.write_json(live.done(stage), out)

    def _finish(self, live: _Live) -> None:
        with self.alone(live.name):
            summary = train_lib.summarise(live.config, live.results)
            checkpoint.write_json(live.ctx.workdir / "result.json", summary)
            self.settle(live.name, Result(summary))

    def _train(self, position: int, waiting: list[_Live]) -> None:
        """Trains the stage number `position` of members, by groups that share a program."""
        groups: dict[Any, list[tuple[_Live, stage_setup.Setup]]] = defaultdict(list)
        decided = self._decided(waiting, position)
        for live in (live for live in waiting if live.name in self.live):
            with self.alone(live.name):
                name = live.stages[position]
                setup = self._setup(live, name)
                ranked = rules.applies(self.halving, name, live.plain) and live.name not in decided
                mark = structure.signature(live.plain, name), training.key_of(setup), ranked, rules.applies(
                    self.early_stop, name, live.plain)
                groups[mark].append((live, setup))
        # Later stages start elsewhere; what members hold together is held by their setups until they are trained.
        self._starts.clear()
        self._sums.clear()
        for (*_, ranked, watched), group in groups.items():
            names = sorted({live.stages[position] for live, _ in group})
            self.console.rule(f"[bold]{', '.join(names)}[/] (train, {len(group)} members in one program)", align="left")
            began = time.monotonic()
            folder = self.home / f"group-{_short([[live.name, live.stages[position]] for live, _ in group])}"
            held = {"parameters of all members": sum(memory.size(setup.params) for _, setup in group)}
            told = names[0], held, {"memory_limit": "bytes on a device, with fewer members at a time",
                                    "batch_size": "a smaller one, or a larger accumulation"}
            try:
                with memory.explained(lambda told=told: told):
                    out = training.train([setup for _, setup in group], folder, console=self.console, stop=self.stop,
                                         mesh=self.mesh, halving=self.halving if ranked else None,
                                         early_stop=self.early_stop if watched else None,
                                         units=[structure.seedless(live.plain) for live, _ in group], **self.settings)
            except (ConfigError, DataError, memory.OutOfMemory) as error:
                for live, _ in group:
                    self.settle(live.name, Result(None, str(error)))
                continue
            seconds = round(time.monotonic() - began, 2)
            share = {"seconds": round(seconds / len(group), 2),
                     "population": {"members": len(group), "seconds": seconds}}
            # All parameters before the first sign that a member is done: what is interrupted here goes on from the
            # group's last checkpoint, with the same group.
            results = [None if outcome.params is None else stage_setup.finish(
                setup, outcome.params, evaluated=outcome.evaluated, compilations=outcome.compilations, drawn=False)
                for (_, setup), outcome in zip(group, out, strict=True)]
            if ranked:
                self._decide(folder, {live.name: o.dropped for (live, _), o in zip(group, out, strict=True)})
            for (live, setup), outcome, result in zip(group, out, results, strict=True):
                if outcome.error:
                    checkpoint.write_json(setup.folder / _FAILED, {"error": outcome.error})
                    self.settle(live.name, Result(None, outcome.error))
                elif outcome.dropped:
                    self._drop(live, outcome.dropped)
                else:
                    stopped = {"stopped_at": outcome.stopped} if outcome.stopped else {}
                    self._write(live, setup.name, result | share | stopped)
            shutil.rmtree(folder, ignore_errors=True)  # every member has its own parameters now

    def _decide(self, group: pathlib.Path, dropped: Mapping[str, Any]) -> None:
        """Writes down, at once for a whole group, whom its rungs dropped: if this invocation ends before the members'
        folders say so, those that are left must not be ranked among themselves."""
        checkpoint.write_json(self.home / f"{_RANKED}{group.name}.json", dropped)

    def _decided(self, waiting: Sequence[_Live], position: int) -> set[str]:
        """Names of the members whose group went through its rungs in an earlier invocation; drops whom it dropped."""
        known: dict[str, Any] = {}
        for place in sorted(self.home.glob(f"{_RANKED}*.json")):
            known |= json.loads(place.read_text(encoding="utf-8"))
            shutil.rmtree(self.home / place.stem.removeprefix(_RANKED), ignore_errors=True)
        here = [live for live in waiting if live.name in known and rules.applies(
            self.halving, live.stages[position], live.plain)]
        for live in here:
            if known[live.name]:
                self._drop(live, known[live.name])
        return {live.name for live in here}

    def _drop(self, live: _Live, record: Mapping[str, Any]) -> None:
        """Notes that a member was dropped, with its last numbers."""
        text = (f"update {record['step']} of {record['stage']}: by {record['metric']} its settings were number "
                f"{record['place']} of {record['settings']}, of which {record['kept']} went on")
        told = dict(record) | {"reason": text}
        checkpoint.write_json(live.ctx.workdir / DROPPED, told)
        self.settle(live.name, Result(None, dropped=told))

    def _setup(self, live: _Live, name: str) -> stage_setup.Setup:
        """The member's stage; parameters, records and reference sums that members have in common are held once."""
        section, ctx = live.config[name].to_dict(), live.ctx
        ctx.stage_dir(name).mkdir(parents=True, exist_ok=True)
        init = live.before[name] if section["init"] == "previous" else section["init"]
        place = id(ctx.initial) if init == "model" else str(ctx.stage_dir(init).resolve())
        if place not in self._starts:
            self._starts[place] = ctx.params_of(init)
        start = self._starts[place]
        source = self._source(live, section)
        if source not in self._records:
            self._records[source] = stage_setup.records_of(ctx, name, section)
        else:  # what is said of the data is said once
            ctx = dataclasses.replace(ctx, console=Console(quiet=True))
        records = self._records[source]
        # Padding and the order of the records do not enter their sums.
        mark = id(start), source
        setup = stage_setup.prepare(ctx, name, section, live.before[name], records, start=start,
                                    cached=self._sums.get(mark))
        self._sums[mark] = setup.cached
        return setup

    def _source(self, live: _Live, section: Mapping[str, Any]) -> str:
        """What a stage's records depend on."""
        path, seed = section["data"]["path"], None
        if path.startswith("stage:"):
            path = str(live.ctx.stage_dir(path[len("stage:"):]).resolve())
        elif path.startswith("builtin:") or "=" in path:
            seed = live.ctx.seed
        loss = section["loss"] if section["loss"]["name"] in ("sum", "compose") else section["loss"]["name"]
        limits = {k: section[k] for k in ("max_prompt", "max_completion", "max_length", "truncation", "batch_size")}
        return json.dumps([section["data"] | {"path": path}, seed, structure.without_numbers(loss), limits,
                           live.plain["tokenizer"], live.plain["text"], live.plain["model"]["path"]], sort_keys=True,
                          default=list)


def _refuse(config: ConfigDict) -> None:
    """ConfigError for what a run alone can do and a member of a population cannot."""
    if config.deterministic and jax.default_backend() == "gpu":
        train_lib.check_deterministic()
    for axis in sharding.AXES:
        if config.mesh[axis] > 1:
            raise ConfigError(f"config.mesh.{axis}={config.mesh[axis]}: in a population every member is on one device; "
                              "allowed: 0 or 1, or members that run as processes of their own")
    for name in config.stages:
        if config[name].kind != "train":
            continue
        if config[name].keep_best:
            raise ConfigError(f"config.{name}.keep_best={config[name].keep_best}: a population keeps its last "
                              "checkpoints only; allowed: 0, or members that run as processes of their own")
        if config[name].diagnostics:
            raise ConfigError(f"config.{name}.diagnostics={tuple(config[name].diagnostics)}: they look at one model "
                              "at a time; allowed: (), or members that run as processes of their own")


def _begins(plain: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Whether a run of config `plain` begins with all that a run of `known` does."""
    count = len(known["stages"])
    return plain["stages"][:count] == known["stages"] and all(
        plain.get(key) == value for key, value in known.items() if key != "stages")


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()[:10]


def _link(base: pathlib.Path, folder: pathlib.Path, stages: Sequence[str]) -> None:
    """Puts the finished stages of `base` into a member's folder: a link to each, and its rows of metrics."""
    (folder / "stages").mkdir(parents=True, exist_ok=True)
    for stage in stages:
        place, source = folder / "stages" / stage, base / "stages" / stage
        if place.exists() and (place / "done.json").exists():
            continue
        if place.is_dir() and not place.is_symlink():
            raise ConfigError(f"{place}: the stage was begun by a run of its own; remove the folder {folder}, or let "
                              "that run end")
        place.unlink(missing_ok=True)
        place.symlink_to(os.path.relpath(source, place.parent), target_is_directory=True)
    rows = base / "metrics.jsonl"
    own = folder / "metrics.jsonl"
    if rows.exists() and not own.exists():
        own.write_text(rows.read_text(encoding="utf-8"), encoding="utf-8")
