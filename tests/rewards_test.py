"""The lexicon reward and Bradley-Terry preference draws."""

import numpy as np
import pytest

from alignax.data import stories
from alignax.rewards import NEGATIVE, POSITIVE, bradley_terry_pairs, lexicon_reward
from alignax.types import ConfigError, DataError


def test_lexicon_counts_whole_words():
    texts = ["He smiled. HAPPY happy!", "she cried , sad and scared .", "unhappy happiness", "", "happy-sad",
             "happy_sad5"]
    reward = lexicon_reward(texts)
    assert reward.tolist() == [1 + 2, -3, 0, 0, 1 - 1, 1 - 1] and reward.dtype == np.float32
    assert lexicon_reward([]).shape == (0,)


def test_lists_are_disjoint_and_hold_the_stories_mood_words():
    assert not POSITIVE & NEGATIVE and len(POSITIVE) >= 55 and len(NEGATIVE) >= 55
    assert {word for words in stories._FILL["good"].values() for word in words} <= POSITIVE
    assert {word for words in stories._FILL["bad"].values() for word in words} <= NEGATIVE


def test_the_winner_is_drawn_with_the_bradley_terry_probability():
    n, gap, scale = 40_000, 0.7, 1.5
    pairs = bradley_terry_pairs(np.tile([0.3, 0.3 + gap], (n, 1)), np.random.default_rng(0), scale)
    expected = 1 / (1 + np.exp(-scale * gap))
    assert abs((pairs.chosen == 1).mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / n)
    assert pairs.flipped == (pairs.chosen == 0).sum() and pairs.ties == 0
    assert np.array_equal(pairs.chosen + pairs.rejected, np.ones(n))


def test_scale_zero_is_a_coin_and_infinity_the_sign():
    scores = np.random.default_rng(1).normal(size=(20_000, 2))
    coin = bradley_terry_pairs(scores, np.random.default_rng(0), 0.0)
    assert abs(coin.flipped / 20_000 - 0.5) < 4 * 0.5 / np.sqrt(20_000)
    scores[0] = 1e300, -1e300
    sign = bradley_terry_pairs(scores, np.random.default_rng(0), np.inf)
    assert sign.flipped == 0 and np.array_equal(sign.chosen, scores.argmax(1))


def test_strategies():
    scores = np.asarray([[1.0, 9.0, 5.0], [4.0, 0.0, 2.0]])
    best = bradley_terry_pairs(scores, np.random.default_rng(0), np.inf)
    assert best.chosen.tolist() == [1, 0] and best.rejected.tolist() == [0, 1] and best.prompt.tolist() == [0, 1]
    every = bradley_terry_pairs(scores, np.random.default_rng(0), np.inf, strategy="all")
    assert list(zip(every.prompt.tolist(), every.chosen.tolist(), every.rejected.tolist(), strict=True)) == [
        (0, 1, 0), (0, 2, 0), (0, 1, 2), (1, 0, 1), (1, 0, 2), (1, 2, 1)]
    some = bradley_terry_pairs(np.tile(scores[:1], (3000, 1)), np.random.default_rng(0), np.inf, strategy="random")
    counts = np.bincount(some.chosen + some.rejected, minlength=4)  # sums 1, 2, 3 name the pairs 01, 02, 12
    assert counts[0] == 0 and (np.abs(counts[1:] - 1000) < 4 * np.sqrt(3000 * 2 / 9)).all()


def test_ties_do_not_favour_an_index():
    pairs = bradley_terry_pairs(np.zeros((9000, 3)), np.random.default_rng(0), np.inf)
    assert pairs.ties == 9000 and pairs.flipped == 0 and (pairs.chosen != pairs.rejected).all()
    assert (np.abs(np.bincount(pairs.chosen, minlength=3) - 3000) < 4 * np.sqrt(9000 * 2 / 9)).all()


def test_identical_texts_are_never_paired_and_counted():
    scores = np.asarray([[2.0, 2.0, 1.0], [3.0, 3.0, 3.0]])
    texts = [["a", "a", "b"], ["c", "c", "c"]]
    for strategy, expected in (("best_worst", 1), ("random", 1), ("all", 2)):
        pairs = bradley_terry_pairs(scores, np.random.default_rng(0), np.inf, strategy=strategy, texts=texts)
        assert pairs.prompt.tolist() == [0] * expected and pairs.rejected.tolist() == [2] * expected
        assert pairs.identical == 1 + 3 and pairs.without_pair == 1


def test_draws_do_not_depend_on_the_strategy_or_later_prompts():
    scores = np.random.default_rng(2).normal(size=(6, 2))
    first, second = (bradley_terry_pairs(scores, np.random.default_rng(5), strategy=s) for s in ("best_worst", "all"))
    assert np.array_equal(first.chosen, second.chosen)
    longer = bradley_terry_pairs(np.concatenate([scores, scores]), np.random.default_rng(5))
    assert np.array_equal(longer.chosen[:6], first.chosen)


@pytest.mark.parametrize("arguments, error, words", [
    ({"strategy": "middle"}, ConfigError, "'middle'.*best_worst"), ({"scale": -1.0}, ConfigError, "-1.0"),
    ({"scale": np.nan}, ConfigError, "nan"), ({"scores": [[1.0, np.nan]]}, DataError, r"scores\[0, 1\] is nan"),
    ({"scores": [1.0, 2.0]}, DataError, r"\(2,\)"), ({"scores": [[1.0]]}, DataError, r"\(1, 1\)"),
    ({"texts": [["a"]]}, DataError, "1 rows of"),
])
def test_bad_arguments_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        bradley_terry_pairs(**{"scores": [[1.0, 2.0]], "rng": np.random.default_rng(0)} | arguments)
