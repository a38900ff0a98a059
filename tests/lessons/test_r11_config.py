"""R11: a field of a config that is unknown, or that nothing reads, is an error, at every level.

Each test replays a failure that users of other frameworks reported; the docstring names the thread.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from alignax import configs, launch, losses, optim, train
from alignax.types import ConfigError

PACKAGE = Path(configs.__file__).parent
FILE = """
from alignax import configs

def get_config(arg=""):
    return configs.embedded_run("dpo", tiny=True)
"""


def whole():
    """A run with every kind of stage."""
    return configs.embedded_run("dpo", tiny=True)


def section_of(config, path: str):
    for part in filter(None, path.split(".")):
        config = config[part]
    return config


# Where the misspelt key stands, the key, and what the message has to offer instead.
TYPOS = [
    ("", "sead", "seed"), ("", "determinstic", "deterministic"), ("model", "hiden_size", "hidden_size"),
    ("mesh", "fdsp", "fsdp"), ("text", "add_boss", "add_bos"), ("sft", "batch_sise", "batch_size"),
    ("sample", "top_q", "top_p"), ("method", "truncation_mode", "truncation"), ("method", "refrence", "reference"),
    ("method.data", "eval_fractoin", "eval_fraction"), ("method.optim", "learning_rat", "learning_rate"),
    ("method.optim", "grad_clip", "clip_norm"), ("method.lora", "alpa", "alpha"), ("method.lora", "r", "rank"),
    ("method.loss", "betta", "beta"), ("evaluate", "target_winrate", "target_win_rate"),
]


@pytest.mark.parametrize("path, key, meant", TYPOS, ids=[f"{path}.{key}" for path, key, _ in TYPOS])
def test_an_unknown_key_in_the_file_passes(path, key, meant):
    """trl#6023, NeMo-RL#3271, verl#6317: keys that nobody knows were ignored. The message lists the legal ones."""
    config = whole()
    section_of(config, path)[key] = 1.0
    with pytest.raises(ConfigError) as caught:
        configs.check(config)
    text = str(caught.value)
    place = "config" + (f".{path}" if path else "")
    assert (f"{place}.{key} is not a key" in text) or (place in text and f"unknown hyper-parameter {key}" in text), text
    assert "allowed: " in text and meant in text.split("allowed: ")[1], text


@pytest.mark.parametrize("path, key, meant", TYPOS, ids=[f"{path}.{key}" for path, key, _ in TYPOS])
def test_an_unknown_key_on_the_command_line_passes(tmp_path, path, key, meant):
    """NeMo-RL#3271 (its documentation says that typos pass), trl#6023."""
    (tmp_path / "c.py").write_text(FILE)
    dotted = f"{path}.{key}" if path else key
    with pytest.raises(ConfigError, match=f"--config.{dotted}: unknown key.*allowed in config.*{meant}"):
        launch.load_config(str(tmp_path / "c.py"), [f"{dotted}=1"])


@pytest.mark.parametrize("override", ["nowhere.steps=1", "method.steps.more=1", "method.data=1", "method"])
def test_an_override_that_hits_no_key_passes(tmp_path, override):
    """Of the family of NeMo-RL#3271: a section that is none, a key below a value, a section as a value, no value."""
    (tmp_path / "c.py").write_text(FILE)
    with pytest.raises(ConfigError, match="--config"):
        launch.load_config(str(tmp_path / "c.py"), [override])


def test_an_unknown_option_of_the_optimiser_passes():
    """verl#6317: options that the optimiser does not take; the open section `options` is checked by the optimiser."""
    section = configs.optim_section(options={"weight_dekay": 0.1}).to_dict()
    with pytest.raises(ConfigError, match="optim.*weight_dekay.*allowed: .*weight_decay"):
        optim.from_section(section, 10)
    with pytest.raises(ConfigError, match="optim.*momentum.* adamw"):
        optim.from_section(configs.optim_section(options={"momentum": 0.9}).to_dict(), 10)


def test_a_run_starts_with_an_unknown_key(tmp_path):
    """open-instruct#1823: an option that does nothing. The loop itself checks, before it writes or reads anything."""
    config = whole()
    config.method.resume_from_checkpoint = True
    with pytest.raises(ConfigError, match="config.method.resume_from_checkpoint is not a key"):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_key_of_a_single_stage_is_named_as_it_stands_in_the_file(tmp_path):
    """The keys of a run of one stage stand at the top; so does the wrong one in the message."""
    config = configs.single("dpo", steps=1, data=dict(path="pairs.jsonl"))
    config.optim.lr = 1.0
    with pytest.raises(ConfigError, match=r"config\.optim\.lr is not a key.*learning_rate"):
        train.run(config, tmp_path / "run")


IDLE = [
    (dict(lora=dict(alpha=32.0)), "config.method.lora.alpha=32.0 has no effect with config.method.lora.rank=0"),
    (dict(lora=dict(targets=("mlp/up",))), "config.method.lora.targets=.* has no effect"),
    (dict(data=dict(path="a", eval_path="b", eval_fraction=0.1)), "eval_fraction=0.1 has no effect beside"),
    (dict(data=dict(path="a", aux_prompt="be kind")), "aux_prompt='be kind' has no effect with the loss 'dpo'"),
    (dict(loss="simpo", reference="frozen"), "reference='frozen' is set, but the loss requests nothing of a reference"),
]


@pytest.mark.parametrize("over, words", IDLE, ids=["lora.alpha", "lora.targets", "eval_fraction", "aux_prompt",
                                                   "reference"])
def test_a_key_that_another_makes_idle_passes(tmp_path, over, words):
    """trl#2538, trl#2551 (`truncation_mode` was accepted and unused), trl#6023: set, legal, and without effect."""
    config = configs.base(tokenizer="builtin:stories", stages=("method",))
    config.method = configs.train_stage(**{"steps": 1, **over})
    with pytest.raises(ConfigError, match=words):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_keys_of_adapters_are_taken_where_there_are_adapters():
    config = configs.base(stages=("method",))
    config.method = configs.train_stage("sr_dpo", lora=dict(rank=2, alpha=32.0), data=dict(aux_prompt="be kind"))
    configs.check(config)


def _names(folder: Path) -> set[str]:
    """Every word by which code could read a key: attributes, strings, arguments and fields, outside configs.py."""
    found = set()
    for path in folder.rglob("*.py"):
        if path.name == "configs.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return found


def test_a_key_is_accepted_and_read_by_nobody():
    """trl#2538 (`truncation_mode`), NeMo-RL#2872 (`logprob_chunk_size`), open-instruct#1823 (resuming): accepted, and
    no line of code reads it. Every legal key of every section occurs in the code outside the sections' own file."""
    stage = configs.train_stage("dpo")
    sections = {"config": configs.base(), "model": configs.model_section(), "mesh": configs.base().mesh,
                "text": configs.base().text, "train": stage, "data": stage.data, "lora": stage.lora,
                "optim": stage.optim, "sample": configs.sample_stage(), "evaluate": configs.evaluate_stage()}
    known = _names(PACKAGE)
    unread = [f"{name}.{key}" for name, section in sections.items() for key in section if key not in known]
    assert not unread
    assert "logprob_chunk_size" not in known  # the scan can tell


def test_a_hyper_parameter_is_accepted_and_unused():
    """trl#7063, trl#7062: label smoothing and DiscoPOP's tau were accepted by a second copy of the loss and dropped.
    Here every hyper-parameter of a loss's signature occurs in its body."""
    unread = []
    for name, function in losses.INDEX.items():
        nodes = ast.walk(ast.parse(inspect.getsource(function)))
        read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        unread += [f"{name}.{key}" for key in losses.split_signature(function)[1] if key not in read]
    assert not unread
