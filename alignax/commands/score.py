"""`alignax score`: what training on each pair of a file would do by CHES, reference margin and difficulty; a filter."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
from typing import Any

from alignax.commands import given, policies

EPILOG = """scores: ches (of summed states) and ches_normalised, the higher the more the chosen completion is to be
displaced (arXiv 2410.08847); margin and margin_per_token, how much the reference prefers the chosen completion; with a
reference also reward_margin (beta times the difference of the log-ratios) and difficulty (DPO's loss). CHES is that of
the policy named with --model or --run, and so is the margin where no reference is named: name the model that the
training would start from. Rank 1 is the highest score.

--keep: lowest:0.9 keeps the 90% of pairs with the lowest score, highest:0.5 the other end; below:0 and above:0 keep by
a bound, between:-1:2 by two. Records that are no pair, state no preference or are too long are never kept, and each of
them stands in scores.jsonl with its reason.

files of --out: scores.jsonl (one line per record: id, place, kept, reason, scores, ranks), scores.png and .svg,
summary.json (summary, rule, ledger), and with --keep kept.jsonl, which every command and config reads.
exit codes: 0 written, 2 bad input"""


def add(commands) -> None:
    """Declares the command and its arguments."""
    parser = commands.add_parser(
        "score", help="score and filter preference pairs by what training on them would do", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Scores every pair of a file under a policy, and with --keep writes the pairs that a rule keeps.")
    parser.add_argument("file", metavar="FILE", help="a file or folder of records, or a prepared folder")
    policies.add_arguments(parser)
    given.add_reference(parser)
    given.add_reading(parser)
    parser.add_argument("--beta", type=float, default=0.1, help="of the reward margin and the difficulty (default 0.1)")
    parser.add_argument("--by", default="", metavar="SCORE",
                        help="with --keep: ches (normalised by length), ches_sum, margin, margin_per_token or "
                             "difficulty")
    parser.add_argument("--keep", default="", metavar="RULE",
                        help="lowest:SHARE, highest:SHARE, below:BOUND, above:BOUND or between:LOW:HIGH")
    parser.add_argument("--out", metavar="DIR", default="", help="write the files to this new folder")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object and nothing else")
    parser.set_defaults(execute=run)


def run(arguments, console) -> int:
    """Scores, prints and writes; returns the exit code."""
    import numpy as np
    from rich.console import Console

    from alignax import checkpoint
    from alignax.diagnostics import pair_scores
    from alignax.types import DataError

    rule, folder = _check(arguments)
    if arguments.json:  # standard output holds the object alone
        console = Console(stderr=True)
    policy = policies.load(arguments)
    reference = given.reference(arguments, policy)
    records, ledger, template = given.read(arguments, policy)
    tokens, reasons = _pairs(arguments, policy, records, ledger, template)
    if not tokens:
        raise DataError(f"{arguments.file}: none of {len(records)} records is a pair to score: {dict(ledger.dropped)}")
    values = _values(arguments, console, policy, reference, tokens)
    found = pair_scores.scores(values, beta=arguments.beta)
    by = pair_scores.BY.get(arguments.by, "")
    keep = pair_scores.kept(found[by], rule) if rule else np.ones(len(tokens), bool)
    if count := int((~keep).sum()):
        ledger.drop(f"{by} outside {rule}", count)
    ledger.keep(int(keep.sum()))
    result = {"file": arguments.file, "policy": given.policy_name(policy), "records": len(records),
              "reference": given.reference_name(arguments, policy) if reference is not None else None,
              "beta": arguments.beta, "by": by or None, "keep": str(rule) if rule else None, "pairs": len(tokens),
              "kept": int(keep.sum()), "scores": pair_scores.summary(found, values["tokens"]),
              "ledger": ledger.as_dict()}
    if arguments.json:
        sys.stdout.write(json.dumps(given.plain(result), allow_nan=False) + "\n")
    else:
        _show(console, result, ledger)
    if folder is not None:
        folder.mkdir(exist_ok=True)
        rows = _rows(records, tokens, reasons, values, found, keep, f"{by} outside {rule}")
        with (folder / "scores.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        pair_scores.histograms(found, keep, by, folder / "scores.png")
        if rule:
            _write_kept(folder, records, tokens, keep)
        checkpoint.write_json(folder / "summary.json", given.plain(result))
        console.print(f"{folder}: scores.jsonl, scores.png, summary.json{', kept.jsonl' if rule else ''}",
                      markup=False, highlight=False, soft_wrap=True)
    return 0


def _check(arguments) -> tuple[Any, pathlib.Path | None]:
    """(rule or None, new folder or None). Raises ConfigError for options out of range or without their partner."""
    from alignax.diagnostics import pair_scores
    from alignax.types import ConfigError

    given.check(arguments)
    if not arguments.beta > 0 or math.isinf(arguments.beta):
        raise ConfigError(f"--beta={arguments.beta}; allowed: above 0")
    if bool(arguments.by) != bool(arguments.keep):
        raise ConfigError(f"--by={arguments.by} --keep={arguments.keep}: each needs the other")
    if arguments.by and arguments.by not in pair_scores.BY:
        raise ConfigError(f"--by={arguments.by}; allowed: {', '.join(pair_scores.BY)}")
    if arguments.by == "difficulty" and not (arguments.reference or arguments.reference_stage):
        raise ConfigError("--by=difficulty: compares the policy with a reference; name it with --reference or "
                          "--reference-stage")
    rule = pair_scores.parse_keep(arguments.keep) if arguments.keep else None
    if rule and not arguments.out:
        raise ConfigError(f"--keep={arguments.keep}: needs --out, the folder that the kept pairs go to")
    folder = pathlib.Path(arguments.out) if arguments.out else None
    if folder is not None and (not folder.parent.is_dir() or folder.exists() and (
            not folder.is_dir() or any(folder.iterdir()))):
        raise ConfigError(f"--out={folder}: it exists with something in it, or its parent does not; allowed: a new or "
                          "empty folder in an existing one")
    return rule, folder


def _pairs(arguments, policy: policies.Policy, records, ledger, template) -> tuple[list, dict[str, str]]:
    """(token records of the pairs, record id -> why it is not among them); the ledger counts the reasons."""
    from alignax import data
    from alignax.analyses import pairs
    from alignax.types import ConfigError

    limit = policy.spec.config.max_positions
    if arguments.max_length > limit:
        raise ConfigError(f"--max-length={arguments.max_length}; the model has {limit} positions")
    ledger.noted.pop("identical completions kept", None)  # here they are left out, and counted below
    out, reasons = [], {}
    for record in records:
        own = data.Ledger()  # one each, so that the reason stands beside the record
        made = data.tokenize_records([record], policy.tokenizer, policy.text, ledger=own, template=template,
                                     truncation=arguments.truncation, max_length=arguments.max_length or limit)
        reason = pairs.why_not(made[0]) if made else next(iter(own.dropped))
        own.kept, own.dropped = 0, type(own.dropped)()
        for name in ("dropped", "cuts", "cut_tokens", "noted"):
            getattr(ledger, name).update(getattr(own, name))
        if reason:
            reasons[record.id] = reason
            ledger.drop(reason)
        else:
            out += made
    return out, reasons


def _values(arguments, console, policy: policies.Policy, reference, tokens) -> dict[str, Any]:
    """analyses.pairs.score with parameters on the devices and a progress line."""
    import jax

    from alignax import metrics, sharding
    from alignax.analyses import pairs

    mesh = sharding.make_mesh()
    place = lambda tree: tree and jax.device_put(tree, sharding.param_shardings(tree, mesh))
    with metrics.progress(console) as bar:
        task = bar.add_task("scoring", total=len(tokens), numbers="")
        return pairs.score(policy.spec, place(policy.params), tokens, pad_id=policy.text.pad_id,
                           reference=place(reference), batch_size=arguments.batch_size, mesh=mesh,
                           advance=lambda count: bar.advance(task, count))


def _rows(records, tokens, reasons, values, found, keep, outside: str) -> list[dict]:
    """One JSON object per record of the file, in its order."""
    from alignax.diagnostics import pair_scores

    ranks = {name: pair_scores.ranks(array) for name, array in found.items()}
    place = {record.id: n for n, record in enumerate(tokens)}
    rows = []
    for record in records:
        row: dict[str, Any] = {"id": record.id, "place": record.place}
        if record.id in reasons:
            rows.append(row | {"kept": False, "reason": reasons[record.id]})
            continue
        n = place[record.id]
        row |= {"kept": bool(keep[n]), "reason": None if keep[n] else outside}
        row |= {f"tokens_{side}": int(values["tokens"][n, k]) for k, side in enumerate(("chosen", "rejected"))}
        row["scores"] = {name: float(array[n]) for name, array in found.items()}
        row["ranks"] = {name: int(array[n]) for name, array in ranks.items()}
        rows.append(row)
    return rows


def _write_kept(folder: pathlib.Path, records, tokens, keep) -> None:
    """kept.jsonl: the kept records as they were read, in the order of the file."""
    from alignax import data

    ids = {record.id for record, good in zip(tokens, keep, strict=True) if good}
    data.write_jsonl(folder / "kept.jsonl", (r for r in records if r.id in ids))


def _show(console, result: dict, ledger) -> None:
    """Prints the tables of a summary."""
    from rich.table import Table
    from rich.text import Text

    from alignax.diagnostics import tables

    reference = f", reference {result['reference']}" if result["reference"] else ""
    console.print(f"{result['file']}: {result['records']} records, policy {result['policy']}{reference}", markup=False,
                  highlight=False, soft_wrap=True)
    console.print(ledger.table())
    table = Table(title=f"scores of {result['pairs']} pairs", title_justify="left",
                  caption="length: Spearman's correlation with tokens(chosen) - tokens(rejected)",
                  caption_justify="left")
    headings = {"mean": "mean", "sd": "sd", "low": "5%", "median": "median", "high": "95%", "length": "length"}
    table.add_column("score", no_wrap=True)
    for heading in headings.values():
        table.add_column(heading, no_wrap=True)
    columns = [tables.aligned([None if math.isnan(row[key]) else row[key] for row in result["scores"].values()], 3)
               for key in headings]
    for n, name in enumerate(result["scores"]):
        mark = " *" if name == result["by"] else ""
        table.add_row(*map(Text, [name + mark, *(column[n] for column in columns)]))
    console.print(table)
    if result["by"]:
        console.print(f"* {result['keep']} keeps {result['kept']} of {result['pairs']} pairs", markup=False,
                      highlight=False)
