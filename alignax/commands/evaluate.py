"""`alignax evaluate`: what a policy makes of a file of preferences, lists, unpaired completions, prompts or texts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from alignax.commands import generate, given, policies, rules

NEW_TOKENS = 64
EPILOG = """Log-probs are sums over the scored tokens of a completion, in nats. Accuracies count ties half; their 95%
intervals (Wilson) are over records, each of which counts once however many pairs it holds. The implicit reward is the
log-ratio to the reference, without beta. KL at data prefixes is exact over the vocabulary; KL on policy is estimated on
samples, with its standard error over prompts, and holds for plain sampling (temperature 1, nothing cut off); with other
decoding rules the same mean is named log_ratio_on_samples."""


def add(commands) -> None:
    """Declares the command and its arguments."""
    parser = commands.add_parser(
        "evaluate", help="score a file of data, and samples on its prompts", epilog=EPILOG,
        description="Scores the completions of any file that training reads under a policy, and with --generate its "
                    "own completions of the file's prompts.")
    parser.add_argument("file", metavar="FILE", help="a file or folder of records, or a prepared folder")
    policies.add_arguments(parser)
    given.add_reference(parser)
    given.add_reading(parser)
    parser.add_argument("--reward", default="", metavar="NAME",
                        help="also score the texts by this reward (a wrong name lists them)")
    parser.add_argument("--generate", action="store_true", help="sample completions of the prompts and compare them")
    parser.add_argument("--samples", type=int, default=1, help="with --generate: completions per prompt (default 1)")
    generate.add_lanes(parser, "with --generate: ")
    parser.add_argument("--out", metavar="FILE", help="write one JSON line per completion to this new file")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object and nothing else")
    rules.add_arguments(parser, max_new_tokens=NEW_TOKENS)
    parser.set_defaults(execute=run)


def run(arguments, console) -> int:
    """Evaluates, prints and writes; returns the exit code."""
    import jax
    from rich.console import Console

    from alignax import sample, scoring, sharding
    from alignax.types import ConfigError

    plain = _check(arguments)
    out_file = generate.new_file("out", arguments.out)
    reward = sample.reward_fn(arguments.reward) if arguments.reward else None
    if arguments.json:  # standard output holds the object alone
        console = Console(stderr=True)
    policy = policies.load(arguments)
    params, reference = policy.params | _reward_head(policy), given.reference(arguments, policy)
    limit = policy.spec.config.max_positions
    if arguments.max_length > limit:
        raise ConfigError(f"--max-length={arguments.max_length}; the model has {limit} positions")
    if arguments.generate and arguments.max_new_tokens >= limit:
        raise ConfigError(f"--max-new-tokens={arguments.max_new_tokens}; allowed: fewer than the model's {limit} "
                          "positions")
    mesh = sharding.make_mesh()
    place = lambda tree: tree and jax.device_put(tree, sharding.param_shardings(tree, mesh))
    work = _Work(arguments, console, policy, place(params), place(reference), mesh, reward)
    records, ledger, template = given.read(arguments, policy)
    result = {"file": arguments.file, "policy": given.policy_name(policy), "records": len(records),
              "reference": given.reference_name(arguments, policy) if reference is not None else None}
    with_answers = [r for r in records if r.completions]
    if not with_answers and not arguments.generate:
        raise ConfigError(f"{arguments.file}: its records are prompts without completions; --generate samples some")
    rows = []
    if with_answers:
        scored = _tokens(work, with_answers, ledger, template, max_length=arguments.max_length or limit)
        values = work.score("scoring", scored)
        if reward is not None:
            texts = {r.id: [_text(c) for c in r.completions] for r in with_answers}
            values["reward"] = _rewards(reward, [texts[r.id] for r in scored])
        result |= scoring.summary(scored, values)
        rows = [{"source": "data"} | row for row in scoring.rows(scored, values)]
    result["ledger"] = ledger.as_dict()
    if arguments.generate:
        result["generated"], more = _generated(work, records, template, plain)
        rows += more
    if arguments.json:
        sys.stdout.write(json.dumps(given.plain(result), allow_nan=False) + "\n")
    else:
        _show(console, result, ledger)
    if out_file is not None:
        generate.write_rows(out_file, rows)
        console.print(f"{out_file}: {len(rows)} rows", markup=False, highlight=False, soft_wrap=True)
    return 0


@dataclasses.dataclass
class _Work:
    """What scoring and sampling share. params, reference: on the mesh; reference is None where there is none."""

    arguments: Any
    console: Any
    policy: policies.Policy
    params: Any
    reference: Any
    mesh: Any
    reward: Any

    def score(self, label: str, records):
        """scoring.score of token records, with a progress line."""
        from alignax import metrics, scoring

        with metrics.progress(self.console) as bar:
            task = bar.add_task(label, total=len(records), numbers="")
            return scoring.score(self.policy.spec, self.params, records, pad_id=self.policy.text.pad_id,
                                 reference=self.reference, batch_size=self.arguments.batch_size, mesh=self.mesh,
                                 advance=lambda count: bar.advance(task, count))

    def sample(self, label: str, params, records, key):
        """(rollouts, their texts) of the records' prompts, with a progress line."""
        from alignax import metrics, sources

        settings = rules.settings(self.arguments, self.policy)
        with metrics.progress(self.console) as bar:
            task = bar.add_task(label, total=len(records), numbers="")
            out = sources.rollout(self.policy.spec.config, params["model"], [r.prompt for r in records],
                                  [r.number for r in records], key,
                                  num_samples=self.arguments.samples, batch_size=self.arguments.batch_size,
                                  lanes=self.arguments.lanes,
                                  advance=lambda count: bar.advance(task, count), **settings)
        ends, decode = self.policy.text.eos_ids, self.policy.tokenizer.decode_completion
        return out, [[decode(r.prompt.tolist(), [int(t) for t in ids if int(t) not in ends]) for ids in row]
                     for r, row in zip(records, out.tokens, strict=True)]


def _check(arguments) -> bool:
    """Refuses numbers out of range and options that would be ignored; returns whether sampling is plain."""
    from alignax.types import ConfigError

    given.check(arguments)
    for flag, low in (("samples", 1), ("lanes", 0)):
        if getattr(arguments, flag) < low:
            raise ConfigError(f"--{flag}={getattr(arguments, flag)}; allowed: {low} or more")
    decoding = argparse.ArgumentParser()
    rules.add_arguments(decoding, max_new_tokens=NEW_TOKENS)
    usual = vars(decoding.parse_args([])) | {"samples": 1, "lanes": 0}
    changed = [name for name, value in usual.items() if getattr(arguments, name) != value]
    if changed and not arguments.generate:
        raise ConfigError(f"--{changed[0].replace('_', '-')}: goes with --generate")
    return not set(changed) - {"max_new_tokens", "stop", "seed", "samples", "lanes"}


def _reward_head(policy: policies.Policy) -> dict[str, Any]:
    """{"reward_head": ...} of the policy's stage, where it has one."""
    import jax

    from alignax import checkpoint, models

    folder = policy.run and policy.run / "stages" / policy.stage / "reward_head"
    if not folder or not folder.exists():
        return {}
    like = jax.eval_shape(lambda: models.init_scalar_head(jax.random.key(0), policy.spec.config.hidden_size))
    return {"reward_head": checkpoint.load_tree(folder, like)}


def _tokens(work: _Work, records, ledger, template, **bounds):
    """Token records under --truncation; DataError where none is left."""
    from alignax import data
    from alignax.types import DataError

    out = data.tokenize_records(records, work.policy.tokenizer, work.policy.text, ledger=ledger, template=template,
                                truncation=work.arguments.truncation, **bounds)
    if not out:
        raise DataError(f"{work.arguments.file}: none of {len(records)} records is left: {dict(ledger.dropped)}")
    return out


def _text(completion: Any) -> str:
    """What a completion says: itself, or what the assistant says in its messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(turn.content or "" for turn in completion if turn.role == "assistant")


def _rewards(reward, texts) -> Any:
    """float64 [n, K], NaN where there is no text."""
    import numpy as np

    out = np.full((len(texts), max(map(len, texts))), np.nan)
    flat = iter(np.asarray(reward([text for row in texts for text in row]), np.float64))
    for n, row in enumerate(texts):
        out[n, :len(row)] = [next(flat) for _ in row]
    return out


def _generated(work: _Work, records, template, plain: bool) -> tuple[dict, list[dict]]:
    """(summary, rows) of samples on the records' prompts, by the policy and by the reference where there is one."""
    import jax
    import numpy as np

    from alignax import data, scoring
    from alignax.diagnostics import compare
    from alignax.types import ConfigError

    asked = [r for r in records if r.prompt]
    if not asked:
        raise ConfigError(f"--generate: {work.arguments.file}: its records have no prompts")
    best = {r.id: _text(r.completions[0]) for r in asked if r.completions}
    ledger = data.Ledger()
    bare = [dataclasses.replace(r, completions=(), scores=None, labels=None, extra={}) for r in asked]
    prompts = _tokens(work, bare, ledger, template,
                      max_prompt=work.policy.spec.config.max_positions - work.arguments.max_new_tokens)
    if any(not len(p.prompt) for p in prompts):
        raise ConfigError("--generate: a prompt has no tokens, and the model has no BOS to start from")
    result: dict[str, Any] = {"prompts": len(prompts), "samples": work.arguments.samples, "ledger": ledger.as_dict()}
    rows, rewards, key = [], {}, jax.random.key(work.arguments.seed)
    # The reference draws with a key of its own: a win rate is about independent samples.
    keys = {"policy": key, "reference": jax.random.fold_in(key, 1)}
    for who, params in (("policy", work.params), ("reference", work.reference)):
        if params is None:
            continue
        out, texts = work.sample(f"sampling: {who}", params, prompts, keys[who])
        sampled = [data.token_record(p.id, p.prompt, row, eos_ids=work.policy.text.eos_ids, file=p.file, line=p.line)
                   for p, row in zip(prompts, out.tokens, strict=True)]
        values = work.score(f"scoring samples: {who}", sampled)
        lists = [ids.tolist() for row in out.tokens for ids in row]
        found = {"length_mean": float(values["tokens"].mean()), "distinct_2": compare.distinct_n(lists, 2),
                 "unfinished": int((~out.finished).sum()), "completions": len(lists)}
        if work.reward is not None:
            values["reward"] = rewards[who] = _rewards(work.reward, texts)
            found |= _mean(values["reward"].mean(1))
        if who == "policy":
            result["sampler_trainer_gap"] = float(np.abs(out.logps - values["logp"]).max())
            if work.reference is not None:
                kl, error = compare.kl_on_policy(values["logp"].mean(1), values["ref_logp"].mean(1))
                result["kl_on_policy" if plain else "log_ratio_on_samples"] = {"nats": kl, "se": error}
        result[who] = found
        said = (text for row in texts for text in row)
        rows += [{"source": who} | row | {"side": "sample", "text": text}
                 for row, text in zip(scoring.rows(sampled, values), said, strict=True)]
    if work.reward is not None:
        if work.reference is not None:
            result["wins"] = {"against": "reference"} | scoring.wins(rewards["policy"], rewards["reference"])
        elif any(p.id in best for p in prompts):
            answered = [n for n, p in enumerate(prompts) if p.id in best]
            theirs = _rewards(work.reward, [[best[prompts[n].id]] for n in answered])
            result["wins"] = {"against": "the file's first completion"} | scoring.wins(
                rewards["policy"][answered], theirs)
    return result, rows


def _mean(values) -> dict[str, float]:
    """Mean over prompts of a reward, and its standard error (None for one prompt)."""
    import numpy as np

    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"reward": float(values.mean()), "reward_se": error}


def _number(value: Any) -> str:
    """A number for a table: integers as they are, others with 4 digits behind the point at most."""
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "–"
    return str(value) if isinstance(value, (int, str)) else f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """A rich table whose first column holds names and the others numbers."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for index, name in enumerate(names):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(_number(value)) for value in row))
    return table


def _rate(found: dict, key: str) -> str:
    return f"{found[key]:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _show(console, result: dict, ledger) -> None:
    """Prints the tables of a summary."""
    reference = f", reference {result['reference']}" if result["reference"] else ""
    console.print(f"{result['file']}: {result['records']} records, policy {result['policy']}{reference}", markup=False,
                  highlight=False, soft_wrap=True)
    if ledger.total or ledger.noted:
        console.print(ledger.table())
    if sides := result.get("sides"):
        names = list(dict.fromkeys(name for found in sides.values() for name in found))
        console.print(_table("completions", ["", *sides], [
            [name.replace("_", " "), *(found.get(name) for found in sides.values())] for name in names]))
    if ranked := result.get("preferences"):
        console.print(_table("the better completion has more", [
            "of", "accuracy [95%]", "margin", "(se)", "records", "pairs", "ties"], [
            [name.replace("_", " "), _rate(found, "accuracy"), found["margin"], found["margin_se"], found["records"],
             found["pairs"], found["ties"]] for name, found in ranked.items()]))
    if areas := result.get("label_auc"):
        console.print(_table("desirable above undesirable", ["by", "area under ROC"], [
            [name.replace("_", " "), area] for name, area in areas.items()]))
    if "generated" in result:
        _show_generated(console, result["generated"])


def _show_generated(console, found: dict) -> None:
    """Prints the table and the lines of sampled completions, and what became of prompts that were too long."""
    from alignax import data

    prompts = data.Ledger.from_dict(found["ledger"])
    if prompts.dropped or prompts.cuts:
        console.print(prompts.table("prompts sampled from"))
    who = [name for name in ("policy", "reference") if name in found]
    names = list(found["policy"])
    console.print(_table(f"samples on {found['prompts']} prompts", ["", *who], [
        [name.replace("_", " "), *(found[w][name] for w in who)] for name in names]))
    say = lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)
    if "wins" in found:
        say(f"win rate against {found['wins']['against']}: {_rate(found['wins'], 'win_rate')} over "
            f"{found['wins']['prompts']} prompts")
    for name, about in (("kl_on_policy", "KL(policy || reference) on policy"),
                        ("log_ratio_on_samples", "mean log-ratio on samples (not a KL: the sampling is not plain)")):
        if name in found:
            say(f"{about}: {_number(found[name]['nats'])} nats per sequence, standard error "
                f"{_number(found[name]['se'])}")
    say(f"largest difference of sampler and trainer: {found['sampler_trainer_gap']:.1e} nats per sequence")
