"""Token records to batches: slots, masks, segments and buckets of the layouts."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignax.data import (
    Ledger,
    Record,
    Shape,
    bucket,
    bucket_shape,
    fill,
    mismatched,
    padded,
    record_number,
    shared_prefix,
    text_policy,
    token_record,
    tokenize_records,
    train_tokenizer,
)
from alignax.data.tokens import TextPolicy
from alignax.types import ConfigError, DataError


def packing(layout):
    """A packed layout called like the others, with as many rows as the records could need."""
    def call(records, *, K, T, L, pad_id, extra=None):
        rows = len(records) * (1 if layout.startswith("shared") else K)
        return fill(records, Shape(K, T, L, rows), layout, pad_id=pad_id, extra=extra)
    return call


LAYOUTS = {"padded": padded, "shared_prefix": shared_prefix, "packed": packing("packed"),
           "shared_prefix_packed": packing("shared_prefix_packed")}
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
A = token_record("a", [1, 5, 6], [[7, 8, 2], [9, 2]], eos_ids=[2], file="f.jsonl", line=1)
B = token_record("b", [1], [[7, 2]], eos_ids=[2], labels=[0], margin=1.5, file="f.jsonl", line=2)


@pytest.fixture(scope="module")
def byte_tokenizer():
    return train_tokenizer(["the cat and the dog"] * 3, 270, kind="bytes")


def flat_row(stream, b):
    """Global rows of record b: groups are equal runs of rows, and `row` counts inside the group."""
    per_group = stream.tokens.shape[0] // stream.groups
    group = b // (stream.mask.shape[0] // stream.groups)
    return group * per_group + stream.row[b]


def reads(stream, row, col):
    """The (position, token) pairs that the token at (row, col) attends to, by the contract's rule."""
    columns = np.arange(col + 1)
    segment = stream.segment[row, :col + 1]
    seen = (segment > 0) & ((segment == stream.segment[row, col]) | (segment == stream.prefix[row, col]))
    return [(int(stream.position[row, c]), int(stream.tokens[row, c])) for c in columns[seen]]


def check_stream(stream, records, pad_id):
    """Every scored slot sees exactly prompt + completion up to it, and the mask covers exactly the completions."""
    for b, record in enumerate(records):
        rows = flat_row(stream, b)
        prompt = record.prompt.tolist()
        for k in range(stream.valid.shape[1]):
            assert stream.valid[b, k] == (k < len(record.completions))
            ids = record.completions[k].tolist() if stream.valid[b, k] else []
            scored = np.ones(len(ids), bool)
            if not prompt and ids:
                scored[0] = False
            assert np.array_equal(stream.mask[b, k], np.pad(scored, (0, stream.mask.shape[2] - len(ids))))
            assert stream.targets[b, k, :len(ids)].tolist() == ids
            assert (stream.targets[b, k, len(ids):] == pad_id).all()
            for slot in np.flatnonzero(stream.mask[b, k]):
                context = reads(stream, rows[k, slot], stream.col[b, k, slot])
                assert context == list(enumerate(prompt + ids[:slot]))
    assert (stream.tokens[stream.segment == 0] == pad_id).all() and ((stream.prefix > 0) == (stream.segment > 0)).all()
    # No slot, scored or not, points outside the rows of its group.
    assert (stream.row < stream.tokens.shape[0] // stream.groups).all() and (stream.col < stream.tokens.shape[1]).all()


def test_padded_by_hand():
    batch = padded([A, B], K=2, T=7, L=4, pad_id=0)
    pair = batch.streams["pair"]
    assert pair.groups == 2 and pair.tokens.dtype == pair.row.dtype == np.int32 and pair.mask.dtype == bool
    assert pair.tokens.tolist() == [[1, 5, 6, 7, 8, 2, 0], [1, 5, 6, 9, 2, 0, 0], [1, 7, 2, 0, 0, 0, 0], [0] * 7]
    assert pair.segment.tolist() == [[1] * 6 + [0], [1] * 5 + [0] * 2, [1] * 3 + [0] * 4, [0] * 7]
    assert pair.position[0].tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert pair.row[0].tolist() == [[0, 0, 0, 0], [1, 1, 0, 0]]
    assert pair.col[0].tolist() == [[2, 3, 4, 0], [2, 3, 0, 0]]
    assert pair.targets[0].tolist() == [[7, 8, 2, 0], [9, 2, 0, 0]]
    assert pair.mask.sum(-1).tolist() == [[3, 2], [2, 0]] and pair.valid.tolist() == [[True, True], [True, False]]
    assert batch.data["labels"].tolist() == [[1, 0], [0, 0]] and batch.data["margins"].tolist() == [0, 1.5]
    assert batch.data["weights"].tolist() == [1, 1] and "scores" not in batch.data
    assert batch.ids.dtype == np.uint32 and batch.ids.tolist() == [record_number("a"), record_number("b")]


def test_shared_prefix_by_hand():
    pair = shared_prefix([A], K=2, T=10, L=3, pad_id=0).streams["pair"]
    assert pair.tokens.tolist() == [[1, 5, 6, 7, 8, 2, 9, 2, 0, 0]] and pair.groups == 1
    assert pair.segment.tolist() == [[1, 1, 1, 2, 2, 2, 3, 3, 0, 0]]
    assert pair.prefix.tolist() == [[1, 1, 1, 1, 1, 1, 1, 1, 0, 0]]
    assert pair.position.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 0, 0]]
    assert pair.row.sum() == 0 and pair.col.tolist() == [[[2, 3, 4], [2, 6, 0]]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pad_and_end_token_may_be_the_same(layout):
    pair = LAYOUTS[layout]([A, B], K=2, T=9, L=3, pad_id=2).streams["pair"]
    check_stream(pair, [A, B], 2)
    assert pair.mask.sum() == 7  # the end tokens are scored although they equal the pad


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.tuples(TEXT, st.lists(TEXT.filter(bool), min_size=1, max_size=3)), min_size=1, max_size=3),
       layout=st.sampled_from(sorted(LAYOUTS)), bos=st.booleans())
def test_masks_cover_exactly_the_completions(byte_tokenizer, texts, layout, bos):
    policy = text_policy(byte_tokenizer, bos="<bos>" if bos else None)
    records = [Record(str(i), prompt, tuple(completions)) for i, (prompt, completions) in enumerate(texts)]
    tokens = tokenize_records(records, byte_tokenizer, policy, ledger=Ledger())
    T, L = bucket_shape(tokens, (8, 4), layout=layout)
    batch = LAYOUTS[layout](tokens, K=3, T=T, L=L, pad_id=0)
    stream = batch.streams["pair"]
    check_stream(stream, tokens, 0)
    for b, record in enumerate(records):
        for k, text in enumerate(record.completions):
            ids = stream.targets[b, k, :len(tokens[b].completions[k])]
            assert byte_tokenizer.decode([*byte_tokenizer.encode_prompt(record.prompt), *ids]) == record.prompt + text
            assert ids[-1] == policy.eos_id


def test_an_empty_prompt_is_scored_from_bos_and_without_it_from_the_second_token(byte_tokenizer):
    record = Record("a", "", ("the cat",))
    for policy, lost in ((text_policy(byte_tokenizer), 0), (TextPolicy(None, 2), 1)):
        tokens = tokenize_records([record], byte_tokenizer, policy, ledger=Ledger())
        length = tokens[0].longest
        for layout in LAYOUTS.values():
            stream = layout(tokens, K=1, T=12, L=12, pad_id=0).streams["pair"]
            assert stream.mask.sum() == length - lost and stream.mask[0, 0, 0] == (not lost)


def test_scores_are_given_when_every_record_has_them():
    scored = [token_record(name, [1], [[5], [6]][:count], scores=[2.0, 1.0][:count])
              for name, count in (("a", 2), ("b", 1))]
    assert padded(scored, K=2, T=4, L=2, pad_id=0).data["scores"].tolist() == [[2, 1], [2, 0]]
    assert "scores" not in padded([*scored, A], K=2, T=8, L=4, pad_id=0).data


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scored_tokens_alone_are_in_the_mask(layout):
    turns = (np.array([True, False, True]), np.array([False, True]))
    pair = LAYOUTS[layout]([dataclasses.replace(A, scored=turns), B], K=2, T=9, L=3, pad_id=0).streams["pair"]
    assert pair.mask.tolist() == [[[True, False, True], [False, True, False]], [[True, True, False], [False] * 3]]
    whole = LAYOUTS[layout]([A, B], K=2, T=9, L=3, pad_id=0).streams["pair"]
    for name in ("tokens", "segment", "prefix", "position", "row", "col", "targets"):
        np.testing.assert_array_equal(getattr(pair, name), getattr(whole, name))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mismatched_rotates_completions_under_the_same_prompts(layout):
    C = token_record("c", [1, 4], [[3, 2]], eos_ids=[2])
    rotated = mismatched([A, B, C])
    assert [r.id for r in rotated] == ["a", "b", "c"]
    assert all(r.prompt is s.prompt for r, s in zip(rotated, [A, B, C], strict=True))
    assert [r.completions for r in rotated] == [B.completions, C.completions, A.completions]
    T, L = bucket_shape([A, B, C, *rotated], 4, layout=layout)
    batch = LAYOUTS[layout]([A, B, C], K=2, T=T, L=L, pad_id=0, extra={"mismatched": rotated})
    check_stream(batch.streams["mismatched"], rotated, 0)
    check_stream(batch.streams["pair"], [A, B, C], 0)
    with pytest.raises(ConfigError, match="1 record.*at least 2"):
        mismatched([A])
    with pytest.raises(ConfigError, match="extra stream 'pair'"):
        LAYOUTS[layout]([A, B], K=2, T=8, L=4, pad_id=0, extra={"pair": [A, B]})


@pytest.mark.parametrize("layout, T", [("padded", 6), ("shared_prefix", 8), ("packed", 6), ("shared_prefix_packed", 8)])
def test_layouts_never_cut(layout, T):
    fits = {"K": 2, "T": T, "L": 3}
    LAYOUTS[layout]([A], **fits, pad_id=0)
    for name in fits:
        with pytest.raises(DataError, match=rf"f.jsonl:1: {layout}: the record needs {name} >= {fits[name]}"):
            LAYOUTS[layout]([A], **fits | {name: fits[name] - 1}, pad_id=0)
    with pytest.raises(DataError, match="no completions"):
        LAYOUTS[layout]([token_record("p", [1], [])], **fits, pad_id=0)


def test_buckets():
    assert [bucket(length, 8) for length in (0, 1, 8, 9)] == [8, 8, 8, 16]
    assert [bucket(length, [16, 4, 64]) for length in (3, 4, 5, 60)] == [4, 4, 16, 64]
    assert bucket_shape([A, B], (4, 2)) == (8, 4) and bucket_shape([A, B], 1, layout="shared_prefix") == (8, 3)
    with pytest.raises(ConfigError, match=r"65.*\[16, 64\]"):
        bucket(65, [64, 16])
    with pytest.raises(ConfigError, match="multiple is 0"):
        bucket(1, 0)
