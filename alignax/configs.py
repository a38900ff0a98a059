"""Config sections with every legal key: experiment files start from these, and `train.run` checks against them.

A run is `stages`, a tuple of names, each naming a section of the config. Sections are `train`, `sample` or
`evaluate` stages. An unknown key anywhere is refused before any work starts.
"""

from __future__ import annotations

import difflib
import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from alignax import losses
from alignax.data import LAYOUT_NAMES
from alignax.diagnostics import live
from alignax.models import ATTENTION, REMAT
from alignax.sharding import DEFAULT_RULES, check_rules
from alignax.types import REQUESTS, ConfigError

DTYPES = ("float32", "bfloat16")


def loss_section(name: str, **hyper) -> ConfigDict:
    """`{name, **defaults}` of a loss from its signature; `hyper` overrides. Raises ConfigError on unknown keys.

    name: an id, `compose` (the parts and all their hyper-parameters), or a sum as `dpo+0.2*sft` (its `weights`, and a
    section for each part)."""
    return ConfigDict(losses.section(name, **hyper))


def optim_section(**over) -> ConfigDict:
    """The optimiser: optax's name, learning rate, schedule, warm-up, clipping, and `options` in optax's words.

    master: float32 master weights in the optimiser's state, for parameters held in bfloat16 (model.dtype)."""
    section = ConfigDict(dict(name="adamw", learning_rate=1e-4, schedule="constant", warmup_steps=0, clip_norm=1.0,
                              master=False))
    section.options = ConfigDict(over.pop("options", {}))
    section.update(over)
    return section


def lora_section(**over) -> ConfigDict:
    """Adapters: rank (0: none), alpha, targets and scaling (`alpha/r` or `rslora`), as models.AdapterConfig."""
    section = ConfigDict(dict(rank=0, alpha=16.0, scaling="alpha/r",
                              targets=("attention/query", "attention/key", "attention/value", "attention/output",
                                       "mlp/gate", "mlp/up", "mlp/down")))
    section.update(over)
    return section


def train_stage(loss: str = "dpo", *, hyper=None, optim=None, data=None, lora=None, **over) -> ConfigDict:
    """A stage that trains on records until `steps` (or `epochs`, when steps is 0).

    data.path: a file or folder in any layout of `data.format` (`auto` finds it), a folder of `alignax data prepare`, a
    mixture `name=path@weight; ...`, `stage:NAME` (pairs made by a sample stage) or `builtin:stories`. data.template: a
    chat template by name, file or folder for records of messages (empty: the model's own). data.eval_fraction: share
    of the prompts that is held out, where there is no eval_path. data.aux_prompt: text put before every prompt for
    losses that look at the completions behind another prompt; a record's own `extra.aux_prompt` stands instead, and
    where neither is given, the prompt of the next record.
    init: `previous`, `model` (the run's starting parameters) or a stage's name. reference: frozen, adapter_off,
    precomputed, none. lora.rank: 0 trains all parameters; above, low-rank adapters on `lora.targets` (paths inside a
    layer, or regular expressions over them).
    truncation: error, drop, left, right. shapes: `global` (one shape) or `batch` (a multiple of bucket_multiple).
    diagnostics: names of diagnostics.live.GROUPS to watch on a probe every `diagnose_every` updates (0: as often as
    costs about 3% of the steps' time; the number is printed).
    """
    section = loss_section(loss, **(hyper or {}))
    requests = losses.from_section(section.to_dict()).requests
    stage = ConfigDict(dict(
        kind="train", init="previous", steps=0, epochs=1, batch_size=32, accumulation=1,
        reference="frozen" if any(REQUESTS[r].references for r in requests) else "none", layout="padded",
        max_prompt=0, max_completion=0, max_length=0, truncation="error", shapes="global", bucket_multiple=8,
        eval_every=50, log_every=10, checkpoint_every=100, keep_best=0, compile_budget=8, records_in_log=4,
        diagnostics=(), diagnose_every=0))
    stage.data = ConfigDict(dict(path="builtin:stories", format="auto", template="", split="", eval_path="",
                                 eval_fraction=0.0, eval_records=256, max_records=0, on_identical="drop",
                                 aux_prompt=""))
    stage.data.update(data or {})
    stage.lora = lora_section(**(lora or {}))
    stage.loss = section
    stage.optim = optim_section(**(optim or {}))
    stage.update(over)
    return stage


def sample_stage(**over) -> ConfigDict:
    """A stage that samples K completions per prompt, scores them, and writes pairs labelled by Bradley-Terry.

    prompts: a file of prompt records, `builtin:stories` or `builtin:openings`. pairs: best_worst, random, all.
    label_scale: the chosen one wins with probability sigmoid(scale * score difference). unseen: how many of the K
    completions are kept out of the pairs, to be watched during training. batch_size: prompts at a time. lanes: 0, or
    how many of a batch's completions are in work at once at most; one that ends makes room for the next, which pays
    where lengths differ much, in batches of several times that many (docs/scaling.md).
    """
    stage = ConfigDict(dict(
        kind="sample", policy="previous", prompts="builtin:stories", num_prompts=256, num_samples=8, unseen=1,
        max_new_tokens=48, temperature=1.0, top_p=1.0, batch_size=64, lanes=0, reward="lexicon", pairs="best_worst",
        label_scale=1.0, max_prompt=0, seed_offset=0))
    stage.update(over)
    return stage


def evaluate_stage(**over) -> ConfigDict:
    """A stage that samples held-out prompts from every policy and from the baseline, and compares them.

    The result names the first policy with win rate >= target_win_rate at <= target_kl nats, else the best one.
    batch_size and lanes: as in sample_stage.
    """
    stage = ConfigDict(dict(
        kind="evaluate", policies=(), baseline="", prompts="builtin:stories", num_prompts=512, max_new_tokens=48,
        temperature=1.0, top_p=1.0, batch_size=128, lanes=0, reward="lexicon", target_win_rate=0.85, target_kl=8.0,
        examples=4, max_prompt=0))
    stage.update(over)
    return stage


def base(**over) -> ConfigDict:
    """The run's own keys, with an empty list of stages.

    mesh: sizes of the axes (data 0: the devices that are left; sequence: over which columns of long rows are cut) and
    `rules`, ordered (regex, axes) pairs that cut parameters, reference and optimiser state; the first regex found in a
    leaf's path wins.
    """
    config = ConfigDict(dict(seed=0, stages=(), tokenizer="", deterministic=False, profile_steps=(0, 0)))
    config.model = model_section()
    config.mesh = ConfigDict(dict(data=0, fsdp=1, sequence=1, tensor=1, rules=DEFAULT_RULES))
    config.text = ConfigDict(dict(add_bos=True, eos_id=-1))
    config.update(over)
    return config


def model_section(**over) -> ConfigDict:
    """A decoder: `path` to a Hugging Face folder, or a shape for random parameters (vocab_size 0: the tokenizer's).

    dtype: float32 or bfloat16, in which parameters are held and layers computed; log-probs and losses are float32.
    remat: one of models.REMAT. head_megabytes: logits alive at once on one device. attention: one of models.ATTENTION;
    `auto` takes the kernel of the device (cudnn, splash; blocked on CPUs) where it computes this model, else xla.
    """
    section = ConfigDict(dict(
        path="", vocab_size=0, hidden_size=96, intermediate_size=256, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=24, rope_theta=10000.0, rms_norm_eps=1e-5, tie_embeddings=True, max_positions=512, remat="none",
        head_megabytes=64, unroll=1, dtype="float32", attention="auto"))
    section.update(over)
    return section


_TEMPLATES = {"train": train_stage, "sample": sample_stage, "evaluate": evaluate_stage}


def check(config: ConfigDict) -> None:
    """Refuses a config with unknown keys, stages or losses, listing the legal ones. Starts no work."""
    stages = tuple(config.get("stages", ()))
    # A stage that `stages` leaves out may stay in the file.
    idle = {k for k, v in config.items() if isinstance(v, ConfigDict) and v.get("kind") in _TEMPLATES}
    _check_keys(config, set(base()) | set(stages) | idle, "config")
    _check_keys(config.model, set(model_section()), "config.model")
    _check_keys(config.mesh, set(base().mesh), "config.mesh")
    _one_of(config.model, "dtype", DTYPES, "config.model")
    _one_of(config.model, "remat", REMAT, "config.model")
    _one_of(config.model, "attention", ATTENTION, "config.model")
    check_rules(config.mesh.rules, "config.mesh.rules")
    _check_keys(config.text, {"add_bos", "eos_id"}, "config.text")
    if not stages:
        raise ConfigError("config.stages is empty; it lists the stages of the run in order")
    if len(set(stages)) != len(stages):
        raise ConfigError(f"config.stages={stages} names a stage twice")
    for index, name in enumerate(stages):
        where = f"config.{name}"
        if name not in config:
            raise ConfigError(f"config.stages names {name!r}, but there is no section {where}")
        stage = config[name]
        if stage.get("kind") not in _TEMPLATES:
            raise ConfigError(f"{where}.kind={stage.get('kind')!r}; allowed: {', '.join(_TEMPLATES)}")
        _check_keys(stage, set(_TEMPLATES[stage.kind]()), where)
        for key in ("init", "policy", "baseline"):
            if key in stage and stage[key] not in ("previous", "model", "") + stages[:index]:
                raise ConfigError(f"{where}.{key}={stage[key]!r} is not an earlier stage; allowed: previous, model, "
                                  f"{', '.join(stages[:index])}")
        for policy in stage.get("policies", ()):
            if policy not in stages[:index]:
                raise ConfigError(f"{where}.policies names {policy!r}; allowed: {', '.join(stages[:index])}")
        if stage.kind == "train":
            _check_train(stage, where)
            if stage.optim.master and config.model.dtype == "float32":
                raise ConfigError(f"{where}.optim.master=True keeps float32 copies of narrower parameters, but "
                                  "config.model.dtype='float32'; allowed: False, or model.dtype='bfloat16'")
        else:
            _check_counts(stage, where)


def plain_of(config: ConfigDict) -> dict[str, Any]:
    """A config or section as JSON holds it: plain dicts, lists for tuples."""
    return json.loads(json.dumps(config.to_dict(), default=list))


def is_run(folder: pathlib.Path) -> bool:
    """Whether the folder is laid out as that of a run of `alignax train`."""
    return (folder / "config.json").is_file() and (folder / "stages").is_dir()


def of_run(folder: pathlib.Path, flag: str = "") -> dict[str, Any]:
    """The config in a run's folder as plain data, completed. Raises ConfigError, with `flag` before the folder's name,
    where it holds no run."""
    stored = folder / "config.json"
    if not stored.is_file():
        raise ConfigError(f"{flag}{folder}: no config.json there; it is not the folder of a run")
    plain = json.loads(stored.read_text(encoding="utf-8"))
    if not {"model", "tokenizer", "text", "stages", "mesh"} <= plain.keys():
        raise ConfigError(f"{flag}{folder}: its config.json is not that of a run; allowed here: the folder of `alignax "
                          "train` (the folder of a model goes with --model)")
    return completed(plain)


def completed(plain: dict[str, Any]) -> dict[str, Any]:
    """A run's config with the keys that it lacks at their defaults, as plain data (lists for tuples).

    For runs of earlier releases: the default of a key that comes later is what was done before there was one.
    """
    kinds = {name: plain.get(name, {}).get("kind") for name in plain.get("stages", ())}
    stages = {name: plain_of(_TEMPLATES[kind]()) for name, kind in kinds.items() if kind in _TEMPLATES}
    for template in stages.values():
        template.pop("loss", None)  # a loss knows its own defaults
    return _filled(plain, {k: v for k, v in plain_of(base()).items() if k != "stages"} | stages)


def _filled(found: Any, template: Any) -> Any:
    if not isinstance(found, dict) or not isinstance(template, dict):
        return found
    return template | {key: _filled(value, template.get(key)) for key, value in found.items()}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """dotted key -> value of nested plain dicts, so that two configs can be compared key by key."""
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}.{key}".lstrip(".")).items()}
    return {prefix: tree}


def _check_train(stage: ConfigDict, where: str) -> None:
    _check_keys(stage.data, set(train_stage().data), f"{where}.data")
    _check_keys(stage.optim, set(optim_section()), f"{where}.optim")
    _check_keys(stage.lora, set(lora_section()), f"{where}.lora")
    try:
        loss = losses.from_section(stage.loss.to_dict())
    except ConfigError as error:
        raise ConfigError(f"{where}.loss: {error}") from error
    _one_of(stage, "truncation", ("error", "drop", "left", "right"), where)
    _one_of(stage, "layout", LAYOUT_NAMES, where)
    _one_of(stage, "shapes", ("global", "batch"), where)
    _check_idle(stage, loss.requests, where)
    live.check(tuple(stage.diagnostics), stage.diagnose_every, stage.to_dict(), loss.requests, where,
               chosen_only=loss.info.chosen_only)
    if stage.batch_size < 1 or stage.accumulation < 1 or stage.batch_size % stage.accumulation:
        raise ConfigError(f"{where}.batch_size={stage.batch_size} must be a positive multiple of "
                          f"{where}.accumulation={stage.accumulation}")
    if stage.steps <= 0 and stage.epochs <= 0:
        raise ConfigError(f"{where}.steps={stage.steps} and {where}.epochs={stage.epochs}: one must be positive")


def _check_idle(stage: ConfigDict, requests: tuple[str, ...], where: str) -> None:
    """Refuses a value that another key makes idle: it would change nothing, and say nothing."""
    plain = lambda value: tuple(value) if isinstance(value, (list, tuple)) else value
    for key, default in lora_section().items():
        if not stage.lora.rank and plain(stage.lora[key]) != plain(default):
            raise ConfigError(f"{where}.lora.{key}={stage.lora[key]!r} has no effect with {where}.lora.rank=0; "
                              f"allowed: its default {default!r}, or a rank above 0")
    if stage.data.eval_path and stage.data.eval_fraction:
        raise ConfigError(f"{where}.data.eval_fraction={stage.data.eval_fraction} has no effect beside "
                          f"{where}.data.eval_path={stage.data.eval_path!r}; allowed: one of the two")
    if stage.data.aux_prompt and "aux_prompt" not in {REQUESTS[name].stream for name in requests}:
        raise ConfigError(f"{where}.data.aux_prompt={stage.data.aux_prompt!r} has no effect with the loss "
                          f"{stage.loss.name!r}, which asks for no completions behind another prompt; allowed: ''")


_LEAST = {"num_prompts": 1, "num_samples": 1, "max_new_tokens": 1, "batch_size": 1, "lanes": 0}


def _check_counts(stage: ConfigDict, where: str) -> None:
    """Of a stage that draws completions."""
    for key, least in _LEAST.items():
        found = stage.get(key, least)
        if isinstance(found, bool) or not isinstance(found, int) or found < least:
            raise ConfigError(f"{where}.{key}={found!r}; allowed: an integer, {least} or more")


def _one_of(stage: ConfigDict, key: str, allowed: tuple[str, ...], where: str) -> None:
    if stage[key] not in allowed:
        raise ConfigError(f"{where}.{key}={stage[key]!r}; allowed: {', '.join(allowed)}")


def _check_keys(section: ConfigDict, legal: set[str], where: str) -> None:
    for key in section:
        if key not in legal:
            near = difflib.get_close_matches(key, sorted(legal), 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"{where}.{key} is not a key{hint}; allowed: {', '.join(sorted(legal))}")


def embedded_run(loss: str = "dpo", *, hyper=None, optim=None, tiny: bool = False, **over) -> ConfigDict:
    """A short whole run of one loss on the built-in stories: sft, pairs by a gold rule, the loss, evaluation.

    What `experiments/methods/` is made of. `over` goes to the loss's train stage. With data.path set to a file
    (`--config.method.data.path=FILE --config.method.init=model --config.stages=method,`) only that stage runs.
    A reward model (a loss that asks for `rewards`) has no policy to sample from and ends after training.
    """
    requests = losses.from_section(losses.section(loss, **(hyper or {}))).requests
    width = 32 if tiny else 64
    config = base(tokenizer="builtin:stories")
    config.model = model_section(hidden_size=width, intermediate_size=2 * width, num_layers=2, num_heads=4,
                                 num_kv_heads=2, head_dim=width // 4, max_positions=128, unroll=2)
    supervised = dict(data=dict(max_records=200 if tiny else 3000, eval_records=64),
                      optim=dict(learning_rate=4e-3, schedule="cosine", warmup_steps=2 if tiny else 10),
                      batch_size=16 if tiny else 32, steps=4 if tiny else 150, eval_every=4 if tiny else 150)
    config.sft = train_stage("sft", **supervised)
    config.sample = sample_stage(num_prompts=24 if tiny else 300, num_samples=4, max_new_tokens=40,
                                 batch_size=24 if tiny else 100)
    if loss == "sft":
        config.method, config.stages = train_stage("sft", hyper=hyper, **supervised | over), ("method", "evaluate")
    else:
        settings = dict(data=dict(path="stage:sample", eval_records=16), batch_size=8 if tiny else 32,
                        steps=2 if tiny else 40, eval_every=2 if tiny else 20, log_every=1 if tiny else 5)
        config.method = train_stage(loss, hyper=hyper, optim={"learning_rate": 5e-4} | dict(optim or {}),
                                    **settings | over)
        config.stages = ("sft", "sample", "method", "evaluate")
    config.evaluate = evaluate_stage(policies=("method",), baseline="model" if loss == "sft" else "sft",
                                     num_prompts=24 if tiny else 200, max_new_tokens=40, batch_size=24 if tiny else 200,
                                     examples=2)
    if "rewards" in requests:
        config.stages = config.stages[:-1]
    return config


def single(loss: str = "dpo", **over) -> ConfigDict:
    """A run of one train stage whose keys stand at the top: `--config.steps=100`, `--config.data.path=FILE`.

    It starts from the model of `model.path` (or random parameters); `over` as for `train_stage`. `staged` turns it into
    the general form before anything runs.
    """
    config = base()
    for key, value in train_stage(loss, **{"init": "model"} | over).items():
        config[key] = value
    return config


SINGLE = "train"


def staged(config: ConfigDict) -> ConfigDict:
    """The general form of a config: one made by `single` becomes a run of the one stage `train`; others stay."""
    if "kind" not in config or config.get("stages"):
        return config
    run_keys, out = set(base()), ConfigDict()
    for key in run_keys & set(config):
        out[key] = config[key]
    out[SINGLE] = ConfigDict({key: config[key] for key in config if key not in run_keys})
    out.stages = (SINGLE,)
    return out


def arguments(arg: str, *flags: str, **defaults: str) -> tuple[dict[str, str], set[str]]:
    """`loss=ipo,tiny` -> ({"loss": "ipo"}, {"tiny"}): what a config file got after its colon.

    Raises ConfigError for a name that is neither in `defaults` nor one of `flags`, with the legal ones.
    """
    values, given = dict(defaults), set()
    for part in filter(None, arg.split(",")):
        key, equals, value = part.partition("=")
        if equals and key in defaults:
            values[key] = value
        elif not equals and key in flags:
            given.add(key)
        else:
            legal = [f"{name}={value}" for name, value in defaults.items()] + list(flags)
            raise ConfigError(f"config argument {part!r}; allowed: {', '.join(legal)} (separated by commas)")
    return values, given


def quick(arg: str) -> bool:
    """Whether a config's argument asks for the toy size. Raises ConfigError for anything but `tiny` or nothing."""
    if arg not in ("", "tiny"):
        raise ConfigError(f"config argument {arg!r}; allowed: tiny")
    return arg == "tiny"
