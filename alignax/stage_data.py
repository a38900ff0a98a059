"""What a train stage learns from: its records, read, tokenised and accounted for, and their batches."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from alignax import data, distributed, losses, sample, sharding
from alignax.context import Context
from alignax.data import mixture, store
from alignax.data.layouts.shapes import packs
from alignax.diagnostics import show
from alignax.models.token_heads import DEGREES
from alignax.types import REQUESTS, Batch, ConfigError, DataError, Stream

PREPARED_EVAL = "eval"
STREAMS = ("pair", "mismatched", "aux_prompt", "reference_sample", "degraded")  # what the loop can lay out


def read(ctx: Context, where: str, section: Mapping[str, Any], *, limits: Mapping[str, Any]) -> tuple[list, list]:
    """(train, held-out) token records of a stage's data section; the ledger and an example are printed.

    section: path, format, template, split, eval_path, eval_records, eval_fraction, max_records, on_identical.
    limits: truncation and the bounds, as data.tokenize_records takes them. where: the config key, for messages.
    Raises ConfigError for a section that cannot work and DataError with file and line for data that cannot.
    """
    section, path = dict(section), section["path"]
    if not path:
        raise ConfigError(f"{where}.path is empty; allowed: a file or folder of records, builtin:stories, stage:NAME, "
                          "or a mixture name=path@weight; ...")
    if not 0 <= section["eval_fraction"] < 1:
        raise ConfigError(f"{where}.eval_fraction={section['eval_fraction']}; allowed: 0 or more and below 1")
    if path.startswith("stage:"):
        train, held_out = sample.read_pairs(ctx.stage_dir(path[len("stage:"):]), sorted(ctx.text.eos_ids))
        return train[:section["max_records"] or None], held_out[:section["eval_records"]]
    ledger = data.Ledger()
    raw, raw_eval = _raw(ctx, where, section, ledger)
    template = template_of(ctx, where, section["template"], [*raw[:1], *raw_eval[:1]])
    tokenize = lambda records: data.tokenize_records(records, ctx.tokenizer, ctx.text, ledger=ledger,
                                                     template=template, **limits)
    train, held_out = (_with_aux_prompts(ctx, tokenize(some), some) for some in (raw, raw_eval))
    held_out = held_out[:section["eval_records"]]
    _report(ctx, ledger, limits, train)
    return train, held_out


def limits_of(stage: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    """The bounds and the truncation rule of a stage, as data.tokenize_records takes them; 0 is no bound of its own."""
    return dict(max_prompt=stage["max_prompt"] or None, max_completion=stage["max_completion"] or None,
                max_length=stage["max_length"] or max_positions, truncation=stage["truncation"])


def records(ctx: Context, where: str, section: Mapping[str, Any], *, limits: Mapping[str, Any], loss: losses.Loss,
            batch_size: int) -> tuple[list, list]:
    """`read`, cut to what the loss trains on, and checked against it. where: the stage's config key."""
    train, held_out = read(ctx, f"{where}.data", section, limits=limits)
    if loss.info.chosen_only:
        train, held_out = list(map(first_only, train)), list(map(first_only, held_out))
    check(where, section["path"], train, loss=loss, batch_size=batch_size)
    return train, held_out


def _with_aux_prompts(ctx: Context, records: list[data.TokenRecord], raw: Sequence[data.Record]) -> list:
    """The records with the ids of their `extra.aux_prompt`, where the data has that field."""
    given = {r.id: r for r in raw if "aux_prompt" in r.extra}
    out = []
    for record in records:
        if (source := given.get(record.id)) is not None:
            text = source.extra["aux_prompt"]
            if source.is_chat or not isinstance(text, str):
                raise DataError(f"{source.place}: extra.aux_prompt: found {type(text).__name__} beside a prompt of "
                                f"{'messages' if source.is_chat else 'text'}; allowed: a text beside a text")
            ids = ctx.text.prompt(ctx.tokenizer.encode_prompt(text))
            record = dataclasses.replace(record, aux_prompt=np.asarray(ids, np.int32))
        out.append(record)
    return out


def _raw(ctx: Context, where: str, section: Mapping[str, Any], ledger: data.Ledger) -> tuple[list, list]:
    """Text records before tokenising: (train, held-out)."""
    path, wanted = section["path"], section["eval_records"]
    if path == "builtin:stories":
        return (data.story_records(seed=ctx.seed, split="train", n=section["max_records"] or 4000),
                data.story_records(seed=ctx.seed, split="eval", n=max(wanted, 1)))
    if path.startswith("builtin:"):
        raise ConfigError(f"{where}.path={path!r}; allowed: builtin:stories, stage:NAME, a file or folder, a mixture")
    reading = dict(on_identical=section["on_identical"], ledger=ledger)
    if "=" in path and not pathlib.Path(path).exists():
        mixed = mixture.load_mixture(path, epochs=1.0, seed=ctx.seed, **reading)
        ctx.console.print(mixed.table())
        records = mixed.records
    else:
        records = store.load_records(path, format=section["format"], split=section["split"] or None, **reading)
    if section["eval_path"]:
        held_out = store.load_records(section["eval_path"], format=section["format"], **reading)
    elif store.is_prepared(path) and PREPARED_EVAL in store.read_manifest(path)["splits"] and not section["split"]:
        held_out = list(store.open_store(path, PREPARED_EVAL))
    else:
        share = section["eval_fraction"]
        held_out = [r for r in records if store.eval_share(r, "prompt") < share] if share else []
        records = [r for r in records if store.eval_share(r, "prompt") >= share] if share else records
    if section["max_records"] and len(records) > section["max_records"]:
        ledger.note(f"records beyond max_records={section['max_records']}, not used",
                    len(records) - section["max_records"])
        records = records[:section["max_records"]]
    return records, held_out


def template_of(ctx: Context, where: str, name: str, examples: Sequence[data.Record]) -> data.ChatTemplate | None:
    """The chat template of a run: the one named, else the model's own where the records are dialogues, else None."""
    source = name or (ctx.tokenizer_source if any(not isinstance(r.prompt, str) for r in examples) else "")
    if not source:
        return None
    specials = data.template_specials(ctx.tokenizer, bos_id=ctx.text.bos_id, eos_id=ctx.text.eos_id)
    try:
        return data.load_template(source, specials=specials)
    except ConfigError as error:
        raise ConfigError(f"{where}.template={name!r}: {error}") from error


def _report(ctx: Context, ledger: data.Ledger, limits: Mapping[str, Any], train: list) -> None:
    """What became of the records, the policies in force, and the first example with its loss mask."""
    if ledger.total:
        ctx.console.print(ledger.table())
    bounds = "  ".join(f"{k}={v}" for k, v in limits.items() if v)
    ends = ", ".join(ctx.tokenizer.token(i) for i in sorted(ctx.text.eos_ids))
    opens = "none" if ctx.text.bos_id is None else ctx.tokenizer.token(ctx.text.bos_id)
    ctx.console.print(f"text: BOS {opens}, ends {ends}; {bounds}", markup=False, highlight=False)
    if train and train[0].completions:
        parts = show.pieces(train[0], 0, ctx.tokenizer, ctx.text)
        text = show.coloured(parts) if ctx.console.is_terminal else show.plain(parts)
        ctx.console.print(text if not isinstance(text, str) else text[-600:], markup=False, highlight=False)


def check(where: str, path: str, train: Sequence[data.TokenRecord], *, loss: losses.Loss, batch_size: int) -> None:
    """Raises DataError where there is too little to train on, or the records do not hold what the loss compares.

    where: the stage's config key; path: what was read."""
    size, where = f"{where}.batch_size={batch_size}", f"{where}.data.path={path!r}"
    if not train:
        raise DataError(f"{where}: no record is left to train on; see the table above for why")
    if len(train) < batch_size:
        raise DataError(f"{where}: {len(train)} records are fewer than {size}")
    width = max(len(r.completions) for r in train)
    # With labels, or a value of the prompt to measure against, a single completion says something.
    alone = {"labels", "prompt_values"} & set(loss.requests)
    compares = "margins" in loss.requests or ("logps" in loss.requests and not alone)
    if width < 2 and compares:
        raise DataError(f"{where}: loss {loss.name!r} compares completions, but the records have one each; use "
                        "prompt/chosen/rejected or a list of completions")


def check_streams(where: str, loss: losses.Loss, path: str, *, made_by: Mapping[str, Any] | None, start: str) -> None:
    """Raises ConfigError where the data cannot give a stream of completions that the loss asks for.

    where: the stage's config key. path: its data.path. made_by: the settings of the sample stage behind `stage:NAME`,
    its policy by name, or None for other data. start: the stage (or `model`) that this one starts from.
    """
    for name in loss.requests:
        stream = REQUESTS[name].stream
        if stream not in STREAMS:
            raise ConfigError(f"{where}.loss={loss.name!r} asks for {name!r}, on a stream {stream!r} that a train "
                              f"stage cannot lay out; allowed: losses on {', '.join(STREAMS)}")
        if stream == "reference_sample":
            if made_by is None:
                raise ConfigError(f"{where}.data.path={path!r}: loss {loss.name!r} needs completions sampled from the "
                                  "reference, which records do not hold; allowed: stage:NAME, a sample stage")
            if made_by["unseen"] < 1:
                raise ConfigError(f"config.{path[len('stage:'):]}.unseen=0: loss {loss.name!r} takes the samples of "
                                  "the reference that are kept out of the pairs; allowed: 1 or more")
            if made_by["policy"] != start:
                raise ConfigError(f"{where}.data.path={path!r}: those completions are of {made_by['policy']!r}, but "
                                  f"the stage starts from {start!r}, its reference; let both be one")


def other_streams(ctx: Context, where: str, section: Mapping[str, Any], records: Sequence[data.TokenRecord], *,
                  loss: losses.Loss, limits: Mapping[str, Any]) -> dict[str, list[data.TokenRecord]]:
    """Stream name -> one record for each of `records`, for the streams that depend on a record alone.

    aux_prompt: the same completions behind the record's extra.aux_prompt, or data.aux_prompt and its own prompt, or,
    where neither is given, behind the next record's prompt (said on the console). reference_sample: the completion that
    the sample stage kept out of the pairs. degraded: DEGREES versions of the chosen completion, version 0
    untouched, the last without its key phrases. section, limits, where: as for `read`.
    """
    wanted = {REQUESTS[name].stream for name in loss.requests}
    out = {}
    if "aux_prompt" in wanted:
        before = ctx.tokenizer.encode_prompt(section["aux_prompt"]) if section["aux_prompt"] else ()
        own = sum(r.aux_prompt is not None for r in records)
        out["aux_prompt"], cut = data.aux_prompts(records, before=before, bos_id=ctx.text.bos_id,
                                                  max_length=limits["max_length"], truncation=limits["truncation"])
        source = f"{where}.aux_prompt and the record's prompt" if before else "the next record's prompt"
        ctx.console.print(f"other prompts: {own} of {len(records)} are the record's own, the others are {source}; "
                          f"{cut} were cut", markup=False, highlight=False)
    if "reference_sample" in wanted:
        unseen = sample.read_unseen(ctx.stage_dir(section["path"][len("stage:"):]))
        out["reference_sample"] = data.reference_samples(records, unseen, ctx.text.ended)
    if "degraded" in wanted:
        out["degraded"] = data.degraded(records, DEGREES, ctx.tokenizer.decode)
    return out


def first_only(record: data.TokenRecord) -> data.TokenRecord:
    """The record with its first completion alone, the chosen one of a pair: what a supervised loss trains on."""
    return dataclasses.replace(record, completions=record.completions[:1], scores=None, labels=None,
                               completion_ended=record.completion_ended[:1],
                               scored=None if record.scored is None else record.scored[:1])


Records = Sequence[data.TokenRecord]
Sizes = tuple[data.Shape, Mapping[str, data.Shape]]


@dataclasses.dataclass(frozen=True)
class Batches:
    """Records to batches on the mesh. shape: the one shape of every batch, or None for the smallest bucket of each.

    groups: row groups of the packed layouts, a multiple of devices times micro-batches. mismatched: whether the loss
    needs KTO's rotated completions. other_shapes: those of further streams by name, where `shape` is given.
    """

    layout: str
    multiples: int
    pad_id: int
    mesh: jax.sharding.Mesh
    width: int
    shape: data.Shape | None
    groups: int
    mismatched: bool
    other_shapes: Mapping[str, data.Shape] = dataclasses.field(default_factory=dict)

    def make(self, records: Records, extra: Mapping[str, np.ndarray] | None = None,
             others: Mapping[str, Records] | None = None) -> Batch:
        """Lays `records` out and puts them on the devices; `extra` arrays [B, ...] join batch.data, and `others`, of
        one record for each, become further streams."""
        if jax.process_count() > 1:
            swapped = {"mismatched": data.mismatched(records)} if self.mismatched else {}
            shape, own = self.sizes(records, others)
            return self._share(records, shape, swapped, {n: (rows, own[n]) for n, rows in (others or {}).items()},
                               extra or {})
        return sharding.shard_batch(self.fill(records, extra, others), self.mesh)

    def sizes(self, records: Records, others: Mapping[str, Records] | None = None) -> Sizes:
        """The shapes in which `make` lays these records out, and those of the further streams by name."""
        return self.shape_for(records), {name: self._shape_of(name, rows) for name, rows in (others or {}).items()}

    def fill(self, records: Records, extra: Mapping[str, np.ndarray] | None = None,
             others: Mapping[str, Records] | None = None, sizes: Sizes | None = None) -> Batch:
        """The batch of `make` as NumPy arrays, in its own shapes or in larger ones (`sizes`)."""
        shape, own = sizes or self.sizes(records, others)
        swapped = {"mismatched": data.mismatched(records)} if self.mismatched else {}
        batch = data.fill(records, shape, self.layout, pad_id=self.pad_id, groups=self.groups, extra=swapped)
        streams = {name: self._stream(rows, own[name], self.groups) for name, rows in (others or {}).items()}
        return dataclasses.replace(batch, data={**batch.data, **(extra or {})}, streams={**batch.streams, **streams})

    def shape_for(self, records: Records) -> data.Shape:
        """The shape in which `make` lays these records out."""
        return self.shape or data.plan_shape(records, self.layout, self.multiples, groups=self.groups,
                                             mismatched=self.mismatched, least=data.Shape(self.width, 1, 1, 1))

    def _shape_of(self, name: str, rows: Records) -> data.Shape:
        """A further stream has a shape of its own: other completions, and as many as it needs."""
        return self.other_shapes.get(name) or data.plan_shape(rows, self.layout, self.multiples, groups=self.groups)

    def _stream(self, rows: Records, shape: data.Shape, groups: int) -> Stream:
        return data.fill(rows, shape, self.layout, pad_id=self.pad_id, groups=groups).streams["pair"]

    def _share(self, records: Records, shape: data.Shape, swapped: Mapping[str, Records],
               own_shapes: Mapping[str, tuple[Records, data.Shape]], extra: Mapping[str, np.ndarray]) -> Batch:
        """The same global batch, of which this process lays out only the records of its own devices."""
        ways, own = sharding.batch_ways(self.mesh), distributed.own_blocks(self.mesh)
        if len(records) % ways or self.groups % ways and self.groups != 1:
            raise ConfigError(f"a batch of {len(records)} records in {self.groups} groups does not divide over {ways} "
                              "devices (data x fsdp)")
        each = len(records) // ways
        mine = np.concatenate([np.arange(b * each, (b + 1) * each) for b in own])
        pick = lambda whole: [whole[i] for i in mine]
        groups = self.groups * len(own) // ways if packs(self.layout) else 1
        batch = data.fill(pick(records), shape, self.layout, pad_id=self.pad_id, groups=groups,
                          extra={name: pick(other) for name, other in swapped.items()})
        streams = {name: self._stream(pick(rows), size, groups) for name, (rows, size) in own_shapes.items()}
        batch = dataclasses.replace(batch, streams={**batch.streams, **streams})
        fields = {**batch.data, **{name: value[mine] for name, value in extra.items()}}
        if any(r.scores is None for r in records):  # as of the whole batch, not of this share
            fields.pop("scores", None)
        batch = distributed.join_blocks(dataclasses.replace(batch, data=fields), self.mesh)
        streams = {name: dataclasses.replace(s, groups=s.groups * ways // len(own))
                   for name, s in batch.streams.items()}
        return dataclasses.replace(batch, streams=streams)


def batches(ctx: Context, train: Sequence[data.TokenRecord], held_out: Sequence[data.TokenRecord], *,
            loss: losses.Loss, plan: data.Plan, steps: int, eval_cuts: Sequence[tuple[int, int]], layout: str,
            shapes: str, bucket_multiple: int, accumulation: int,
            others: Mapping[str, Records] | None = None) -> Batches:
    """The layout of a stage. With shapes=`global` one shape holds every batch of the plan and of the evaluation.

    others: what `other_streams` made of train and held_out together."""
    mismatched = any(REQUESTS[q].stream == "mismatched" for q in loss.requests)
    groups = row_groups(ctx.mesh, layout, accumulation) if packs(layout) else 1
    every = [*train, *held_out]
    shape, other_shapes = None, {}
    if shapes == "global":
        offset = len(train) if held_out else 0
        cuts = [offset + np.arange(start, stop) for start, stop in eval_cuts]
        planned = [*plan.sequence(steps), *cuts]
        shape = data.plan_shape(every, layout, bucket_multiple, batches=planned, groups=groups, mismatched=mismatched)
        other_shapes = {name: data.plan_shape(rows, layout, bucket_multiple, batches=planned, groups=groups)
                        for name, rows in (others or {}).items()}
    return Batches(layout, bucket_multiple, ctx.text.pad_id, ctx.mesh, max(len(r.completions) for r in every), shape,
                   groups, mismatched, other_shapes)


def row_groups(mesh: jax.sharding.Mesh, layout: str, accumulation: int) -> int:
    """What the records of a batch must be a multiple of: the devices that share it, and in a packed layout, whose rows
    are cut into groups, the micro-batches too."""
    ways = sharding.batch_ways(mesh)
    return ways * accumulation if packs(layout) else ways


def eval_cuts(n: int, batch_size: int, ways: int) -> list[tuple[int, int]]:
    """(start, stop) of the evaluation's batches over n records: whole multiples of `ways`, none of a single record
    where it can be helped (a batch of one has no mismatched partner)."""
    usable = n // ways * ways
    edges = [*range(0, usable, batch_size), usable]
    if len(edges) > 2 and edges[-1] - edges[-2] == 1:
        del edges[-2]
    return [(a, b) for a, b in zip(edges, edges[1:], strict=False) if b > a]
