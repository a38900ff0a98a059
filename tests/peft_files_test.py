"""Adapters in the files of PEFT: names and settings, round trips, refusals; in the second tier peft itself."""

import copy
import dataclasses
import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignax import models
from alignax.models import adapters, families, peft_files
from alignax.models.families.slots import fused, single
from alignax.types import ConfigError

MODEL = models.DecoderConfig(vocab_size=29, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4,
                             num_kv_heads=2, head_dim=6, max_positions=64)
CONFIG = adapters.AdapterConfig(rank=4, alpha=6.0, targets=("query", "down"))
PREFIX = "base_model.model."
merge = jax.jit(adapters.merge, static_argnames=("config", "sign"))


def random_adapters(config, model=MODEL, seed=0, size=0.3):
    """Adapters with random b."""
    tree = adapters.init_adapters(models.abstract_params(model), config, jax.random.key(seed))
    draw = np.random.default_rng(seed)
    return adapters.unflatten({path: {"a": leaf["a"], "b": jnp.asarray(draw.normal(size=leaf["b"].shape) * size,
                                                                       leaf["b"].dtype)}
                               for path, leaf in adapters.flatten(tree).items()})


def deltas(tree, config):
    """{path: scale a b}."""
    return {path: np.asarray(adapters.delta(leaf, config.scale)) for path, leaf in adapters.flatten(tree).items()}


def same_deltas(left, left_config, right, right_config, atol=1e-6):
    left, right = deltas(left, left_config), deltas(right, right_config)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_allclose(left[path], right[path], atol=atol, err_msg=path)


@pytest.fixture
def folder(tmp_path):
    """A saved adapter, and a function that changes its settings."""
    peft_files.save_peft(tmp_path, MODEL, CONFIG, random_adapters(CONFIG), base_model_name="base")
    return tmp_path


def settings(folder, **changes):
    """adapter_config.json after `changes` to it."""
    place = folder / peft_files.CONFIG_FILE
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))
    return json.loads(place.read_text())


def tensors(folder, change=None):
    """The tensors of the file, after `change` to them."""
    place = folder / peft_files.TENSOR_FILE
    if change:
        found = load_file(place)
        change(found)
        save_file(found, place)
    return load_file(place)


# --- names and settings --------------------------------------------------------------------------------------------


def test_names_shapes_and_settings_are_those_of_peft(folder):
    raw = settings(folder)
    assert raw["peft_type"] == "LORA" and raw["task_type"] == "CAUSAL_LM" and raw["base_model_name_or_path"] == "base"
    assert (raw["r"], raw["lora_alpha"], raw["use_rslora"], raw["bias"]) == (4, 6, False, "none")
    assert raw["target_modules"] == ["down_proj", "q_proj"] and raw["rank_pattern"] == {}
    assert not raw["fan_in_fan_out"]
    assert {name: array.shape for name, array in tensors(folder).items()} == {
        f"{PREFIX}model.layers.{layer}.{module}.{side}.weight": shape for layer in range(3)
        for module, side, shape in (("self_attn.q_proj", "lora_A", (4, 16)), ("self_attn.q_proj", "lora_B", (24, 4)),
                                    ("mlp.down_proj", "lora_A", (4, 24)), ("mlp.down_proj", "lora_B", (16, 4)))}
    tree = random_adapters(CONFIG)
    np.testing.assert_array_equal(tensors(folder)[f"{PREFIX}model.layers.1.mlp.down_proj.lora_B.weight"],
                                  tree["mlp"]["down"]["b"][1].T)


@pytest.mark.parametrize("scaling, alpha", [("alpha/r", 6.0), ("rslora", 2.5)])
def test_a_round_trip_keeps_every_bit(tmp_path, scaling, alpha):
    config = dataclasses.replace(CONFIG, scaling=scaling, alpha=alpha)
    tree = random_adapters(config)
    peft_files.save_peft(tmp_path, MODEL, config, tree, base_model_name="base")
    again, found = peft_files.load_peft(tmp_path, MODEL)
    assert again == dataclasses.replace(config, targets=("attention/query", "mlp/down"))
    jax.tree.map(np.testing.assert_array_equal, found, tree)
    assert not list(tmp_path.glob("*.part"))


def test_dtypes(tmp_path):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_adapters(CONFIG))
    peft_files.save_peft(tmp_path, MODEL, CONFIG, half, base_model_name="base")
    assert {str(array.dtype) for array in tensors(tmp_path).values()} == {"bfloat16"}
    found = peft_files.load_peft(tmp_path, MODEL)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(np.testing.assert_array_equal, peft_files.load_peft(tmp_path, MODEL, jnp.bfloat16)[1], half)


@pytest.mark.parametrize("scaling", adapters.SCALINGS)
def test_combined_adapters_are_written_with_ranks_of_their_own(tmp_path, scaling):
    config = dataclasses.replace(CONFIG, scaling=scaling)
    one, two = random_adapters(config), random_adapters(config, seed=1)
    mixed = adapters.combine({"one": one, "two": {"mlp": two["mlp"]}}, {"one": 1.0, "two": -0.5})
    peft_files.save_peft(tmp_path, MODEL, config, mixed, base_model_name="base")
    assert settings(tmp_path)["rank_pattern"] == {"mlp.down_proj": 8} and settings(tmp_path)["r"] == 4
    # PEFT divides alpha by 8, or its root: what is stored makes up for it.
    stored = tensors(tmp_path)[f"{PREFIX}model.layers.0.mlp.down_proj.lora_B.weight"]
    factor = 2 if scaling == "alpha/r" else np.sqrt(2)
    np.testing.assert_allclose(stored, factor * np.asarray(mixed["mlp"]["down"]["b"][0]).T, rtol=1e-6)
    again, found = peft_files.load_peft(tmp_path, MODEL)
    same_deltas(mixed, config, found, again)


def test_patterns_of_rank_and_alpha_and_left_out_layers_keep_every_delta(folder):
    """A file in which q_proj of layer 2 has rank 2 and alpha 1, down_proj alpha 12, and layer 1 no adapter."""
    before = deltas(random_adapters(CONFIG), CONFIG)
    name = f"{PREFIX}model.layers.2.self_attn.q_proj."

    def change(found):
        found[name + "lora_A.weight"] = np.ascontiguousarray(found[name + "lora_A.weight"][:2])
        found[name + "lora_B.weight"] = np.ascontiguousarray(found[name + "lora_B.weight"][:, :2])
        for key in [key for key in found if ".1." in key]:
            del found[key]

    tree = random_adapters(CONFIG)
    tensors(folder, change)
    settings(folder, rank_pattern={r"model\.layers\.2\.self_attn\.q_proj": 2}, layers_to_transform=[0, 2],
             alpha_pattern={"down_proj": 12, r"layers.2.self_attn.q_proj": 1})
    config, found = peft_files.load_peft(folder, MODEL)
    after = deltas(found, config)
    np.testing.assert_allclose(after["attention/query"][0], before["attention/query"][0], atol=1e-6)
    np.testing.assert_allclose(after["mlp/down"][[0, 2]], 2 * before["mlp/down"][[0, 2]], atol=1e-6)
    leaf = tree["attention"]["query"]
    np.testing.assert_allclose(after["attention/query"][2],
                               0.5 * np.asarray(leaf["a"][2, :, :2]) @ np.asarray(leaf["b"][2, :2]), atol=1e-6)
    assert not after["attention/query"][1].any() and not after["mlp/down"][1].any()
    # What is not there stays away: no gradient flows into zeros that meet zeros.
    grads = jax.grad(lambda leaf: jnp.sum(jnp.sin(jnp.matmul(leaf["a"], leaf["b"]) + 1)))(found["attention"]["query"])
    assert not grads["a"][1].any() and not grads["b"][1].any() and not grads["a"][2, :, 2:].any()
    assert grads["b"][2, :2].any()


@pytest.mark.parametrize("changes", [
    {"target_modules": r".*\.(q_proj|down_proj)"},
    {"target_modules": ["q_proj", "down_proj", "up_proj"], "exclude_modules": ["up_proj"]},
    {"target_modules": ["q_proj", "down_proj", "up_proj"], "exclude_modules": r".*up.*"},
    {"target_modules": ["self_attn.q_proj", "mlp.down_proj"]},
    {"target_modules": [f"model.layers.{n}.{m}" for n in range(3) for m in ("self_attn.q_proj", "mlp.down_proj")]},
    {"layers_to_transform": [0, 1, 2], "layers_pattern": "layers"},
    {"lora_dropout": 0.05, "init_lora_weights": "gaussian", "some_new_switch": False, "loftq_config": {}},
])
def test_settings_that_say_the_same_are_read(folder, changes):
    settings(folder, **changes)
    config, found = peft_files.load_peft(folder, MODEL)
    assert config.targets == ("attention/query", "mlp/down")
    jax.tree.map(np.testing.assert_array_equal, found, random_adapters(CONFIG))


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, value", [
    ("use_dora", True), ("bias", "all"), ("bias", "lora_only"), ("modules_to_save", ["lm_head"]), ("lora_bias", True),
    ("peft_type", "IA3"), ("task_type", "SEQ_CLS"), ("init_lora_weights", "pissa"), ("use_rslora", "yes"), ("r", 0),
    ("r", 2.0), ("lora_alpha", None), ("lora_alpha", -1), ("rank_pattern", {"q_proj": 0}), ("alpha_pattern", ["x"]),
    ("target_modules", None), ("target_modules", []), ("trainable_token_indices", [1]), ("some_new_switch", True),
    ("layer_replication", [[0, 2]]), ("use_qalora", True), ("target_parameters", ["x"]),
])
def test_a_setting_that_is_not_computed_is_refused_by_name(folder, key, value):
    settings(folder, **{key: value})
    with pytest.raises(ConfigError, match=rf"adapter_config.json: {key}: found .*allowed: "):
        peft_files.load_peft(folder, MODEL)


def drop(found):
    del found[f"{PREFIX}model.layers.1.mlp.down_proj.lora_B.weight"]


def spare(found):
    found[f"{PREFIX}model.layers.1.mlp.up_proj.lora_B.weight"] = np.zeros((24, 4), np.float32)


def head(found):
    found[f"{PREFIX}lm_head.lora_A.weight"] = np.zeros((4, 16), np.float32)


def beyond(found):
    found[f"{PREFIX}model.layers.3.mlp.down_proj.lora_B.weight"] = np.zeros((16, 4), np.float32)


def misshapen(found):
    found[f"{PREFIX}model.layers.1.mlp.down_proj.lora_A.weight"] = np.zeros((4, 16), np.float32)


def integers(found):
    found[f"{PREFIX}model.layers.1.mlp.down_proj.lora_A.weight"] = np.zeros((4, 24), np.int32)


@pytest.mark.parametrize("change, said", [
    (drop, r"missing: .*layers\.1\.mlp\.down_proj\.lora_B"), (spare, r"unexpected: .*up_proj"),
    (head, r"lm_head\.lora_A.*neither takes an adapter"), (beyond, r"layers\.3\.mlp.*no linear layer"),
    (misshapen, r"down_proj\.lora_A\.weight: found float32 \(4, 16\), allowed: .*\(4, 24\)"),
    (integers, r"down_proj\.lora_A\.weight: found int32"),
])
def test_a_tensor_that_does_not_fit_is_refused_by_name(folder, change, said):
    tensors(folder, change)
    with pytest.raises(ConfigError, match=said):
        peft_files.load_peft(folder, MODEL)


def test_a_file_of_another_model_and_absent_files_are_refused(folder):
    with pytest.raises(ConfigError, match=r"lora_[AB].weight: found float32"):
        peft_files.load_peft(folder, dataclasses.replace(MODEL, hidden_size=8))
    (folder / peft_files.TENSOR_FILE).write_bytes(b"no")
    with pytest.raises(ConfigError, match="adapter_model.safetensors: found a file that is not safetensors"):
        peft_files.load_peft(folder, MODEL)
    (folder / peft_files.TENSOR_FILE).unlink()
    with pytest.raises(ConfigError, match="adapter_model.safetensors: found no such file"):
        peft_files.load_peft(folder, MODEL)
    (folder / peft_files.CONFIG_FILE).unlink()
    with pytest.raises(ConfigError, match="adapter_config.json: found no such file"):
        peft_files.load_peft(folder, MODEL)


def test_saving_refuses_what_does_not_fit(tmp_path):
    tree = random_adapters(CONFIG)
    save = functools.partial(peft_files.save_peft, tmp_path, MODEL, CONFIG, base_model_name="base")
    with pytest.raises(ConfigError, match="attention/query: found shapes"):
        save({"attention": {"query": tree["mlp"]["down"]}})
    with pytest.raises(ConfigError, match="empty tree"):
        save({})
    with pytest.raises(ConfigError, match="mlp/down/a: found dtype int32"):
        save(jax.tree.map(lambda leaf: leaf.astype(jnp.int32), {"mlp": tree["mlp"]}))
    assert not list(tmp_path.iterdir())


# --- fused modules -------------------------------------------------------------------------------------------------

SQUARE = dataclasses.replace(MODEL, num_kv_heads=4, head_dim=4)
QKV = tuple(("layers", "attention", name) for name in ("query", "key", "value"))


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("heads", [None, 4])
def test_a_fused_module_is_written_exactly(tmp_path, monkeypatch, heads, turned):
    """Query, key and value in one tensor, in both orders of the columns and both orientations; the output apart."""
    shapes = models.abstract_params(SQUARE)
    table = {}
    for layer in range(3):
        table[f"model.layers.{layer}.attn.packed.weight"] = fused(shapes, QKV, layer, turned=turned, heads=heads)
        table[f"model.layers.{layer}.attn.proj.weight"] = single(shapes, ("layers", "attention", "output"), layer,
                                                                 turned=turned)
        table[f"model.layers.{layer}.mlp.proj.weight"] = single(shapes, ("layers", "mlp", "down"), layer, turned=turned)
    monkeypatch.setattr(families, "tensors", lambda config: table)
    config = dataclasses.replace(CONFIG, targets=("attention/.*",), rank=6)
    tree = random_adapters(config, SQUARE)
    # Key and value share their a: 6 columns for the query, 6 for both others.
    tree["attention"]["value"]["a"] = tree["attention"]["key"]["a"]
    peft_files.save_peft(tmp_path, SQUARE, config, tree, base_model_name="base")
    raw = settings(tmp_path)
    assert raw["rank_pattern"] == {"attn.packed": 12} and raw["target_modules"] == ["attn.proj", "packed"]
    assert raw["fan_in_fan_out"] is not turned
    params = models.init_params(SQUARE, jax.random.key(0))
    merged = merge(params, tree, config)
    for layer in range(3):
        for module in ("packed", "proj"):
            name = f"{PREFIX}model.layers.{layer}.attn.{module}."
            stored = tensors(tmp_path)
            product = stored[name + "lora_B.weight"] @ stored[name + "lora_A.weight"] * 6 / raw["rank_pattern"].get(
                f"attn.{module}", raw["r"])
            slot = table[f"model.layers.{layer}.attn.{module}.weight"]
            leaf = lambda tree, place: np.asarray(tree["layers"]["attention"][place.path[2]][place.layer])
            expected = slot.from_params(*[leaf(merged, place) - leaf(params, place) for place in slot.places])
            np.testing.assert_allclose(product if turned else product.T, expected, atol=1e-6)
    again, found = peft_files.load_peft(tmp_path, SQUARE)
    same_deltas(tree, config, found, again)
    # Only one of the three: the others get zeros.
    part = {"attention": {"key": tree["attention"]["key"]}}
    peft_files.save_peft(tmp_path, SQUARE, config, part, base_model_name="base")
    assert settings(tmp_path)["rank_pattern"] == {}
    again, found = peft_files.load_peft(tmp_path, SQUARE)
    assert sorted(found["attention"]) == ["key", "query", "value"]
    same_deltas(part, config, {"attention": {"key": found["attention"]["key"]}}, again)
    assert not found["attention"]["query"]["b"].any() and not found["attention"]["value"]["b"].any()


def test_a_rank_beyond_the_width_survives_a_fused_module(tmp_path, monkeypatch):
    shapes = models.abstract_params(SQUARE)
    table = {f"model.layers.{layer}.attn.packed.weight": fused(shapes, QKV, layer, turned=True, heads=4)
             for layer in range(3)}
    monkeypatch.setattr(families, "tensors", lambda config: table)
    config = dataclasses.replace(CONFIG, targets=("query", "key", "value"), rank=9)
    tree = random_adapters(config, SQUARE)
    peft_files.save_peft(tmp_path, SQUARE, config, tree, base_model_name="base")
    assert settings(tmp_path)["rank_pattern"] == {"attn.packed": 27}  # of an input of 16
    again, found = peft_files.load_peft(tmp_path, SQUARE)
    same_deltas(tree, config, found, again)


@pytest.mark.parametrize("family, targets, expected", [
    ("llama", (".*",), {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ("baichuan", ("query", "key", "value", "down"), {"W_pack", "down_proj"}),
    ("gpt_neox", ("query", "key", "value", "output"), {"query_key_value", "dense"}),
    ("gpt2", ("query", "output"), {"c_attn", "attn.c_proj"}),
    ("gpt2", ("output", "mlp/.*"), {"c_proj", "c_fc"}),
])
def test_modules_are_named_as_the_family_names_them(tmp_path, family, targets, expected):
    model = dataclasses.replace(SQUARE, family=family)
    if family.startswith("gpt"):
        model = dataclasses.replace(model, gated_mlp=False, mlp_bias=True, norm="layer",
                                    attention_bias=("query", "key", "value", "output"),
                                    positions="learned" if family == "gpt2" else "rope")
    config = dataclasses.replace(CONFIG, targets=targets)
    tree = random_adapters(config, model)
    peft_files.save_peft(tmp_path, model, config, tree, base_model_name="base")
    raw = settings(tmp_path)
    assert set(raw["target_modules"]) == expected and raw["fan_in_fan_out"] is (family == "gpt2")
    again, found = peft_files.load_peft(tmp_path, model)
    parts = adapters.flatten(found)
    same_deltas(tree, config, adapters.unflatten({path: parts[path] for path in adapters.flatten(tree)}), again)
    assert not any(leaf["b"].any() for path, leaf in parts.items() if path not in adapters.flatten(tree))


# --- peft itself ---------------------------------------------------------------------------------------------------

SIZES = dict(vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
# transformers' config class -> its arguments.
TINY = {
    "LlamaConfig": SIZES,
    "MistralConfig": SIZES,
    "Qwen2Config": SIZES,
    "Qwen3Config": SIZES | {"head_dim": 6},
    "Gemma2Config": SIZES | {"head_dim": 4, "sliding_window": 4},
    "Gemma3TextConfig": SIZES | {"head_dim": 4, "sliding_window": 4},
    "GPT2Config": dict(vocab_size=29, n_embd=16, n_layer=2, n_head=4, n_positions=64),
    # A quarter of each head is turned, which has to be an even number.
    "GPTNeoXConfig": {key: value for key, value in SIZES.items() if key != "num_key_value_heads"} | {"hidden_size": 32},
}
TOKENS = np.random.default_rng(5).integers(1, 29, (2, 7))


@functools.cache
def hugging_face(name):
    """A random tiny model of transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("peft")
    torch.manual_seed(0)
    config = getattr(transformers, name)(**TINY[name], bos_token_id=1, eos_token_id=2, pad_token_id=0)
    # float32 weights of a size at which an adapter and a lost scale show in the logits.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(params=list(TINY))
def base(request, tmp_path):
    """(its name, a function that makes the transformers model anew, our config and parameters)."""
    model = hugging_face(request.param)
    model.save_pretrained(tmp_path / "base")
    return request.param, lambda: copy.deepcopy(model), *models.load(tmp_path / "base")


def our_logits(config, params, tree=None):
    """[2, 7, 29] of the fixed tokens."""
    ones = jnp.ones(TOKENS.shape, jnp.int32)
    position = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32)[None], TOKENS.shape)
    hidden = models.forward(config, params, jnp.asarray(TOKENS, jnp.int32), ones, ones, position, adapters=tree)
    return np.asarray(models.logits(config, params, hidden))


def their_logits(model):
    """[2, 7, 29] of a torch model."""
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(TOKENS)).logits.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("targets, scaling", [((".*",), "alpha/r"), (("query", "mlp/.*"), "rslora")])
def test_peft_loads_our_files(base, tmp_path, targets, scaling):
    import peft

    _, _, config, params = base
    models.save(tmp_path / "exported", config, params)
    adapter_config = adapters.AdapterConfig(rank=4, alpha=6.0, targets=targets, scaling=scaling)
    tree = random_adapters(adapter_config, config)
    peft_files.save_peft(tmp_path / "adapter", config, adapter_config, tree,
                         base_model_name=str(tmp_path / "exported"))
    # peft finds the base through the name in the adapter's settings.
    theirs = their_logits(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval())
    ours = our_logits(config, params, adapters.scaled(tree, adapter_config))
    assert np.abs(ours - our_logits(config, params)).max() > 0.1
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    # Not a coincidence of a file that PEFT half ignores: without the fold of the scale the logits differ.
    assert np.abs(our_logits(config, params, tree) - theirs).max() > 1e-2


# transformers' config class -> the modules that PEFT adapts.
MODULES = {
    "LlamaConfig": ["q_proj", "o_proj", "up_proj"], "MistralConfig": ["v_proj", "gate_proj"],
    "Qwen2Config": ["k_proj", "v_proj", "down_proj"], "Qwen3Config": ["q_proj", "down_proj"],
    "Gemma2Config": ["q_proj", "gate_proj"], "Gemma3TextConfig": ["o_proj", "up_proj"],
    "GPT2Config": ["c_attn", "mlp.c_proj"],
    "GPTNeoXConfig": ["query_key_value", "dense_h_to_4h"],
}


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True, "lora_dropout": 0.1}, {"layers_to_transform": [1], "init_lora_weights": "gaussian"},
    {"rank": True, "alpha": True},
], ids=["plain", "rslora", "layer", "patterns"])
def test_we_load_the_files_of_peft(base, tmp_path, options):
    import peft
    import torch

    name, model, config, params = base
    targets = MODULES[name]
    if "rank" in options:
        options = {"rank_pattern": {targets[0]: 2}, "alpha_pattern": {rf".*\.1\..*{targets[1]}": 3}}
    adapted = peft.get_peft_model(model(), peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=10, target_modules=targets, fan_in_fan_out=name == "GPT2Config",
        **options)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    adapter_config, tree = peft_files.load_peft(tmp_path / "adapter", config)
    theirs = their_logits(adapted)
    assert np.abs(theirs - our_logits(config, params)).max() > 0.1
    np.testing.assert_allclose(our_logits(config, params, adapters.scaled(tree, adapter_config)), theirs, atol=1e-4)
    np.testing.assert_allclose(our_logits(config, merge(params, tree, adapter_config)), theirs, atol=1e-4)
    # And back again through our own files.
    peft_files.save_peft(tmp_path / "again", config, adapter_config, tree, base_model_name="base")
    np.testing.assert_allclose(their_logits(peft.PeftModel.from_pretrained(model(), tmp_path / "again")), theirs,
                               atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options, said", [
    ({"use_dora": True}, "use_dora"), ({"bias": "lora_only"}, "bias"), ({"modules_to_save": ["lm_head"]}, "modules_to"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.*neither takes an adapter"),
    ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.*neither takes an adapter"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"), ({"lora_bias": True}, "lora_bias"),
])
def test_what_peft_writes_and_we_do_not_compute_is_refused(tmp_path, options, said):
    model, config = hugging_face("LlamaConfig"), models.DecoderConfig(29, 16, 24, 2, 4, 2, 4, tie_embeddings=False)
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(
            **{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], **options}))
        adapted.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=said):
        peft_files.load_peft(tmp_path, config)
