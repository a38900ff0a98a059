"""Reasoning steps of records: from characters to tokens to batches."""

import dataclasses

import jax
import numpy as np
import pytest
from chat_test import byte_core, piece_core
from step_test import CONFIG, SPEC

from alignax import data, losses, models, step
from alignax.data import Ledger, Tokenizer, from_json, tokenize_records
from alignax.types import DataError

PAIR = {"prompt": "one plus one", "chosen": " add one\nso two\ndone", "rejected": " add one\nso three",
        "extra": {"steps": [[[8, 1.0], [15, 1.0], [20, None]], [[8, 1.0], [17, -1.0]]]}}


def policy():
    return data.TextPolicy(None, 2, frozenset({2}), 0)


def tokenized(fields, tokenizer, **limits):
    return tokenize_records([from_json(fields)], tokenizer, policy(), ledger=Ledger(), **limits)[0]


@pytest.mark.parametrize("core", [byte_core, lambda: piece_core("first"), lambda: piece_core("legacy")])
def test_a_token_belongs_to_the_step_in_which_it_begins(core):
    tokenizer = Tokenizer(core())
    record = tokenized(PAIR, tokenizer)
    for k, name in enumerate(("chosen", "rejected")):
        ids, column = record.completions[k], record.columns["steps"][k]
        ends = [end for end, _ in PAIR["extra"]["steps"][k]]
        assert len(column) == len(ids) and column.dtype == np.int32
        starts = tokenizer.completion_starts(PAIR["prompt"], PAIR[name])
        assert starts[0] == 0 and starts == sorted(starts) and len(starts) == len(ids) - 1  # the end token has none
        expected = [sum(end <= start for end in ends) for start in starts] + [len(ends) - 1]
        np.testing.assert_array_equal(column, expected)
        assert set(column) == set(range(len(ends)))
    cut = tokenized(PAIR, tokenizer, max_completion=4, truncation="right")
    assert [len(c) for c in cut.columns["steps"]] == [4, 4]


def test_records_without_steps_have_no_columns():
    plain = {name: PAIR[name] for name in ("prompt", "chosen", "rejected")}
    assert not tokenized(plain, Tokenizer(byte_core())).columns


@pytest.mark.parametrize("entry", [[], 3, [[0, 1.0]], [[5, 1.0], [5, 1.0]], [[9, 1.0], [4, 1.0]], [[99, 1.0]],
                                   [["a", 1.0]], [[]]])
def test_broken_steps_are_refused(entry):
    fields = {**PAIR, "extra": {"steps": [entry, PAIR["extra"]["steps"][1]]}}
    with pytest.raises(DataError, match=r"extra.steps\[0\].*ends rising within 1 to 20"):
        tokenized(fields, Tokenizer(byte_core()))


def rows():
    record = data.token_record("a", [1, 4], [[5, 6, 7, 2], [5, 6, 8, 9, 2]], eos_ids=(2,))
    columns = {"steps": (np.array([0, 0, 1, 1], np.int32), np.array([0, 0, 1, 2, 2], np.int32)),
               "advantages": (np.array([0.5, 0.5, 1, 1]), np.array([0.5, 0.5, -1, 0, 0]))}
    other = data.token_record("b", [1], [[9, 2], [8, 2]], eos_ids=(2,))
    zeros = (np.zeros(2, np.int32), np.zeros(2, np.int32))
    return [dataclasses.replace(record, columns=columns),
            dataclasses.replace(other, columns={"steps": zeros, "advantages": tuple(z * 1.0 for z in zeros)})]


@pytest.mark.parametrize("layout", data.LAYOUT_NAMES)
def test_columns_reach_the_batch(layout):
    records = rows()
    batch = data.fill(records, data.plan_shape(records, layout, 4), layout, pad_id=0)
    assert batch.data["steps"].dtype == np.int32 and batch.data["advantages"].dtype == np.float32
    np.testing.assert_array_equal(batch.data["steps"][0], [[0, 0, 1, 1] + [-1] * 4, [0, 0, 1, 2, 2] + [-1] * 3])
    np.testing.assert_array_equal(batch.data["advantages"][0, 1], [0.5, 0.5, -1, 0, 0, 0, 0, 0])
    swapped = data.mismatched(records)
    again = data.fill(swapped, data.plan_shape(swapped, layout, 4), layout, pad_id=0)
    np.testing.assert_array_equal(again.data["steps"][1], batch.data["steps"][0])


def test_a_batch_holds_a_column_of_all_records_or_of_none():
    records = rows()
    mixed = [records[0], dataclasses.replace(records[1], columns={})]
    with pytest.raises(DataError, match="lacks the column 'advantages'"):
        data.padded(mixed, K=2, T=16, L=8, pad_id=0)


def test_step_dpo_on_records_compares_one_step():
    params, other = ({"model": models.init_params(CONFIG, jax.random.key(k))} for k in (0, 1))
    loss = losses.get("step_dpo")
    batch = data.padded(rows(), K=2, T=16, L=8, pad_id=0)
    inputs = step.compute(SPEC, params, other, batch, set(loss.requests))
    ratio = np.asarray(inputs["token_logps"] - inputs["ref_token_logps"], np.float64)
    margin = ratio[0, 0, 2:4].sum() - ratio[0, 1, 2]
    np.testing.assert_allclose(loss(inputs)[0], np.log1p(np.exp(-0.4 * margin)), rtol=1e-5)
