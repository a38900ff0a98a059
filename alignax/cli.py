"""The command `alignax`: train, generate, methods."""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import sys
from collections.abc import Sequence

EXIT_ERROR = 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="alignax", description="Preference alignment of language models in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", help="run or resume the stages of a config",
        description="Runs the stages of a config in a folder. The same command again resumes a run that was stopped "
                    "or killed, and ends at once when the run is finished. Any key can be overridden with "
                    "--config.key=value; an unknown key is refused with the legal ones.",
        epilog="exit codes: 0 finished, 2 bad input, 3 a step was not finite, "
               "75 stopped by SIGTERM and resumable")
    train.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a Python file with get_config([arg])")
    train.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder")
    train.add_argument("--dry-run", action="store_true", help="check and print the resolved config, start nothing")

    generate = commands.add_parser(
        "generate", help="sample completions of prompts",
        description="Samples completions from a Hugging Face folder (--model) or from a stage of a run (--run).")
    place = generate.add_mutually_exclusive_group(required=True)
    place.add_argument("--model", metavar="FOLDER", help="a Hugging Face folder")
    place.add_argument("--run", metavar="DIR", help="the folder of a run of `alignax train`")
    generate.add_argument("--stage", default="", help="with --run: the train stage (default: the last finished)")
    generate.add_argument("--prompt", action="append", required=True, help="a prompt; may be given several times")
    generate.add_argument("--samples", type=int, default=1, help="completions per prompt (default 1)")
    generate.add_argument("--max-new-tokens", type=int, default=64, help="default 64")
    generate.add_argument("--temperature", type=float, default=1.0, help="default 1.0; 0 is greedy")
    generate.add_argument("--top-p", type=float, default=1.0, help="default 1.0")
    generate.add_argument("--seed", type=int, default=0, help="default 0")
    generate.add_argument("--json", action="store_true", help="one JSON object per completion")

    methods = commands.add_parser("methods", help="list the methods",
                                  description="Lists id, kind, arXiv id, fidelity, signature and file of every method.")
    methods.add_argument("--json", action="store_true", help="a JSON list of objects with `id`")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    overrides = [a[len("--config."):] for a in argv if a.startswith("--config.")]
    arguments = _parser().parse_args([a for a in argv if not a.startswith("--config.")])
    # Imported late, so that --help answers at once.
    from rich.console import Console

    from alignax import context, launch
    from alignax.types import ConfigError, DataError

    logging.getLogger("absl").setLevel(logging.ERROR)
    console, problems = Console(), Console(stderr=True)
    if not console.is_terminal:
        console = Console(width=120)  # a log file has no width of its own
    try:
        launch.compilation_cache()
        if arguments.command == "train":
            return _train(arguments, overrides, console)
        if overrides:
            raise ConfigError(f"--config.{overrides[0]}: only `alignax train` takes config overrides")
        return {"generate": _generate, "methods": _methods}[arguments.command](arguments, console)
    except (ConfigError, DataError) as error:
        problems.print("[bold red]error:[/] ", end="")
        problems.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return EXIT_ERROR
    except FloatingPointError as error:
        problems.print(f"error: {error}", markup=False, soft_wrap=True)
        return 3
    except context.Preempted as stop:
        problems.print(str(stop), markup=False, soft_wrap=True)
        return context.EXIT_RESUMABLE


def _train(arguments, overrides: list[str], console) -> int:
    from alignax import configs, launch, train

    config = launch.load_config(arguments.config, overrides)
    configs.check(config)
    if arguments.dry_run:
        console.print(json.dumps(config.to_dict(), indent=2, default=list), markup=False, highlight=False)
        return 0
    summary = train.run(config, arguments.workdir, console=console)
    shown = {k: v for k, v in summary.items() if k != "stages"}
    if shown:
        console.print(json.dumps(shown, indent=2), markup=False, highlight=False)
    console.print(f"result: {pathlib.Path(arguments.workdir) / 'result.json'}", markup=False, soft_wrap=True)
    return 0


def _generate(arguments, console) -> int:
    import jax
    import numpy as np

    from alignax import context, data, sources
    from alignax.types import ConfigError

    for flag, value in (("samples", arguments.samples), ("max-new-tokens", arguments.max_new_tokens)):
        if value < 1:
            raise ConfigError(f"--{flag}={value}; allowed: 1 or more")
    if arguments.model:
        path, section = arguments.model, {"path": arguments.model, "remat": "none", "head_megabytes": 64, "unroll": 1}
        tokenizer_name, text = "", {"add_bos": True, "eos_id": -1}
        params = None
    else:
        run = pathlib.Path(arguments.run)
        if not (run / "config.json").exists():
            raise ConfigError(f"--run={run}: no config.json there; it is not the folder of a run")
        stored = json.loads((run / "config.json").read_text(encoding="utf-8"))
        section, tokenizer_name, text = stored["model"], stored["tokenizer"], stored["text"]
        path = section["path"]
        finished = [s for s in stored["stages"] if (run / "stages" / s / "params").exists()]
        stage = arguments.stage or (finished[-1] if finished else "")
        if stage not in finished:
            raise ConfigError(f"--stage={stage or '(none)'}: no parameters; finished train stages: "
                              f"{', '.join(finished) or 'none'}")
    tokenizer = context.load_tokenizer(tokenizer_name, path)
    spec, initial = context.load_model(section, vocab_size=tokenizer.vocab_size, seed=0)
    data.check_vocab(tokenizer, spec.config.vocab_size)
    policy = context.text_policy(tokenizer, path, **text)
    params = initial
    if arguments.run:
        from alignax import checkpoint

        params = checkpoint.load_tree(run / "stages" / stage / "params", {"model": initial["model"]})
    prompts = [np.asarray(policy.prompt(tokenizer.encode_prompt(p)), np.int32) for p in arguments.prompt]
    limit = spec.config.max_positions
    for text_of, ids in zip(arguments.prompt, prompts, strict=True):
        if not len(ids):
            raise ConfigError(f"--prompt={text_of!r} has no tokens, and the model has no BOS to start from")
        if len(ids) + arguments.max_new_tokens > limit:
            raise ConfigError(f"--prompt={text_of[:40]!r}: {len(ids)} tokens and --max-new-tokens="
                              f"{arguments.max_new_tokens} exceed the model's {limit} positions")
    out = sources.rollout(spec.config, params["model"], prompts, range(len(prompts)), jax.random.key(arguments.seed),
                          num_samples=arguments.samples, max_new_tokens=arguments.max_new_tokens,
                          temperature=arguments.temperature, top_p=arguments.top_p, eos_ids=sorted(policy.eos_ids),
                          pad_id=policy.pad_id, batch_size=len(prompts))
    for i, prompt in enumerate(arguments.prompt):
        for k in range(arguments.samples):
            ids = [int(t) for t in out.tokens[i][k] if int(t) not in policy.eos_ids]
            row = {"prompt": prompt, "completion": tokenizer.decode_completion(prompts[i].tolist(), ids),
                   "logp": float(out.logps[i, k]), "tokens": len(out.tokens[i][k]),
                   "finished": bool(out.finished[i, k])}
            if arguments.json:
                sys.stdout.write(json.dumps(row) + "\n")
            else:
                console.print(prompt, style="bold", markup=False, highlight=False, soft_wrap=True,
                              end="" if row["completion"][:1].isspace() else " ")
                console.print(row["completion"], soft_wrap=True, markup=False, highlight=False)
                console.print(f"[dim]{row['tokens']} tokens, log-prob {row['logp']:.2f} nats, "
                              f"{'finished' if row['finished'] else 'cut at the limit'}[/]\n")
    return 0


def _methods(arguments, console) -> int:
    import inspect

    from rich.table import Table

    from alignax import losses

    root = pathlib.Path(losses.__file__).resolve().parents[2]
    rows = []
    for name in losses.names():
        loss = losses.get(name)
        file = pathlib.Path(inspect.getsourcefile(loss.fn)).resolve()
        config = root / "experiments" / "methods" / f"{loss.fn.__name__}.py"
        rows.append({"id": name, "kind": loss.info.kind, "system": loss.info.system, "arxiv": loss.info.arxiv,
                     "fidelity": loss.info.fidelity, "signature": f"{loss.fn.__name__}{inspect.signature(loss.fn)}",
                     "file": str(file.relative_to(root)),
                     "config": str(config.relative_to(root)) if config.exists() else None})
    if arguments.json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return 0
    table = Table("id", "kind", "arXiv", "fidelity", "signature", "file", "config")
    for row in rows:
        table.add_row(row["id"], row["kind"], row["arxiv"], row["fidelity"], row["signature"], row["file"],
                      row["config"] or "")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
