"""`alignax convert`: stages of runs and models as Hugging Face folders and as native ones."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import checkpoint, cli, context, data, launch, models

CONFIG = models.DecoderConfig(vocab_size=data.stories_tokenizer().vocab_size, hidden_size=16, intermediate_size=32,
                              num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_positions=64)


def same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def listing(place: pathlib.Path) -> list[str]:
    return sorted(p.relative_to(place).as_posix() for p in place.rglob("*"))


RUN = """
from alignax import configs

def get_config(arg=""):
    config = configs.base(tokenizer="builtin:stories", stages=("first", "second"))
    config.model = configs.model_section(hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2,
                                         num_kv_heads=1, head_dim=8, max_positions=64, unroll=2)
    stage = lambda: configs.train_stage("sft", data=dict(path="builtin:stories", max_records=24), steps=1,
                                        batch_size=2, log_every=1, eval_every=1)
    config.first, config.second = stage(), stage()
    return config
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """The folder of a run of two stages as `alignax train` leaves it, with random parameters and without the wait; the
    second tier converts one that was trained."""
    return leave_run(tmp_path_factory.mktemp("run"))


def leave_run(place: pathlib.Path, tokenizer: str = "builtin:stories", path: str = "") -> pathlib.Path:
    """Writes config.json and parameters of a run that used `tokenizer` and started from the model in `path`."""
    (place / "config.py").write_text(RUN)
    config = launch.load_config(str(place / "config.py"), [f"tokenizer={tokenizer}", f"model.path={path}"])
    checkpoint.write_json(place / "w" / "config.json", json.loads(json.dumps(config.to_dict(), default=list)))
    params = models.init_params(CONFIG, jax.random.key(3))
    for number, stage in enumerate(config.stages):
        checkpoint.save_tree(place / "w" / "stages" / stage / "params",
                             {"model": jax.tree.map(lambda leaf, number=number: leaf + number, params)})
    return place / "w"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder without a tokenizer."""
    place = tmp_path_factory.mktemp("hf") / "model"
    models.save(place, CONFIG, models.init_params(CONFIG, jax.random.key(4)), bos_token_id=1, eos_token_id=2)
    return place


def stage_params(finished, stage):
    folder = finished / "stages" / stage / "params"
    return checkpoint.load_tree(folder, checkpoint.stored_tree(folder))["model"]


def section_of(path) -> dict:
    return dict(path=str(path), remat="none", head_megabytes=64, unroll=1)


def test_a_stage_becomes_a_hugging_face_folder(finished, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["convert", "--run", str(finished), "--to-hf", str(out), "--max-shard-size", "20KB"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "stage second" in shown and "model.safetensors.index.json" in shown and "parameters" in shown
    config, params = models.load(out)
    same(params, stage_params(finished, "second"))
    tokenizer = data.stories_tokenizer()
    ours = context.load_tokenizer("", str(out))
    assert ours.vocab_size == tokenizer.vocab_size == config.vocab_size
    assert ours.encode_prompt("tom was at the park .") == tokenizer.encode_prompt("tom was at the park .")
    assert context.text_policy(ours, str(out), add_bos=True, eos_id=-1) == data.text_policy(tokenizer)
    other = tmp_path / "first"
    assert cli.main(["convert", "--run", str(finished), "--stage", "first", "--to-hf", str(other), "--dtype",
                     "bfloat16"]) == 0
    same(models.load(other, "stored")[1],
         jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), stage_params(finished, "first")))


def test_a_native_folder_goes_wherever_a_hugging_face_folder_goes(finished, tmp_path):
    native, back = tmp_path / "native", tmp_path / "back"
    assert cli.main(["convert", "--run", str(finished), "--to-native", str(native)]) == 0
    assert "params" in listing(native) and "model.safetensors" not in listing(native)
    params = stage_params(finished, "second")
    tokenizer = context.load_tokenizer("", str(native))
    spec, loaded = context.load_model(section_of(native), vocab_size=tokenizer.vocab_size, seed=0)
    same(loaded["model"], params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
    assert cli.main(["convert", "--model", str(native), "--to-hf", str(back)]) == 0
    assert models.load(back)[0] == spec.config
    same(models.load(back)[1], params)
    assert (back / "tokenizer.json").read_bytes() == (native / "tokenizer.json").read_bytes()
    assert cli.main(["convert", "--model", str(back), "--to-native", str(native), "--dtype", "bfloat16",
                     "--overwrite"]) == 0
    loaded = context.load_model(section_of(native), vocab_size=tokenizer.vocab_size, seed=0)[1]["model"]
    same(loaded, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params))
    half = tmp_path / "half"
    assert cli.main(["convert", "--model", str(native), "--to-hf", str(half)]) == 0
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(models.load(half, "stored")[1])} == {"bfloat16"}
    # A Hugging Face export over a native folder takes its parameters away: one folder, one set of weights.
    assert cli.main(["convert", "--model", str(back), "--to-hf", str(native), "--overwrite"]) == 0
    assert not (native / "params").exists()


@pytest.mark.parametrize("kind", ["model", "file", "folder", "builtin"])
def test_tokenizer_and_ids_are_those_of_the_run(tmp_path, folder, kind):
    """The run began from a model folder; its tokenizer is the model's, a file, another folder, or the built-in one."""
    model, other = tmp_path / "model", tmp_path / "other"
    shutil.copytree(folder, model)
    other.mkdir()
    for place in (model, other):
        data.stories_tokenizer().save(place / "tokenizer.json")
        (place / "chat_template.jinja").write_text(place.name)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "top_p": 0.5}))
    names = {"model": "", "file": str(other / "tokenizer.json"), "folder": str(other), "builtin": "builtin:stories"}
    out = tmp_path / "out"
    assert cli.main(["convert", "--run", str(leave_run(tmp_path, names[kind], str(model))), "--to-hf", str(out)]) == 0
    template = out / "chat_template.jinja"
    assert (template.read_text() if template.exists() else None) == {"model": "model", "folder": "other"}.get(kind)
    assert context.load_tokenizer("", str(out)).vocab_size == CONFIG.vocab_size
    assert models.read_generation_ids(out)["eos"] == (2, 3) and models.read_generation_ids(out)["bos"] == 1
    assert json.loads((out / "generation_config.json").read_text())["top_p"] == 0.5
    assert (out / "tokenizer_config.json").exists() == (kind == "builtin")


@pytest.mark.parametrize("extra, words", [
    (["--run", "RUN", "--stage", "third", "--to-hf", "OUT"], ("--stage=third", "first, second")),
    (["--run", "OUT", "--to-hf", "OUT"], ("--run=", "no config.json")),
    (["--run", "MODEL", "--to-hf", "OUT"], ("is not that of a run", "--model")),
    (["--model", "nowhere/model", "--to-hf", "OUT"], ("--model='nowhere/model': no such folder",)),
    (["--model", "MODEL", "--stage", "first", "--to-hf", "OUT"], ("--stage=first", "--run")),
    (["--model", "MODEL", "--to-hf", "OUT", "--max-shard-size", "2XB"], ("--max-shard-size=2XB", "GB")),
    (["--model", "MODEL", "--to-hf", "OUT", "--max-shard-size", "0GB"], ("--max-shard-size=0GB",)),
    (["--model", "MODEL", "--to-native", "OUT", "--max-shard-size", "2GB"], ("--max-shard-size=2GB", "--to-hf")),
    (["--model", "MODEL", "--to-hf", "RUN"], ("not empty", "overwrite")),
])
def test_convert_refuses(finished, folder, tmp_path, capsys, extra, words):
    places = {"RUN": str(finished), "OUT": str(tmp_path / "out"), "MODEL": str(folder)}
    assert cli.main(["convert", *(places.get(word, word) for word in extra)]) == cli.EXIT_ERROR
    shown = capsys.readouterr().err
    assert all(word in shown for word in words) and "Traceback" not in shown, shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [[], ["--run", "a"], ["--to-hf", "a"], ["--run", "a", "--model", "b", "--to-hf", "c"],
                                  ["--run", "a", "--to-hf", "b", "--to-native", "c"]])
def test_convert_needs_one_source_and_one_target(capsys, argv):
    with pytest.raises(SystemExit) as end:
        cli.main(["convert", *argv])
    assert end.value.code == 2 and "usage: alignax convert" in capsys.readouterr().err


def test_help_names_both_directions(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["convert", "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and all(word in shown for word in ("--to-hf", "--to-native", "--dtype", "memory:"))


@pytest.mark.slow
def test_transformers_loads_what_convert_writes_of_a_trained_run(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    out, config = tmp_path / "out", tmp_path / "config.py"
    config.write_text(RUN)
    assert cli.main(["train", "--config", str(config), "--workdir", str(tmp_path / "run")]) == 0
    assert cli.main(["convert", "--run", str(tmp_path / "run"), "--to-hf", str(out), "--max-shard-size", "20KB"]) == 0
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ours, text = data.stories_tokenizer(), "tom was at the park ."
    policy = data.text_policy(ours)
    ids = policy.prompt(ours.encode_prompt(text))
    assert tokenizer(text)["input_ids"] == ids and len(ids) > 4
    assert model.generation_config.eos_token_id == policy.eos_id == tokenizer.eos_token_id
    same(models.load(out)[1], stage_params(tmp_path / "run", "second"))
    config, params = models.load(out)
    row = jnp.asarray([ids], jnp.int32)
    hidden = models.forward(config, params, row, jnp.ones_like(row), jnp.ones_like(row),
                            jnp.arange(len(ids), dtype=jnp.int32)[None])
    with torch.no_grad():
        theirs = model.eval()(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(models.logits(config, params, hidden), theirs, atol=1e-4)
