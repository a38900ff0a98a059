"""`alignax score`: every score against float64 arithmetic, whatever it is batched with; rules, files and refusals."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import checkpoint, cli, configs, context, data, models, step
from alignax.analyses import pairs
from alignax.diagnostics import pair_scores
from alignax.types import ConfigError

pytestmark = pytest.mark.slow

CONFIG = models.DecoderConfig(vocab_size=23, hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2,
                              num_kv_heads=1, head_dim=4, max_positions=64)
SPEC = step.ModelSpec(CONFIG)


def record(id, prompt, *completions, **more):
    return data.token_record(id, prompt, completions, eos_ids=(2,), **more)


# Rows of three lengths; `d` states its preference by labels, the other way round; `e` has few scored tokens.
RECORDS = [record("c", [1, *range(3, 20)], [5, 6], [6, 5, 2]), record("b", [1, 5], [7, 2], [9, 10, 11, 2]),
           record("a", [1, 5, 6], [7, 8, 2], [9, 2]), record("d", [1], [12, 2], [4, 4, 4, 2], labels=(0, 1)),
           record("e", [1, 9], [*range(3, 22)], [8, 8])]
RECORDS = [dataclasses.replace(r, line=n) for n, r in enumerate(RECORDS, 1)]


@pytest.fixture(scope="module")
def policy():
    return {"model": jax.tree.map(lambda a: 4 * a, models.init_params(CONFIG, jax.random.key(0)))}


@pytest.fixture(scope="module")
def reference():
    return {"model": jax.tree.map(lambda a: 4 * a, models.init_params(CONFIG, jax.random.key(1)))}


@pytest.fixture(scope="module")
def values(policy, reference):
    return pairs.score(SPEC, policy, RECORDS, pad_id=0, reference=reference, batch_size=2)


def explicit(params, r, k):
    """(log-prob, states [L, D]) of a completion in float64, from one unpadded row."""
    with jax.enable_x64(True):
        tree = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params["model"])
        ids = np.asarray([*r.prompt, *r.completions[k]], np.int32)[None]
        ones, place = np.ones_like(ids), np.arange(ids.shape[1], dtype=np.int32)[None]
        hidden = models.forward(CONFIG, tree, ids, ones, 0 * ones, place)
        logits = np.asarray(models.logits(CONFIG, tree, hidden))[0, len(r.prompt) - 1:-1]
        states = np.asarray(hidden)[0, len(r.prompt) - 1:-1]
    assert states.dtype == np.float64
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logp[np.arange(len(r.completions[k])), r.completions[k]].sum(), states


def test_every_score_is_that_of_the_float64_formulas(policy, reference, values):
    found = pair_scores.scores(values, beta=0.3)
    for n, r in enumerate(RECORDS):
        order = (1, 0) if r.id == "d" else (0, 1)
        (p, h), (q, g) = (explicit(policy, r, k) for k in order)
        (rp, _), (rq, _) = (explicit(reference, r, k) for k in order)
        sum_h, sum_g = h.sum(0), g.sum(0)
        margin = 0.3 * (p - rp - q + rq)
        expected = {"ches": sum_h @ sum_g - sum_h @ sum_h,
                    "ches_normalised": sum_h @ sum_g / len(h) / len(g) - sum_h @ sum_h / len(h) ** 2,
                    "margin": rp - rq, "margin_per_token": rp / len(h) - rq / len(g), "reward_margin": margin,
                    "difficulty": np.log1p(np.exp(-margin))}
        assert found.keys() == expected.keys() == pair_scores.ABOUT.keys()
        for name, number in expected.items():
            np.testing.assert_allclose(found[name][n], number, rtol=2e-5, atol=2e-5, err_msg=f"{name} of {r.id}")
        assert values["tokens"][n].tolist() == [len(h), len(g)]


def test_scores_do_not_depend_on_the_batch(policy, reference, values):
    alone = [pairs.score(SPEC, policy, [r], pad_id=0, reference=reference, batch_size=2) for r in RECORDS]
    turned = pairs.score(SPEC, policy, RECORDS[::-1], pad_id=0, reference=reference, batch_size=2)
    wide = pairs.score(SPEC, policy, RECORDS, pad_id=0, reference=reference, batch_size=5)
    for name, array in values.items():
        np.testing.assert_array_equal(array, np.concatenate([one[name] for one in alone]), err_msg=name)
        np.testing.assert_array_equal(array, turned[name][::-1], err_msg=name)
        np.testing.assert_allclose(array, wide[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_without_a_reference_the_policy_is_its_own(policy, values):
    own = pairs.score(SPEC, policy, RECORDS, pad_id=0, batch_size=2)
    found = pair_scores.scores(own)
    assert list(found) == ["ches", "ches_normalised", "margin", "margin_per_token"]
    np.testing.assert_allclose(found["margin"], values["logp"][:, 0] - values["logp"][:, 1], atol=1e-5)


def test_what_is_no_pair_is_refused():
    same, lone = record("s", [1], [5, 2], [5, 2]), record("l", [1], [5, 2])
    tied = record("t", [1], [5, 2], [6, 2], scores=(1.0, 1.0))
    assert [pairs.why_not(r) for r in (*RECORDS[:1], same, lone, tied)] == [
        "", "both completions are the same tokens", "1 completion, not a pair",
        "equal scores or labels: no preference"]
    with pytest.raises(ConfigError, match="not a pair"):
        pairs.score(SPEC, {}, [lone], pad_id=0)
    for records, size in (([], 2), (RECORDS, 0)):
        with pytest.raises(ConfigError, match=f"{len(records)} records and batch_size {size}"):
            pairs.score(SPEC, {}, records, pad_id=0, batch_size=size)


def test_progress_counts_every_pair_once(policy):
    seen = []
    pairs.score(SPEC, policy, RECORDS, pad_id=0, batch_size=2, advance=seen.append)
    assert sum(seen) == len(RECORDS) and len(seen) > 1


def test_numbers_that_are_not_finite_name_their_record(policy):
    """Only the second record holds the token whose embedding is broken."""
    model = policy["model"]
    broken = {"model": {**model, "embedding": model["embedding"].at[21].set(jnp.nan)}}
    with pytest.raises(FloatingPointError, match=re.escape(RECORDS[4].place) + r": .* is (nan|\[.*nan)"):
        pairs.score(SPEC, broken, [RECORDS[2], RECORDS[4]], pad_id=0, batch_size=2)


def test_infinite_numbers_name_their_record(policy, monkeypatch):
    numbers = pairs._numbers
    monkeypatch.setattr(pairs, "_numbers", lambda *given: numbers(*given) | {"ches": jnp.asarray([0.0, jnp.inf])})
    with pytest.raises(FloatingPointError, match=re.escape(RECORDS[2].place) + ": ches is inf"):
        pairs.score(SPEC, policy, RECORDS[1:3], pad_id=0, batch_size=2)


@pytest.mark.parametrize("text, good", [
    ("lowest:0.5", [1, 0, 1, 0]), ("highest:0.5", [0, 1, 0, 1]), ("highest:0.01", [0, 1, 0, 0]),
    ("below:2", [1, 0, 1, 1]), ("above:2", [0, 1, 0, 1]), ("between:1:2", [1, 0, 0, 1]), ("lowest:1", [1, 1, 1, 1])])
def test_rules(text, good):
    rule = pair_scores.parse_keep(text)
    assert str(rule) == text
    assert pair_scores.kept(np.asarray([1.0, 3.0, -1.0, 2.0]), rule).tolist() == [bool(g) for g in good]


def test_ties_keep_the_first_and_share_a_rank():
    tied = np.asarray([2.0, 1.0, 1.0, 1.0])
    assert pair_scores.kept(tied, pair_scores.parse_keep("lowest:0.5")).tolist() == [False, True, True, False]
    assert pair_scores.ranks(tied).tolist() == [1, 2, 2, 2]


@pytest.mark.parametrize("text", ["0.5", "lowest", "lowest:0", "lowest:1.5", "below:x", "below:nan", "between:2:1",
                                  "between:1", "some:1"])
def test_other_rules_are_refused(text):
    with pytest.raises(ConfigError, match=f"--keep={text}"):
        pair_scores.parse_keep(text)


# --- the command ----------------------------------------------------------------------------------------------------


LINES = [{"prompt": "tom was at the park .", "chosen": "he smiled .", "rejected": "he cried and cried .", "id": "one"},
         {"prompt": "sue saw a dog .", "chosen": "she smiled .", "rejected": "she ran .", "id": "two",
          "extra": {"source": "hand"}},
         {"prompt": "sue saw a dog .", "completions": ["she ran .", "she smiled .", "no ."], "id": "list"},
         {"prompt": "sue saw a cat .", "chosen": "she ran .", "rejected": "she ran .", "id": "same"},
         {"prompt": "tom had a ball .", "chosen": "he laughed .", "rejected": "tom was " * 80, "id": "long"},
         {"prompt": "tom had a ball .", "chosen": "the ball was happy .", "rejected": "he ran .", "id": "three"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with one finished stage, without the training."""
    folder = tmp_path_factory.mktemp("run")
    config = configs.embedded_run("dpo", tiny=True)
    config.stages = ("method",)
    stored = json.loads(json.dumps(config.to_dict(), default=list))
    checkpoint.write_json(folder / "config.json", stored)
    _, initial = context.load_model(stored["model"], vocab_size=context.load_tokenizer(stored["tokenizer"],
                                                                                       "").vocab_size, seed=0)
    context.save_stage_params(folder / "stages" / "method", jax.tree.map(lambda a: 2 * a, initial), base="model",
                              adapters=None)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return folder


def test_the_files_and_the_ledger(run, tmp_path, capsys):
    out = tmp_path / "scored"
    code = cli.main(["score", str(run / "pairs.jsonl"), "--run", str(run), "--reference-stage", "model", "--by",
                     "difficulty", "--keep", "lowest:0.67", "--truncation", "drop", "--out", str(out)])
    shown = capsys.readouterr().out
    assert code == 0 and "difficulty *" in shown and "lowest:0.67 keeps 2 of 3 pairs" in shown
    rows = {row["id"]: row for row in map(json.loads, (out / "scores.jsonl").read_text().splitlines())}
    assert list(rows) == [line["id"] for line in LINES]  # every record, in the order of the file
    assert {id: row["reason"] for id, row in rows.items() if "scores" not in row} == {
        "list": "3 completions, not a pair", "same": "both completions are the same tokens", "long": "max_length"}
    scored = {id: row for id, row in rows.items() if "scores" in row}
    hardest = max(scored, key=lambda id: scored[id]["scores"]["difficulty"])
    assert scored[hardest]["ranks"]["difficulty"] == 1 and not scored[hardest]["kept"]
    assert scored[hardest]["reason"] == "difficulty outside lowest:0.67"
    kept = {r.id: r for r in data.load_records(out / "kept.jsonl")}  # it reads as any preference file
    assert kept.keys() == {id for id in scored if id != hardest}
    raw = {r.id: r for r in data.load_records(run / "pairs.jsonl", on_identical="keep")}
    for id, one in kept.items():
        assert (one.prompt, one.completions, one.extra) == (raw[id].prompt, raw[id].completions, raw[id].extra)
    ledger = json.loads((out / "summary.json").read_text())["ledger"]
    assert ledger["kept"] == 2 and sum(ledger["dropped"].values()) == 4
    assert not any("kept" in note for note in ledger["noted"])  # nothing that reading kept and scoring dropped
    assert (out / "scores.png").stat().st_size > 5000 and (out / "scores.svg").exists()


def test_json_alone(run, capsys):
    assert cli.main(["score", str(run / "pairs.jsonl"), "--run", str(run), "--truncation", "drop", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"] == found["kept"] == 3 and "difficulty" not in found["scores"] and found["by"] is None


@pytest.mark.parametrize("more, words", [
    (["--by", "ches"], ["--by=ches", "needs the other"]),
    (["--by", "beauty", "--keep", "below:0"], ["--by=beauty", "ches_sum"]),
    (["--by", "ches", "--keep", "below:0"], ["--out"]),
    (["--by", "difficulty", "--keep", "below:0"], ["difficulty", "--reference"]),
    (["--by", "ches", "--keep", "half", "--out", "x"], ["--keep=half", "lowest:SHARE"]),
    (["--beta", "0"], ["--beta=0", "above 0"]),
    (["--limit", "-1"], ["--limit=-1"]),
    (["--out", "no/where"], ["--out=no/where"]),
    ([], ["pairs.jsonl:5", "max_length"]),
], ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "")
def test_what_cannot_work_is_refused(run, capsys, more, words):
    assert cli.main(["score", str(run / "pairs.jsonl"), "--run", str(run), *more]) == cli.EXIT_ERROR
    shown = capsys.readouterr().err
    assert all(word in shown for word in words), shown
