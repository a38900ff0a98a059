"""`alignax generate`: sample completions of prompts."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any, NamedTuple

from alignax.commands import policies, rules

BATCH = 16
EPILOG = """A line of --prompts is a JSON object with `prompt` (a text, or with --chat a list of messages) or
`messages`, and optionally `id`, from which the draws follow; other fields are not read. --out writes one JSON object
for each completion, with the sampled ids, so that training on them never tokenises again."""


def add(commands) -> None:
    """Declares the command and its arguments."""
    parser = commands.add_parser(
        "generate", help="sample completions of prompts", epilog=EPILOG,
        description="Samples completions from a model's folder (--model) or from a stage of a run (--run).")
    policies.add_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    source.add_argument("--prompts", metavar="FILE", help="a file of prompts: JSON lines (.jsonl, .jsonl.gz)")
    parser.add_argument("--samples", type=int, default=1, help="completions per prompt (default 1)")
    parser.add_argument("--chat", action="store_true", help="put prompts into the chat template, as a user's turn")
    parser.add_argument("--template", default="", metavar="NAME",
                        help="with --chat: chatml, plain, hh, a Jinja file or a folder (default: the model's own)")
    parser.add_argument("--system", default="", metavar="TEXT", help="with --chat: the system's turn")
    parser.add_argument("--batch-size", type=int, default=BATCH, help=f"prompts at a time (default {BATCH})")
    add_lanes(parser)
    parser.add_argument("--out", metavar="FILE", help="write JSON lines to this file, which must not exist")
    parser.add_argument("--json", action="store_true", help="print one JSON object per completion")
    rules.add_arguments(parser, max_new_tokens=64)
    parser.set_defaults(execute=run)


def add_lanes(parser, where: str = "") -> None:
    """Declares --lanes."""
    parser.add_argument("--lanes", type=int, default=0, metavar="N",
                        help=f"{where}at most N completions of a batch in work at once, one that ends makes room for "
                             "the next: faster where lengths differ much (default 0: all until the longest ends)")


class _Prompt(NamedTuple):
    """One prompt: its place for messages, its id, the number that its draws follow from, what is shown, and its ids."""

    place: str
    id: str
    number: int
    shown: Any
    ids: Any


def run(arguments, console) -> int:
    """Samples, prints or writes completions; returns the exit code."""
    import jax

    from alignax import metrics, rollout, sources
    from alignax.types import ConfigError

    for flag, value, low in (("samples", arguments.samples, 1), ("batch-size", arguments.batch_size, 1),
                             ("lanes", arguments.lanes, 0)):
        if value < low:
            raise ConfigError(f"--{flag}={value}; allowed: {low} or more")
    for flag, value in (("template", arguments.template), ("system", arguments.system)):
        if value and not arguments.chat:
            raise ConfigError(f"--{flag}={value}: goes with --chat")
    out_file = new_file("out", arguments.out)
    asked = _asked(arguments)
    policy = policies.load(arguments)
    settings = rules.settings(arguments, policy)
    prompts = _prompts(arguments, policy, asked)
    with metrics.progress(console) as bar:
        task = bar.add_task("prompts", total=len(prompts), numbers="")
        out = sources.rollout(policy.spec.config, policy.params["model"], [p.ids for p in prompts],
                              [p.number for p in prompts], jax.random.key(arguments.seed),
                              num_samples=arguments.samples, batch_size=arguments.batch_size, lanes=arguments.lanes,
                              advance=lambda count: bar.advance(task, count), **settings)
    rows = []
    for i, prompt in enumerate(prompts):
        for k in range(arguments.samples):
            ids = [int(t) for t in out.tokens[i][k]]
            text = policy.tokenizer.decode_completion(prompt.ids.tolist(),
                                                      [t for t in ids if t not in policy.text.eos_ids])
            rows.append({"id": prompt.id, "sample": k, "prompt": prompt.shown, "completion": text,
                         "logp": float(out.logps[i, k]), "behaviour_logp": float(out.behaviour_logps[i][k].sum()),
                         "tokens": len(ids), "finished": bool(out.finished[i, k]),
                         "reason": rollout.REASONS[out.reason[i, k]], "prompt_ids": prompt.ids.tolist(),
                         "completion_ids": ids})
    if out_file is not None:
        write_rows(out_file, rows)
        console.print(f"{out_file}: {len(rows)} completions of {len(prompts)} prompts", markup=False, highlight=False,
                      soft_wrap=True)
    for row in rows:
        if arguments.json:
            sys.stdout.write(json.dumps({n: v for n, v in row.items() if not n.endswith("_ids")}) + "\n")
        elif out_file is None:
            _show(console, row)
    return 0


def _asked(arguments) -> list[tuple[str, str, Any]]:
    """(place, id, text or messages) of every prompt; DataError with file and line for a line that is none."""
    if arguments.prompt:
        return [(f"--prompt={text[:40]!r}", str(number), text) for number, text in enumerate(arguments.prompt)]
    from alignax import data
    from alignax.data import messages, rows
    from alignax.types import DataError

    path, found, places = pathlib.Path(arguments.prompts), [], {}
    for line, fields in rows.json_lines(path, data.Ledger()):
        place = f"{path}:{line}"
        names = [name for name in ("prompt", "messages") if fields.get(name) is not None]
        if len(names) != 1:
            raise DataError(f"{place}: found the fields {sorted(fields)}, allowed: one of `prompt` and `messages`")
        value, id = fields[names[0]], fields.get("id", str(line))
        if not isinstance(value, str) or names == ["messages"]:
            value = messages.dialogue(value, place, names[0])
            if not value:
                raise DataError(f"{place}: field {names[0]!r}: found no messages, allowed: one or more")
            if not arguments.chat:
                raise DataError(f"{place}: field {names[0]!r} holds messages, which need --chat")
        if not isinstance(id, (str, int)) or str(id) in places:
            raise DataError(f"{place}: field 'id': found {id!r}"
                            + (f", as on line {places[str(id)]}" if str(id) in places else "")
                            + ", allowed: a text that no other line has")
        places[str(id)] = line
        found.append((place, str(id), value))
    if not found:
        raise DataError(f"{path}: no prompts in it")
    return found


def _prompts(arguments, policy, asked) -> list[_Prompt]:
    """Prompts as ids. Raises ConfigError for one without tokens, or one that is too long for the model."""
    import numpy as np

    from alignax import data
    from alignax.types import ConfigError

    template = policies.template(policy, arguments.template) if arguments.chat else None
    limit, out = policy.spec.config.max_positions, []
    for index, (place, id, value) in enumerate(asked):
        shown = value if isinstance(value, str) else [turn.to_json() for turn in value]
        if template is None:
            ids = policy.text.prompt(policy.tokenizer.encode_prompt(value))
        else:
            turns = (data.Message("user", value),) if isinstance(value, str) else value
            if arguments.system and turns[0].role != "system":
                turns = (data.Message("system", arguments.system), *turns)
            ids = template.encode(policy.tokenizer, turns, place=place)
        if not len(ids):
            raise ConfigError(f"{place} has no tokens, and the model has no BOS to start from")
        if len(ids) + arguments.max_new_tokens > limit:
            raise ConfigError(f"{place}: {len(ids)} tokens and --max-new-tokens={arguments.max_new_tokens} exceed the "
                              f"model's {limit} positions")
        number = index if arguments.prompt else data.record_number(id)
        out.append(_Prompt(place, id, number, shown, np.asarray(ids, np.int32)))
    return out


def new_file(flag: str, name: str | None) -> pathlib.Path | None:
    """The file that a flag names, or None; ConfigError where it exists or its folder does not."""
    from alignax.types import ConfigError

    path = pathlib.Path(name) if name else None
    if path is not None and (path.exists() or not path.parent.is_dir()):
        raise ConfigError(f"--{flag}={path}: {'it exists' if path.exists() else 'no such folder'}; allowed: a new "
                          "file in an existing folder")
    return path


def write_rows(path: pathlib.Path, rows: list[dict]) -> None:
    """Writes JSON lines under another name first, so that a file of the right name is whole."""
    from alignax.types import ConfigError

    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if path.exists():  # it came to be while we sampled
        raise ConfigError(f"--out={path}: it exists; the rows are in {part}")
    part.replace(path)


def _show(console, row: dict) -> None:
    """Prints a prompt, its completion and a line of numbers."""
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in prompt) + "\n"
    console.print(prompt, style="bold", markup=False, highlight=False, soft_wrap=True, end="")
    console.print(completion, soft_wrap=True, markup=False, highlight=False)
    ended = {"end token": "finished"}.get(row["reason"], row["reason"])
    console.print(f"[dim]{row['tokens']} tokens, log-prob {row['logp']:.2f} nats, {ended}[/]\n")
