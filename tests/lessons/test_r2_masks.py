"""R2: masks are explicit data, never inferred from a pad id; one audited policy for BOS and EOS, shared by all.

Each test replays a failure that users of other frameworks reported; the docstring names the thread.
"""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import context, data, models, sample, scoring, step
from alignax.data import Ledger, Message, Record, TextPolicy
from alignax.data.chat import ChatTemplate
from alignax.types import DataError

WORDS = "tom sue sat ran home far . hi yo".split()
WORD = data.word_tokenizer(WORDS)
POLICY = data.text_policy(WORD)  # pad 0, BOS 1, EOS 2
PAIR = Record("pair", "tom sat", (" home .", " far"))
CONFIG = models.DecoderConfig(vocab_size=16, hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2,
                              num_kv_heads=1, head_dim=4, max_positions=32)
SPEC = step.ModelSpec(CONFIG)
CHAT = ("{{ bos_token }}{% for m in messages %}{{ m.role[0] + ' ' + m.content + ' ' }}{% if m.role == 'assistant' %}"
        "{{ '<eos>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'a ' }}{% endif %}")
DIALOGUE = Record("chat", (Message("user", "tom sat"),), ((Message("assistant", "home ."),),
                                                          (Message("assistant", "far"),)))


@pytest.fixture(scope="module")
def params():
    return {"model": jax.tree.map(lambda a: 4 * a, models.init_params(CONFIG, jax.random.key(0)))}


def tokenized(record, policy=POLICY, tokenizer=WORD, ledger=None, **more):
    [found] = data.tokenize_records([record], tokenizer, policy, ledger=Ledger() if ledger is None else ledger, **more)
    return found


def template(text=CHAT, **specials):
    return ChatTemplate({"default": text}, specials={"bos_token": "<bos>", "eos_token": "<eos>"} | specials)


def chat_tokenizer():
    return data.word_tokenizer([*WORDS, "a", "u"])


def every_layout(records, pad_id=0):
    for layout in data.LAYOUT_NAMES:
        yield layout, data.fill(records, data.plan_shape(records, layout, 8), layout, pad_id=pad_id)


# --- BOS ------------------------------------------------------------------------------------------------------------


def test_bos_is_inserted_before_the_responses():
    """axolotl#1616, axolotl#1733; also Tunix, whose one `_tokenize` serves prompts and responses alike."""
    for record, own in ((PAIR, {}), (DIALOGUE, {"tokenizer": chat_tokenizer(), "template": template()})):
        found = tokenized(record, **own)
        assert found.prompt.tolist().count(1) == 1 and found.prompt[0] == 1
        assert all(1 not in completion for completion in found.completions)


def test_a_tokenizer_without_bos_breaks():
    """trl#1885: Qwen has none; tunix#927 asks that BOS and EOS be flags."""
    found = tokenized(PAIR, dataclasses.replace(POLICY, bos_id=None))
    assert found.prompt.tolist() == WORD.encode_prompt("tom sat")
    bare = tokenized(PAIR, TextPolicy(None, None))
    assert [c.tolist() for c in bare.completions] == [WORD.encode_prompt(" home ."), WORD.encode_prompt(" far")]


def test_bos_stands_twice():
    """NeMo-RL#855, alignment-handbook#127: the template writes BOS and the tokenizer adds another."""
    ledger = Ledger()
    found = tokenized(DIALOGUE, tokenizer=chat_tokenizer(), template=template(), ledger=ledger)
    assert found.prompt[:2].tolist() == [1, chat_tokenizer().token_id("u")]
    assert POLICY.prompt([1, 5]) == [1, 5]  # ids that open with it already
    assert not any("BOS" in reason for reason in ledger.noted)
    tokenized(DIALOGUE, tokenizer=chat_tokenizer(), template=template("{{ bos_token }}" + CHAT), ledger=ledger)
    assert ledger.noted["double BOS: the template opens with two"] == 1  # what the template itself writes is told


def test_a_fallback_template_drops_bos():
    """marin#7179."""
    ledger = Ledger()
    found = tokenized(DIALOGUE, tokenizer=chat_tokenizer(), template=template(CHAT.replace("{{ bos_token }}", "")),
                      ledger=ledger)
    assert found.prompt[0] != 1 and ledger.noted["no BOS: the template writes none, and none is added"] == 1
    specials = data.template_specials(WORD, bos_id=1, eos_id=2)
    builtin = {name: tokenized(DIALOGUE, template=data.load_template(name, specials=specials)).prompt[0]
               for name in ("plain", "hh")}
    assert builtin == {"plain": 1, "hh": 1}


def test_bos_of_id_zero_counts_as_no_bos():
    """Tunix, `dpo_trainer.py`: `bos_id() == 0` is read as "no BOS"."""
    found = tokenized(PAIR, TextPolicy(bos_id=0, eos_id=2, pad_id=3))
    assert found.prompt.tolist() == [0, *WORD.encode_prompt("tom sat")]
    batch = data.padded([found], K=2, T=8, L=4, pad_id=3)
    assert (batch.streams["pair"].segment[0] > 0).sum() == 3 + 3  # BOS and two words, two words and EOS


def test_bos_differs_between_training_and_sampling():
    """SimPO#21."""
    tokenizer = context.load_tokenizer("builtin:stories", "")
    ctx = types.SimpleNamespace(tokenizer=tokenizer, text=data.text_policy(tokenizer), seed=0)
    asked = dict(sample.load_prompts(ctx, "builtin:stories", split="train", n=3, max_prompt=0))
    texts = dict(data.prompt_texts("builtin:stories", split="train", seed=0, n=3))
    for id, ids in asked.items():
        trained = tokenized(Record(id, texts[id], (" tom was happy .",)), ctx.text, tokenizer)
        assert trained.prompt.tolist() == ids.tolist() and ids[0] == ctx.text.bos_id


# --- EOS and masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_id", [0, 2, 7], ids=["pad", "pad=eos", "pad=a word"])
def test_the_end_token_is_masked_out(pad_id):
    """trl#6357, alignment-handbook#127 (pad = EOS masks EOS), trl#1623, trl#3091, trl#2059 (EOS missing or masked, so
    that the model never learns to stop), torchtune#949 (in both completions of a pair)."""
    found = tokenized(PAIR, dataclasses.replace(POLICY, pad_id=pad_id))
    other = tokenized(Record("other", "sue", (" ran home far .", " hi")), POLICY)
    for layout, batch in every_layout([found, other], pad_id):
        stream = batch.streams["pair"]
        for k, completion in enumerate(found.completions):
            scored = stream.targets[0, k][stream.mask[0, k]]
            assert scored.tolist() == completion.tolist() and scored[-1] == 2, layout


def test_ids_equal_to_the_pad_id_are_not_trained_on():
    """Tunix: masks are `ids != pad_id`; a word that shares the pad's id falls out of the loss."""
    word = WORD.token_id("home")
    found = tokenized(PAIR, dataclasses.replace(POLICY, pad_id=word))
    for _, batch in every_layout([found], word):
        assert word in batch.streams["pair"].targets[0, 0][batch.streams["pair"].mask[0, 0]]
        assert int(batch.streams["pair"].mask.sum()) == sum(map(len, found.completions))


def test_the_pad_id_changes_a_log_prob(params):
    """trl#6357 and Tunix once more, in numbers: nothing that is computed depends on which id fills the rows."""
    found = tokenized(PAIR)
    values = [scoring.score(SPEC, params, [found], pad_id=pad_id) for pad_id in (0, 2, 7)]
    for name in values[0]:
        np.testing.assert_array_equal(values[0][name], values[1][name])
        np.testing.assert_array_equal(values[0][name], values[2][name])


def test_a_template_that_closes_no_turn_teaches_no_end():
    """trl#1623, trl#3091."""
    ledger = Ledger()
    open_ended = template(CHAT.replace("{{ '<eos>' }}", ""))
    found = tokenized(DIALOGUE, tokenizer=chat_tokenizer(), template=open_ended, ledger=ledger)
    assert all(c[-1] == 2 for c in found.completions) and all(found.completion_ended)
    assert ledger.noted["EOS appended: the template does not close the turn with an end token"] == 2


def test_the_mask_is_shifted_by_one(params):
    """verl#3287; gpt-neox#1285 in another place: the first completion token is scored, the last prompt token is not,
    and each one by the distribution after the token before it."""
    found = tokenized(PAIR)
    for layout, batch in every_layout([found]):
        stream = batch.streams["pair"]
        arrays = step.compute(SPEC, params, None, batch, ("token_logps",))
        for k, completion in enumerate(found.completions):
            ids = np.asarray([*found.prompt, *completion], np.int32)[None]
            ones, position = np.ones_like(ids), np.arange(ids.shape[1], dtype=np.int32)[None]
            hidden = models.forward(CONFIG, params["model"], ids, ones, ones, position)
            logps = jax.nn.log_softmax(models.logits(CONFIG, params["model"], hidden))[0]
            begin = len(found.prompt)
            expected = [float(logps[begin - 1 + i, token]) for i, token in enumerate(completion)]
            assert stream.mask[0, k].sum() == len(completion)
            np.testing.assert_allclose(arrays["token_logps"][0, k][stream.mask[0, k]], expected, atol=1e-4,
                                       err_msg=layout)


def test_padding_stands_between_prompt_and_response():
    """direct-preference-optimization#3."""
    rows = [tokenized(PAIR), tokenized(Record("long", "tom sat home far hi", (" yo", " hi hi hi")))]
    for layout, batch in every_layout(rows, pad_id=9):
        stream = batch.streams["pair"]
        for b, k in np.ndindex(2, 2):
            row = int(stream.row[b, k, 0]) + (stream.tokens.shape[0] // stream.groups) * (b * stream.groups // 2)
            last, position = int(stream.col[b, k, 0]), stream.position[row]
            length = len(rows[b].prompt)
            assert stream.tokens[row, last - length + 1:last + 1].tolist() == rows[b].prompt.tolist(), layout
            after = position[stream.col[b, k, 1:len(rows[b].completions[k])]]
            assert after.tolist() == list(range(length, length + len(after))), layout


@pytest.mark.parametrize("pad_id", [0, 2], ids=["pad", "pad=eos"])
def test_a_reward_is_read_at_the_wrong_last_token(params, pad_id):
    """transformers#35352 (pad = EOS), gpt-neox#1285 (off by one), trl#2778 (padding side), trl#5813 (the evaluation
    leaves out the EOS that training had)."""
    whole = params | {"reward_head": {"weight": jnp.linspace(-1, 1, 8), "bias": jnp.float32(0)}}
    rows = [tokenized(PAIR), tokenized(Record("long", "tom sat home", (" yo", " hi hi hi")))]
    for layout, batch in every_layout(rows, pad_id):
        rewards = step.compute(SPEC, whole, None, batch, ("rewards",))["rewards"]
        for b, k in np.ndindex(2, 2):
            ids = np.asarray([*rows[b].prompt, *rows[b].completions[k]], np.int32)[None]
            ones, position = np.ones_like(ids), np.arange(ids.shape[1], dtype=np.int32)[None]
            hidden = models.forward(CONFIG, whole["model"], ids, ones, ones, position)
            at_the_end = float(models.scalar_head(whole["reward_head"], hidden[0, -1]))
            assert ids[0, -1] == 2 and float(rewards[b, k]) == pytest.approx(at_the_end, abs=1e-4), layout
    evaluated = scoring.score(SPEC, whole, rows, pad_id=pad_id)["head_reward"]
    np.testing.assert_allclose(evaluated, rewards, atol=1e-4)


# --- templates and borders ------------------------------------------------------------------------------------------


def test_a_template_is_silently_not_applied():
    """trl#1640."""
    with pytest.raises(DataError, match="needs? a chat template"):
        tokenized(DIALOGUE)
    ledger = Ledger()
    tokenized(PAIR, template=template(), ledger=ledger)
    assert ledger.noted["text record: the chat template does not apply"] == 1


def test_a_template_drops_the_beginning_of_a_response():
    """trl#6433: the text of the prompt with its generation prompt has to be the beginning of the whole."""
    eager = CHAT.replace("{{ 'a ' }}", "{{ 'a home ' }}")  # the generation prompt runs into the answer
    with pytest.raises(DataError, match="writes the prompt differently"):
        tokenized(Record("x", DIALOGUE.prompt, DIALOGUE.completions[1:]), tokenizer=chat_tokenizer(),
                  template=template(eager))
    found = tokenized(DIALOGUE, tokenizer=chat_tokenizer(), template=template())
    tokenizer = chat_tokenizer()
    assert [[tokenizer.token(i) for i in c] for c in found.completions] == [["home", ".", "<eos>"], ["far", "<eos>"]]


def test_thoughts_disappear_unnoticed():
    """trl#6363: a template leaves out (or rewrites) the thoughts of a turn."""
    ledger = Ledger()
    turn = Message("assistant", "home .", extra={"reasoning_content": "sue ran far"})
    tokenized(Record("x", DIALOGUE.prompt, ((turn,),)), tokenizer=chat_tokenizer(), template=template(), ledger=ledger)
    assert ledger.noted["the template drops a turn's thoughts"] == 1


def merging():
    """A byte-level tokenizer that has the token `ab`, which straddles the border of "a" and "b"."""
    return data.train_tokenizer(["ab ab ab ab cb"], 262)


def test_the_border_depends_on_the_response():
    """trl#2054, trl#2209, unsloth-zoo#832: tokenised together, the prompt's last token may change with the response.
    TRL 1.16 leaves the diverging end of the prompt out, with one warning for the whole run."""
    tokenizer, ledger = merging(), Ledger()
    assert tokenizer.encode_prompt("ab")[0] not in tokenizer.encode_prompt("a")  # the token exists
    policy = TextPolicy(1, 2)
    found = tokenized(Record("x", "a", ("b", "cb")), policy, tokenizer, ledger)
    assert tokenizer.decode(found.prompt.tolist()) == "a"
    assert [tokenizer.decode(c.tolist()) for c in found.completions] == ["b", "cb"]
    assert ledger.noted["boundary_merge"] == 1  # each one is counted
    swapped = tokenized(Record("x", "a", ("cb", "b")), policy, tokenizer)
    assert swapped.prompt.tolist() == found.prompt.tolist()  # what is sampled from does not depend on the response


def test_sampled_ids_are_tokenised_again():
    """trl#5224, trl#5242, verl#6719: other ids are trained on than were sampled."""
    tokenizer = merging()
    spelled = [tokenizer.token_id("a"), tokenizer.token_id("b"), 2]
    assert tokenizer.encode_prompt(tokenizer.decode(spelled)) != spelled[:2]  # the tokenizer would spell it otherwise
    record = data.token_record("x", [1, tokenizer.token_id("c")], [spelled], eos_ids=(2,))
    assert record.completions[0].tolist() == spelled and record.completion_ended == (True,)
    stream = data.padded([record], K=1, T=8, L=4, pad_id=0).streams["pair"]
    assert stream.targets[0, 0][stream.mask[0, 0]].tolist() == spelled
