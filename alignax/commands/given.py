"""What commands that look at data under a model share: a reference, a file of records, numbers as plain JSON."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

from alignax.commands import policies


def add_reference(parser) -> None:
    """Declares --reference and --reference-stage."""
    reference = parser.add_mutually_exclusive_group()
    reference.add_argument("--reference", default="", metavar="FOLDER",
                           help="the reference: a model of the policy's shape, or a run (its last finished stage)")
    reference.add_argument("--reference-stage", default="", metavar="STAGE",
                           help="the reference: a stage of the policy's run, or `model` for what the run started from")


def add_reading(parser) -> None:
    """Declares how the file is read and cut, and --batch-size."""
    parser.add_argument("--format", default="auto", help="the layout of the file (default auto; see alignax data)")
    parser.add_argument("--split", default="", help="of a folder, or of files with a field `split`: the split to read")
    parser.add_argument("--template", default="", metavar="NAME",
                        help="for messages: chatml, plain, hh, a Jinja file or a folder (default: the model's own)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="the first N records (default: all)")
    parser.add_argument("--batch-size", type=int, default=16, help="records at a time (default 16)")
    parser.add_argument("--max-length", type=int, default=0, metavar="N",
                        help="tokens of a prompt with a completion (default: the model's positions)")
    parser.add_argument("--truncation", default="error", metavar="RULE",
                        help="what becomes of longer records, counted and shown: error, drop, left or right (default "
                             "error)")


def check(arguments) -> None:
    """Raises ConfigError for numbers of `add_reading` out of range and an unknown rule of truncation."""
    from alignax import data
    from alignax.types import ConfigError

    if arguments.truncation not in data.TRUNCATION:
        raise ConfigError(f"--truncation={arguments.truncation}; allowed: {', '.join(data.TRUNCATION)}")
    for flag, least in (("limit", 0), ("batch_size", 1), ("max_length", 0)):
        if (value := getattr(arguments, flag)) < least:
            raise ConfigError(f"--{flag.replace('_', '-')}={value}; allowed: {least} or more")


def policy_name(policy: policies.Policy) -> str:
    """The policy with its stage, for messages and results."""
    return f"{policy.name}:{policy.stage}" if policy.stage else policy.name


def reference_name(arguments, policy: policies.Policy) -> str:
    """The reference as it was named on the line."""
    return arguments.reference or f"{policy.name}:{arguments.reference_stage}"


def reference(arguments, policy: policies.Policy) -> Any:
    """The reference's parameters, or None. Raises ConfigError where it is not the policy's shape and tokenizer."""
    from alignax.types import ConfigError

    if not arguments.reference and not arguments.reference_stage:
        return None
    flag = "--reference" if arguments.reference else "--reference-stage"
    if arguments.reference_stage and policy.run is None:
        raise ConfigError(f"--reference-stage={arguments.reference_stage}: {policy.name} is no run; name a folder with "
                          "--reference")
    try:
        other = policies.load(argparse.Namespace(
            model=arguments.reference, stage=arguments.reference_stage,
            run=str(policy.run) if arguments.reference_stage else None))
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from error
    if other.spec.config != policy.spec.config:
        ours, theirs = (dataclasses.asdict(p.spec.config) for p in (policy, other))
        differ = [f"{name} {theirs[name]!r} (policy: {ours[name]!r})" for name in ours if ours[name] != theirs[name]]
        raise ConfigError(f"{flag}={reference_name(arguments, policy)}: a model of another shape: "
                          f"{', '.join(differ)}; allowed: the policy's shape, so that both run in one program")
    if other.tokenizer.core.to_str() != policy.tokenizer.core.to_str():
        raise ConfigError(f"{flag}={reference_name(arguments, policy)}: it has another tokenizer than {policy.name}; "
                          "log-probs of other tokens cannot be compared")
    return other.params


def read(arguments, policy: policies.Policy):
    """(records, ledger, chat template or None) of the file."""
    from alignax import data
    from alignax.types import DataError

    ledger = data.Ledger()
    records = data.load_records(arguments.file, format=arguments.format, split=arguments.split or None,
                                on_identical="keep", ledger=ledger)
    if arguments.limit and len(records) > arguments.limit:
        ledger.note(f"records beyond --limit={arguments.limit}, not used", len(records) - arguments.limit)
        records = records[:arguments.limit]
    if not records:
        raise DataError(f"{arguments.file}: no records in it")
    chats = any(r.is_chat for r in records)
    template = policies.template(policy, arguments.template) if chats or arguments.template else None
    return records, ledger, template


def plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: what has no finite value becomes null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
