"""Model families: config.json and tensors both ways, attention and positions, layouts, adapters, Baichuan, parity.

Baichuan has no class in transformers, so this file states its architecture a second time, in numpy and float64.
"""

import functools
import importlib.util
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import models
from alignax.models import families
from alignax.models.attention import alibi_bias, alibi_slopes, attend, attention_mask, distance
from alignax.models.config import RopeScaling
from alignax.models.decoder import _embed, _runs, _views
from alignax.models.rope import frequencies
from alignax.ops.head import head_stats
from alignax.ops.zloss import max_z, z_loss
from alignax.rollout import generate
from alignax.types import ConfigError

spec = importlib.util.spec_from_file_location(
    "parity_families", pathlib.Path(__file__).parents[1] / "experiments" / "parity" / "families.py")
parity = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parity)

LLAMA = dict(model_type="llama", vocab_size=23, hidden_size=16, intermediate_size=12, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=6, max_position_embeddings=64, rms_norm_eps=1e-5)
GEMMA = LLAMA | dict(sliding_window=3, query_pre_attn_scalar=9)
BAICHUAN = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "head_dim")} | dict(
    model_type="baichuan", norm_head=True, max_position_embeddings=80)
RAW = {
    "llama": LLAMA | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_theta=500.0, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}),
    "mistral": LLAMA | dict(model_type="mistral", sliding_window=3),
    "qwen2": LLAMA | dict(model_type="qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=1,
                          rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}),
    "qwen3": LLAMA | dict(model_type="qwen3"),
    "gemma2": GEMMA | dict(model_type="gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3_text": GEMMA | dict(model_type="gemma3_text", num_hidden_layers=4, sliding_window_pattern=2,
                                rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "gpt2": dict(model_type="gpt2", vocab_size=23, n_embd=16, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.1),
    "gpt_neox": dict(model_type="gpt_neox", vocab_size=23, hidden_size=16, intermediate_size=12, num_hidden_layers=2,
                     num_attention_heads=2, rotary_pct=0.25, rotary_emb_base=500, max_position_embeddings=64),
    "baichuan": BAICHUAN | dict(position_embedding="rope"),
    "baichuan alibi": BAICHUAN | dict(position_embedding="alibi", num_attention_heads=2),
}
CONFIGS = {name: families.read_config(raw, "config.json") for name, raw in RAW.items()}


@functools.cache
def params_of(name):
    """Parameters without neutral values, drawn with numpy: norms and biases too are random."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.ndim == 3:
            return jnp.asarray(rng.normal(size=leaf.shape) * leaf.shape[1] ** -0.5, jnp.float32)
        neutral = 1.0 if "norm" in str(path[-1]) and CONFIGS[name].norm != "rms_plus_one" else 0.0
        return jnp.asarray(neutral + 0.3 * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, models.abstract_params(CONFIGS[name]))


each = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(autouse=True)
def strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


def wide(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


# --- config.json -----------------------------------------------------------------------------------------------


@each
def test_config_json_says_the_same_in_both_spellings(name):
    config = CONFIGS[name]
    written = families.write_config(config)
    new = ("rope_parameters", "layer_types")
    old = ("rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_emb_base", "rotary_pct", "max_window_layers")
    without = lambda keys: {key: value for key, value in written.items() if key not in keys}
    for raw in (written, without(old), without(("rope_parameters",))):
        assert families.read_config(raw, "config.json") == config
    if name not in ("gemma3_text",):  # whose older spelling needs the period, which layer_types replaces
        assert families.read_config(without(new), "config.json") == config


# What the released files say, and what it must mean. (Only the keys that matter; numbers of the models' own pages.)
RELEASED = {
    "Llama 3.1 8B": (dict(
        model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0,
        hidden_act="silu", hidden_size=4096, initializer_range=0.02, intermediate_size=14336, mlp_bias=False,
        max_position_embeddings=131072, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8,
        pretraining_tp=1, rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=False, torch_dtype="bfloat16",
        rope_scaling={"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                      "original_max_position_embeddings": 8192}, use_cache=True, vocab_size=128256),
        dict(head_dim=128, num_kv_heads=8, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 8192), windows=())),
    "Mistral 7B v0.1": (dict(
        model_type="mistral", architectures=["MistralForCausalLM"], hidden_size=4096, intermediate_size=14336,
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, sliding_window=4096, vocab_size=32000,
        max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=10000.0), dict(windows=(4096,) * 32)),
    "Mistral 7B v0.3": (dict(
        model_type="mistral", hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=32,
        num_key_value_heads=8, sliding_window=None, vocab_size=32768, rope_theta=1e6),
        dict(windows=(), rope_theta=1e6)),
    "Qwen2.5 7B": (dict(
        model_type="qwen2", hidden_size=3584, intermediate_size=18944, max_window_layers=28, num_attention_heads=28,
        num_hidden_layers=28, num_key_value_heads=4, sliding_window=131072, use_sliding_window=False, use_mrope=False,
        vocab_size=152064, rope_theta=1e6, max_position_embeddings=131072),
        dict(windows=(), attention_bias=("query", "key", "value"), head_dim=128)),
    "Gemma 2 9B": (dict(
        model_type="gemma2", hidden_size=3584, intermediate_size=14336, num_attention_heads=16, num_hidden_layers=42,
        num_key_value_heads=8, head_dim=256, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256, sliding_window=4096, sliding_window_size=4096, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, cache_implementation="hybrid", vocab_size=256000),
        dict(windows=(4096, 0) * 21, query_pre_attn_scalar=None, attention_softcap=50.0, final_softcap=30.0,
             tie_embeddings=True, scale_embedding=True, norm="rms_plus_one", activation="gelu_tanh")),
    "Gemma 3 1B": (dict(
        model_type="gemma3_text", hidden_size=1152, intermediate_size=6912, num_attention_heads=4, num_hidden_layers=26,
        num_key_value_heads=1, head_dim=256, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256,
        sliding_window=512, sliding_window_pattern=6, rope_theta=1000000, rope_local_base_freq=10000, rope_scaling=None,
        attn_logit_softcapping=None, final_logit_softcapping=None, vocab_size=262144, max_position_embeddings=32768),
        dict(windows=((512,) * 5 + (0,)) * 4 + (512,) * 2, rope_theta=1e6, local_rope_theta=1e4, final_softcap=None)),
    "Pythia 410M": (dict(
        model_type="gpt_neox", hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24,
        rotary_pct=0.25, rotary_emb_base=10000, use_parallel_residual=True, layer_norm_eps=1e-5, hidden_act="gelu",
        vocab_size=50304, tie_word_embeddings=False, max_position_embeddings=2048),
        dict(rotary_dim=16, head_dim=64, parallel_residual=True, activation="gelu", positions="rope")),
    "Baichuan 2 7B": (dict(
        model_type="baichuan", architectures=["BaichuanForCausalLM"], hidden_size=4096, intermediate_size=11008,
        num_attention_heads=32, num_hidden_layers=32, max_position_embeddings=4096, model_max_length=4096,
        rms_norm_eps=1e-6, vocab_size=125696, z_loss_weight=0, tie_word_embeddings=False, auto_map={}),
        dict(positions="rope", norm_head=True, max_positions=4096, num_kv_heads=32)),
    "Baichuan 2 13B": (dict(
        model_type="baichuan", hidden_size=5120, intermediate_size=13696, num_attention_heads=40, num_hidden_layers=40,
        model_max_length=4096, vocab_size=125696), dict(positions="alibi", norm_head=True, max_positions=4096)),
    "Baichuan 1 7B": (dict(
        model_type="baichuan", architectures=["BaiChuanForCausalLM"], hidden_size=4096, intermediate_size=11008,
        num_attention_heads=32, num_hidden_layers=32, max_position_embeddings=4096, vocab_size=64000),
        dict(positions="rope", norm_head=False)),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_config_files_mean_what_the_papers_say(name):
    raw, wanted = RELEASED[name]
    config = families.read_config(raw, "config.json")
    assert {key: getattr(config, key) for key in wanted} == wanted
    assert families.read_config(families.write_config(config), "config.json") == config


@pytest.mark.parametrize("name, change, words", [
    ("llama", {"num_experts": 8}, "num_experts: found 8"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout: found 0.1"),
    ("llama", {"use_fancy_attention": True}, "use_fancy_attention: found True.*not known"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.*dynamic.*length of its batch"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "rope_scaling.*beta_fast"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor and high_freq_factor"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5"),
    ("llama", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("llama", {"model_type": "mixtral"}, "model_type: found 'mixtral', allowed: 'llama', 'mistral'"),
    ("llama", {"architectures": ["LlamaForCausalLM", "Other"]}, "architectures"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types: found .*2 of"),
    ("qwen2", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 2}, "sliding_window: found None"),
    ("qwen2", {"use_mrope": True}, "use_mrope: found True"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation: found 'gelu'"),
    ("gemma2", {"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: found 50.0"),
    ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters.*full_attention"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"activation_function": "relu"}, "activation_function: found 'relu'.*gelu_new"),
    ("gpt2", {"n_head": 3}, "n_head: found 3"),
    ("gpt_neox", {"hidden_dropout": 0.1}, "hidden_dropout: found 0.1"),
    ("gpt_neox", {"rotary_pct": 0.4}, "rotary_dim: found 3"),
    ("baichuan", {"position_embedding": None}, "position_embedding: found None.*hidden_size is not one of 4096, 5120"),
    ("baichuan", {"norm_head": None}, "norm_head: found None.*vocab_size"),
    ("baichuan", {"num_key_value_heads": 2}, "num_key_value_heads: found 2"),
])
def test_settings_that_are_not_computed_are_refused_by_name(name, change, words):
    with pytest.raises(ConfigError, match=words):
        families.read_config(RAW[name] | change, "config.json")


def test_a_config_that_its_family_cannot_say_is_not_written():
    shape = dict(vocab_size=5, hidden_size=8, intermediate_size=4, num_layers=2, num_heads=2, num_kv_heads=2,
                 head_dim=4)
    with pytest.raises(ConfigError, match="windows: found .3, 3., allowed: .. with family 'llama'"):
        families.write_config(models.DecoderConfig(**shape, windows=(3, 3)))
    with pytest.raises(ConfigError, match="qk_norm: found True, allowed: False with family 'qwen2'"):
        families.write_config(models.DecoderConfig(**shape, family="qwen2", qk_norm=True,
                                                   attention_bias=("query", "key", "value")))
    with pytest.raises(ConfigError, match="family: found 'opt'|model_type: found 'opt'"):
        families.tensors(models.DecoderConfig(**shape, family="opt"))


@pytest.mark.parametrize("change, words", [
    ({"norm": "batch"}, "norm: found 'batch', allowed: rms"), ({"windows": (3,)}, "windows: found .3,."),
    ({"attention_bias": ("q",)}, "attention_bias"), ({"rotary_dim": 3}, "rotary_dim: found 3"),
    ({"positions": "alibi", "rotary_dim": 2}, "rotary_dim: found 2, allowed: None"),
    ({"local_rope_theta": 1e4}, "local_rope_theta"), ({"attention_softcap": 0.0}, "attention_softcap: found 0.0"),
    ({"norm_head": True}, "norm_head"), ({"qk_norm": True, "norm": "layer"}, "qk_norm"),
])
def test_impossible_configs_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        models.DecoderConfig(5, 8, 4, 2, 2, 2, 4, **change)


# --- tensors ---------------------------------------------------------------------------------------------------


@each
def test_tensors_fill_every_parameter_once_and_go_back(name):
    config, params = CONFIGS[name], jax.tree.map(np.asarray, params_of(name))
    slots = families.tensors(config)
    filled = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), params)
    times = jax.tree.map(lambda leaf: np.zeros(leaf.shape, int), params)
    for slot in slots.values():
        leaves = []
        for place in slot.places:
            leaf, target, count = params, filled, times
            for part in place.path:
                leaf, target, count = leaf[part], target[part], count[part]
            index = ... if place.layer is None else place.layer
            leaves.append((leaf[index], target, count, index, place))
        tensor = slot.from_params(*(entry[0] for entry in leaves))
        assert tensor.shape == slot.shape
        for _, target, count, index, place in leaves:
            target[index], count[index] = place.to_params(tensor), count[index] + 1
    jax.tree.map(np.testing.assert_array_equal, filled, params)
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(times))


def test_fused_tensors_are_laid_out_as_published():
    layout = lambda name, tensor: families.tensors(CONFIGS[name])[tensor]
    # Baichuan: [Q; K; V], three equal blocks of rows.
    slot = layout("baichuan", "model.layers.1.self_attn.W_pack.weight")
    packed = np.random.default_rng(0).normal(size=slot.shape)
    assert slot.shape == (48, 16)
    for place, block in zip(slot.places, np.split(packed, 3), strict=True):
        np.testing.assert_array_equal(place.to_params(packed), block.T)
    # GPT-2: columns Q, K, V of an [in, out] matrix. GPT-NeoX: rows of head 0 (Q, K, V), then of head 1.
    slot = layout("gpt2", "transformer.h.0.attn.c_attn.weight")
    packed = np.random.default_rng(0).normal(size=slot.shape)
    np.testing.assert_array_equal(slot.places[1].to_params(packed), packed[:, 16:32])
    slot = layout("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.bias")
    packed = np.arange(48.0)
    np.testing.assert_array_equal(slot.places[1].to_params(packed), [*range(8, 16), *range(32, 40)])


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gpt_neox", "baichuan alibi"])
def test_folders_round_trip(tmp_path, name):
    models.save(tmp_path / "model", CONFIGS[name], params_of(name), eos_token_id=2)
    config, params = models.load(tmp_path / "model")
    assert config == CONFIGS[name]
    jax.tree.map(np.testing.assert_array_equal, params, params_of(name))


# --- positions and attention -----------------------------------------------------------------------------------


def test_rotary_frequencies_are_the_formulas():
    plain = frequencies(100.0, 8)
    np.testing.assert_allclose(plain, [1, 100 ** -0.25, 100 ** -0.5, 100 ** -0.75])
    np.testing.assert_allclose(frequencies(100.0, 8, RopeScaling("linear", 4.0)), plain / 4)
    # llama3 with original length 40: turns 6.4, 2.0, 0.64, 0.2; fast above 4, slow below 1, a mix at 2.01.
    turns = plain * 40 / (2 * np.pi)
    share = (turns[1] - 1) / (4 - 1)
    np.testing.assert_allclose(frequencies(100.0, 8, RopeScaling("llama3", 8.0, 40)),
                               [plain[0], plain[1] * (share + (1 - share) / 8), plain[2] / 8, plain[3] / 8])
    # yarn: pair i makes `turns` turns; beta_fast 4 and beta_slow 0.5 lie at pairs 0.4 and 2.2, rounded to 0 and 3.
    ramp = np.array([0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(frequencies(100.0, 8, RopeScaling("yarn", 8.0, 40, beta_fast=4.0, beta_slow=0.5)),
                               plain * (1 - ramp) + plain / 8 * ramp)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attend_is_its_formula(softcap):
    draw = lambda seed, *shape: np.random.default_rng(seed).normal(size=shape)
    query, key, value, bias = draw(0, 2, 3, 4, 6), draw(1, 2, 5, 2, 6), draw(2, 2, 5, 2, 6), draw(3, 1, 4, 3, 5)
    mask = np.tril(np.ones((2, 3, 5), bool), 2)
    mask[1, 0] = False  # nothing to read
    scores = np.einsum("rtnh,rsnh->rnts", query, key.repeat(2, axis=2)) * 0.3
    scores = (scores if softcap is None else softcap * np.tanh(scores / softcap)) + bias
    weights = np.where(mask[:, None], np.exp(scores), 0)
    weights[1, :, 0] = 1
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("rnts,rsnh->rtnh", weights, value.repeat(2, axis=2))
    arrays = lambda dtype: [jnp.asarray(a, dtype) for a in (query, key, value, bias)]
    for names in ((None, "einsum") if softcap else (None, "xla", "einsum")):
        q, k, v, b = arrays(jnp.float32)
        out = attend(q, k, v, jnp.asarray(mask), scale=0.3, softcap=softcap, bias=b, implementation=names)
        np.testing.assert_allclose(out, expected, atol=2e-6)
    with jax.enable_x64(True):
        q, k, v, b = arrays(jnp.float64)
        out = attend(q, k, v, jnp.asarray(mask), scale=0.3, softcap=softcap, bias=b)
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, expected, atol=1e-12)
    for names in ("flash",) + (("xla",) if softcap else ()):
        with pytest.raises(ConfigError, match=f"implementation=.: found '{names}'"):
            attend(*arrays(jnp.float32)[:3], jnp.asarray(mask), scale=1.0, softcap=softcap, implementation=names)


def test_alibi_slopes_and_bias():
    np.testing.assert_allclose(alibi_slopes(8), [2.0 ** -k for k in range(1, 9)])
    forty = alibi_slopes(40)  # those of 32 heads, then the first eight odd ones of 64
    np.testing.assert_allclose(forty[:32], alibi_slopes(32))
    np.testing.assert_allclose(forty[32:], alibi_slopes(64)[0:16:2])
    distance = jnp.arange(4)[:, None] - jnp.arange(4)[None, :]
    bias = np.asarray(alibi_bias(2, distance[None], jnp.float32))[0]
    np.testing.assert_array_equal(np.diagonal(bias, axis1=1, axis2=2), np.zeros((2, 4)))
    np.testing.assert_allclose(bias[:, 3], -np.array([[2.0 ** -4], [2.0 ** -8]]) * np.array([3, 2, 1, 0]))
    # Under softmax a row may be shifted: the bias is that of the key's position alone.
    shifted = np.array([2.0 ** -4, 2.0 ** -8])[:, None] * np.arange(4)
    soft = lambda row: np.exp(row) / np.exp(row).sum(-1, keepdims=True)
    np.testing.assert_allclose(soft(bias[:, 3]), soft(shifted), rtol=1e-6)


def test_runs_compile_few_layers_and_keep_their_order():
    assert _runs((0,) * 9) == ((0, 1, 9),)
    assert _runs((0,) * 28 + (8,) * 4) == ((0, 1, 28), (28, 1, 4))
    assert _runs((8, 0) * 21) == ((0, 2, 21),)
    assert _runs(((5,) * 5 + (0,)) * 4 + (5,) * 2) == ((0, 6, 4), (24, 1, 2))
    for windows in itertools.product((0, 3), repeat=6):
        spread = [windows[start + number] for start, period, repeats in _runs(windows)
                  for _ in range(repeats) for number in range(period)]
        numbers = [start + number for start, period, repeats in _runs(windows) for number in range(period * repeats)]
        assert numbers == list(range(6)) and spread == list(windows)


def test_a_window_of_three_reads_the_token_itself_and_two_before():
    config = families.read_config(RAW["mistral"] | dict(num_hidden_layers=1), "config.json")
    assert config.windows == (3,) and CONFIGS["qwen2"].windows == (0, 3)  # Qwen2: from max_window_layers on
    position = jnp.arange(6, dtype=jnp.int32)[None]
    view = _views(config, position, attention_mask(position * 0 + 1, position * 0 + 1),
                  lambda: distance(position, position), jnp.float32)[3]
    assert [np.flatnonzero(row).tolist() for row in np.asarray(view.mask[0])] == [
        [0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]


def test_learned_positions_beyond_their_table_show():
    config = CONFIGS["gpt2"]
    inside, beyond = (jnp.full((1, 1), number, jnp.int32) for number in (63, 64))
    assert np.isfinite(_embed(config, params_of("gpt2"), inside * 0, inside)).all()
    assert np.isnan(_embed(config, params_of("gpt2"), beyond * 0, beyond)).all()


# --- layouts, decoding, adapters -------------------------------------------------------------------------------

PROMPT, FIRST, SECOND = [3, 9, 4, 4, 11, 6], [7, 8, 2], [5, 6]
forward = jax.jit(models.forward, static_argnums=0)
decode = jax.jit(models.decode_step, static_argnums=0)


def grids():
    """One grid [3, 12]: prompt and first completion; prompt and second, padded on the left; both in one row that
    shares the prompt. Returns (grid, where the hidden states of the completions stand in each)."""
    count, width = len(PROMPT), 12
    tokens, segment, prefix, position = (np.zeros((3, width), np.int32) for _ in range(4))
    for row, start, text in ((0, 0, PROMPT + FIRST), (1, 3, PROMPT + SECOND)):
        place = slice(start, start + len(text))
        tokens[row, place], segment[row, place], position[row, place] = text, 1, np.arange(len(text))
    text = PROMPT + FIRST + SECOND
    tokens[2, :len(text)], prefix[2, :len(text)] = text, 1
    segment[2, :len(text)] = [1] * count + [2] * len(FIRST) + [3] * len(SECOND)
    position[2, :len(text)] = [*range(count), *range(count, count + 3), *range(count, count + 2)]
    prefix[:2] = segment[:2]
    alone = [(0, slice(count, count + 3)), (1, slice(3 + count, 5 + count))]
    shared = [(2, slice(count, count + 3)), (2, slice(count + 3, count + 5))]
    return tuple(map(jnp.asarray, (tokens, segment, prefix, position))), alone, shared


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ("llama", "gemma2", "baichuan alibi") else
                                                pytest.mark.slow) for n in CONFIGS])
def test_padding_sharing_a_prompt_and_decoding_change_nothing(name):
    config = CONFIGS[name]
    with jax.enable_x64(True):
        params = wide(params_of(name))
        grid, alone, shared = grids()
        hidden = np.asarray(forward(config, params, *grid))
        assert hidden.dtype == np.float64 and np.isfinite(hidden).all()
        for one, other in zip(alone, shared, strict=True):
            np.testing.assert_allclose(hidden[one], hidden[other], atol=1e-10)
        # The left-padded row, decoded: a prefill with padding, then token by token.
        tokens, segment, _, position = grid
        row = slice(1, 2)
        valid = jnp.asarray((np.asarray(segment[row]) > 0) | (np.arange(12) >= 11)[None])
        out, cache = decode(config, params, tokens[row, :8], position[row, :8],
                            models.init_cache(config, 1, 12, jnp.float64), 0, valid)
        found = [out[:, 3:]]
        for index in range(8, 11):
            at = slice(index, index + 1)
            out, cache = decode(config, params, tokens[row, at], position[row, at], cache, index, valid)
            found.append(out)
        np.testing.assert_allclose(np.concatenate(found, axis=1), hidden[row, 3:11], atol=1e-10)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "baichuan alibi"])
def test_gradients_are_finite_beside_padding(name):
    config, (grid, *_) = CONFIGS[name], grids()

    def loss(params):
        stats = head_stats(models.forward(config, params, *grid)[:, None], models.head(config, params),
                           grid[0][:, None], want=("logp", "log_z"))
        return jnp.sum(jnp.where(grid[1][:, None] > 0, stats["logp"] + stats["log_z"], 0))

    grads = jax.jit(jax.grad(loss))(params_of(name))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert all(np.abs(leaf).max() > 0 for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]
               if "key_bias" not in str(path))  # a key's bias shifts all scores of a query alike


@pytest.mark.parametrize("name", ["gpt_neox", "gemma3_text"])
def test_adapters_on_every_matrix_equal_merged_weights(name):
    config, (grid, *_) = CONFIGS[name], grids()
    with jax.enable_x64(True):
        params = wide(params_of(name))
        rng = np.random.default_rng(4)
        adapters = {part: {leaf: {"a": jnp.asarray(rng.normal(size=(*w.shape[:2], 2))),
                                  "b": jnp.asarray(0.1 * rng.normal(size=(w.shape[0], 2, w.shape[2])))}
                           for leaf, w in params["layers"][part].items() if w.ndim == 3}
                    for part in ("attention", "mlp")}
        merged = params | {"layers": {
            key: value if key not in adapters else value | {
                leaf: value[leaf] + ab["a"] @ ab["b"] for leaf, ab in adapters[key].items()}
            for key, value in params["layers"].items()}}
        run = lambda params, adapters: np.asarray(forward(config, params, *grid, adapters=adapters))
        plain, expected = run(params, None), run(merged, None)
        assert np.abs(plain - expected).max() > 1e-2
        np.testing.assert_allclose(run(params, adapters), expected, atol=1e-10)
        zero = jax.tree_util.tree_map_with_path(lambda path, x: x * (path[-1].key == "a"), adapters)
        np.testing.assert_allclose(run(params, zero), plain, atol=1e-12)
        cache, valid = models.init_cache(config, 1, 9, jnp.float64), jnp.ones((1, 9), bool)
        found, _ = decode(config, params, grid[0][:1, :9], grid[3][:1, :9], cache, 0, valid, adapters=adapters)
        np.testing.assert_allclose(found, expected[:1, :9], atol=1e-10)
    for wrong, words in (({"attention": {"gate": {"a": 0, "b": 0}}}, "attention/gate: found no such matrix"),
                         ({"mlp_norm": {"a": 0, "b": 0}}, "mlp_norm"), ({"mlp": {"up": {"a": 0}}}, "mlp/up")):
        with pytest.raises(ConfigError, match=words):
            models.forward(config, params_of(name), *grid, adapters=wrong)


# --- Baichuan --------------------------------------------------------------------------------------------------


def baichuan(config, tensors, tokens):
    """Logits [T, V] of one text by the published architecture, from file tensors, numpy float64."""
    get = lambda name: np.asarray(tensors[name], np.float64)
    heads, count = config.num_heads, len(tokens)
    size = config.hidden_size // heads
    norm = lambda x, name: x / np.sqrt((x ** 2).mean(-1, keepdims=True) + config.rms_norm_eps) * get(name)
    silu = lambda x: x / (1 + np.exp(-x))

    def turn(x):  # x [T, heads, size]
        angle = np.arange(count)[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
        cos, sin = (np.concatenate([f(angle)] * 2, axis=-1)[:, None] for f in (np.cos, np.sin))
        return x * cos + np.concatenate([-x[..., size // 2:], x[..., :size // 2]], axis=-1) * sin

    x = get("model.embed_tokens.weight")[tokens]
    for number in range(config.num_layers):
        at = f"model.layers.{number}."
        packed = norm(x, at + "input_layernorm.weight") @ get(at + "self_attn.W_pack.weight").T
        query, key, value = (part.reshape(count, heads, size) for part in np.split(packed, 3, axis=-1))
        if config.positions == "rope":
            query, key = turn(query), turn(key)
        scores = np.einsum("ind,jnd->nij", query, key) / np.sqrt(size)
        if config.positions == "alibi":
            slopes = np.array([2.0 ** (-8 * k / heads) for k in range(1, heads + 1)])  # heads: a power of two
            scores += slopes[:, None, None] * (np.arange(count)[None] - np.arange(count)[:, None])
        scores = np.where(np.tril(np.ones((count, count), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("nij,jnd->ind", weights, value).reshape(count, -1) @ get(at + "self_attn.o_proj.weight").T
        inner = norm(x, at + "post_attention_layernorm.weight")
        gated = silu(inner @ get(at + "mlp.gate_proj.weight").T) * (inner @ get(at + "mlp.up_proj.weight").T)
        x = x + gated @ get(at + "mlp.down_proj.weight").T
    output = get("lm_head.weight")
    if config.norm_head:
        output = output / np.maximum(np.linalg.norm(output, axis=-1, keepdims=True), 1e-12)
    return norm(x, "model.norm.weight") @ output.T


def file_tensors(config, params):
    """name -> array, as saved."""
    out = {}
    for name, slot in families.tensors(config).items():
        arrays = []
        for place in slot.places:
            leaf = params
            for part in place.path:
                leaf = leaf[part]
            arrays.append(np.asarray(leaf if place.layer is None else leaf[place.layer]))
        out[name] = slot.from_params(*arrays)
    return out


@pytest.mark.parametrize("name", ["baichuan", "baichuan alibi"])
def test_baichuan_equals_its_independent_statement(name):
    config, text = CONFIGS[name], PROMPT + FIRST + SECOND
    tokens = jnp.asarray([text], jnp.int32)
    ones, position = jnp.ones_like(tokens), jnp.arange(len(text), dtype=jnp.int32)[None]
    with jax.enable_x64(True):
        params = wide(params_of(name))
        score = lambda logits, xp: xp.sum(xp.sin(logits))  # any smooth scalar
        ours = jax.jit(lambda p: models.logits(config, p, models.forward(config, p, tokens, ones, ones, position)))
        tensors = file_tensors(config, params)
        np.testing.assert_allclose(ours(params)[0], baichuan(config, tensors, text), atol=1e-10)
        # Gradients: the directional derivative along a random direction of every tensor, by central differences.
        grads = file_tensors(config, jax.grad(lambda p: score(ours(p), jnp))(params))
        rng = np.random.default_rng(0)
        for changed in tensors:
            direction, step = rng.normal(size=tensors[changed].shape), 1e-5
            ends = [score(baichuan(config, tensors | {changed: tensors[changed] + sign * step * direction}, text), np)
                    for sign in (1, -1)]
            wanted = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose((grads[changed] * direction).sum(), wanted, rtol=1e-6, atol=1e-6,
                                       err_msg=changed)
        # Rows of the output matrix may be scaled: the logits do not change.
        scales = jnp.asarray(np.random.default_rng(1).uniform(0.1, 9, (config.vocab_size, 1)))
        np.testing.assert_allclose(ours(params | {"head": params["head"] * scales}), ours(params), atol=1e-12)

    # Greedy generation from left-padded prompts, 32-bit, until the statement's two best logits come close.
    width, new, prompts = 9, 64, [PROMPT + FIRST, PROMPT[:4], PROMPT[2:3]]
    grid, mask = np.zeros((3, width), np.int32), np.zeros((3, width), bool)
    for row, prompt in enumerate(prompts):
        grid[row, width - len(prompt):], mask[row, width - len(prompt):] = prompt, True
    out = generate(config, params_of(name), jnp.asarray(grid), jnp.asarray(mask), jnp.arange(3, dtype=jnp.uint32),
                   jax.random.key(0), max_new_tokens=new, temperature=0.0)
    got = np.asarray(out.tokens)[:, 0]
    tensors, compared = file_tensors(config, params_of(name)), 0
    for row, prompt in enumerate(prompts):
        text = list(prompt)
        for token in got[row]:
            logits = baichuan(config, tensors, text)[-1]
            if np.diff(np.sort(logits)[-2:])[0] <= 1e-3:
                break
            assert token == logits.argmax()
            text.append(int(token))
            compared += 1
    assert compared > 3 * new // 2


def test_z_losses_are_squares_of_the_heads_statistics():
    config, params = CONFIGS["gemma2"], params_of("gemma2")
    hidden = jax.random.normal(jax.random.key(0), (1, 2, 3, config.hidden_size))
    raw = np.asarray(models.logits(config, params, hidden), np.float64)
    for budget in (1e9, 4 * 6 * 5):  # whole, and five columns of the vocabulary at a time
        stats = head_stats(hidden, models.head(config, params), jnp.zeros((1, 2, 3), jnp.int32),
                           want=("log_z", "max_logit"), byte_budget=int(budget))
        np.testing.assert_allclose(max_z(stats["max_logit"]), 2e-4 * raw.max(-1) ** 2, rtol=1e-5)
        log_z = np.log(np.exp(raw).sum(-1))
        np.testing.assert_allclose(z_loss(stats["log_z"], weight=0.5), 0.5 * log_z ** 2, rtol=1e-5)
    assert max_z(jnp.ones((2,), jnp.bfloat16)).dtype == jnp.float32


# --- transformers ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", parity.CASES)
def test_parity_with_transformers(tmp_path, case):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    result = parity.measure(case, tmp_path)
    assert result.good(), result


@pytest.mark.slow
@pytest.mark.parametrize("kind, numbers", [
    ("linear", {}), ("yarn", {}), ("yarn", {"truncate": False, "beta_fast": 20.0}),
    ("yarn", {"mscale": 0.7, "mscale_all_dim": 0.4}), ("yarn", {"attention_factor": 0.9}),
    ("llama3", {"low_freq_factor": 1.0, "high_freq_factor": 4.0})])
def test_scaled_frequencies_equal_transformers(kind, numbers):
    transformers = pytest.importorskip("transformers")
    init = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS[kind]
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 6.0, **numbers}
    if kind != "linear":
        rope["original_max_position_embeddings"] = 512
    theirs = transformers.LlamaConfig(hidden_size=64, num_attention_heads=1, max_position_embeddings=3072,
                                      rope_parameters=dict(rope))
    expected, factor = init(theirs, "cpu")
    raw = LLAMA | dict(hidden_size=64, head_dim=64, num_attention_heads=2, rope_parameters=rope)
    scaling = families.read_config(raw, "config.json").rope_scaling
    np.testing.assert_allclose(frequencies(1e4, 64, scaling), expected.numpy(), rtol=1e-5)
    np.testing.assert_allclose(scaling.attention_factor, factor, rtol=1e-6)
