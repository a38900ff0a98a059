"""R3: a ledger of every example: kept, cut (how many tokens, which side) or dropped (why); no completion without a
scored token passes in silence.

Each test replays a failure that users of other frameworks reported; the docstring names the thread.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import data, losses, models, rollout
from alignax.data import Ledger, Message, Record
from alignax.data.chat import ChatTemplate
from alignax.ops.reductions import reduce_terms
from alignax.types import ConfigError, DataError

WORDS = [f"w{i}" for i in range(30)]
WORD = data.word_tokenizer(WORDS)
POLICY = data.text_policy(WORD)  # pad 0, BOS 1, EOS 2; word i has id i + 4


def text(start, count):
    return " ".join(WORDS[start:start + count])


def records():
    """Prompts of 1 + 4 tokens (BOS); completions of 3 and 2 words, of 2 and 9, of 1 and 1, each with EOS."""
    return [Record("even", text(0, 4), (text(10, 3), text(20, 2)), file="f", line=1),
            Record("long", text(4, 4), (text(10, 2), text(20, 9)), file="f", line=2),
            Record("short", text(8, 4), (text(10, 1), text(20, 1)), file="f", line=3)]


def tokenized(rows, **more):
    ledger = Ledger()
    return data.tokenize_records(rows, WORD, POLICY, ledger=ledger, **more), ledger


def test_cut_examples_lose_their_completion():
    """trl#6320, trl#6321: after the cut an example has no completion left, and is trained on all the same."""
    for truncation in ("left", "right", "drop"):
        for bound in ({"max_length": n} for n in range(2, 16)):
            out, ledger = tokenized(records(), truncation=truncation, **bound)
            assert all(len(c) for r in out for c in r.completions)
            assert ledger.total == 3 and ledger.kept == len(out)
    dialogue = Record("chat", (Message("user", "w0"),), ((Message("tool", "w1 w2 w3"), Message("assistant", "w4")),))
    chat = ChatTemplate({"default": "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"})
    out, ledger = tokenized([dialogue], truncation="right", max_completion=2, template=chat)
    assert out == [] and ledger.dropped == {"no scored tokens": 1}  # the cut leaves another's turn only


def test_the_truncation_mode_does_nothing():
    """trl#2538, trl#2551: `truncation_mode` was accepted and not used."""
    [left], [right] = (tokenized(records()[:1], truncation=side, max_prompt=3)[0] for side in ("left", "right"))
    ids = WORD.encode_prompt(text(0, 4))
    assert left.prompt.tolist() == [1, *ids[-2:]] and right.prompt.tolist() == [1, *ids[:2]]
    with pytest.raises(ConfigError, match="keep_end.*left.*right"):
        tokenized(records(), truncation="keep_end", max_prompt=3)


@pytest.mark.parametrize("bound, reason", [({"max_prompt": 4}, "max_prompt"), ({"max_completion": 6}, "max_completion"),
                                           ({"max_length": 9}, "max_length")])
def test_what_a_bound_bounds_is_unclear(bound, reason):
    """trl#1271: each bound acts alone, on the part that it names, special tokens counted, and the ledger names it."""
    out, ledger = tokenized(records(), truncation="drop", **bound)
    sizes = {"max_prompt": lambda r: len(r.prompt), "max_completion": lambda r: r.longest,
             "max_length": lambda r: len(r.prompt) + r.longest}
    assert all(sizes[reason](r) <= bound[reason] for r in out)
    whole, _ = tokenized(records())
    assert ledger.dropped == {reason: sum(sizes[reason](r) > bound[reason] for r in whole)}


def test_a_prompt_bound_does_not_hold_while_sampling():
    """trl#3601: sampling saw the whole prompt. What is sampled from are the ids that were cut, and ids that do not fit
    the model are refused, never cut."""
    [found], _ = tokenized([Record("p", text(0, 9))], truncation="left", max_prompt=4)
    assert found.prompt.tolist() == [1, *WORD.encode_prompt(text(6, 3))] and not found.completions
    config = models.DecoderConfig(vocab_size=34, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1,
                                  num_kv_heads=1, head_dim=8, max_positions=8)
    with pytest.raises(ConfigError, match="10 prompt columns.*max_positions = 8"):
        rollout.generate(config, models.abstract_params(config), np.ones((1, 10), np.int32), np.ones((1, 10), bool),
                         np.zeros(1, np.uint32), jax.random.key(0), max_new_tokens=2)


@pytest.mark.parametrize("place", [0, 1], ids=["chosen", "rejected"])
def test_the_bound_misses_one_of_the_two(place):
    """LlamaFactory#4617: the cutoff did not reach the rejected completion; open-instruct#1597: the length filter on it
    was dead code."""
    answers = [text(10, 2), text(20, 2)]
    answers[place] = text(10, 9)
    row = Record("x", text(0, 4), tuple(answers))
    [cut], ledger = tokenized([row], truncation="right", max_completion=4)
    assert len(cut.completions[place]) == 4 and not cut.completion_ended[place] and cut.completion_ended[1 - place]
    assert ledger.as_dict()["cut"] == [{"reason": "max_completion: completion", "side": "right", "count": 1,
                                        "tokens": 6}]
    assert tokenized([row], truncation="drop", max_completion=4)[1].dropped == {"max_completion": 1}
    with pytest.raises(DataError, match="10 tokens exceed max_completion = 4"):
        tokenized([row], max_completion=4)


def test_all_tokens_masked_gives_nan():
    """open-instruct#1685: a batch in which no token is scored; loss and gradient stay finite, and are 0."""
    rng = np.random.default_rng(0)
    logps = jnp.asarray(-rng.random((2, 2, 3)), jnp.float32)
    for name in ("sft", "dpo", "simpo", "ipo", "orpo"):
        loss = losses.get(name)

        def value(x, loss=loss):
            mask = jnp.zeros((2, 2, 3), bool)
            inputs = {"token_logps": jnp.where(mask, x, 0), "mask": mask, "logps": jnp.where(mask, x, 0).sum(-1),
                      "ref_logps": jnp.zeros((2, 2)), "lengths": jnp.zeros((2, 2))}
            return reduce_terms(loss(inputs))[0]

        found, gradient = jax.value_and_grad(value)(logps)
        assert np.isfinite(found) and (np.asarray(gradient) == 0).all(), name


def test_the_prompt_takes_the_whole_length():
    """SimPO#35: with max_prompt_length == max_length nothing is left for the completions; the loss is 0 or NaN."""
    for truncation in ("left", "right"):
        out, ledger = tokenized(records(), truncation=truncation, max_prompt=5, max_length=5)
        assert len(out) == 3 and all(min(map(len, r.completions)) >= 1 for r in out)
        assert all(len(r.prompt) + r.longest <= 5 for r in out)
        batch = data.padded(out, K=2, T=8, L=8, pad_id=0)
        assert (batch.streams["pair"].mask.sum(-1) >= 1).all()
    with pytest.raises(ConfigError, match="max_length is 1"):
        tokenized(records(), truncation="left", max_prompt=1, max_length=1)


def test_a_cut_completion_is_normalised_by_its_former_length():
    """trl#6439: lengths are those of the tokens that are scored, after the cut."""
    out, _ = tokenized(records(), truncation="right", max_completion=3)
    mask = data.padded(out, K=2, T=16, L=8, pad_id=0).streams["pair"].mask
    assert mask.sum(-1).tolist() == [[3, 3], [3, 3], [2, 2]]
    per_token = losses.get("simpo", beta=1.0, gamma=0.0)
    logps, lengths = jnp.asarray([[-3.0, -6.0]]), jnp.asarray(mask.sum(-1)[:1], jnp.float32)
    assert float(per_token({"logps": logps, "lengths": lengths})[0]) == pytest.approx(np.log1p(np.exp(-(-1 + 2))))


@pytest.mark.parametrize("truncation", ["drop", "left", "right"])
def test_nobody_knows_how_many_were_cut_or_dropped(truncation):
    """gemma's examples/dpo.py cuts and asks in a comment how many examples are lost: the ledger balances, token by
    token."""
    whole, _ = tokenized(records())
    out, ledger = tokenized(records(), truncation=truncation, max_prompt=4, max_completion=4, max_length=7)
    assert ledger.total == len(whole) == 3
    tokens = lambda rows: sum(len(r.prompt) + sum(map(len, r.completions)) for r in rows)
    kept = {r.id for r in out}
    assert tokens([r for r in whole if r.id in kept]) - tokens(out) == sum(ledger.cut_tokens.values())
    assert sum(ledger.dropped.values()) == len(whole) - len(out)
    if truncation == "drop":
        assert ledger.dropped == {"max_prompt": 3} and not ledger.cuts
    else:
        assert {side for reason, side in ledger.cuts if reason.endswith("prompt")} == {truncation}
    assert Ledger.from_dict(ledger.as_dict()).as_dict() == ledger.as_dict()
    shown = "".join(str(cell) for column in ledger.table().columns for cell in column.cells)
    assert all(str(n) in shown for n in ledger.cut_tokens.values())


def test_too_long_is_an_error_unless_a_rule_is_named():
    """The default of all of them: nothing is cut or dropped that nobody asked for; file and line are named."""
    with pytest.raises(DataError, match="f:2: 15 tokens exceed max_length = 9 .*drop"):
        tokenized(records(), max_length=9)
