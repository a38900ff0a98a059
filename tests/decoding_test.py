"""Every decoding rule against independent float64 code, alone, composed, in the sampler, and against transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from alignax import models, rollout
from alignax.data import tokens as tokens_lib
from alignax.rollout import decoding, sampler
from alignax.types import ConfigError

CONFIG = models.DecoderConfig(vocab_size=11, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
                              num_kv_heads=2, head_dim=4, tie_embeddings=False, max_positions=48)
PROMPTS = np.array([[0, 0, 5, 2], [1, 9, 4, 4]], np.int32)
MASK = np.array([[0, 0, 1, 1], [1, 1, 1, 1]], bool)
IDS = np.array([71, 5], np.uint32)
KEY = jax.random.key(7)


@pytest.fixture(autouse=True)
def strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module")
def params():
    params = models.init_params(CONFIG, jax.random.key(1))
    return params | {"embedding": params["embedding"] * 25, "head": params["head"] * 15}


# --- an independent statement of the rules, one row in float64 ------------------------------------------------------


def softmax64(x):
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max())
    return e / e.sum()


def keep_top_k(p, k):
    return set(sorted(range(len(p)), key=lambda i: (-p[i], i))[:k])


def keep_top_p(p, mass):
    kept, total = set(), 0.0
    for i in sorted(range(len(p)), key=lambda i: (-p[i], i)):
        kept.add(i)
        total += p[i]
        if total >= mass:
            break
    return kept


def keep_min_p(p, share):
    return {i for i in range(len(p)) if p[i] >= share * max(p)}


def keep_epsilon(p, epsilon):
    return {i for i in range(len(p)) if p[i] >= epsilon} | {int(np.argmax(p))}


def keep_typical(p, mass):
    entropy = -sum(x * np.log(x) for x in p if x > 0)
    far = [abs(-np.log(x) - entropy) if x > 0 else np.inf for x in p]
    kept, total = set(), 0.0
    for i in sorted(range(len(p)), key=lambda i: far[i]):
        kept.add(i)
        total += p[i]
        if total >= mass:
            break
    return kept


def distribution(logits, *, seen=(), counts=None, held=(), bias=None, repetition_penalty=1.0, presence_penalty=0.0,
                 frequency_penalty=0.0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, epsilon=0.0):
    """(probabilities [V] that are sampled, kept mass) by the documented order, in float64."""
    x = np.asarray(logits, np.float64) + (0 if bias is None else np.asarray(bias, np.float64))
    for i in set(seen):
        x[i] = x[i] / repetition_penalty if x[i] > 0 else x[i] * repetition_penalty
    for i, n in (counts or {}).items():
        x[i] -= presence_penalty + frequency_penalty * n
    x[list(held)] = -np.inf
    full = softmax64(x / temperature)
    p = full.copy()
    for rule, value, off in ((keep_top_k, top_k, 0), (keep_top_p, top_p, 1.0), (keep_min_p, min_p, 0.0),
                             (keep_typical, typical_p, 1.0), (keep_epsilon, epsilon, 0.0)):
        if value != off:
            kept = rule(p, value)
            p = np.array([v if i in kept else 0.0 for i, v in enumerate(p)])
            p /= p.sum()
    return p, full[p > 0].sum()


# --- single rules -----------------------------------------------------------------------------------------------


FILTERS = {
    "top_k": (rollout.top_k_filter, (1, 3, 10, 11, 40)), "top_p": (rollout.top_p_filter, (0.05, 0.4, 0.9, 1.0)),
    "min_p": (rollout.min_p_filter, (0.0, 0.05, 0.3, 1.0)), "epsilon": (rollout.epsilon_filter, (0.0, 0.02, 0.2, 0.9)),
    "typical_p": (rollout.typical_filter, (0.1, 0.5, 0.95, 1.0)),
}


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_keeps_what_the_independent_rule_keeps(name):
    rule, values = FILTERS[name]
    logits = np.asarray(jax.random.normal(jax.random.key(3), (40, 11)) * 2)
    traced = jax.jit(rule)
    for value in values:
        filtered, mass = rule(jnp.asarray(logits), value)
        for row in range(len(logits)):
            p, kept_mass = distribution(logits[row], **{name: value})
            np.testing.assert_array_equal(np.isfinite(filtered[row]), p > 0, err_msg=f"{name}={value} row {row}")
            np.testing.assert_allclose(mass[row], kept_mass, rtol=1e-5)
        kept = np.isfinite(filtered)
        np.testing.assert_array_equal(np.asarray(filtered)[kept], logits[kept])
        assert (np.asarray(mass)[kept.all(-1)] == 1).all()
        again = traced(jnp.asarray(logits), value)
        np.testing.assert_array_equal(again[0], filtered)
        np.testing.assert_allclose(again[1], mass, rtol=1e-6)


def test_ties():
    flat = jnp.zeros((2, 5))
    kept = lambda rule, value: np.flatnonzero(np.isfinite(rule(flat, value)[0][0])).tolist()
    assert kept(rollout.top_k_filter, 2) == [0, 1]  # exactly k, by token id
    assert kept(rollout.top_p_filter, 0.5) == [0, 1, 2]
    assert kept(rollout.min_p_filter, 1.0) == kept(rollout.typical_filter, 0.1) == [0, 1, 2, 3, 4]  # all or none
    assert kept(rollout.epsilon_filter, 0.5) == [0]  # one token always stays


def test_penalties_by_hand():
    logits = jnp.array([[2.0, -2.0, 0.0, 3.0]])
    seen = jnp.array([[True, True, True, False]])
    np.testing.assert_allclose(rollout.apply_repetition_penalty(logits, seen, 1.25),
                               [[2.0 / 1.25, -2.0 * 1.25, 0.0, 3.0]], rtol=1e-6)
    counts = jnp.array([[0, 1, 3, 0]])
    np.testing.assert_allclose(rollout.apply_count_penalties(logits, counts, presence=0.5, frequency=0.25),
                               [[2.0, -2.0 - 0.5 - 0.25, 0.0 - 0.5 - 3 * 0.25, 3.0]], rtol=1e-6)
    np.testing.assert_array_equal(rollout.hold_back(logits, (0, 3), True), [[-np.inf, -2.0, 0.0, -np.inf]])
    np.testing.assert_array_equal(rollout.hold_back(logits, (0, 3), jnp.asarray(False)), logits)


def test_token_bias():
    bias = rollout.token_bias(5, {1: 2.5, 4: -1.0}, banned=(0,))
    assert bias.tolist() == [-np.inf, 2.5, 0.0, 0.0, -1.0] and bias.dtype == np.float32
    assert rollout.token_bias(3, allowed=(1,)).tolist() == [-np.inf, 0.0, -np.inf]
    for words, arguments in (("ids in 0 .. 4", ({5: 1.0},)), ("finite", ({1: float("inf")},)), ("finite", ({1: "a"},))):
        with pytest.raises(ConfigError, match=words):
            rollout.token_bias(5, *arguments)
    for words, arguments in (("ids in 0 .. 4", dict(banned=[-1])), ("at least one", dict(allowed=())),
                             ("at least one", dict(banned=range(5)))):
        with pytest.raises(ConfigError, match=words):
            rollout.token_bias(5, **arguments)


@pytest.mark.parametrize("rule, bad", [
    (rollout.top_k_filter, (0, -1, 2.5, True)), (rollout.min_p_filter, (-0.1, 1.1)),
    (rollout.epsilon_filter, (-0.1, 1.0)), (rollout.typical_filter, (0.0, 1.5)),
])
def test_filters_refuse_impossible_numbers(rule, bad):
    for value in bad:
        with pytest.raises(ConfigError, match="allowed"):
            rule(jnp.zeros((1, 3)), value)


@pytest.mark.parametrize("truncating", [
    dict(top_k=8, top_p=0.93, min_p=0.02, typical_p=0.9, epsilon=0.04), dict(top_k=5, top_p=0.7),
    dict(top_p=0.8, min_p=0.2, typical_p=0.8), dict(top_k=6, typical_p=0.7, epsilon=0.15),
])
def test_all_rules_compose_in_the_documented_order(truncating):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(30, 11)) * 1.2
    counts = rng.integers(0, 3, size=(30, 11))
    prompt = rng.random((30, 11)) < 0.3
    bias = rollout.token_bias(11, {2: 1.5, 5: -0.7}, banned=(9,))
    settings = dict(temperature=0.8, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2) | truncating
    with jax.enable_x64(True):
        rules = decoding.Rules(bias=bias, min_new_tokens=3, **settings)
        shaped = decoding.shape(rules, jnp.asarray(logits), seen=jnp.asarray(prompt | (counts > 0)),
                                counts=jnp.asarray(counts), held=jnp.asarray(True), eos_ids=(3, 7))
        kept, mass = decoding.truncate(rules, decoding.apply_temperature(shaped, 0.8))
        assert kept.dtype == jnp.float64
        got = np.asarray(jax.nn.softmax(kept))
    sizes = set()
    for row in range(30):
        p, kept_mass = distribution(
            logits[row], seen=np.flatnonzero(prompt[row] | (counts[row] > 0)), held=(3, 7), bias=bias,
            counts={i: n for i, n in enumerate(counts[row]) if n}, **settings)
        np.testing.assert_allclose(got[row], p, rtol=1e-10, atol=1e-300)
        np.testing.assert_allclose(mass[row], kept_mass, rtol=1e-10)
        sizes.add(int((p > 0).sum()))
    assert len(sizes) > 2


# --- the sampler, rule by rule --------------------------------------------------------------------------------------


forward = jax.jit(models.forward, static_argnums=0)


def next_logits(params, text):
    """Logits [V] after a list of ids, by the training pass."""
    grid = jnp.asarray([text], jnp.int32)
    segment = jnp.ones_like(grid)
    hidden = forward(CONFIG, params, grid, segment, segment, jnp.arange(len(text))[None])
    return np.asarray(models.logits(CONFIG, params, hidden[0, -1]), np.float64)


def chi_square(observed, p):
    """The p-value of counts [V] under probabilities [V]; counts must be 0 where p is, and rare cells are merged."""
    assert observed[p == 0].sum() == 0
    expected = p * observed.sum()
    small = expected < 5
    merge = lambda a: np.append(a[~small], a[small].sum()) if expected[small].sum() > 0 else a[~small]
    observed, expected = merge(observed), merge(expected)
    if len(expected) < 2:
        return 1.0
    return scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


CASES = {
    "plain": {}, "temperature": dict(temperature=0.6), "top_k": dict(top_k=3), "top_p": dict(top_p=0.8),
    "min_p": dict(min_p=0.15), "typical_p": dict(typical_p=0.6), "epsilon": dict(epsilon=0.08),
    "repetition": dict(repetition_penalty=1.8), "presence": dict(presence_penalty=1.0),
    "frequency": dict(frequency_penalty=-0.8), "bias": dict(bias={1: 1.0, 4: -2.0}, banned=(5,)),
    "min_new_tokens": dict(min_new_tokens=1),
    "all": dict(temperature=1.3, top_k=8, top_p=0.95, min_p=0.03, typical_p=0.97, epsilon=0.01,
                repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, bias={1: 1.0}, min_new_tokens=1),
}


@pytest.mark.parametrize("name", CASES)
def test_sampled_frequencies_and_records_are_those_of_the_rule(params, name):
    """Two tokens a row: the first against its distribution, the second against that given the most common first."""
    settings, count, eos = dict(CASES[name]), 6000, (3, 7)
    bias = None
    if "bias" in settings:
        bias = rollout.token_bias(11, settings.pop("bias"), banned=settings.pop("banned", ()))
    held_for = settings.get("min_new_tokens", 0)
    out = jax.device_get(rollout.generate(CONFIG, params, PROMPTS, MASK, IDS, KEY, num_samples=count, max_new_tokens=2,
                                          eos_ids=eos, bias=bias, **settings))
    settings.pop("min_new_tokens", None)
    spread = []
    for row in range(2):
        prompt = PROMPTS[row][MASK[row]].tolist()
        chosen, text = np.ones(count, bool), prompt
        for slot in range(2):
            p, mass = distribution(next_logits(params, text), seen=text, bias=bias, held=eos if slot < held_for else (),
                                   counts={t: text[len(prompt):].count(t) for t in text[len(prompt):]}, **settings)
            tokens = out.tokens[row, chosen, slot]
            observed = np.bincount(tokens, minlength=11)
            assert observed.sum() > 300
            spread.append(int((p > 0).sum()))
            assert chi_square(observed, p) > 1e-3, (row, slot, observed, p * observed.sum())
            np.testing.assert_allclose(out.behaviour_logps[row, chosen, slot], np.log(p[tokens]), atol=1e-4)
            np.testing.assert_allclose(out.kept_mass[row, chosen, slot], mass, atol=1e-4)
            policy = np.log(softmax64(next_logits(params, text)))
            np.testing.assert_allclose(out.logps[row, chosen, slot], policy[tokens], atol=1e-4)
            going_on = np.where(np.isin(np.arange(11), eos), 0, observed)
            chosen = chosen & (out.tokens[row, :, slot] == going_on.argmax())
            text = [*text, int(going_on.argmax())]
    assert sum(n >= 2 for n in spread) >= 2, spread  # a point mass tests nothing


def test_changing_a_number_compiles_nothing(params):
    run = lambda **settings: rollout.generate(CONFIG, params, PROMPTS, MASK, IDS, KEY, max_new_tokens=2, **settings)
    run(temperature=0.5, top_k=3, top_p=0.9, repetition_penalty=1.2)
    before = sampler._generate._cache_size()
    run(temperature=0.9, top_k=5, top_p=0.5, repetition_penalty=1.5)
    run(temperature=1, top_k=np.int64(2), top_p=jnp.float32(0.7), repetition_penalty=2)
    assert sampler._generate._cache_size() == before
    run(temperature=0.5, top_k=3, top_p=0.9)
    assert sampler._generate._cache_size() == before + 1


def test_settings_may_be_traced(params):
    run = functools.partial(rollout.generate, CONFIG, params, PROMPTS, MASK, IDS, KEY, num_samples=4, max_new_tokens=3)
    numbers = jnp.array([0.5, 1.5])
    many = jax.vmap(lambda t: run(temperature=t, top_p=t / 2, top_k=jnp.int32(4)))(numbers)
    for i, number in enumerate((0.5, 1.5)):
        np.testing.assert_array_equal(many.tokens[i], run(temperature=number, top_p=number / 2, top_k=4).tokens)


def test_a_temperature_for_each_prompt(params):
    run = functools.partial(rollout.generate, CONFIG, params, PROMPTS, MASK, IDS, KEY, num_samples=3, max_new_tokens=5)
    cold, warm, both = run(temperature=0.0), run(temperature=1.2), run(temperature=np.array([1.2, 0.0]))
    np.testing.assert_array_equal(both.tokens[0], warm.tokens[0])
    np.testing.assert_array_equal(both.tokens[1], cold.tokens[1])
    np.testing.assert_allclose(both.behaviour_logps[0], warm.behaviour_logps[0], atol=1e-6)
    assert (both.behaviour_logps[1] == 0).all() and (both.kept_mass[1] == 1).all()
    np.testing.assert_allclose(both.logps[1], cold.logps[1], atol=1e-6)


def test_greedy_obeys_bias_penalties_and_held_ends(params):
    run = functools.partial(rollout.generate, CONFIG, params, PROMPTS, MASK, IDS, KEY, max_new_tokens=8, temperature=0)
    plain = np.asarray(run().tokens)
    banned = np.asarray(run(bias=rollout.token_bias(11, banned=plain[0, 0, :1].tolist())).tokens)
    assert plain[0, 0, 0] not in banned[0, 0]
    ends = tuple({int(plain[0, 0, 0]), int(plain[1, 0, 0])})
    out = jax.device_get(run(min_new_tokens=3, eos_ids=ends))
    assert out.mask.sum(-1).min() >= 4 and not np.isin(out.tokens[..., :3], ends).any()
    forced = np.asarray(run(bias=rollout.token_bias(11, allowed=(6,))).tokens)
    assert (forced == 6).all()
    fresh = np.asarray(run(presence_penalty=1e4).tokens)
    assert all(len(set(row.tolist())) == 8 for row in fresh[:, 0])


@pytest.mark.parametrize("change, words", [
    (dict(top_k=-1), "top_k.*found -1"), (dict(top_k=1.5), "top_k.*found 1.5"), (dict(min_p=1.5), "min_p.*1.5"),
    (dict(typical_p=0.0), "typical_p.*0.0"), (dict(epsilon=1.0), r"epsilon.*\[0.0, 1.0\)"),
    (dict(repetition_penalty=0.0), "repetition_penalty.*0.0"), (dict(presence_penalty=float("nan")), "presence.*nan"),
    (dict(frequency_penalty=float("inf")), "frequency.*inf"), (dict(min_new_tokens=9), "min_new_tokens.*0 .. 4"),
    (dict(bias=np.zeros(3)), r"bias.*\(3,\).*\[11\]"), (dict(bias=np.full(11, -np.inf)), "every token is banned"),
    (dict(bias=rollout.token_bias(11, allowed=(3,)), min_new_tokens=1, eos_ids=(3,)), "min_new_tokens holds back"),
    (dict(min_new_tokens=1, eos_ids=tuple(range(11))), "holds back"),
    (dict(temperature=np.ones(3)), r"temperature.*\(3,\).*2 prompts"),
    (dict(temperature=np.array([1.0, -1.0])), r"temperature\[1\].*-1.0"), (dict(temperature=True), "temperature.*True"),
    (dict(stops=np.zeros((2, 5), np.int32)), r"stops.*\(2, 5\).*11"),
])
def test_settings_out_of_range_are_refused(params, change, words):
    with pytest.raises(ConfigError, match=words):
        rollout.generate(CONFIG, params, PROMPTS, MASK, IDS, KEY, **{"max_new_tokens": 4, **change})


# --- stop strings ---------------------------------------------------------------------------------------------------


PIECES = [b"", b"a", b"b", b"ab", b"ba", b"abc", b" c", b"c", b"\xc3", b"\xa9", b"cab"]


@pytest.mark.parametrize("stops", [["abc"], ["ab", "cc"], ["aba", "\u00e9", "bc c"], ["abab", "b", "zzz"]])
def test_the_automaton_finds_a_stop_at_the_token_that_completes_it(stops):
    table = rollout.stop_table(stops, PIECES, 13)
    assert table.shape[1] == 13 and table.dtype == np.int32
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        text, state = b"", 0
        for token in rng.integers(0, 13, size=12):
            text += PIECES[token] if token < len(PIECES) else b""
            state = table[state, token]
            found = any(s.encode() in text for s in stops)
            assert (state == len(table) - 1) == found, (text, stops)
            hits += found
    assert 0 < hits < 400 * 12


def test_generation_ends_at_a_stop_string(params):
    run = functools.partial(rollout.generate, CONFIG, params, PROMPTS, MASK, IDS, KEY, num_samples=40, eos_ids=(0,),
                            max_new_tokens=12)
    free = jax.device_get(run())
    stops = ["abc", "\u00e9"]
    out = jax.device_get(run(stops=rollout.stop_table(stops, PIECES, 11)))
    reasons = set()
    for row in range(2):
        for k in range(40):
            tokens = out.tokens[row, k][out.mask[row, k]]
            np.testing.assert_array_equal(tokens, free.tokens[row, k][:len(tokens)])
            text = lambda ids: b"".join(PIECES[t] for t in ids)
            found = lambda ids, text=text: any(s.encode() in text(ids) for s in stops)
            assert not found(tokens[:-1])
            expected = rollout.ENDED if tokens[-1] == 0 else rollout.STOPPED if found(tokens) else rollout.CUT
            assert out.reason[row, k] == expected and (expected != rollout.CUT or len(tokens) == 12)
            reasons.add(expected)
    assert reasons == {rollout.CUT, rollout.ENDED, rollout.STOPPED}
    assert out.reason.dtype == np.int8
    np.testing.assert_array_equal(out.finished, out.reason > 0)


@pytest.mark.parametrize("kind", ["bytes", "words", "stories260K"])
def test_pieces_spell_what_decoding_gives(kind, request):
    if kind == "stories260K":
        tokenizer = tokens_lib.load_tokenizer(request.getfixturevalue("shared") / "models" / "stories260K")
    else:
        tokenizer = tokens_lib.train_tokenizer(["the cat sat on the mat .", "caf\u00e9 na\u00efve \u00fcber"],
                                               300 if kind == "bytes" else 12, kind=kind)
    pieces = rollout.token_pieces(tokenizer.core)
    assert len(pieces) == tokenizer.vocab_size
    prompt = tokenizer.encode_prompt("the cat")
    for text in ("sat on the mat .", "the \u00fcber cat", "caf\u00e9"):
        if kind == "words" and tokenizer.unk_id in tokenizer.encode_prompt(text):
            continue
        ids = tokenizer.encode_pair("the cat ", text, prompt)[1]
        assert b"".join(pieces[i] for i in ids).decode() == tokenizer.decode_completion(prompt, ids)


def test_stop_tables_are_refused():
    for stops in ([], [""], "abc", [3]):
        with pytest.raises(ConfigError, match="stop_table"):
            rollout.stop_table(stops, PIECES, 11)
    with pytest.raises(ConfigError, match="11 token pieces, allowed: at most vocab_size = 5"):
        rollout.stop_table(["a"], PIECES, 5)


def test_text_around_stop_strings():
    assert rollout.cut_at_stop("one\nUser: two\nUser:", ["\nUser:", "zz"]) == "one"
    assert rollout.cut_at_stop("one", ["two"]) == "one"
    assert rollout.held_back("one\nUs", ["\nUser:"]) == 3 and rollout.held_back("one", ["\nUser:"]) == 0
    assert rollout.held_back("caf\ufffd", []) == 1


# --- streams --------------------------------------------------------------------------------------------------------


def test_a_stream_grows_into_what_generate_returns(params):
    settings = dict(num_samples=3, max_new_tokens=10, temperature=1.5, top_k=7, eos_ids=(3,), repetition_penalty=1.1,
                    frequency_penalty=0.1, stops=rollout.stop_table(["abc"], PIECES, 11))
    whole = jax.device_get(rollout.generate(CONFIG, params, PROMPTS, MASK, IDS, KEY, **settings))
    lengths = []
    for part in rollout.stream(CONFIG, params, PROMPTS, MASK, IDS, KEY, chunk=4, **settings):
        part = jax.device_get(part)
        lengths.append(int(part.mask.sum(-1).max()))
        np.testing.assert_array_equal(part.tokens[part.mask], whole.tokens[part.mask])
    for name, a, b in zip(whole._fields, part, whole, strict=True):
        same = functools.partial(np.testing.assert_allclose, atol=1e-6) if a.dtype.kind == "f" else (
            np.testing.assert_array_equal)
        same(a, b, err_msg=name)
    assert lengths == [4, 8, 10]
    ended = list(rollout.stream(CONFIG, params, PROMPTS, MASK, IDS, KEY, chunk=2, max_new_tokens=9,
                                eos_ids=tuple(range(11))))
    assert len(ended) == 1
    with pytest.raises(ConfigError, match="chunk"):
        rollout.stream(CONFIG, params, PROMPTS, MASK, IDS, KEY, chunk=0)


# --- transformers ---------------------------------------------------------------------------------------------------


HF = {
    "repetition": ("RepetitionPenaltyLogitsProcessor", dict(penalty=1.4), dict(repetition_penalty=1.4)),
    "min_new_tokens": ("MinNewTokensLengthLogitsProcessor",
                       dict(prompt_length_to_skip=4, min_new_tokens=3, eos_token_id=[3, 7]), dict(min_new_tokens=3)),
    "suppress": ("SuppressTokensLogitsProcessor", dict(suppress_tokens=[2, 9]),
                 dict(bias=rollout.token_bias(32, banned=[2, 9]))),
    "temperature": ("TemperatureLogitsWarper", dict(temperature=0.7), dict(temperature=0.7)),
    "top_k": ("TopKLogitsWarper", dict(top_k=9), dict(top_k=9)),
    "top_p": ("TopPLogitsWarper", dict(top_p=0.8), dict(top_p=0.8)),
    "min_p": ("MinPLogitsWarper", dict(min_p=0.1), dict(min_p=0.1)),
    "typical_p": ("TypicalLogitsWarper", dict(mass=0.7), dict(typical_p=0.7)),
    "epsilon": ("EpsilonLogitsWarper", dict(epsilon=0.03), dict(epsilon=0.03)),
}


def by_our_rules(logits, text, settings):
    """Logits after our rules, 2 new tokens behind a prompt of 4."""
    rules = decoding.Rules(**settings)
    seen = np.zeros(logits.shape, bool)
    seen[np.arange(len(text))[:, None], text] = True
    shaped = decoding.shape(rules, jnp.asarray(logits), seen=jnp.asarray(seen), held=2 < settings.get(
        "min_new_tokens", 0), eos_ids=(3, 7))
    return decoding.truncate(rules, decoding.apply_temperature(shaped, settings.get("temperature", 1.0)))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", HF)
def test_each_rule_is_that_of_transformers(name):
    torch, process = pytest.importorskip("torch"), pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(4)
    logits, text = rng.normal(size=(64, 32)) * 2, rng.integers(0, 32, size=(64, 6))
    kind, theirs, ours = HF[name]
    theirs = theirs | ({"device": "cpu"} if kind.startswith(("MinNew", "Suppress")) else {})
    expected = getattr(process, kind)(**theirs)(torch.tensor(text), torch.tensor(logits)).numpy()
    with jax.enable_x64(True):
        np.testing.assert_allclose(by_our_rules(logits, text, ours), expected, rtol=1e-10)
    assert (expected != logits).any()


@pytest.mark.slow
def test_the_order_is_that_of_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    settings = dict(repetition_penalty=1.4, min_new_tokens=3, temperature=0.7, top_k=20, top_p=0.9, min_p=0.02,
                    typical_p=0.9, epsilon_cutoff=0.03)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    config = transformers.GenerationConfig(do_sample=True, eos_token_id=[3, 7], pad_token_id=0,
                                           sequence_bias=[[[5], 1.5], [[6], -2.0]], **settings)
    config._eos_token_tensor = torch.tensor([3, 7])
    chain = model._get_logits_processor(config, input_ids_seq_length=4, device="cpu")
    assert len(chain) == 9
    rng = np.random.default_rng(5)
    logits, text = rng.normal(size=(64, 32)) * 2, rng.integers(0, 32, size=(64, 6))
    expected = chain(torch.tensor(text), torch.tensor(logits)).numpy()
    ours = settings | {"bias": rollout.token_bias(32, {5: 1.5, 6: -2.0}), "epsilon": settings["epsilon_cutoff"]}
    del ours["epsilon_cutoff"]
    with jax.enable_x64(True):
        np.testing.assert_allclose(by_our_rules(logits, text, ours), expected, rtol=1e-6)
    assert np.isfinite(expected).sum(-1).min() < np.isfinite(expected).sum(-1).max()


@pytest.mark.slow
def test_greedy_decoding_with_penalty_and_held_ends_is_that_of_transformers(shared):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = shared / "models" / "stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = tokens_lib.load_tokenizer(folder)
    prompts = [[1, *tokenizer.encode_prompt(text)] for text in ("Once upon a time", "Lily saw a big red ball and")]
    width, new = max(map(len, prompts)), 48
    grid = np.array([[0] * (width - len(p)) + p for p in prompts], np.int32)
    mask = np.array([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    expected = model.generate(torch.tensor(grid).long(), attention_mask=torch.tensor(mask).long(), do_sample=False,
                              max_new_tokens=new, min_new_tokens=new, repetition_penalty=1.15, pad_token_id=0,
                              eos_token_id=2).numpy()[:, width:]
    config, params = models.load(folder)
    with jax.numpy_rank_promotion("warn"):
        out = rollout.generate(config, params, grid, mask, np.arange(2, dtype=np.uint32), KEY, temperature=0,
                               max_new_tokens=new, min_new_tokens=new, repetition_penalty=1.15, eos_ids=(2,))
    np.testing.assert_array_equal(out.tokens[:, 0], expected)
