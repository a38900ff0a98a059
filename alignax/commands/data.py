"""`alignax data`: prepare a data set, look at it as the model sees it, and check it before it costs a run."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

_TRUNCATION = ("error", "drop", "left", "right")  # alignax.data.TRUNCATION, spelled here so that --help stays quick


def add(commands) -> None:
    """Declares the command with its actions prepare, show and check."""
    parser = commands.add_parser(
        "data", help="prepare, show and check data sets",
        description="Works on files of records (.jsonl, .json, .csv, each also gzipped, .parquet), on folders of such "
                    "files, and on folders made by `alignax data prepare`.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_prepare(actions)
    _add_show(actions)
    _add_check(actions)


def _add_prepare(actions) -> None:
    parser = actions.add_parser(
        "prepare", help="store records in a folder for random access",
        description="Reads files into a folder that training reads at random places without holding it in memory: a "
                    "TFDS dataset of array_record shards, with the files' SHA-256 and the ledger of reading beside. "
                    "Equal files give equal bytes. The same command again resumes one that was killed, and ends at "
                    "once when the folder is finished. Needs the extra: pip install 'alignax[data]'.",
        epilog="exit codes: 0 prepared, 2 bad input (nothing is left behind)")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files or folders of records")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make; must be new, empty, or the "
                                                                    "same dataset")
    _add_reading(parser)
    parser.add_argument("--eval", nargs="+", default=[], metavar="PATH", dest="eval_paths",
                        help="files of the split `eval`")
    parser.add_argument("--eval-fraction", type=float, default=0.0, metavar="F",
                        help="put this share of the records into the split `eval`, by a stable hash (default 0)")
    parser.add_argument("--split-by", choices=("prompt", "id"), default="prompt",
                        help="what is hashed: the prompt, so that no prompt is in both splits, or the id "
                             "(default prompt)")
    parser.add_argument("--on-identical", choices=("error", "drop", "keep"), default="error",
                        help="what to do with records whose completions are all the same (default error)")
    parser.add_argument("--shard-records", type=int, default=20000, metavar="N", help="records per shard "
                                                                                      "(default 20000)")
    parser.add_argument("--json", action="store_true", help="a JSON object with folder, records and ledger")
    parser.set_defaults(execute=prepare)


def _add_show(actions) -> None:
    parser = actions.add_parser(
        "show", help="print records with what is scored in colour",
        description="Prints records. With --tokenizer they stand as the model sees them: scored tokens in green, "
                    "unscored ones of a completion in yellow, special tokens in braces with their role. Where the "
                    "output is no terminal, and with --plain, scored text stands in double brackets.",
        epilog="exit codes: 0 shown, 2 bad input")
    parser.add_argument("path", metavar="PATH",
                        help="a file, a folder of files, a prepared folder, or a mixture \"name=path@weight; ...\"")
    _add_reading(parser)
    _add_tokens(parser)
    parser.add_argument("--n", type=int, default=2, help="how many records (default 2)")
    parser.add_argument("--start", type=int, default=0, metavar="I", help="the first one, counted from 0 (default 0)")
    parser.add_argument("--id", metavar="ID", help="only the record with this id")
    parser.add_argument("--plain", action="store_true", help="brackets instead of colours")
    parser.add_argument("--json", action="store_true", help="one JSON object per record, with ids and masks")
    parser.set_defaults(execute=show)


def _add_check(actions) -> None:
    parser = actions.add_parser(
        "check", help="look for faults, leaks, biases and traps",
        description="Checks records: duplicates and contradictions, prompts that two files or splits share, "
                    "completions that state no preference, length bias, balance of labels. With --tokenizer also: "
                    "BOS and EOS, tokens across the border of prompt and completion, what the chat template leaves "
                    "out, and what the limits would cut or drop. Every file, and every split of a prepared folder, "
                    "is a part of its own.",
        epilog="exit codes: 0 no errors (warnings do not count), 1 errors found, 2 bad input")
    parser.add_argument("paths", nargs="+", metavar="PATH",
                        help="files, folders of files, prepared folders, or a mixture \"name=path@weight; ...\"")
    _add_reading(parser)
    _add_tokens(parser)
    parser.add_argument("--png", metavar="FILE", help="draw the lengths into this file too")
    parser.add_argument("--json", action="store_true", help="a JSON object with everything that was found")
    parser.set_defaults(execute=check)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reading")
    group.add_argument("--format", default="auto", metavar="NAME",
                       help="the layout of the rows (default auto: the only one that fits; a wrong name lists all)")
    group.add_argument("--split", metavar="NAME",
                       help="of a folder, the files with this word in their name; of a file, the rows whose field "
                            "`split` says so; of a prepared folder, the split (default of show: train)")


def _add_tokens(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tokens")
    group.add_argument("--tokenizer", metavar="FOLDER", help="a Hugging Face folder, a tokenizer.json, a model of "
                                                             "the Hub (name, or name@revision), or builtin:stories")
    group.add_argument("--template", metavar="NAME", default="auto",
                       help="chat template of messages: chatml, plain, hh, a Jinja file, a Hugging Face folder, none "
                            "(default auto: the one of --tokenizer where it has one)")
    group.add_argument("--no-bos", action="store_true", help="do not open prompts with BOS")
    group.add_argument("--eos-id", type=int, default=-1, metavar="ID",
                       help="the end token to append (default: the first of the model's)")
    for part in ("prompt", "completion", "length"):
        about = "the prompt with its longest completion" if part == "length" else f"the {part}"
        group.add_argument(f"--max-{part}", type=int, metavar="N", help=f"limit of {about} in tokens")
    group.add_argument("--truncation", choices=_TRUNCATION, default="drop",
                       help="what happens beyond a limit: an error, the record is dropped, or the prompt is cut on "
                            "that side (default drop)")


def prepare(arguments, console) -> int:
    """Makes a prepared folder; returns the exit code."""
    from rich.table import Table

    from alignax.data import store

    sources = {"train": arguments.paths} | ({"eval": arguments.eval_paths} if arguments.eval_paths else {})
    made = store.prepare(sources, arguments.out, format=arguments.format, source_split=arguments.split,
                         eval_fraction=arguments.eval_fraction, split_by=arguments.split_by,
                         shard_records=arguments.shard_records, on_identical=arguments.on_identical,
                         console=console if console.is_terminal and not arguments.json else None)
    if arguments.json:
        _json({"folder": str(made.folder), "fresh": made.fresh, "records": dict(made.counts),
               "ledger": made.ledger.as_dict()}, indent=2)
        return 0
    table = Table(title="splits", title_justify="left")
    table.add_column("split")
    table.add_column("records", justify="right")
    for split, count in made.counts.items():
        table.add_row(split, str(count))
    console.print(table)
    console.print()
    _print_ledger(made.ledger, console)
    state = "prepared" if made.fresh else "already prepared, nothing done"
    console.print(f"{state}: {made.folder}", markup=False, highlight=False, soft_wrap=True)
    return 0


def show(arguments, console) -> int:
    """Prints records; returns the exit code."""
    from alignax.data import store
    from alignax.types import ConfigError

    if arguments.n < 1 or arguments.start < 0:
        raise ConfigError(f"--n={arguments.n} --start={arguments.start}; expected --n of 1 or more, --start of 0 or "
                          "more")
    ledger = _ledger()
    if store.is_prepared(arguments.path):
        records = store.open_store(arguments.path, arguments.split or "train")
    else:
        records = _read(arguments.path, arguments.split, arguments, ledger)
    if arguments.id is not None:
        chosen = [(i, record) for i, record in enumerate(records) if record.id == arguments.id]
        if not chosen:
            raise ConfigError(f"--id={arguments.id}: none of the {len(records)} records of {arguments.path} has it")
    elif arguments.start >= len(records):
        raise ConfigError(f"--start={arguments.start}: {arguments.path} has {len(records)} records")
    else:
        chosen = [(i, records[i]) for i in range(arguments.start, min(arguments.start + arguments.n, len(records)))]
    setting = _tokens(arguments, (record for _, record in chosen))
    for index, record in chosen:
        if arguments.json:
            _json(_as_json(index, record, setting, arguments))
        else:
            _print_record(index, record, len(records), setting, arguments, console)
    return 0


def check(arguments, console) -> int:
    """Checks records and prints what was found; returns 1 where there are errors, else 0."""
    from alignax.data import audit as checks
    from alignax.data import store
    from alignax.diagnostics import show as rendering

    ledger = _ledger()
    parts = {}
    short = [pathlib.Path(path).name for path in arguments.paths]
    for path, name in zip(arguments.paths, short, strict=True):
        name = name if short.count(name) == 1 else path
        if store.is_prepared(path):
            splits = [arguments.split] if arguments.split else store.splits_of(path)
            for split in splits:  # all splits share one ledger of reading
                parts[f"{name}:{split}"] = _read(path, split, arguments, ledger if split == splits[0] else None)
        else:
            parts[name] = _read(path, arguments.split, arguments, ledger)
    setting = _tokens(arguments, (record for part in parts.values() for record in part))
    report = checks.audit(parts, *(setting or ()), **_limits(arguments), truncation=arguments.truncation)
    if arguments.png:
        rendering.save_histogram(report.values, arguments.png, unit=report.unit)
    if arguments.json:
        _json(report.as_dict() | {"reading": ledger.as_dict()}, indent=2)
        return 1 if report.errors else 0
    ledger.keep(sum(map(len, parts.values())))
    _print_ledger(ledger, console)
    *tables, findings = report.tables()
    chart = rendering.histogram(report.histogram(), checks.EDGES, title=f"histogram of lengths in {report.unit}")
    for table in (*tables, chart, *([findings] if report.findings else [])):
        console.print(table)
        console.print()
    counts = [(sum(f.severity == level for f in report.findings), level) for level in ("error", "warning")]
    words = ", ".join(f"{count} {level}{'' if count == 1 else 's'}" for count, level in counts)
    console.print(words, style="bold red" if report.errors else "bold", highlight=False)
    return 1 if report.errors else 0


def _json(value, indent: int | None = None) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def _ledger():
    from alignax.data import Ledger

    return Ledger()


def _read(path: str, split: str | None, arguments, ledger) -> list:
    """All records; those without a preference are kept, so that they are shown and reported."""
    from alignax.data import mixture, store
    from alignax.types import ConfigError

    if "=" in path and not pathlib.Path(path).exists():
        if split or arguments.format != "auto":
            raise ConfigError("--split and --format are not for a mixture: its sources are files and folders whose "
                              "layout is found by itself")
        return mixture.load_mixture(path, epochs=1.0, on_identical="keep", ledger=ledger).records
    return store.load_records(path, format=arguments.format, split=split, on_identical="keep", ledger=ledger)


def _print_ledger(ledger, console) -> None:
    """The ledger of reading, where it says more than that all was kept."""
    if ledger.dropped or ledger.noted or ledger.cuts:
        table = ledger.table("reading")
        table.title_justify = "left"
        console.print(table)
        console.print()


def _limits(arguments) -> dict[str, int | None]:
    return {"max_prompt": arguments.max_prompt, "max_completion": arguments.max_completion,
            "max_length": arguments.max_length}


def _tokens(arguments, records):
    """(tokenizer, policy, template) of the arguments, or None without --tokenizer. ConfigError on what is missing."""
    from alignax import context, models
    from alignax.data import chat
    from alignax.types import ConfigError

    if not arguments.tokenizer:
        given = [name for name, value in _limits(arguments).items() if value is not None]
        if given or arguments.template not in ("auto", "none"):
            name = f"--{(given or ['template'])[0].replace('_', '-')}"
            raise ConfigError(f"{name} needs --tokenizer: it is about tokens")
        return None
    name = arguments.tokenizer
    if name.startswith("builtin:") and name != "builtin:stories":
        raise ConfigError(f"--tokenizer={name}: the only built-in one is builtin:stories")
    if not name.startswith("builtin:") and not pathlib.Path(name).exists():
        try:
            name = str(models.resolve(name, weights=False))
        except ConfigError as error:
            raise ConfigError(f"--tokenizer={error}") from error
    tokenizer = context.load_tokenizer(name, "")
    policy = _policy(tokenizer, pathlib.Path(name), arguments)
    if arguments.template == "none":
        return tokenizer, policy, None
    specials = chat.template_specials(tokenizer, bos_id=policy.bos_id, eos_id=policy.eos_id)
    if arguments.template != "auto":
        return tokenizer, policy, chat.load_template(arguments.template, specials=specials)
    if not any(record.is_chat for record in records):
        return tokenizer, policy, None
    try:
        return tokenizer, policy, chat.load_template(name, specials=specials)
    except ConfigError as error:
        raise ConfigError(f"the records hold messages, and --tokenizer={name} brings no chat template ({error}); "
                          f"name one with --template: {', '.join(sorted(chat.BUILTIN))}, a Jinja file or a folder"
                          ) from error


def _policy(tokenizer, folder: pathlib.Path, arguments):
    """The BOS/EOS policy: of the model's configuration where the folder has one, else of tokenizer_config.json."""
    from alignax import context, data
    from alignax.types import ConfigError

    add_bos, eos_id = not arguments.no_bos, arguments.eos_id
    if not folder.exists():
        return context.text_policy(tokenizer, "", add_bos=add_bos, eos_id=eos_id)
    folder = folder if folder.is_dir() else folder.parent
    if (folder / "generation_config.json").is_file() or (folder / "config.json").is_file():
        return context.text_policy(tokenizer, str(folder), add_bos=add_bos, eos_id=eos_id)
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        raise ConfigError(f"--tokenizer={folder}: no generation_config.json, config.json or tokenizer_config.json that "
                          "names the end token")
    stored = json.loads(path.read_text(encoding="utf-8"))
    spelled = {name: value.get("content") if isinstance(value, dict) else value for name in ("bos", "eos", "pad")
               if (value := stored.get(f"{name}_token")) is not None}
    if "eos" not in spelled:
        raise ConfigError(f"{path}: no eos_token")
    policy = data.text_policy(tokenizer, bos=spelled.get("bos") if add_bos else None, eos=spelled["eos"],
                              pad=spelled.get("pad", spelled["eos"]))
    if eos_id >= 0 and eos_id != policy.eos_id:
        raise ConfigError(f"--eos-id={eos_id}: the end token of {path} is {policy.eos_id}")
    return policy


def _tokenised(record, setting, arguments):
    """(token record or None, ledger) under the limits of the arguments."""
    from alignax import data

    ledger = _ledger()
    found = data.tokenize_records([record], setting[0], setting[1], template=setting[2], ledger=ledger,
                                  truncation=arguments.truncation, **_limits(arguments))
    return (found[0] if found else None), ledger


def _as_json(index: int, record, setting, arguments) -> dict:
    from alignax.data.records import to_json

    out = {"index": index, "file": record.file, "line": record.line, "record": to_json(record)}
    if setting is None:
        return out
    tokens, ledger = _tokenised(record, setting, arguments)
    out["ledger"] = ledger.as_dict()
    if tokens is not None:
        scored = tokens.scored or [None] * len(tokens.completions)
        out["tokens"] = {"prompt": tokens.prompt.tolist(), "completions": [
            {"ids": ids.tolist(), "scored": [True] * len(ids) if mask is None else mask.tolist(), "ended": ended}
            for ids, mask, ended in zip(tokens.completions, scored, tokens.completion_ended, strict=True)]}
    return out


def _print_record(index: int, record, total: int, setting, arguments, console) -> None:
    """One record: a heading, then its prompt with each completion."""
    from rich.text import Text

    from alignax.data.audit import text_of
    from alignax.diagnostics import show as rendering

    plain = arguments.plain or not console.is_terminal
    margin = "" if record.margin is None else f"  margin {record.margin:g}"
    console.print(f"record {index} of {total}  id {record.id}  {record.place}{margin}", style="bold", markup=False,
                  highlight=False, soft_wrap=True)
    if setting is None:
        for name, part in zip(["prompt", *rendering.names(record)], [record.prompt, *record.completions], strict=True):
            console.print(Text(f"--- {name}", style="cyan"))
            console.print(Text(text_of(part)), soft_wrap=True)
        console.print()
        return
    tokens, ledger = _tokenised(record, setting, arguments)
    for outcome, reason in [*(("dropped", r) for r in ledger.dropped), *(("noted", r) for r in ledger.noted),
                            *(("cut", f"{ledger.cut_tokens[key]} tokens on the {key[1]}: {key[0]}")
                              for key in ledger.cuts)]:
        console.print(Text(f"{outcome}: {reason}", style="yellow"))
    if tokens is not None:
        parts = [rendering.pieces(tokens, k, setting[0], setting[1]) for k in range(len(tokens.completions))]
        prompt = rendering.pieces(tokens, None, setting[0], setting[1])
        shown = [(f"prompt: {len(tokens.prompt)} tokens", prompt)]
        for name, part in zip(rendering.names(tokens), parts, strict=True):
            answer = [piece for piece in part if piece.kind != "prompt"]
            scored = sum(piece.tokens for piece in answer if piece.kind == "scored")
            shown.append((f"{name}: {sum(piece.tokens for piece in answer)} tokens, {scored} scored", answer))
        for heading, part in shown:
            console.print(Text(f"--- {heading}", style="cyan"))
            console.print(Text(rendering.plain(part)) if plain else rendering.coloured(part), soft_wrap=True)
    console.print()
