"""`alignax generate`: sample completions of prompts."""

from __future__ import annotations

import json
import pathlib
import sys


def add(commands) -> None:
    """Declares the command and its arguments."""
    parser = commands.add_parser(
        "generate", help="sample completions of prompts",
        description="Samples completions from a Hugging Face folder (--model) or from a stage of a run (--run).")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--model", metavar="FOLDER", help="a Hugging Face folder")
    place.add_argument("--run", metavar="DIR", help="the folder of a run of `alignax train`")
    parser.add_argument("--stage", default="", help="with --run: the train stage (default: the last finished)")
    parser.add_argument("--prompt", action="append", required=True, help="a prompt; may be given several times")
    parser.add_argument("--samples", type=int, default=1, help="completions per prompt (default 1)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default 64")
    parser.add_argument("--temperature", type=float, default=1.0, help="default 1.0; 0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="default 1.0")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--json", action="store_true", help="one JSON object per completion")
    parser.set_defaults(execute=run)


def run(arguments, console) -> int:
    """Samples and prints completions; returns the exit code."""
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
