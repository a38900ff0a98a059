"""Scoring given completions, and `alignax evaluate` on files of every kind."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import checkpoint, cli, configs, context, data, models, scoring, step
from alignax.diagnostics.compare import wilson
from alignax.types import ConfigError

CONFIG = models.DecoderConfig(vocab_size=23, hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2,
                              num_kv_heads=1, head_dim=4, max_positions=64)
SPEC = step.ModelSpec(CONFIG)


def record(id, prompt, *completions, **more):
    return data.token_record(id, prompt, completions, eos_ids=(2,), **more)


# The longest stands first: records are scored in another order than they come in.
RECORDS = [record("c", [1, *range(3, 20)], [5, 6], [6, 5, 2]), record("b", [1, 5], [7, 2], [9, 10, 11, 2], [4]),
           record("a", [1, 5, 6], [7, 8, 2], [9, 2]), record("d", [1], [12, 2])]


@pytest.fixture(scope="module")
def params():
    return {"model": jax.tree.map(lambda a: 4 * a, models.init_params(CONFIG, jax.random.key(0)))}


@pytest.fixture(scope="module")
def other():
    return {"model": jax.tree.map(lambda a: 4 * a, models.init_params(CONFIG, jax.random.key(1)))}


def distributions(params, prompt, completion):
    """float64 [L, V]: the next-token log-probs at every completion token, from one unpadded row and plain numpy."""
    ids = np.asarray([*prompt, *completion], np.int32)[None]
    ones = np.ones_like(ids)
    hidden = models.forward(CONFIG, params["model"], ids, ones, ones, np.arange(ids.shape[1], dtype=np.int32)[None])
    logits = np.asarray(models.logits(CONFIG, params["model"], hidden), np.float64)[0, len(prompt) - 1:-1]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_sums_are_those_of_the_plain_formulas(params, other):
    """Ragged prompts, completions and numbers of completions; batches of one shape and filled-up batches."""
    seen = []
    values = scoring.score(SPEC, params, RECORDS, pad_id=0, reference=other, batch_size=2, advance=seen.append)
    assert sum(seen) == len(RECORDS)
    for n, r in enumerate(RECORDS):
        for k in range(3):
            if k >= len(r.completions):
                assert all(np.isnan(array[n, k]) for array in values.values())
                continue
            p, q = (distributions(tree, r.prompt, r.completions[k]) for tree in (params, other))
            at = (np.arange(len(r.completions[k])), r.completions[k])
            expected = {"logp": p[at].sum(), "ref_logp": q[at].sum(), "tokens": len(r.completions[k]),
                        "entropy": -(np.exp(p) * p).sum(), "kl_policy_ref": (np.exp(p) * (p - q)).sum(),
                        "kl_ref_policy": (np.exp(q) * (q - p)).sum()}
            assert values.keys() == expected.keys()
            for name, number in expected.items():
                assert values[name][n, k] == pytest.approx(number, abs=1e-4), (name, n, k)
    assert np.nanmax(np.abs(values["kl_policy_ref"] - values["kl_ref_policy"])) > 1e-2  # the two directions differ


def test_the_policy_as_its_own_reference_is_exactly_zero(params):
    values = scoring.score(SPEC, params, RECORDS[:2], pad_id=0, reference=params)
    assert np.nanmax(np.abs(values["logp"] - values["ref_logp"])) == 0 == np.nanmax(np.abs(values["kl_policy_ref"]))


def test_a_reward_head_is_read_at_the_last_token(params):
    head = {"weight": jnp.arange(8.0), "bias": jnp.float32(1)}
    values = scoring.score(SPEC, params | {"reward_head": head}, RECORDS[2:3], pad_id=0)
    ids = np.asarray([1, 5, 6, 7, 8, 2], np.int32)[None]
    hidden = models.forward(CONFIG, params["model"], ids, np.ones_like(ids), np.ones_like(ids),
                            np.arange(6, dtype=np.int32)[None])
    assert values["head_reward"][0, 0] == pytest.approx(float(hidden[0, -1] @ head["weight"] + 1), abs=1e-3)


def test_what_cannot_be_scored_is_refused(params):
    with pytest.raises(ConfigError, match="without completions"):
        scoring.score(SPEC, params, [record("p", [1, 2])], pad_id=0)
    broken = {"model": params["model"] | {"embedding": params["model"]["embedding"] * np.nan}}
    with pytest.raises(FloatingPointError, match="<sampled>:9: completion 0: .* nan"):
        scoring.score(SPEC, broken, [record("p", [1, 3], [4], line=9)], pad_id=0)


def test_what_is_preferred_follows_scores_then_labels_then_order():
    three = ([4], [5], [6])
    assert scoring.preferred(record("a", [1], *three)) == [(0, 1), (0, 2), (1, 2)]
    assert scoring.preferred(record("a", [1], *three, scores=[3, 1, 1])) == [(0, 1), (0, 2)]
    assert scoring.preferred(record("a", [1], *three, labels=[0, 1, 0])) == [(1, 0), (1, 2)]
    assert scoring.preferred(record("a", [1], [4], labels=[1])) == []
    sides = [scoring.side(r, k) for r in (record("a", [1], *three), record("a", [1], [4], [5]), record("a", [1], [4]))
             for k in range(len(r.completions))]
    assert sides == ["best", "others", "others", "chosen", "rejected", "completion"]


def test_the_pair_of_a_record_has_the_better_first_and_keeps_what_is_said_of_both():
    kept = lambda **told: (found := scoring.as_pair(record("a", [1], [4], [5, 2], [6, 6], **told))) and (
        [c.tolist() for c in found.completions], found.completion_ended, found.scores, found.labels)
    assert kept() == ([[4], [5, 2]], (False, True), None, None)
    assert kept(scores=[1, 3, 2], labels=[1, 0, 1]) == ([[5, 2], [6, 6]], (True, False), (3.0, 2.0), (0.0, 1.0))
    assert kept(labels=[0, 0, 1]) == ([[6, 6], [4]], (False, False), None, (1.0, 0.0))
    assert kept(scores=[1, 1, 1]) is None and scoring.as_pair(record("a", [1], [4])) is None
    rich = dataclasses.replace(record("a", [1], [4], [5, 2], labels=[0, 1]),
                               scored=(np.ones(1, bool), np.zeros(2, bool)),
                               columns={"steps": (np.zeros(1), np.ones(2))})
    turned = scoring.as_pair(rich)
    assert [len(a) for a in (*turned.scored, *turned.columns["steps"])] == [2, 1, 2, 1]


def test_accuracy_counts_ties_half_and_a_list_once():
    """Records: a win; a tie; a list with one win in three, which counts for one record."""
    values = np.asarray([[2.0, 1.0, np.nan], [1.0, 1.0, np.nan], [1.0, 3.0, 2.0], [5.0, np.nan, np.nan]])
    pairs = [[(0, 1)], [(0, 1)], [(0, 1), (0, 2), (1, 2)], []]
    found = scoring.accuracy(values, pairs)
    rate = (1 + 1 / 2 + 1 / 3) / 3
    margins = [1.0, 0.0, (-2 - 1 + 1) / 3]
    assert found["accuracy"] == pytest.approx(rate) and (found["low"], found["high"]) == pytest.approx(wilson(rate, 3))
    assert (found["records"], found["pairs"], found["ties"]) == (3, 5, 1)
    assert found["margin"] == pytest.approx(sum(margins) / 3)
    assert found["margin_se"] == pytest.approx(np.std(margins, ddof=1) / math.sqrt(3))
    assert scoring.accuracy(values[3:], [[]]) is None


def test_label_auc_is_the_share_of_ordered_pairs():
    labels, numbers = [1, 0, 1, 0, 0], [3.0, 1.0, 2.0, 2.0, 4.0]
    rows = [record(str(i), [1], [4], labels=[label]) for i, label in enumerate(labels)]
    goods, bads = ([v for v, label in zip(numbers, labels, strict=True) if label == kind] for kind in (1, 0))
    share = np.mean([(g > b) + 0.5 * (g == b) for g in goods for b in bads])
    assert scoring.label_auc(np.asarray(numbers)[:, None], rows) == pytest.approx(share)
    assert scoring.label_auc(np.asarray(numbers)[:1, None], rows[:1]) is None


def test_sides_weigh_tokens_not_sequences():
    rows = [record("a", [1], [4, 2], [5]), record("b", [1], [4, 5, 6, 7], [5, 2])]
    values = {"logp": np.asarray([[-2.0, -1], [-10, -5]]), "entropy": np.asarray([[1.0, 1], [2, 3]]),
              "tokens": np.asarray([[2.0, 1], [4, 2]])}
    chosen = scoring.by_side(rows, values)["chosen"]
    assert chosen["logp"] == -6 and chosen["logp_per_token"] == -12 / 6 and chosen["entropy_per_token"] == 3 / 6
    assert chosen["perplexity"] == pytest.approx(math.exp(12 / 6)) and chosen["ended"] == 1 / 2
    assert (chosen["length_mean"], chosen["length_max"], chosen["tokens"]) == (3.0, 4, 6)
    assert scoring.measures(values)["logp_per_token"][1].tolist() == [-10 / 4, -5 / 2]


def test_wins_compare_every_sample_with_every_other():
    ours, theirs = np.asarray([[1.0, 3.0], [0.0, 0.0]]), np.asarray([[2.0], [0.0]])
    found = scoring.wins(ours, theirs)
    assert found["win_rate"] == (1 / 2 + 1 / 2) / 2 and found["prompts"] == 2
    assert scoring.wins(ours[:1], theirs[1:])["win_rate"] == 1


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with a finished reward stage and a finished policy stage, without the training."""
    folder = tmp_path_factory.mktemp("run")
    config = configs.embedded_run("bt_rm", tiny=True)
    config.stages = ("sft", "method")
    stored = json.loads(json.dumps(config.to_dict(), default=list))
    checkpoint.write_json(folder / "config.json", stored)
    tokenizer = context.load_tokenizer(stored["tokenizer"], "")
    spec, initial = context.load_model(stored["model"], vocab_size=tokenizer.vocab_size, seed=0)
    trained = jax.tree.map(lambda a: a * 3, initial)
    head = {"reward_head": models.init_scalar_head(jax.random.key(1), spec.config.hidden_size)}
    for stage, params in (("sft", trained), ("method", trained | head)):
        context.save_stage_params(folder / "stages" / stage, params, base="model", adapters=None)
    return folder, spec, initial, trained | head, tokenizer


LINES = [{"prompt": "tom was at the park .", "chosen": "he smiled .", "rejected": "he cried and cried .", "id": "pair"},
         {"prompt": "sue saw a dog .", "completions": ["she ran .", "she smiled .", "the dog was happy ."],
          "scores": [1, 3, 2], "id": "list"},
         {"prompt": "sue saw a cat .", "completion": "she laughed .", "label": 1, "id": "good"},
         {"prompt": "sue saw a cat .", "completion": "she cried .", "label": 0, "id": "bad"},
         {"prompt": "tom had a ball .", "id": "prompt"}, {"text": "tom was happy .", "id": "text"}]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.fixture
def evaluate(capsys):
    """evaluate(*arguments, code=0) runs the command; returns what it wrote to standard output and error."""

    def call(*arguments, code=0):
        assert cli.main(["evaluate", *map(str, arguments)]) == code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.out if not code else captured.err

    return call


def test_every_kind_of_record_is_scored(evaluate, run, lines, tmp_path):
    folder, spec, initial, trained, tokenizer = run
    out = tmp_path / "rows.jsonl"
    found = json.loads(evaluate(lines, "--run", folder, "--reference-stage", "model", "--reward", "lexicon", "--json",
                                "--out", out))
    rows = {(r["id"], r["completion"]): r for r in map(json.loads, out.read_text().splitlines())}
    assert len(rows) == 2 + 3 + 1 + 1 + 1 and rows["list", 2]["place"] == f"{lines}:2"
    assert {r["side"] for r in rows.values()} == {"chosen", "rejected", "best", "others", "desirable", "undesirable",
                                                  "completion"}
    policy = data.text_policy(tokenizer)
    prompt, ids, _ = tokenizer.encode_pair("sue saw a dog .", "the dog was happy .")
    own = data.token_record("x", policy.prompt(prompt), [policy.completion(ids)], eos_ids=policy.eos_ids)
    direct = scoring.score(spec, trained, [own], pad_id=0, reference=initial)
    for name in ("logp", "ref_logp", "entropy", "kl_policy_ref", "kl_ref_policy", "tokens", "head_reward"):
        assert rows["list", 1][name] == pytest.approx(direct[name][0, 0], abs=1e-3), name
    assert [rows["list", k]["reward"] for k in range(3)] == [1, 1, 0]  # best first: smiled, happy, ran
    gap = lambda name: rows["pair", 0][name] - rows["pair", 1][name]
    of_list = lambda name: [rows["list", i][name] - rows["list", j][name] for i, j in ((0, 1), (0, 2), (1, 2))]
    for name in ("logp", "head_reward", "tokens", "reward"):
        margin = (gap(name) + np.mean(of_list(name))) / 2
        assert found["preferences"][name]["margin"] == pytest.approx(margin, abs=1e-4)
    assert found["preferences"]["log_ratio"]["margin"] == pytest.approx(
        (gap("logp") - gap("ref_logp") + np.mean(of_list("logp")) - np.mean(of_list("ref_logp"))) / 2, abs=1e-4)
    assert found["label_auc"]["reward"] == 1.0
    assert found["policy"].endswith(":method") and found["reference"].endswith(":model")
    assert found["ledger"]["kept"] == 5 and found["records"] == 6


def test_samples_against_the_reference(evaluate, run, lines, tmp_path):
    folder, out = run[0], tmp_path / "rows.jsonl"
    asked = [lines, "--run", folder, "--reward", "lexicon", "--generate", "--samples", 2, "--max-new-tokens", 5,
             "--seed", 3, "--json"]
    found = json.loads(evaluate(*asked, "--reference-stage", "model", "--out", out))["generated"]
    rows = [r for r in map(json.loads, out.read_text().splitlines()) if r["source"] != "data"]
    mine, theirs = ([r for r in rows if r["source"] == who] for who in ("policy", "reference"))
    assert len(mine) == len(theirs) == 5 * 2 and found["prompts"] == 5  # the text has no prompt
    ratios = np.asarray([r["logp"] - r["ref_logp"] for r in mine]).reshape(5, 2).mean(1)
    assert found["kl_on_policy"]["nats"] == pytest.approx(ratios.mean(), abs=1e-4)
    assert found["kl_on_policy"]["se"] == pytest.approx(np.std(ratios, ddof=1) / math.sqrt(5), abs=1e-4)
    won = [np.mean([(a["reward"] > b["reward"]) + 0.5 * (a["reward"] == b["reward"])
                    for a in mine if a["id"] == id for b in theirs if b["id"] == id]) for id in {r["id"] for r in mine}]
    assert found["wins"]["win_rate"] == pytest.approx(np.mean(won)) and found["wins"]["against"] == "reference"
    assert found["policy"]["reward"] == pytest.approx(np.mean([r["reward"] for r in mine]))
    assert found["sampler_trainer_gap"] < 1e-3
    assert {(r["id"], r["text"]) for r in mine} != {(r["id"], r["text"]) for r in theirs}
    again = json.loads(evaluate(*asked, "--temperature", "0.5", "--reference-stage", "model"))["generated"]
    assert "kl_on_policy" not in again and "log_ratio_on_samples" in again  # another distribution: no KL of it
    alone = json.loads(evaluate(*asked))["generated"]
    assert alone["wins"]["against"] != "reference" and alone["wins"]["prompts"] == 4  # those with a completion
    assert alone["policy"] == found["policy"]


def test_equal_policies_draw_apart(evaluate, run, lines, tmp_path):
    """The reference's samples are its own, also where it is the policy: a win rate is about independent samples."""
    out = tmp_path / "rows.jsonl"
    evaluate(lines, "--run", run[0], "--reference-stage", "method", "--generate", "--max-new-tokens", 5, "--out", out)
    texts = {who: [r["text"] for r in map(json.loads, out.read_text().splitlines()) if r["source"] == who]
             for who in ("policy", "reference")}
    assert texts["policy"] != texts["reference"]


def test_the_tables(evaluate, run, lines):
    shown = evaluate(lines, "--run", run[0], "--reference-stage", "model", "--limit", "2")
    for word in ("2 records", "kl policy ref at data prefixes", "perplexity", "accuracy [95%]", "log ratio",
                 "head reward", "beyond --limit=2"):
        assert word in shown, word


def test_prompts_that_are_cut_are_shown(evaluate, run, lines):
    shown = evaluate(lines, "--run", run[0], "--limit", "1", "--generate", "--max-new-tokens", "123", "--truncation",
                     "left", "--max-length", "12")
    assert "prompts sampled from" in shown and "max_prompt: prompt (left)" in shown
    assert "samples on 1 prompts" in shown


@pytest.mark.parametrize("more, words", [
    (["--max-new-tokens", "9"], ["--max-new-tokens", "--generate"]),
    (["--samples", "2"], ["--samples", "--generate"]),
    (["--samples", "0", "--generate"], ["--samples=0", "1 or more"]),
    (["--limit", "-1"], ["--limit=-1"]),
    (["--max-length", "4000"], ["--max-length=4000", "128 positions"]),
    (["--max-length", "5"], ["mixed.jsonl:1", "max_length"]),
    (["--truncation", "cut"], ["--truncation=cut", "left"]),
    (["--reward", "nice"], ["nice", "lexicon"]),
    (["--format", "hhh"], ["hhh", "alignax"]),
    (["--reference-stage", "ppo"], ["--reference-stage", "ppo", "method"]),
    (["--out", "no/where.jsonl"], ["--out=no/where.jsonl", "no such folder"]),
    (["--generate", "--max-new-tokens", "128"], ["--max-new-tokens=128", "128 positions"]),
], ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "")
def test_what_cannot_work_is_refused(evaluate, run, lines, more, words):
    shown = evaluate(lines, "--run", run[0], *more, code=cli.EXIT_ERROR)
    assert all(word in shown for word in words), shown


def test_a_reference_of_another_shape_and_prompts_without_completions_are_refused(evaluate, run, lines, tmp_path):
    folder, ours = tmp_path / "model", run[1].config
    config = dataclasses.replace(CONFIG, vocab_size=ours.vocab_size)
    models.save(folder, config, models.init_params(config, jax.random.key(0)), bos_token_id=1, eos_token_id=2)
    run[4].save(folder / "tokenizer.json")
    shown = evaluate(lines, "--run", run[0], "--reference", folder, code=cli.EXIT_ERROR)
    assert "another shape" in shown and f"hidden_size 8 (policy: {ours.hidden_size})" in shown
    models.save(folder / "same", ours, run[2]["model"], bos_token_id=1, eos_token_id=2)
    data.word_tokenizer([f"w{i}" for i in range(ours.vocab_size - 4)]).save(folder / "same" / "tokenizer.json")
    assert "another tokenizer" in evaluate(lines, "--run", run[0], "--reference", folder / "same", code=cli.EXIT_ERROR)
    lines.write_text('{"prompt": "a b"}\n')
    assert "--generate" in evaluate(lines, "--run", run[0], code=cli.EXIT_ERROR)
