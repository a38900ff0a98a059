"""`alignax plan`: what a train stage would cost on a mesh, without its weights and without the devices."""

from __future__ import annotations

import json
import pathlib
import sys

MESH_AXES = ("data", "fsdp", "sequence", "tensor")


def add(commands) -> None:
    """Declares the command and its arguments."""
    parser = commands.add_parser(
        "plan", help="memory, FLOPs, traffic and step time of a train stage, before it runs",
        description="Compiles the update of a train stage for a mesh of simulated devices and prints what one device "
                    "would hold, compute and send, how many compilations the data needs, and the bounds that a "
                    "device's peaks set to the time of a step. Parameters are shapes only: neither weights nor devices "
                    "are needed. Any key of the config can be overridden with --config.key=value.",
        epilog="up to 2048 devices are simulated and the program is compiled; beyond, it is traced and lowered, and "
               "temporaries and collectives are not told. Exit codes: 0 planned, 2 bad input")
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a Python file with get_config([arg])")
    parser.add_argument("--stage", default="", metavar="NAME", help="which train stage (default: the last one)")
    parser.add_argument("--mesh", default="", metavar="AXIS=N,...",
                        help="sizes of data, fsdp, sequence and tensor (default: the config's, with data at least 1)")
    parser.add_argument("--batch", type=int, default=0, metavar="N", help="prompts of an update over all devices "
                                                                          "(default: the stage's batch_size)")
    parser.add_argument("--length", type=int, default=0, metavar="T",
                        help="tokens of a row; then no data is read (default: what the stage's data needs)")
    parser.add_argument("--slots", type=int, default=0, metavar="L",
                        help="scored tokens of a completion, beside --length (default: half of it)")
    parser.add_argument("--completions", type=int, default=0, metavar="K",
                        help="completions of a prompt, beside --length (default: 2, and 1 for sft)")
    parser.add_argument("--device", default="h100", metavar="NAME",
                        help="h100, h200, v5e, v5p or cpu, and numbers instead of a row's: peak= (FLOP/s), memory= "
                             "(bytes), bandwidth=, link= (bytes/s); `h100,link=50e9` (default: h100)")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the tables")
    parser.set_defaults(execute=run)


def run(arguments, console) -> int:
    """Plans the stage and prints; returns the exit code."""
    from alignax import configs, context, launch, losses, models, optim, planning, sharding
    from alignax.types import ConfigError

    device = planning.device(arguments.device)
    config = configs.staged(launch.load_config(arguments.config, arguments.overrides))
    configs.check(config)
    name, stage = _stage(config, arguments.stage)
    sizes = _mesh(arguments.mesh, config.mesh)
    mesh = planning.simulated_mesh(sizes)
    model = config.model.to_dict()
    tokenizer = None
    if not arguments.length or not (model["path"] or model["vocab_size"]):
        tokenizer = context.load_tokenizer(config.tokenizer, model["path"])
    shape = context.shape_of(model, tokenizer.vocab_size if tokenizer else 0)
    # A kernel cannot be compiled without its device; attention in blocks holds as little as it does.
    attention = model["attention"]
    if device.platform or attention == "auto":  # of numbers alone nobody knows which kernels are there
        attention = models.choose_attention(attention, shape, model["dtype"], device.platform or "cpu")
    spec = context.model_spec(shape, model | {"attention": "xla" if attention == "xla" else "blocked"})
    loss = losses.from_section(stage.loss.to_dict())
    batch = arguments.batch or stage.batch_size
    for flag, value in (("batch", batch), ("length", arguments.length), ("slots", arguments.slots),
                        ("completions", arguments.completions)):
        if value < 0:
            raise ConfigError(f"--{flag}={value}; allowed: a positive number")
    if arguments.length:
        needed = _given(arguments, stage, mesh, batch)
    else:
        needed = from_data(config, name, stage, spec, tokenizer, mesh, loss, batch, console)
    adapters = models.AdapterConfig(**stage.lora.to_dict()) if stage.lora.rank else None
    optimizer = optim.from_section(stage.optim.to_dict(), max(needed["steps"], stage.optim.warmup_steps, 1))
    setup = planning.make_setup(spec, loss, optimizer, dtype=model["dtype"], adapters=adapters,
                                reference=stage.reference, accumulation=stage.accumulation,
                                rules=sharding.check_rules(config.mesh.rules, "config.mesh.rules"))
    measured = planning.measure(setup, planning.Size(batch, needed.pop("shape"), stage.layout), mesh)
    time = planning.step_time(measured, device, model["dtype"])
    report = {"stage": name, "loss": loss.name, "dtype": model["dtype"], "remat": spec.remat, "attention": attention,
              "parameters": _count(setup), **measured, "compilations": needed, "time": time}
    if arguments.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        _show(console, report, device, stage.compile_budget)
    return 0


def _count(setup) -> int:
    import jax

    return sum(a.size for a in jax.tree.leaves(setup.frozen or setup.params))


def _stage(config, wanted: str):
    from alignax.types import ConfigError

    names = [s for s in config.stages if config[s].kind == "train"]
    if not names:
        raise ConfigError(f"config.stages={tuple(config.stages)} holds no train stage; only those can be planned")
    if wanted and wanted not in names:
        raise ConfigError(f"--stage={wanted}; allowed, the train stages of this config: {', '.join(names)}")
    return wanted or names[-1], config[wanted or names[-1]]


def _mesh(text: str, section) -> dict[str, int]:
    from alignax.types import ConfigError

    if not text:
        return {axis: max(section[axis], 1) for axis in MESH_AXES}
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in text.split(","):
        axis, _, value = part.partition("=")
        if axis not in MESH_AXES or not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"--mesh={text}: {part!r}; allowed: AXIS=N with the axes {', '.join(MESH_AXES)}, like "
                              "data=4,fsdp=8")
        sizes[axis] = int(value)
    return sizes


def _given(arguments, stage, mesh, batch: int) -> dict:
    """What the data would need, from the numbers of the command line."""
    from alignax import data, losses, stage_data
    from alignax.types import ConfigError

    columns = arguments.length
    slots = arguments.slots or max(columns // 2, 1)
    if slots > columns:
        raise ConfigError(f"--slots={slots} is more than --length={columns}; a completion lies inside its row")
    width = arguments.completions or (1 if losses.from_section(stage.loss.to_dict()).info.chosen_only else 2)
    if stage.layout.endswith("packed"):  # rows so many as tokens need them: full ones
        groups = stage_data.row_groups(mesh, stage.layout, stage.accumulation)
        rows = max(-(-batch // groups) * width, 1)
    else:
        rows = width
    known = stage.shapes == "global"
    return {"shape": data.Shape(width, columns, slots, rows), "steps": stage.steps, "update": 1 if known else None,
            "evaluation": 1 if known else None, "source": "the numbers given"}


def from_data(config, name: str, stage, spec, tokenizer, mesh, loss, batch: int, console) -> dict:
    """Reads the stage's records as the run would, and lays its batches out without filling them."""
    from alignax import context, data, stage_data
    from alignax.types import ConfigError

    where, model_path = f"config.{name}.data", config.model.path
    if stage.data.path.startswith("stage:"):
        raise ConfigError(f"{where}.path={stage.data.path!r} is made by the run itself; give the sizes instead: "
                          "--length, --slots, --completions")
    text = context.text_policy(tokenizer, model_path, **config.text.to_dict())
    ctx = context.Context(workdir=pathlib.Path(), spec=spec, initial=None, tokenizer=tokenizer, text=text,
                          tokenizer_source=context.template_place(config.tokenizer, model_path), mesh=mesh,
                          seed=config.seed, console=_quiet(), stop=context.Stop())
    limits = stage_data.limits_of(stage.to_dict(), spec.config.max_positions)
    with console.status(f"reading {stage.data.path}"):
        train, held_out = stage_data.records(ctx, f"config.{name}", stage.data.to_dict(), limits=limits, loss=loss,
                                             batch_size=batch)
    plan = data.Plan(len(train), batch, config.seed)
    steps = stage.steps or plan.num_steps(stage.epochs)
    watched = held_out or train[:batch]
    cuts = stage_data.eval_cuts(len(watched), batch, stage_data.row_groups(mesh, stage.layout, stage.accumulation))
    laid = stage_data.batches(ctx, train, held_out, loss=loss, plan=plan, steps=steps, eval_cuts=cuts,
                              layout=stage.layout, shapes=stage.shapes, bucket_multiple=stage.bucket_multiple,
                              accumulation=stage.accumulation)
    if laid.shape is not None:
        return {"shape": laid.shape, "steps": steps, "update": 1, "evaluation": len({b - a for a, b in cuts}),
                "source": stage.data.path}
    with console.status("laying out the batches"):
        shapes = {laid.shape_for([train[i] for i in plan.batch_indices(number)]) for number in range(steps)}
        evaluated = {(b - a, laid.shape_for(watched[a:b])) for a, b in cuts}
    largest = max(shapes, key=lambda s: (s.T * s.rows, s.L))
    return {"shape": largest, "steps": steps, "update": len(shapes), "evaluation": len(evaluated),
            "source": stage.data.path}


def _quiet():
    import io

    from rich.console import Console

    return Console(file=io.StringIO())


def _bytes(number) -> str:
    if number is None:
        return "unknown"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f} B"


def _flops(number) -> str:
    if number is None:
        return "unknown"
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3f} {unit}FLOP"
    return f"{number:.0f} FLOP"


def _seconds(number) -> str:
    return "unknown" if number is None else f"{number * 1e3:.3f} ms"


_PARTS = (("parameters", "parameters (trained)"), ("frozen", "frozen base under adapters"),
          ("reference", "reference"), ("optimizer", "optimiser state"), ("batch", "batch"),
          ("temporaries", "activations and temporaries"), ("gradients", "  of which at least the gradients"),
          ("total", "total"))


def _show(console, report, device, budget: int) -> None:
    """The same numbers as tables."""
    from rich.table import Table

    mesh = ", ".join(f"{k} {v}" for k, v in report["mesh"].items())
    console.print(f"{report['stage']}: {report['loss']}, {report['parameters']:,} parameters in {report['dtype']}, "
                  f"remat {report['remat']}, attention {report['attention']}; {report['prompts']} prompts as "
                  f"{report['rows']} rows of {report['columns']} tokens, {report['slots']} slots; {report['devices']} "
                  f"devices ({mesh})", highlight=False)
    table = Table("bytes of one device", "", title="memory", title_justify="left")
    for key, label in _PARTS:
        table.add_row(label, _bytes(report["bytes"][key]))
    console.print(table)
    passes = "; ".join(f"{stream}: " + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in one.items() if n)
                       for stream, one in report["passes"].items())
    console.print(f"passes of an update: {passes}", highlight=False)
    flops = report["flops"]
    table = Table("one device, one update", "", title="arithmetic", title_justify="left")
    lacks = " (blocks of attention once)" if flops["partial"] else ""
    for key, label in (("analytic", "by formula"), ("traced", f"products of the traced program{lacks}"),
                       ("compiled", f"products of the compiled program{lacks}"),
                       ("xla", "XLA's cost analysis (bodies of loops once)")):
        table.add_row(label, _flops(flops[key]))
    console.print(table)
    if report["collectives"] is not None:
        table = Table("collective", "runs", "bytes of results", "bytes sent", title="traffic of one device",
                      title_justify="left")
        for kind, one in report["collectives"].items():
            table.add_row(kind, str(one["count"]), _bytes(one["bytes"]), _bytes(one["wire"]))
        console.print(table if report["collectives"] else "traffic: none")
        console.print(f"donated: {report['donated']} of {report['donatable']} arrays of the state are updated in place",
                      highlight=False)
    else:
        console.print("traffic, temporaries: unknown; the mesh has more devices than can be simulated, so the update "
                      "was lowered and not compiled")
    needed = report["compilations"]
    shown = lambda n: "unknown without the data" if n is None else str(n)
    over = needed["update"] is not None and needed["update"] > budget
    console.print(f"compilations ({needed['source']}): update {shown(needed['update'])}"
                  f"{f', over compile_budget={budget}' if over else ''}, evaluation {shown(needed['evaluation'])}",
                  highlight=False)
    time = report["time"]
    fits = {None: "", True: f"; fits into {_bytes(device.memory)}",
            False: f"; does NOT fit into {_bytes(device.memory)}"}[time["fits"]]
    console.print(f"a step on {device.name}: at least {_seconds(time['overlapped'])} if all overlaps, "
                  f"{_seconds(time['in_turn'])} if nothing does (compute {_seconds(time['compute'])}, memory "
                  f"{_seconds(time['memory'])}, links {_seconds(time['link'])}; bound by {time['bound']}){fits}",
                  highlight=False)
