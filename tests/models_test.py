"""The decoder against transformers and against itself in other layouts; scalar heads; Hugging Face folders."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignax import models
from alignax.types import ConfigError, DataError, Stream

CONFIG = models.DecoderConfig(vocab_size=29, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4,
                              num_kv_heads=2, head_dim=6, max_positions=64)
STORIES = pathlib.Path(os.environ.get("ALIGNAX_SHARED", pathlib.Path(__file__).parents[2] / "shared")
                       ) / "models" / "stories260K"


@pytest.fixture(autouse=True)
def strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module")
def params():
    return models.init_params(CONFIG, jax.random.key(1))


forward = jax.jit(models.forward, static_argnums=0, static_argnames="remat")


def plain(tokens):
    """Arguments of forward for full, unpadded rows."""
    ones = jnp.ones_like(tokens)
    return tokens, ones, ones, jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)


def draw(shape, seed=0, vocab=CONFIG.vocab_size):
    return jnp.asarray(np.random.default_rng(seed).integers(1, vocab, shape), jnp.int32)


# --- the decoder -----------------------------------------------------------------------------------------------


def test_init_fills_abstract_params_and_uses_the_config(params):
    abstract = models.abstract_params(CONFIG)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract) == jax.tree.map(lambda a: (a.shape, a.dtype), params)
    assert "head" not in abstract
    untied = models.abstract_params(models.DecoderConfig(7, 4, 4, 1, 1, 1, 4, tie_embeddings=False), jnp.bfloat16)
    assert untied["head"].shape == (7, 4) and untied["layers"]["mlp"]["up"].dtype == jnp.bfloat16
    query = params["layers"]["attention"]["query"]
    assert query.shape == (3, 16, 24)
    assert not np.allclose(query[0], query[1])  # a key of its own per layer


def test_remat_changes_neither_values_nor_gradients(params):
    args = plain(draw((2, 7)))

    @functools.partial(jax.jit, static_argnums=1)
    def loss(params, remat):
        return jax.value_and_grad(lambda p: jnp.sum(jnp.sin(models.forward(CONFIG, p, *args, remat=remat))))(params)

    base = loss(params, "none")
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(base[1]))
    for remat in ("full", "dots"):
        other = loss(params, remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), base, other)


def test_remat_saves_memory_of_residuals(params):
    args = plain(draw((2, 7)))

    def residuals(remat):
        out = jax.eval_shape(lambda p: jax.vjp(lambda q: models.forward(CONFIG, q, *args, remat=remat), p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(out))

    assert residuals("full") < residuals("dots") < residuals("none")


def test_decode_steps_equal_the_scanned_forward(params):
    tokens = draw((2, 8))
    expected = forward(CONFIG, params, *plain(tokens))
    cache, valid = models.init_cache(CONFIG, 2, 8), jnp.ones((2, 8), bool)
    assert len(cache) == CONFIG.num_layers and cache[0].key.shape == (2, 2, 8, 6)
    step = jax.jit(models.decode_step, static_argnums=0)
    position = plain(tokens)[3]
    out, cache = step(CONFIG, params, tokens[:, :5], position[:, :5], cache, 0, valid)
    found = [out]
    for index in range(5, 8):
        out, cache = step(CONFIG, params, tokens[:, index:index + 1], position[:, index:index + 1], cache, index, valid)
        found.append(out)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, atol=2e-6)


def test_one_prefill_serves_several_completions(params):
    prompt, tails = draw((2, 4)), draw((4, 2), seed=5)
    _, cache = models.decode_step(CONFIG, params, prompt, plain(prompt)[3], models.init_cache(CONFIG, 2, 4), 0,
                                  jnp.ones((2, 4), bool))
    cache = models.extend_cache(cache, repeats=2, length=6)
    out, _ = models.decode_step(CONFIG, params, tails, jnp.full((4, 2), 4, jnp.int32) + jnp.arange(2)[None], cache, 4,
                                jnp.ones((4, 6), bool))
    whole = forward(CONFIG, params, *plain(jnp.concatenate([jnp.repeat(prompt, 2, axis=0), tails], axis=1)))
    np.testing.assert_allclose(out, whole[:, 4:], atol=2e-6)


def test_padding_on_either_side_changes_nothing_and_gives_no_nan(params):
    tokens = draw((1, 5))
    base = forward(CONFIG, params, *plain(tokens))
    for left, right in ((0, 4), (3, 1)):
        pad = lambda a, fill, ends=(left, right): jnp.pad(a, ((0, 0), ends), constant_values=fill)
        for fill in (0, 17):
            t, s, p, q = plain(tokens)
            args = (pad(t, fill), pad(s, 0), pad(p, 0), pad(q, 0))
            out = forward(CONFIG, params, *args)
            np.testing.assert_allclose(out[:, left:left + 5], base, atol=2e-6)
            assert np.isfinite(out).all()
    grads = jax.grad(lambda p: jnp.sum(models.forward(CONFIG, p, *args)[:, 3:8] ** 3))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    # A row of nothing but padding, too.
    empty = jnp.zeros((1, 9), jnp.int32)
    grads = jax.grad(lambda p: jnp.sum(models.forward(CONFIG, p, empty, empty, empty, empty)))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


PROMPT, FIRST, SECOND = [3, 9, 4, 4], [7, 8, 2], [5, 6]


def streams(first=FIRST, second=SECOND):
    """The same two completions of one prompt as (padded stream, shared-prefix stream), numpy, L = 3."""
    n, slots = len(PROMPT), 3
    length = n + slots + 1
    lay = lambda fill: np.zeros((2, length), np.int32) + fill
    tokens, segment, position = lay(0), lay(0), lay(0)
    row, col, targets = (np.zeros((1, 2, slots), np.int32) for _ in range(3))
    mask = np.zeros((1, 2, slots), bool)
    for k, completion in enumerate((first, second)):
        text = PROMPT + completion
        tokens[k, :len(text)], segment[k, :len(text)], position[k, :len(text)] = text, 1, np.arange(len(text))
        filled = len(completion)
        row[0, k], col[0, k, :filled] = k, n - 1 + np.arange(filled)
        targets[0, k, :filled], mask[0, k, :filled] = completion, True
    padded = Stream(tokens, segment, segment, position, row, col, targets, mask, np.ones((1, 2), bool), 1)

    text = PROMPT + first + second + [0]
    segment = np.array([[1] * n + [2] * len(first) + [3] * len(second) + [0]], np.int32)
    prefix = np.where(segment > 0, 1, 0).astype(np.int32)
    position = np.array([[*range(n), *range(n, n + len(first)), *range(n, n + len(second)), 0]], np.int32)
    col = np.zeros((1, 2, slots), np.int32)
    start = n
    for k, completion in enumerate((first, second)):
        col[0, k, :len(completion)] = [n - 1, *range(start, start + len(completion) - 1)]
        start += len(completion)
    shared = Stream(np.array([text], np.int32), segment, prefix, position, np.zeros_like(row), col, targets, mask,
                    np.ones((1, 2), bool), 1)
    return padded, shared


def run(params, stream):
    return forward(CONFIG, params, *map(jnp.asarray, (stream.tokens, stream.segment, stream.prefix, stream.position)))


def test_shared_prefix_row_equals_two_padded_rows(params):
    padded, shared = streams()
    slots = [np.asarray(run(params, s))[np.asarray(s.row), np.asarray(s.col)][np.asarray(s.mask)]
             for s in (padded, shared)]
    np.testing.assert_allclose(slots[0], slots[1], atol=2e-6)


def test_attention_mask_is_the_rule():
    segment = np.array([[1, 1, 2, 3, 3, 4, 5, 0]], np.int32)
    prefix = np.array([[1, 1, 1, 1, 1, 4, 4, 0]], np.int32)
    reads = {0: [0], 1: [0, 1], 2: [0, 1, 2], 3: [0, 1, 3], 4: [0, 1, 3, 4], 5: [5], 6: [5, 6], 7: []}
    found = np.asarray(models.attention_mask(jnp.asarray(segment), jnp.asarray(prefix)))[0]
    assert {i: np.flatnonzero(row).tolist() for i, row in enumerate(found)} == reads


def test_unknown_remat_and_impossible_shapes_are_refused(params):
    with pytest.raises(ConfigError, match="'some'.*none, full, dots"):
        models.forward(CONFIG, params, *plain(draw((1, 2))), remat="some")
    good = dict(vocab_size=4, hidden_size=4, intermediate_size=4, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=2)
    for change, words in (({"num_kv_heads": 3}, "num_kv_heads: found 3.*divisor.*4"), ({"head_dim": 3}, "head_dim"),
                          ({"num_layers": 0}, "num_layers: found 0"), ({"vocab_size": 4.0}, "vocab_size: found 4.0"),
                          ({"rope_theta": 0.0}, "rope_theta"), ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
                          ({"tie_embeddings": 1}, "tie_embeddings")):
        with pytest.raises(ConfigError, match=words):
            models.DecoderConfig(**{**good, **change})
    with pytest.raises(ConfigError, match="decode_step"):
        models.decode_step(CONFIG, params, draw((1, 1)), jnp.zeros((1, 1), jnp.int32), models.init_cache(CONFIG, 1, 3),
                           0, jnp.ones((1, 4), bool))
    with pytest.raises(ConfigError, match="found 2, allowed: >= 3"):
        models.extend_cache(models.init_cache(CONFIG, 1, 3), length=2)


def test_bfloat16_parameters_give_float32_logits_near_the_full_ones(params):
    tokens = draw((2, 6))
    full = models.logits(CONFIG, params, forward(CONFIG, params, *plain(tokens)))
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    hidden = forward(CONFIG, half, *plain(tokens))
    out = models.logits(CONFIG, half, hidden)
    assert hidden.dtype == jnp.bfloat16 and out.dtype == jnp.float32
    np.testing.assert_allclose(out, full, atol=2e-2)


# --- scalar heads ----------------------------------------------------------------------------------------------


def test_scalar_head_init_and_value():
    params = models.init_scalar_head(jax.random.key(0), 4000)
    assert abs(float(params["weight"].std()) * 4001 ** 0.5 - 1) < 0.05
    assert not any(jax.tree.leaves(jax.tree.map(jnp.any, models.init_scalar_head(jax.random.key(0), 8, zero=True))))
    out = models.scalar_head({"weight": jnp.array([1.0, -2.0]), "bias": jnp.array(0.5)},
                             jnp.ones((3, 2, 2), jnp.bfloat16))
    assert out.dtype == jnp.float32 and out.shape == (3, 2)
    np.testing.assert_array_equal(out, np.full((3, 2), 1 - 2 + 0.5))


@pytest.mark.parametrize("first, second", [([7, 8, 2], [5]), ([7], [5]), ([7], [7]), ([5], [5, 5, 5]), ([5, 5], [5])])
def test_last_token_positions_in_both_layouts(params, first, second):
    padded, shared = streams(first, second)
    row, col = models.last_token_positions(padded)
    n = len(PROMPT)
    np.testing.assert_array_equal(row, [[0, 1]])
    np.testing.assert_array_equal(col, [[n + len(first) - 1, n + len(second) - 1]])
    row, col = models.last_token_positions(shared)
    ends = [n + len(first) - 1, n + len(first) + len(second) - 1]
    np.testing.assert_array_equal(row, [[0, 0]])
    if second != first[:1]:  # a one-token completion may be read where another begins with the same token
        np.testing.assert_array_equal(col, [ends])

    head = models.init_scalar_head(jax.random.key(3), CONFIG.hidden_size)
    expected = [models.scalar_head(head, forward(CONFIG, params, *plain(jnp.array([PROMPT + text], jnp.int32))))[0, -1]
                for text in (first, second)]
    for stream in (padded, shared):
        np.testing.assert_allclose(models.last_token_rewards(head, run(params, stream), stream)[0], expected, atol=1e-5)


def test_last_token_positions_keep_to_the_group_of_the_prompt():
    padded, shared = streams()
    other, other_shared = streams([9], [6, 6])
    for one, two in ((padded, other), (shared, other_shared)):
        width = max(one.tokens.shape[1], two.tokens.shape[1])
        wide = lambda a, width=width: np.pad(a, ((0, 0), (0, width - a.shape[1])))
        grids = ("tokens", "segment", "prefix", "position")
        both = Stream(*(np.concatenate([wide(getattr(s, f)) for s in (one, two)]) for f in grids),
                      *(np.concatenate([getattr(one, f), getattr(two, f)])
                        for f in ("row", "col", "targets", "mask", "valid")), 2)
        for got, *want in zip(jax.jit(models.last_token_positions)(both), models.last_token_positions(one),
                              models.last_token_positions(two), strict=True):
            np.testing.assert_array_equal(got, jnp.concatenate(want))
        # The hidden state is its own place: (row in the grid, column).
        rows, columns = both.tokens.shape
        place = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij"), -1).astype(jnp.float32)
        found = models.gather_last(place, both)
        np.testing.assert_array_equal(both.tokens[tuple(np.asarray(found, int).transpose(2, 0, 1))],
                                      [[FIRST[-1], SECOND[-1]], [9, 6]])


def test_last_token_positions_skip_other_prefixes():
    # Two prompts, then a one-token completion of each, both "5": only the prefix tells them apart.
    grid = lambda *a: np.array([a], np.int32)
    slot = lambda *a: np.array(a, np.int32).reshape(2, 1, 1)
    stream = Stream(grid(3, 4, 6, 5, 5), grid(1, 1, 2, 3, 4), grid(1, 1, 2, 2, 1), grid(0, 1, 0, 1, 2), slot(0, 0),
                    slot(1, 2), slot(5, 5), np.ones((2, 1, 1), bool), np.ones((2, 1), bool), 1)
    np.testing.assert_array_equal(models.last_token_positions(stream)[1], [[4], [3]])


def test_rewards_of_absent_completions_are_zero_and_of_missing_tokens_loud(params):
    padded, _ = streams()
    head = models.init_scalar_head(jax.random.key(3), CONFIG.hidden_size)
    ragged = dataclasses.replace(padded, valid=np.array([[True, False]]))
    hidden = run(params, padded)
    assert models.last_token_rewards(head, hidden, ragged)[0, 1] == 0
    grads = jax.grad(lambda h: models.last_token_rewards(h, hidden, ragged).sum())(head)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    cut = dataclasses.replace(padded, segment=np.where(np.arange(8)[None] < 6, padded.segment, 0).astype(np.int32))
    with pytest.raises(DataError, match=r"\(0, 0\) is not in its row of 8"):
        models.last_token_positions(cut)
    assert np.isnan(jax.jit(models.last_token_rewards)(head, hidden, cut)[0, 0])


# --- Hugging Face folders --------------------------------------------------------------------------------------


def torch_logits(model, tokens):
    import torch
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.float().numpy()


@pytest.mark.slow  # importing transformers takes seconds; its extra comes with the second tier
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers_both_ways(tmp_path, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32, tie_word_embeddings=tied, rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, initializer_range=0.3)).eval()
    for weight in model.parameters():  # norms start at 1, which would hide a swap
        torch.nn.init.normal_(weight, 0.5 if weight.ndim == 1 else 0.0, 0.3)
    model.save_pretrained(tmp_path / "theirs")
    tokens = draw((2, 9), vocab=31)
    config, params = models.load(tmp_path / "theirs")
    assert config == models.DecoderConfig(31, 16, 20, 2, 4, 2, 8, 500.0, 1e-3, tied, 32)
    ours = models.logits(config, params, forward(config, params, *plain(tokens)))
    expected = torch_logits(model, tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours, expected, atol=1e-4)

    fresh = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    models.save(tmp_path / "ours", config, fresh, bos_token_id=1, eos_token_id=(2, 3))
    back, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert back.config.tie_word_embeddings is tied and back.generation_config.eos_token_id == [2, 3]
    ours = models.logits(config, fresh, forward(config, fresh, *plain(tokens)))
    np.testing.assert_allclose(ours, torch_logits(back.eval(), tokens), atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params):
    place = tmp_path_factory.mktemp("hf") / "model"
    models.save(place, CONFIG, params, bos_token_id=1, eos_token_id=2)
    return place


def edited(folder, tmp_path, change=None, drop=(), tensors=None):
    """A copy of `folder` with config.json and the weights edited."""
    place = tmp_path / "copy"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    raw = json.loads((place / "config.json").read_text()) | (change or {})
    (place / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if key not in drop}))
    if tensors is not None:
        save_file(tensors(load_file(place / "model.safetensors")), place / "model.safetensors")
    return place


def same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_round_trip_old_spelling_shards_and_host_arrays(folder, tmp_path, params):
    config, back = models.load(folder)
    assert config == CONFIG and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(back))
    same(back, params)
    old = edited(folder, tmp_path, {"rope_scaling": None}, drop=("rope_parameters", "dtype"))
    assert models.read_config(old) == CONFIG
    assert models.read_config(edited(folder, tmp_path, drop=("rope_theta", "torch_dtype"))) == CONFIG

    whole = load_file(folder / "model.safetensors")
    place = edited(folder, tmp_path)
    (place / "model.safetensors").unlink()
    names = sorted(whole)
    parts = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for file, held in parts.items():
        save_file({name: whole[name] for name in held}, place / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = models.load(place, host=True)[1]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(loaded))
    same(loaded, params)
    (place / "b.safetensors").unlink()
    with pytest.raises(ConfigError, match="b.safetensors"):
        models.load(place)


def test_bfloat16_files_are_read_and_written(folder, tmp_path, params):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    models.save(tmp_path / "half", CONFIG, half)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert stored["model.norm.weight"].dtype == ml_dtypes.bfloat16
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    same(models.load(tmp_path / "half")[1], jax.tree.map(lambda a: a.astype(jnp.float32), half))
    back = models.load(folder, jnp.bfloat16)[1]
    assert back["embedding"].dtype == jnp.bfloat16
    same(back, half)


@pytest.mark.parametrize("change, words", [
    ({"attention_bias": True}, "missing: model.layers.0.self_attn.k_proj.bias"),
    ({"mlp_bias": True}, "missing: model.layers.0.mlp.down_proj.bias"),
    ({"mlp_bias": "yes"}, "mlp_bias: found 'yes'"),
    ({"hidden_act": "gelu"}, "hidden_act: found 'gelu', allowed: 'silu'"),
    ({"sliding_window": 128}, "sliding_window: found 128"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.*llama3"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*linear"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters.*yarn"),
    ({"rope_theta": 5e5}, "rope_theta: found .10000.0, 500000.0."),
    ({"architectures": ["GemmaForCausalLM"]}, "architectures.*Gemma.*LlamaForCausalLM"),
    ({"model_type": "qwen2"}, "architectures: found .'LlamaForCausalLM'.*Qwen2ForCausalLM"),
    ({"model_type": "mixtral"}, "model_type: found 'mixtral'"),
    ({"vocab_size": None}, "vocab_size: found None"),
    ({"num_key_value_heads": 3}, "num_kv_heads: found 3"),
    ({"intermediate_size": 25}, "found shape .24, 16., allowed: .25, 16."),
    ({"num_hidden_layers": 2}, "unexpected: model.layers.2.input_layernorm.weight"),
    ({"num_hidden_layers": 4}, "missing: model.layers.3.input_layernorm.weight"),
    ({"tie_word_embeddings": False}, "missing: lm_head.weight"),
])
def test_what_the_decoder_does_not_compute_is_refused_by_name(folder, tmp_path, change, words):
    with pytest.raises(ConfigError, match=words):
        models.load(edited(folder, tmp_path, change))


def test_spare_tensors(folder, tmp_path, params):
    name = "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(ConfigError, match=f"unexpected: {name}"):
        models.load(edited(folder, tmp_path, tensors=lambda t: t | {name: np.zeros(3, np.float32)}))
    derived = "model.layers.0.self_attn.rotary_emb.inv_freq"
    same(models.load(edited(folder, tmp_path, tensors=lambda t: t | {
        derived: np.zeros(3, np.float32), "lm_head.weight": t["model.embed_tokens.weight"]}))[1], params)
    with pytest.raises(ConfigError, match="lm_head.weight: found values that differ"):
        models.load(edited(folder, tmp_path,
                           tensors=lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ConfigError, match="model.norm.weight: found dtype int32"):
        models.load(edited(folder, tmp_path, tensors=lambda t: t | {"model.norm.weight": np.zeros(16, np.int32)}))


def test_absent_folders_and_bad_saves_are_refused(tmp_path, params):
    with pytest.raises(ConfigError, match="config.json: found no such file"):
        models.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="neither model.safetensors"):
        models.save(tmp_path / "x", CONFIG, params)
        (tmp_path / "x" / "model.safetensors").unlink()
        models.load(tmp_path / "x")
    with pytest.raises(ConfigError, match="eos_token_id=.: found 29, allowed: 0 .. 28"):
        models.save(tmp_path / "y", CONFIG, params, eos_token_id=(1, 29))
    with pytest.raises(ConfigError, match=r"\['head'\]"):
        models.save(tmp_path / "y", CONFIG, params | {"head": params["embedding"]})
    with pytest.raises(ConfigError, match=r"\['norm'\]: found shape \(3,\), allowed: \(16,\)"):
        models.save(tmp_path / "y", CONFIG, params | {"norm": jnp.ones(3)})
    with pytest.raises(ConfigError, match="bfloat16.*float32"):
        models.save(tmp_path / "y", CONFIG, params | {"norm": jnp.ones(16, jnp.bfloat16)})
    assert not (tmp_path / "y").exists()


def test_generation_ids_come_from_the_first_file_that_gives_them(tmp_path):
    def write(name, content):
        (tmp_path / name).write_text(json.dumps(content))

    with pytest.raises(ConfigError, match="found none of"):
        models.read_generation_ids(tmp_path)
    write("config.json", {"bos_token_id": 0, "eos_token_id": 7})
    assert models.read_generation_ids(tmp_path) == {"bos": 0, "eos": (7,), "pad": None}
    write("generation_config.json", {"eos_token_id": [2, 5]})
    assert models.read_generation_ids(tmp_path) == {"bos": 0, "eos": (2, 5), "pad": None}
    write("tokenizer_config.json", {"pad_token": {"content": "<pad>"}, "eos_token": "</s>"})
    with pytest.raises(ConfigError, match="pad_token: found '<pad>'"):
        models.read_generation_ids(tmp_path)
    write("tokenizer.json", {"model": {"vocab": {"</s>": 2}}, "added_tokens": [{"content": "<pad>", "id": 9}]})
    assert models.read_generation_ids(tmp_path) == {"bos": 0, "eos": (2, 5), "pad": 9}
    write("generation_config.json", {"eos_token_id": [2, -1]})
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id: found \[2, -1\]"):
        models.read_generation_ids(tmp_path)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"the pretrained model is absent: {STORIES}")
def test_a_pretrained_model_finds_its_own_language_likely():
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(STORIES / "tokenizer.json"))
    config, params = models.load(STORIES)
    assert models.read_generation_ids(STORIES) == {"bos": 1, "eos": (1, 2), "pad": 0}
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    mean = lambda logits, tokens: float(np.take_along_axis(np.asarray(jax.nn.log_softmax(logits))[:, :-1],
                                                           np.asarray(tokens)[:, 1:, None], axis=-1).mean())
    tokens = jnp.array([[1, *ids]], jnp.int32)
    logits = models.logits(config, params, forward(config, params, *plain(tokens)))
    # The opening of half of its stories: a fraction of a nat per piece. The same pieces backwards: word salad.
    assert -0.5 < mean(logits, tokens) < -0.05
    mixed = jnp.concatenate([tokens[:, :1], tokens[:, :0:-1]], axis=1)
    assert mean(models.logits(config, params, forward(config, params, *plain(mixed))), mixed) < -3


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason=f"the pretrained model is absent: {STORIES}")
def test_logits_of_a_pretrained_model_equal_transformers():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, params = models.load(STORIES)
    tokens = draw((2, 24), vocab=config.vocab_size)
    logits = models.logits(config, params, forward(config, params, *plain(tokens)))
    model = transformers.LlamaForCausalLM.from_pretrained(STORIES).eval()
    np.testing.assert_allclose(logits, torch_logits(model, tokens), atol=1e-4)
