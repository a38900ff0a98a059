"""Which policy a command works with: a model's folder or a stage of a run, and how the two are named on the line."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple


class Policy(NamedTuple):
    """A policy ready to sample from.

    name: for messages. spec: step.ModelSpec. params: {"model": ...}. tokenizer: data.Tokenizer. text: data.TextPolicy.
    folders: where a chat template may lie, the tokenizer's own folder first. run, stage: of a run, else None and "".
    """

    name: str
    spec: Any
    params: Any
    tokenizer: Any
    text: Any
    folders: tuple[pathlib.Path, ...]
    run: pathlib.Path | None = None
    stage: str = ""


def add_arguments(parser) -> None:
    """Declares --model, --run and --stage; one of the first two is required."""
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--model", metavar="FOLDER",
                       help="a Hugging Face folder, a model of the Hub (name, or name@revision), or a run's folder")
    place.add_argument("--run", metavar="DIR", help="the folder of a run of `alignax train`")
    parser.add_argument("--stage", default="", help="of a run: the train stage, or `model` for what it started from "
                        "(default: the last finished)")


def load(arguments) -> Policy:
    """The policy that --model or --run with --stage names.

    Raises ConfigError for a folder that is neither model nor run, for a stage without parameters, and where tokenizer
    and model do not fit.
    """
    from alignax import configs, context, data
    from alignax.types import ConfigError

    run = None
    if arguments.run or configs.is_run(pathlib.Path(arguments.model)):
        run = pathlib.Path(arguments.run or arguments.model)
    elif arguments.stage:
        raise ConfigError(f"--stage={arguments.stage}: goes with the folder of a run, and --model={arguments.model} is "
                          "none")
    if run is None:
        path, section = arguments.model, {"path": arguments.model, "remat": "none", "head_megabytes": 64, "unroll": 1}
        tokenizer_name, text, stage = "", {"add_bos": True, "eos_id": -1}, ""
    else:
        stored = configs.of_run(run, "--run=")
        # A run is read where other kernels may be at home than those it was trained with.
        section, tokenizer_name, text = stored["model"] | {"attention": "auto"}, stored["tokenizer"], stored["text"]
        path = section["path"]
        finished = context.finished_stages(run, stored["stages"])
        stage = arguments.stage or (finished[-1] if finished else "")
        if stage not in ("model", *finished):
            raise ConfigError(f"--stage={stage or '(none)'}: no parameters; finished train stages: "
                              f"{', '.join(finished) or 'none'}")
    tokenizer = context.load_tokenizer(tokenizer_name, path)
    spec, params = context.load_model(section, vocab_size=tokenizer.vocab_size, seed=0)
    data.check_vocab(tokenizer, spec.config.vocab_size)
    policy = context.text_policy(tokenizer, path, **text)
    if run is not None:
        params = context.stage_params(run, stage, params)
    folders = []
    if tokenizer_name and tokenizer_name != "builtin:stories":
        place = context.tokenizer_place(tokenizer_name, path)
        folders.append(place.parent if place.is_file() else place)
    if path:
        folders.append(context.model_folder(path))
    return Policy(str(run) if run else arguments.model, spec, params, tokenizer, policy, tuple(folders), run, stage)


def template(policy: Policy, name: str = ""):
    """The chat template `name` (a built-in one, a Jinja file or a folder), or the policy's own where name is empty.

    Raises ConfigError where the policy has none, naming the built-in ones.
    """
    from alignax.data import chat
    from alignax.types import ConfigError

    if name:
        specials = {}
        if not pathlib.Path(name).is_dir():
            specials = chat.template_specials(policy.tokenizer, bos_id=policy.text.bos_id, eos_id=policy.text.eos_id)
        return chat.load_template(name, specials=specials)
    reasons = []
    for folder in policy.folders:
        try:
            return chat.load_template(folder)
        except ConfigError as error:
            reasons.append(str(error))
    if len(reasons) and not all(reason.startswith("no chat template") for reason in reasons):
        raise ConfigError(next(r for r in reasons if not r.startswith("no chat template")))
    raise ConfigError(f"{policy.name} has no chat template; name one with --template: a folder, a Jinja file, or one "
                      f"of {', '.join(sorted(chat.BUILTIN))}")
