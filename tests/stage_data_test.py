"""What a train stage learns from beside its pairs: the streams of completions that play another role."""

from __future__ import annotations

import dataclasses
import io
import json
import types

import jax
import numpy as np
import pytest
from rich.console import Console
from step_test import CONFIG, SPEC

from alignax import configs, context, data, losses, models, sharding, stage_data, stage_setup, step, train
from alignax.data import degrade
from alignax.types import ConfigError, DataError

BOS, EOS = 1, 2


def record(name, prompt, *completions, **rest):
    return data.token_record(name, [BOS, *prompt], [[*c, EOS] for c in completions], eos_ids=(EOS,), **rest)


RECORDS = [record("a", [5, 6], [7, 8], [9]), record("b", [10], [11, 12, 13], [14]),
           record("c", [15, 16, 3], [4], [5, 6]), record("d", [7], [8, 9, 10, 11], [12])]


def ids(records):
    return [r.prompt.tolist() for r in records]


# Other prompts


def test_other_prompts_come_from_the_record_the_text_before_or_the_next_record():
    own = dataclasses.replace(RECORDS[1], aux_prompt=np.asarray([BOS, 3, 3], np.int32))
    rows = [RECORDS[0], own, RECORDS[2]]
    out, cut = data.aux_prompts(rows, before=[16, 4], bos_id=BOS)
    assert ids(out) == [[BOS, 16, 4, 5, 6], [BOS, 3, 3], [BOS, 16, 4, 15, 16, 3]] and cut == 0
    out, _ = data.aux_prompts(rows, bos_id=BOS)
    assert ids(out) == [[BOS, 10], [BOS, 3, 3], [BOS, 5, 6]]
    for before, after in zip(rows, out, strict=True):
        assert after.completions is before.completions and after.id == before.id
    out, _ = data.aux_prompts(rows[:1], before=[16], bos_id=None)
    assert ids(out) == [[16, BOS, 5, 6]]


def test_other_prompts_that_are_too_long_are_cut_or_refused():
    out, cut = data.aux_prompts(RECORDS[:2], before=[16, 4], bos_id=BOS, max_length=7, truncation="left")
    assert ids(out) == [[BOS, 4, 5, 6], [BOS, 4, 10]] and cut == 2
    with pytest.raises(DataError, match=r"aux_prompt: 5 tokens and the longest completion of 3 exceed max_length = 7"):
        data.aux_prompts(RECORDS[:2], before=[16, 4], bos_id=BOS, max_length=7, truncation="drop")
    with pytest.raises(ConfigError, match="a single record has no next one"):
        data.aux_prompts(RECORDS[:1])


# Versions without key phrases


def test_key_phrases_by_degree_over_frequency():
    """Degrees: brave 3, fox 3 + 2, saved 3, old 2, farm 2, laughed 2; fox stands twice: 8.5, 4.5 and 4."""
    text = "The brave fox saved the old farm . The fox laughed"
    assert [text[a:b] for a, b in degrade.key_phrases(text)] == ["brave fox saved", "fox laughed", "old farm"]
    assert degrade.key_phrases("and then it was .") == []
    text = "well-known, don't"
    assert [text[a:b] for a, b in degrade.key_phrases(text)] == ["well-known", "don't"]


def words(ids):
    """A tokenizer of one word per id, as `decode` sees it; special ids are left out."""
    table = {3: "the", 4: "brave", 5: "fox", 6: "saved", 7: "old", 8: "farm", 9: ".", 10: "laughed"}
    return " ".join(table[int(i)] for i in ids if int(i) in table)


def test_versions_lose_a_growing_share_of_their_key_phrases():
    whole = record("r", [3], [3, 4, 5, 6, 3, 7, 8, 9, 3, 5, 10], [3])
    versions = degrade.without_phrases(whole, 4, words)
    assert versions.completions[0].tolist() == whole.completions[0].tolist()
    assert [c.tolist() for c in versions.completions[1:]] == [
        [3, 3, 7, 8, 9, 3, 5, 10, EOS], [3, 3, 7, 8, 9, 3, EOS], [3, 3, 9, 3, EOS]]
    assert versions.completion_ended == (True,) * 4 and versions.prompt.tolist() == [BOS, 3]
    bare = data.token_record("n", [BOS], [[4, 5], [3]])  # without an end token something has to remain
    assert [c.tolist() for c in degrade.without_phrases(bare, 3, words).completions] == [[4, 5]] * 3


def test_scored_tokens_of_a_dialogue_follow_their_tokens():
    scored = (np.array([False, True, True, True, True]), np.ones(2, bool))
    marked = dataclasses.replace(record("r", [3], [3, 4, 9, 8], [3]), scored=scored)
    out = degrade.without_phrases(marked, 3, words)
    assert [c.tolist() for c in out.completions] == [[3, 4, 9, 8, EOS], [3, 9, 8, EOS], [3, 9, EOS]]
    assert [s.tolist() for s in out.scored] == [[False, True, True, True, True], [False, True, True, True],
                                                [False, True, True]]


# On the loop's batches


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh()


def context_of(mesh, tmp_path=None, tokenizer=None):
    """The parts of a run's context that reading data needs."""
    tokenizer = tokenizer or data.stories_tokenizer()
    return types.SimpleNamespace(
        mesh=mesh, seed=0, tokenizer=tokenizer, tokenizer_source="", text=data.text_policy(tokenizer), spec=SPEC,
        console=Console(file=io.StringIO(), width=200), stage_dir=lambda name: tmp_path / name)


@pytest.mark.parametrize("layout, shapes", [("padded", "batch"), ("shared_prefix_packed", "global")])
def test_further_streams_are_laid_out_beside_the_pairs(mesh, layout, shapes):
    """Policy sums on each stream are those of its records laid out alone; its width is its own."""
    ctx = context_of(mesh)
    sampled = {r.id: r.completions[1] for r in RECORDS}
    others = {"aux_prompt": data.aux_prompts(RECORDS, bos_id=BOS)[0],
              "reference_sample": data.reference_samples(RECORDS, sampled, ctx.text.ended),
              "degraded": data.degraded(RECORDS, 3, words)}
    plan = data.Plan(len(RECORDS), 2, 0)
    laid = stage_data.batches(ctx, RECORDS, [], loss=losses.get("dpo"), plan=plan, steps=2, eval_cuts=[(0, 4)],
                              layout=layout, shapes=shapes, bucket_multiple=4, accumulation=1, others=others)
    rows = plan.batch_indices(1)
    pick = lambda whole: [whole[i] for i in rows]
    batch = laid.make(pick(RECORDS), None, {name: pick(other) for name, other in others.items()})
    assert set(batch.streams) == {"pair", *others}
    assert [batch.streams[n].targets.shape[1] for n in ("aux_prompt", "reference_sample", "degraded")] == [2, 1, 3]
    params = {"model": jax.tree.map(lambda a: 3 * a, models.init_params(CONFIG, jax.random.key(0)))}
    asked = {"aux_prompt": "aux_prompt_logps", "reference_sample": "reference_sample_logps"}
    out = step.compute(SPEC, params, None, batch, set(asked.values()))
    for name, request in asked.items():
        mine = pick(others[name])
        alone = data.padded(mine, K=len(mine[0].completions), T=16, L=8, pad_id=0)
        np.testing.assert_allclose(out[request], step.compute(SPEC, params, None, alone, {"logps"})["logps"], rtol=1e-4)
    assert (laid.other_shapes == {}) == (shapes == "batch")
    # What a process of several lays out, where it holds all the devices, is the whole batch.
    own = {name: (pick(other), laid._shape_of(name, pick(other))) for name, other in others.items()}
    shared = laid._share(pick(RECORDS), laid.shape or data.plan_shape(pick(RECORDS), layout, 4), {}, own, {})
    for name in others:
        for one, two in zip(*(jax.tree.leaves(b.streams[name]) for b in (batch, shared)), strict=True):
            np.testing.assert_array_equal(one, two)


def test_streams_of_a_loss_are_made_from_its_data(mesh, tmp_path):
    ctx = context_of(mesh, tmp_path)
    pairs = tmp_path / "pairs.jsonl"
    rows = [dict(id=f"r{i}", prompt=f"Tom saw a {animal} at the park .", chosen=" Tom was happy .",
                 rejected=" it fell .") for i, animal in enumerate(("dog", "cat", "fox"))]
    rows[1]["extra"] = {"aux_prompt": "Mia had a red ball ."}
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = configs.train_stage("dpo", data=dict(path=str(pairs))).data.to_dict()
    limits = dict(max_prompt=None, max_completion=None, max_length=64, truncation="error")
    records, _ = stage_data.read(ctx, "config.method.data", section, limits=limits)
    make = lambda name, **change: stage_data.other_streams(ctx, "config.method.data", section | change, records,
                                                           loss=losses.get(name), limits=limits)
    text = lambda r: ctx.tokenizer.decode(r.prompt)
    assert make("dpo") == {}
    out = make("sr_dpo")["aux_prompt"]
    assert list(map(text, out)) == [rows[1]["prompt"], "Mia had a red ball .", rows[0]["prompt"]]
    assert "1 of 3 are the record's own, the others are the next record's prompt" in ctx.console.file.getvalue()
    out = make("sr_dpo", aux_prompt="one happy day")["aux_prompt"]
    assert list(map(text, out))[:2] == ["one happy day " + rows[0]["prompt"], "Mia had a red ball ."]
    assert out[0].prompt[0] == ctx.text.bos_id
    versions = make("self_supervised_po")["degraded"][0].completions
    assert [ctx.tokenizer.decode(v) for v in versions] == ["Tom was happy .", *["was happy ."] * 2, "was ."]
    assert all(v[-1] == ctx.text.eos_id for v in versions)
    rows[1]["extra"] = {"aux_prompt": [{"role": "user", "content": "x"}]}
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: extra\.aux_prompt: found .*; allowed: a text beside a text"):
        stage_data.read(ctx, "config.method.data", section, limits=limits)


def test_samples_of_the_reference_are_those_kept_out_of_the_pairs(mesh, tmp_path):
    (tmp_path / "sample").mkdir()
    row = dict(id="p/0", prompt_ids=[1, 5], chosen_ids=[6, 2], rejected_ids=[7, 2], unseen_ids=[[8, 9], [3, 2]],
               scores=[1.0, 0.0], split="train")
    (tmp_path / "sample" / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    ctx = context_of(mesh, tmp_path)
    records, _ = stage_data.read(ctx, "config.method.data", configs.train_stage(
        "dpo", data=dict(path="stage:sample")).data.to_dict(), limits={})
    out = stage_data.other_streams(ctx, "config.method.data", dict(path="stage:sample"), records,
                                   loss=losses.get("typo"), limits={})["reference_sample"]
    assert [c.tolist() for c in out[0].completions] == [[8, 9]] and out[0].completion_ended == (False,)
    with pytest.raises(DataError, match="no completion of record 'a' was kept out"):
        data.reference_samples(RECORDS, {}, ctx.text.ended)


def test_a_supervised_loss_keeps_the_chosen_completion_alone(mesh, tmp_path):
    ctx = context_of(mesh, tmp_path)
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(dict(prompt="Tom saw a dog .", chosen=" Tom was happy .", rejected=" it fell .")) + "\n")
    for name, width in (("sft", 1), ("dft", 1), ("unlikelihood_token", 1), ("dpo+0.2*sft", 2), ("unlikelihood", 2)):
        stage = configs.train_stage(name, data=dict(path=str(path)), batch_size=1)
        assert len(stage_setup.records_of(ctx, "method", stage.to_dict())[0][0].completions) == width, name


# What the data cannot give


@pytest.mark.parametrize("made_by, start, words", [
    (None, "model", r"config\.method\.data\.path='stage:s': loss 'new_desiderata' needs completions sampled from"),
    (dict(policy="sft", unseen=0), "sft", r"config\.s\.unseen=0"),
    (dict(policy="sft", unseen=1), "model", r"those completions are of 'sft', but the stage starts from 'model'"),
], ids=["file", "none-unseen", "other-policy"])
def test_reference_samples_that_are_not_there_are_refused(made_by, start, words):
    with pytest.raises(ConfigError, match=words):
        stage_data.check_streams("config.method", losses.get("typo"), "stage:s", made_by=made_by, start=start)
    stage_data.check_streams("config.method", losses.get("typo"), "stage:s", made_by=dict(policy="sft", unseen=1),
                             start="sft")
    stage_data.check_streams("config.method", losses.get("sr_dpo"), "file", made_by=None, start="model")


def test_a_run_without_its_stream_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    config = configs.embedded_run("typo", tiny=True)
    config.sample.unseen = 0
    with pytest.raises(ConfigError, match=r"config\.sample\.unseen=0"):
        train.run(config, tmp_path / "w", console=Console(file=io.StringIO()))
    config.sample.unseen, config.method.init = 1, "model"
    with pytest.raises(ConfigError, match="are of 'sft', but the stage starts from 'model'"):
        train.run(config, tmp_path / "w", console=Console(file=io.StringIO()))
    assert not (tmp_path / "w").exists() and context.finished_stages(tmp_path / "w", ("sft",)) == []
