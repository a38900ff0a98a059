"""`alignax sweep`: run or resume every member of a sweep, and write one table of their results."""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from alignax.commands import sweep_cost, sweep_rules, sweep_search

BACKENDS = ("population", "process", "slurm", "pod")
ALONE = ("process", "slurm")  # members are runs of their own, which share no stages
EXIT_FAILED = 1


def add(commands) -> None:
    """Declares the command and its arguments."""
    parser = commands.add_parser(
        "sweep", help="run or resume many variations of a config, and compare them",
        description="Runs the members of a sweep in a folder: the points that the config file's `sweep(add)` adds, "
                    "times the values of --sweep, times --seeds. Every member is a run of its own under "
                    "DIR/members/NAME that all other commands can read. The same command again goes on with the "
                    "members that are not finished. --config.key=value sets a key of all members. `alignax report DIR` "
                    "then compares them. With --trials, the config file's `search(trial)` and optuna choose the "
                    "members instead.",
        epilog="exit codes: 0 all members finished (or were dropped by --halving), 1 some failed (the reasons are "
               "printed and stand in status.json), 2 bad input, 75 stopped by SIGTERM and resumable")
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a Python file with get_config([arg]), "
                                                                              "and sweep(add) if it has one")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the sweep's folder")
    parser.add_argument("--sweep", action="append", default=[], metavar="KEY=A,B,...",
                        help="values of one key; several of these are combined in every way. `loss`, and a key that "
                             "begins with a colon, is an argument of the config file (FILE:loss=ipo)")
    parser.add_argument("--seeds", type=int, default=0, metavar="N",
                        help="run every point with N seeds, from the config's own upwards (default: once)")
    parser.add_argument("--trials", type=int, default=0, metavar="N",
                        help="search instead of sweeping: run members that optuna chooses by the config file's "
                             "`search(trial)` until there are N, in the same folder and table. The same command goes "
                             "on, also with a larger N (needs pip install 'alignax[search]')")
    parser.add_argument("--metric", default="win_rate:max", metavar="NAME:MODE",
                        help="with --trials: the number of results.jsonl that is searched for, :max or :min; over "
                             "seeds, its mean (default win_rate:max)")
    parser.add_argument("--at-once", type=int, default=8, metavar="N",
                        help="with --trials: how many trials are chosen together, and train together where they can "
                             "(default 8)")
    parser.add_argument("--backend", default="population", metavar="NAME",
                        help="population: members that differ in numbers only train as one compiled program; process: "
                             "each in a process of its own; slurm: each a job of an array (default population); jobs "
                             "on pods: `alignax launch --members`")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE",
                        help="backend slurm: as in `alignax launch --backend=slurm`; may be repeated")
    parser.add_argument("--base", choices=("shared", "own"), default=None,
                        help="shared: stages before the first one in which members differ run once, also for members "
                             "of different seeds, with the lowest seed; own: every member is what it would be alone "
                             "(default: shared, and own for the backends process and slurm, which know no other)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time (backend process; "
                                                                         "default 1)")
    parser.add_argument("--retries", type=int, default=1, metavar="N",
                        help="further attempts for a member whose process fails, other than by bad input or by a step "
                             "that is not finite, which the same numbers would give again (default 1)")
    parser.add_argument("--halving", default="", metavar="KEY=VALUE,...",
                        help="backend population: drop the worse members at rungs, as in metric=accuracy,mode=max,"
                             "rungs=20:40,keep=0.5: of the members of one program, the half with the higher accuracy "
                             "on held-out records goes on after 20 updates, and half of those after 40. Members that "
                             "differ in the seed only stand and fall together. stage=NAME: a train stage other than "
                             "the last. `sweep.halving` in the config file says the same")
    parser.add_argument("--early-stop", default="", metavar="KEY=VALUE,...",
                        help="backend population: end the training of a member after so many evaluations in a row that "
                             "are no better than its best, as in metric=loss,mode=min,patience=3; it goes on with its "
                             "later stages. `sweep.early_stop` in the config file says the same")
    parser.add_argument("--generate", choices=("auto", "together", "apart"), default="auto",
                        help="backend population: whether sample and evaluate stages of members that draw alike run as "
                             "one program too (together), or member by member on each device (apart); auto, the "
                             "default: together on accelerators, apart on CPUs")
    parser.add_argument("--dry-run", action="store_true",
                        help="check and print the members, their groups and an estimate of the cost, with the updates "
                             "that --halving leaves; start nothing")
    parser.add_argument("--no-estimate", action="store_true", help="leave the timed step of --dry-run out")
    parser.add_argument("--history", action="store_true", help="also write all members' metrics into history.jsonl")
    parser.set_defaults(execute=run)


def run(arguments, console) -> int:
    """Runs the members; returns the exit code."""
    from alignax import checkpoint, presence, sweep
    from alignax.types import ConfigError

    for flag, least in (("seeds", 0), ("retries", 0), ("jobs", 1), ("trials", 0)):
        if (value := getattr(arguments, flag)) < least:
            raise ConfigError(f"--{flag}={value}; allowed: at least {least}")
    _check_backend(arguments.backend)
    folder = pathlib.Path(arguments.workdir)
    if arguments.option and arguments.backend != "slurm":
        raise ConfigError(f"--option={arguments.option[0]} --backend={arguments.backend}: options are Slurm's")
    if arguments.base == "shared" and arguments.backend in ALONE:
        raise ConfigError(f"--base=shared --backend={arguments.backend}: processes share no stages; allowed: own")
    base = arguments.base or ("own" if arguments.backend in ALONE else "shared")
    work = _Work(arguments, folder, base)
    known = sweep.claim(folder, work.plan())
    if arguments.dry_run:
        work.ask(sweep.gather(folder) if known else [])
        _show_plan(work, folder, base, console, estimate=not arguments.no_estimate)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    with presence.locked(folder) as note:
        if note:
            console.print(note, markup=False)
        if not (sweep.claim(folder, work.plan()) or known):
            checkpoint.write_json(folder / sweep.PLAN, work.plan())
        progress = sweep.Progress(folder)
        began = time.monotonic()
        while True:
            try:
                _attempts(arguments, work, folder, progress, console)
            finally:  # what there is stands in the table, also after a stop
                rows, missing = sweep.write(folder, with_history=arguments.history)
            if not work.ask(rows):
                break
            console.print(f"trials up to {len(work.trials)} of {arguments.trials}", highlight=False)
            checkpoint.write_json(folder / sweep.PLAN, work.plan())
    if missing:
        console.print(missing, markup=False, soft_wrap=True)
    if len(work.trials) < arguments.trials:
        console.print(f"the space of search(trial) seems to hold no more than {len(work.trials)} settings",
                      highlight=False)
    return _say(rows, folder, time.monotonic() - began, console)


class _Work:
    """What is to be run. members: of the sweep, or of the trials so far; rules: what drops or stops members."""

    def __init__(self, arguments, folder: pathlib.Path, base: str):
        from alignax import launch

        self.arguments, self.folder, self.base = arguments, folder, base
        module, _ = launch.load_module(arguments.config)
        self.rules = sweep_rules.rules_of(arguments, module, alone=ALONE)
        self.search, self.trials = None, []
        if arguments.trials:
            from alignax.sweep import search

            self.search, self.function = sweep_search.settings_of(arguments, module)
            self.trials = sweep_search.stored_trials(folder)
            search.check(self.function, self.trials)
        self.members = self._members()
        sweep_rules.check(self.rules, self.members)

    def _members(self) -> list[Any]:
        from alignax.sweep import search

        arguments = self.arguments
        if self.search is not None and not self.trials:
            return []
        return members_of(arguments.config, self.folder, axes=arguments.sweep, seeds=arguments.seeds,
                          overrides=arguments.overrides,
                          points=None if self.search is None else search.points(self.trials))

    def plan(self) -> dict[str, Any]:
        """What sweep.json holds."""
        from alignax import sweep

        plan = sweep.plan_of(self.members, self.base, self.rules | {"search": self.search})
        return plan if self.search is None else plan | {"trials": [trial.record() for trial in self.trials]}

    def ask(self, rows: Sequence[dict]) -> bool:
        """Adds a batch of trials, chosen by the results so far; False where there are enough or no others."""
        from alignax.sweep import search

        wanted = 0 if self.search is None else min(self.search.at_once, self.arguments.trials - len(self.trials))
        if wanted < 1:
            return False
        values = sweep_search.values_of(self.search, len(self.trials), self.members, rows)
        fresh = search.ask(self.function, self.search, self.trials, values, wanted)
        self.trials += fresh
        self.members = self._members()
        return bool(fresh)


def members_of(config: str, folder: pathlib.Path, *, axes: Sequence[str] = (), seeds: int = 0,
               overrides: Sequence[str] = (), points: Sequence[Any] | None = None) -> list[Any]:
    """The members (alignax.sweep.Member) of the config file's sweep times `axes` (`KEY=A,B`) times seeds.

    points: (alignax.sweep.Point) in place of the file's sweep.

    Raises ConfigError for anything that a run would be refused for, and where nothing says what is swept.
    """
    from alignax import launch, sweep
    from alignax.types import ConfigError

    file = config.partition(":")[0]
    module, argument = launch.load_module(config)
    given = sweep.product(*map(sweep.parse, axes))  # one empty setting where there are no axes
    if points is not None:
        own = list(points)
    elif hasattr(module, "sweep"):
        own = sweep.collect(module.sweep)
    elif axes or seeds:
        own = [sweep.Point({})]
    else:
        raise ConfigError(f"--config={config}: {file} defines no sweep(add); say what to vary there, or with --sweep "
                          "KEY=A,B and --seeds N")
    made = []
    for point in own:
        for index, extra in enumerate(given):
            merged = sweep.product([dict(point.settings)], [extra])[0]
            factors = None if point.factors is None else {**point.factors, **extra}
            suffix = f"-{index:0{len(str(len(given) - 1))}d}" if point.name and len(given) > 1 else ""
            made.append(sweep.Point(merged, point.name + suffix, factors))
    load = lambda words, texts: launch.load_config(f"{file}:{words}" if words else file, texts)
    return sweep.resolve(made, load, folder / sweep.MEMBERS, argument=argument, overrides=overrides, seeds=seeds)


def _check_backend(name: str) -> None:
    from alignax.types import ConfigError

    if name not in BACKENDS:
        raise ConfigError(f"--backend={name}; allowed: {', '.join(BACKENDS)}")
    if name == "pod":
        raise ConfigError("--backend=pod: say which tool submits the members: alignax launch --members "
                          "--backend=xpk|jobset|skypilot; then this command without --backend=pod writes the table")


def _attempts(arguments, work: _Work, folder: pathlib.Path, progress: Any, console) -> None:
    """Runs what is not finished, and what failed again as often as --retries allows."""
    from alignax import sweep

    def ended(name: str, reason: str, final: bool) -> None:
        if reason:
            progress.failed(name, reason, final=final)
            console.print(f"{name}: failed: {reason}", markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(f"{name}: finished", markup=False, highlight=False)

    members = work.members
    done = sum(sweep.finished(folder, m.name) for m in members)
    if done:
        console.print(f"{done} of {len(members)} members are finished already", highlight=False)
    for attempt in range(1 + arguments.retries):
        left = [m for m in sweep.left(folder, members) if not progress.final(m.name)]
        if not left:
            break
        if attempt:
            console.print(f"trying {len(left)} members again", highlight=False)
        if arguments.backend == "process":
            sweep.run_processes(left, folder, arguments.config.partition(":")[0], jobs=arguments.jobs, ended=ended)
        elif arguments.backend == "slurm":
            _slurm(left, arguments, folder, console, ended)
        else:
            _population(work, {m.name for m in left}, folder, console, ended)
    progress.settle()


def _slurm(left: Sequence[Any], arguments, folder: pathlib.Path, console,
           ended: Callable[[str, str, bool], None]) -> None:
    from alignax.launching import job, options, slurm

    say = lambda text: console.print(text, markup=False, highlight=False)
    slurm.run_members(left, job.name_of(str(folder)), str(folder), arguments.config.partition(":")[0],
                      options.parse("slurm", arguments.option), ended=ended, say=say)


def _population(work: _Work, left: set[str], folder: pathlib.Path, console,
                ended: Callable[[str, str, bool], None]) -> None:
    """All members go in, since which stages they share is a matter of all; those that are finished take no time."""
    import jax

    from alignax import population

    with contextlib.suppress(RuntimeError):  # JAX has started, with the devices that it has
        jax.config.update("jax_num_cpu_devices", min(len(os.sched_getaffinity(0)), len(work.members)))

    def told(name: str, result: Any) -> None:
        if name in left and result.dropped:
            console.print(f"{name}: dropped: {result.dropped['reason']}", markup=False, highlight=False, soft_wrap=True)
        elif name in left:
            # What a population reports of a member (bad input, a step that is not finite) comes out the same again.
            ended(name, result.error, True)

    population.run(work.members, folder, console=console, seeds=work.base, ended=told,
                   generate=work.arguments.generate, **work.rules)


def _show_plan(work: _Work, folder: pathlib.Path, base: str, console, *, estimate: bool) -> None:
    """The table of --dry-run: every member with its factors, its group and its state; what is shared; the cost."""
    from rich.table import Table

    from alignax import population, sweep

    members = work.members
    groups = population.groups(members)
    number = {name: str(i) for i, held in enumerate(groups) for name in held}
    factors = list(dict.fromkeys(key for m in members for key in m.factors))
    plural = "s" if len(groups) > 1 else ""
    table = Table("member", "group", *factors, "state", title_justify="left",
                  title=f"{len(members)} members, {len(groups)} group{plural} of one structure")
    for member in members:
        table.add_row(member.name, number[member.name], *(_cell(member.factors.get(key)) for key in factors),
                      "finished" if sweep.finished(folder, member.name) else
                      "dropped" if sweep.dropped(folder, member.name) else "to run")
    console.print(table)
    bases = population.bases(members, seeds=base)
    for shared in bases:
        console.print(f"once for {len(shared.members)} members: {', '.join(shared.stages)}", markup=False,
                      highlight=False)
    left = sweep.left(folder, members)
    if estimate and left:
        for line in sweep_cost.estimate(left, bases, console, halving=work.rules["halving"],
                                        early_stop=work.rules["early_stop"]):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _say(rows: Sequence[dict], folder: pathlib.Path, seconds: float, console) -> int:
    """Prints what failed and where the table is; returns the exit code."""
    failed = [row for row in rows if row["state"] not in ("finished", "dropped")]
    dropped = sum(row["state"] == "dropped" for row in rows)
    also = f", {dropped} were dropped at rungs" if dropped else ""
    console.print(f"{len(rows) - len(failed) - dropped} of {len(rows)} members finished{also}, {seconds:.0f} seconds",
                  highlight=False)
    for row in failed:
        console.print(f"  {row['member']}: {row['state']}{': ' if row['reason'] else ''}{row['reason']}",
                      markup=False, highlight=False, soft_wrap=True)
    if any(row["state"] == "failed" for row in failed):
        console.print(f"a member runs from its beginning once its folder in {folder / 'members'} is removed",
                      markup=False, highlight=False, soft_wrap=True)
    console.print(f"results: {folder / 'results.jsonl'}; compare with: alignax report {folder}", markup=False,
                  soft_wrap=True, highlight=False)
    return EXIT_FAILED if failed else 0
