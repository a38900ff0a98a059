"""The reproductions: their docstrings, the verdict, the page, the bandits they share, and a few run in small."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from alignax import losses
from alignax.models.decoder import init_params
from alignax.types import ConfigError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.papers import all as papers  # noqa: E402  (needs the path)
from experiments.papers import (  # noqa: E402
    compare_losses,
    gradient_entanglement,
    gradient_field,
    grokking_tickets,
    harness,
    implicit_explicit,
    overoptimisation,
    simpo_length,
    squeezing,
    texts,
    variants_by_start,
    worlds,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", papers.NAMES)
def test_every_docstring_has_its_parts(name):
    module = importlib.import_module(f"experiments.papers.{name}")
    title, text = papers.parts(module.__doc__)
    assert set(text) == set(harness.LABELS) and title
    assert text["Command"] == f"python -m experiments.papers.{name}"


def test_a_missing_part_is_named():
    with pytest.raises(ValueError, match="no paragraph Published, Here, Command"):
        papers.parts("Title.\n\nClaim: x.\n")


def test_the_list_is_the_folder():
    """A file that nobody runs, or a name without a file, is a mistake."""
    helpers = {"__init__", "all", "harness", "worlds", "texts"}
    helpers |= {"compare_on_quickstart", "quickstart_runs", "quickstart_page"}  # half an hour, with a page of its own
    assert {path.stem for path in (ROOT / "experiments/papers").glob("*.py")} - helpers == set(papers.NAMES)


def test_the_verdict_is_counted():
    assert harness.verdict({"a": True, "b": True})[0] == "reproduced"
    assert harness.verdict({"a": True, "b": np.bool_(False)}) == ("partly", "holds: a; does not hold: b")
    assert harness.verdict({"a": False})[0] == "not"


def test_intervals():
    mean, half = harness.mean_ci([1.0, 2.0, 3.0, float("nan")])
    assert mean == 2 and half == pytest.approx(4.302652729911275 / 3 ** 0.5)
    assert np.isnan(harness.mean_ci([1.0])[1])


def test_reading_at_a_kl():
    """Between two records in proportion; NaN where the level is never reached."""
    kl = np.array([[0.0, 1.0, 3.0], [0.0, 0.5, 0.9]])
    found = harness.at_kl(kl, np.array([[0.0, 10.0, 20.0], [0.0, 1.0, 2.0]]), 2.0)
    assert found[0] == 15 and np.isnan(found[1])


def test_bandits():
    """Two different responses, scores that belong to them, the better first without noise, and flips at their rate."""
    place = worlds.world(jax.random.key(0), 4, 6)
    np.testing.assert_allclose(place.reward.mean(1), 0, atol=1e-6)
    clean = worlds.draw(jax.random.key(1), place, 2000, scale=jnp.inf)
    assert (clean.chosen != clean.rejected).all() and (clean.scores[:, 0] > clean.scores[:, 1]).all()
    np.testing.assert_array_equal(clean.scores[:, 1], place.reward[clean.prompt, clean.rejected])
    turned = worlds.draw(jax.random.key(1), place, 2000, scale=jnp.inf, flip=0.3)
    assert float((turned.scores[:, 0] < turned.scores[:, 1]).mean()) == pytest.approx(0.3, abs=0.04)
    assert float(worlds.ranking_accuracy(place.log_ref + place.reward, place)) == pytest.approx(1)
    assert float(worlds.ranking_accuracy(place.log_ref - place.reward, place)) == pytest.approx(0)
    pairs, weight = worlds.all_pairs(place, 1.0)
    assert float(weight.sum()) == pytest.approx(4 * 6 * 5 / 2)  # p and 1 - p of every pair


def test_squeezing_factors():
    """The catalogue's numbers, and their opposite order under a positive gradient."""
    p = jnp.array([0.55, 0.25, 0.15, 0.04, 0.01])
    np.testing.assert_allclose(squeezing.factors(p, 4, 1.0), [1.160, 0.860, 0.778, 0.697, 0.249], atol=6e-4)
    assert (np.diff(np.asarray(squeezing.factors(p, 4, -1.0))[:4]) > 0).all()


def test_the_gradient_field_is_the_formula():
    """-beta x2^beta / (x1 (x1^beta + x2^beta)) and beta x2^(beta - 1) / (x1^beta + x2^beta)."""
    x1, x2, beta = np.array([0.1, 1.0, 1.9]), np.array([1.5, 1.0, 0.2]), 0.3
    d1, d2 = gradient_field.slopes(x1, x2, beta)
    np.testing.assert_allclose(d1, -beta * x2 ** beta / (x1 * (x1 ** beta + x2 ** beta)), rtol=1e-12)
    np.testing.assert_allclose(d2, beta * x2 ** (beta - 1) / (x1 ** beta + x2 ** beta), rtol=1e-12)


@pytest.mark.parametrize("basis", ["log", "square"])
def test_the_law_recovers_its_coefficients(basis):
    d = np.linspace(0.1, 5, 40)
    gain = d * (2.0 - 0.3 * (np.log(d) if basis == "log" else d))
    found, error = overoptimisation.law(d, gain, basis)
    np.testing.assert_allclose(found, [2.0, 0.3], rtol=1e-9)
    assert error < 1e-9


def test_a_setting_is_chosen_on_the_other_seeds():
    """The setting that is best for one seed alone does not report its own luck."""
    kl = np.broadcast_to(np.array([0.0, 2.0]), (2, 3, 2))
    reward = np.zeros((2, 3, 2))
    reward[0, :, 1], reward[1, :, 1] = [0.6, 0.6, 0.6], [0.0, 0.0, 1.5]
    curves = {"kl": kl, "reward": reward, "chosen": -reward, "entropy": reward}
    assert compare_losses.held_out(curves, 2.0)["reward"].tolist() == [0.0, 0.0, 0.6]
    assert np.isnan(compare_losses.held_out(curves, 3.0)["reward"]).all()


def test_best_of_n_and_the_best_policy():
    """Best-of-1 is the reference; no best-of-n lies above the best policy at its KL."""
    kl, reward, bon_kl, bon_reward = (x[0] for x in compare_losses.exact(1))
    assert abs(bon_kl[0]) < 1e-4
    assert (np.interp(bon_kl, kl, reward) >= bon_reward - 2e-3)[1:].all()


def test_strengths_are_hyper_parameters():
    from alignax.diagnostics import toy

    for name in toy.usable():
        assert set(compare_losses.strength(name)) <= set(losses.defaults(name)), name
    assert compare_losses.strength("ipo") == ("tau",) and compare_losses.strength("simper") == ()


CONFIG = texts.decoder(texts.EXTRA, width=8, layers=1)


@pytest.fixture(scope="module")
def reviews():
    """(parameters of a small decoder at random, another, pairs of its samples of unequal length)."""
    one, other = (init_params(CONFIG, jax.random.key(i)) for i in (0, 1))
    prompts = jnp.concatenate([jnp.full((6, 1), texts.START),
                               texts.words(jax.random.key(2), jnp.arange(6) % 2, 2)], 1).astype(jnp.int32)
    drawn = [texts.sample(CONFIG, one, jax.random.key(3 + i), prompts, 12) for i in (0, 1)]
    return one, other, texts.Pairs(*(jnp.stack(x, 1) for x in zip(*drawn, strict=True)))


def test_samples_end_where_they_say(reviews):
    """A completion is its tokens up to the first END; prompts and what follows END are outside the mask."""
    _, _, pairs = reviews
    for tokens, mask in zip(np.asarray(pairs.tokens).reshape(-1, 15), np.asarray(pairs.mask).reshape(-1, 15),
                            strict=True):
        ends = np.flatnonzero(tokens[3:] == texts.END)
        length = ends[0] + 1 if ends.size else 12
        assert mask.tolist() == [False] * 3 + [True] * length + [False] * (12 - length)
        assert (tokens[3 + length:] == texts.END).all()
    assert len({int(n) for n in pairs.mask.sum(-1).reshape(-1)}) > 1


def test_words_have_their_polarity():
    tokens = jnp.array([texts.PRAISE, texts.PRAISE + 7, texts.BLAME, texts.NEUTRAL, texts.START, texts.EXTRA])
    assert texts.polarity(tokens).tolist() == [1, 1, -1, 0, 0, 0]
    drawn = texts.words(jax.random.key(0), jnp.ones(2000), 4, agree=0.8, low=2, high=4)
    assert float((texts.polarity(drawn) == 1).mean()) == pytest.approx(0.4, abs=0.02)
    assert set(np.unique(drawn[texts.polarity(drawn) == -1])) == {texts.BLAME + 2, texts.BLAME + 3}


def test_what_a_loss_gets_from_sequences(reviews):
    """Sums and KLs against a loop over tokens; at the reference TDPO and DPO are log 2; what follows END is unread."""
    one, other, pairs = reviews
    log_pi, ref = (texts.log_policy(CONFIG, p, pairs.tokens) for p in (one, other))
    found = texts.supply(("logps", "ref_policy_kl", "mask", "lengths"), log_pi, ref, pairs)
    a, b, tokens, mask = (np.asarray(x, np.float64) for x in (log_pi, ref, *pairs))
    for row in np.ndindex(6, 2):
        places = [t for t in range(14) if mask[row][t + 1]]
        assert float(found["logps"][row]) == pytest.approx(
            sum(a[row][t][int(tokens[row][t + 1])] for t in places), rel=1e-5)
        assert int(found["lengths"][row]) == len(places)
        for t in places:
            assert float(found["ref_policy_kl"][row][t]) == pytest.approx(
                (np.exp(b[row][t]) * (b[row][t] - a[row][t])).sum(), rel=1e-3, abs=1e-6)
    for name in ("dpo", "tdpo", "tdpo:tdpo1"):
        assert float(texts.value(losses.get(name), log_pi, log_pi, pairs)) == pytest.approx(np.log(2))
        weights = jnp.array([0.0, 1, 0, 0, 0, 0])
        alone = texts.Pairs(*(x[1:2] for x in pairs))
        assert float(texts.value(losses.get(name), log_pi, ref, pairs, weights=weights)) == pytest.approx(
            float(texts.value(losses.get(name), log_pi[1:2], ref[1:2], alone)), rel=1e-5)
    spoilt = pairs._replace(tokens=jnp.where(pairs.mask | (jnp.arange(15) < 3)[None, None], pairs.tokens, 5))
    np.testing.assert_allclose(texts.sums(CONFIG, one, spoilt), texts.sums(CONFIG, one, pairs), rtol=1e-5)
    with pytest.raises(ConfigError, match="cannot supply scores"):
        texts.supply(("scores",), log_pi, ref, pairs)


def test_a_shared_suffix_is_all_that_the_cases_differ_in():
    """One contrasting token, then as many scored tokens as the case says, the same on both sides."""
    for suffix in gradient_entanglement.CASES.values():
        pairs = gradient_entanglement.labelled(jax.random.key(0), 5, suffix)
        assert (pairs.mask.sum(-1) == 1 + suffix).all()
        differ = pairs.tokens[:, 0] != pairs.tokens[:, 1]
        assert (differ.sum(-1) == 1).all() and (differ & pairs.mask[:, 0]).any(-1).all()


def test_length_statistics():
    """Longer completions with less log-prob per token correlate at -1; a winner is judged by the loss's own reward."""
    lengths = np.array([[[2, 4], [8, 4]]])
    logps = -np.array([[[[2.0, 4], [8, 4]], [[3.0, 9], [40, 4]]]])  # mean log-probs -1 throughout, then falling
    assert simpo_length.correlation(logps[:, 1:], lengths)[0, 0] < -0.5
    found = {"logps": logps, "lengths": lengths}
    assert simpo_length.accuracy(found, "SimPO") == {"shorter": [1], "longer": [0]}
    assert simpo_length.accuracy({**found, "logps": logps[:, :1] * [[[1, 1], [1, 3]]]},
                                 "without normalisation") == {"shorter": [1], "longer": [1]}


def test_preferences_prefer_praise():
    """The pairs of two studies: well-formed, the chosen with more praise on average, or always where ranked."""
    data = variants_by_start.preferences(jax.random.key(0), 400)
    assert (data.tokens[..., variants_by_start.TOPIC + 2] == variants_by_start.REPLY).all()
    praise = (texts.polarity(data.tokens) * data.mask).sum(-1)
    assert float((praise[:, 0] - praise[:, 1]).mean()) > 1
    ranked, kept = implicit_explicit.pairs(jax.random.key(1), 200, which=implicit_explicit.NEW, opposite=True)
    praise = (texts.polarity(ranked.tokens) * ranked.mask).sum(-1)
    assert (praise[:, 0] >= praise[:, 1]).all() and ((praise[:, 0] > praise[:, 1]) == kept).all()
    prompt = ranked.tokens[:, 0, 1:1 + implicit_explicit.PROMPT]
    assert float(texts.polarity(prompt).sum()) < 0 and (ranked.tokens[:, 1, 1:4] == prompt).all()


def test_one_program_trains_by_any_of_several_losses(reviews):
    """Number `which` of them gives what the loss alone gives, and every record is looked at in its place."""
    one, _, pairs = reviews
    several = [losses.get("dpo", beta=0.5), losses.get("tdpo", beta=0.5)]
    look = lambda p: texts.sums(CONFIG, p, pairs)
    go = lambda loss, which: texts.train(loss, CONFIG, one, pairs, look=look, steps=4, every=2, lr=1e-2, which=which)
    both = jax.jit(lambda n: jax.lax.map(lambda i: go(several, i), n))(jnp.arange(2))
    for i, loss in enumerate(several):
        params, seen = jax.jit(lambda loss=loss: go(loss, 0))()
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=2e-4, atol=2e-5), both, (params, seen))
        np.testing.assert_allclose(seen[0], look(one), rtol=1e-5)
        np.testing.assert_allclose(seen[-1], look(params), rtol=1e-5)
    assert float(jnp.abs(both[1][0] - both[1][1]).max()) > 1e-3  # and the two are not the same
    with pytest.raises(ConfigError, match="must divide"):
        texts.train(several, CONFIG, one, pairs, look=look, steps=3, every=2, lr=1e-2)


def test_each_slice_is_computed_once_and_in_its_place():
    keys = jax.random.split(jax.random.key(0), 3)
    found = harness.each(lambda key, x: {"draw": jax.random.normal(key), "double": 2 * x}, keys, np.arange(3))
    assert found["double"].tolist() == [0, 2, 4]
    np.testing.assert_allclose(found["draw"], [jax.random.normal(key) for key in keys], rtol=1e-6)


SMALL = grokking_tickets.SMALL._replace(modulus=11, embedding=8, width=8, steps=20, every=5)


def test_the_sums_are_split_once_and_masked_weights_stay_out():
    """Every unordered pair in one of the parts, with its sum; weights outside a mask are 0 at every record."""
    parts = grokking_tickets.data(jax.random.key(0), SMALL)
    terms = [np.nonzero(row)[0].tolist() for counts, _ in parts for row in np.asarray(counts)]
    assert sorted(terms) == [[a, b] for a in range(11) for b in range(a + 1, 11)] and len(parts[0][1]) == 33
    assert [sum(t) % 11 for t in terms] == np.concatenate([sums for _, sums in parts]).tolist()
    first = grokking_tickets.start(jax.random.key(1), SMALL)
    draws = np.random.default_rng(0)
    mask = jax.tree.map(lambda x: (draws.random(x.shape) < 0.5).astype(np.float32), first)
    go = jax.jit(lambda decay: grokking_tickets.train(jax.random.key(0), first, mask, decay, SMALL))
    path, seen = go(0.0)
    assert seen.shape == (5, 2) and jax.tree.leaves(path)[0].shape[0] == 5
    for name, weights in path.items():
        assert (np.asarray(weights)[:, mask[name] == 0] == 0).all()
        np.testing.assert_allclose(weights[0], first[name] * mask[name])
    last = jax.tree.map(lambda x: x[-1], path)
    counts, sums = parts[1]
    assert float(seen[-1, 1]) == pytest.approx(float((grokking_tickets.scores(last, counts).argmax(-1) == sums).mean()))
    decayed = jax.tree.map(lambda x: x[-1], go(5.0)[0])
    assert grokking_tickets.norm(decayed) < grokking_tickets.norm(last)


def test_the_starts_and_masks_of_the_second_runs():
    """Largest weights of the whole network; the random mask has as many in every matrix; the scaled start has the
    ticket's norm; the early ticket is that of the first record at which the training pairs are fitted."""
    draws = np.random.default_rng(1)
    path = {name: draws.normal(size=(3, 10, n)).astype(np.float32) for name, n in (("a", 4), ("b", 6))}
    first = {name: draws.normal(size=x.shape[1:]).astype(np.float32) for name, x in path.items()}
    seen = np.array([[0.1, 0.1], [0.97, 0.2], [1.0, 1.0]])
    starts, masks = grokking_tickets.second_runs(first, path, seen, 0.6, 0)
    for mask, record in ((masks[3], 1), (masks[4], 2)):
        size = np.concatenate([np.abs(x[record]).reshape(-1) for x in path.values()])
        ones = np.concatenate([mask[name].reshape(-1) for name in path])
        assert ones.sum() == 40 and size[ones > 0].min() > size[ones == 0].max()
    assert all((masks[2][n].sum() == masks[4][n].sum()) and (masks[2][n] != masks[4][n]).any() for n in path)
    assert grokking_tickets.norm(starts[1]) == pytest.approx(
        grokking_tickets.norm(jax.tree.map(np.multiply, first, masks[4])), rel=1e-5)
    assert all((s[n] == first[n]).all() for s in (starts[0], *starts[2:]) for n in path)
    accuracy = np.array([[[0, 0], [1, 0], [1, 0.96]], [[0, 0], [1, 0], [1, 0.94]]])
    assert grokking_tickets.delays(accuracy, 50).tolist() == [50, np.inf]


@pytest.mark.parametrize("names", [("h_dpo", "gradient_field")])
def test_the_page(names, tmp_path, monkeypatch):
    """Runs of two in small make a page whose figures exist and are small; a second run keeps the first's reports."""
    monkeypatch.setattr(harness, "OUT", tmp_path / "runs")
    console = Console(file=(tmp_path / "log").open("w"))
    for name in names:
        assert papers.main(["--quick", "--out", str(tmp_path), "--only", name], console) == 0
    page = (tmp_path / "reproductions.md").read_text(encoding="utf-8")
    assert set(json.loads((tmp_path / "reproductions/reports.json").read_text(encoding="utf-8"))) == set(names)
    for name in names:
        figure = tmp_path / f"reproductions/{name}.png"
        assert f"(reproductions/{name}.png)" in page and 5_000 < figure.stat().st_size < harness.PNG_LIMIT
    assert page.count("**Verdict:") == 2
    with pytest.raises(SystemExit):
        papers.main(["--quick"])


@pytest.mark.parametrize("name", ["ipo_deterministic", "odpo", "reference_strength", "squeezing", "grokking_tickets"])
def test_reproductions_run_in_small(name, tmp_path):
    """A few of them, each a kind of its own; `python -m experiments.papers.all --quick --out FOLDER` runs all."""
    found = importlib.import_module(f"experiments.papers.{name}").run(tmp_path, quick=True)
    assert found["verdict"] in harness.VERDICTS and found["published"] and found["ours"]
    for figure in found["figures"]:
        assert figure.is_file() and figure.with_suffix(".svg").is_file()


def test_the_written_page_agrees_with_its_reports():
    """docs/reproductions.md is what its stored reports make; docstring changes need `all` to be run again."""
    store = ROOT / "docs/reproductions/reports.json"
    reports = json.loads(store.read_text(encoding="utf-8"))
    assert (ROOT / "docs/reproductions.md").read_text(encoding="utf-8") == papers.document(reports)
    for report in reports.values():
        for figure in report["figures"]:
            assert (store.parent / figure).stat().st_size <= harness.PNG_LIMIT
