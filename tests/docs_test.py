"""The chapter of losses: it agrees with the code, loses no sentence, and states relations that hold."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from alignax import losses
from alignax.losses.info import method

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "experiments" / "docs"


@pytest.fixture(scope="module")
def made():
    """The scripts of experiments/docs: (chapter, figures, relations)."""
    # The chapter's script is called losses: loaded under a name of its own, its siblings found by the path.
    import importlib.util

    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("loss_chapter", FOLDER / "losses.py")
        chapter = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = chapter
        spec.loader.exec_module(chapter)
        yield chapter, sys.modules["loss_figures"], sys.modules["loss_relations"]
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("loss_chapter", "loss_figures", "loss_relations"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def text(made):
    return made[0].chapter()


def section(text, name):
    """The lines of one loss."""
    return text.split(f"\n### {name}\n")[1].split("\n<a id=")[0].split("\n## ")[0]


def words(text):
    return re.findall(r"[\w']+", text)


def test_the_chapter_agrees_with_the_code(made):
    assert made[0].check(made[0].CHAPTER) == ""


def test_check_and_write(made, tmp_path, capsys):
    chapter, out = made[0], tmp_path / "docs" / "losses.md"
    run = lambda *arguments: chapter.main([*arguments, "--out", str(out)])
    assert run("--check") == 1 and "does not exist" in capsys.readouterr().out
    assert run("--write", "--text-only") == 0 and run("--check") == 0
    assert not (out.parent / "losses").exists()
    lines = out.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if "Defaults: `beta = 0.1`" in line)
    lines[place] = lines[place].replace("0.1", "0.2")
    out.write_text("\n".join(lines))
    capsys.readouterr()
    assert run("--check") == 1
    assert f"losses.md:{place + 1}: found '- Defaults: `beta = 0.2`" in capsys.readouterr().out
    out.write_text("\n".join([*lines[:place], "- Defaults: `beta = 0.1`, `label_smoothing = 0.0`."]))
    assert "found the end" in chapter.check(out)


def test_every_loss_has_its_row_and_its_section(text):
    table = text.split("## All losses")[1].split("## Inputs")[0]
    for name, function in losses.INDEX.items():
        requests, hyper = losses.split_signature(function)
        row = next(line for line in table.splitlines() if line.startswith(f"| [`{name}`]"))
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 7 and cells[1] == f"`{function.__name__}`" and cells[3] == ", ".join(requests), name
        assert cells[4] == (", ".join(f"{k} = {v!r}" for k, v in hyper.items()) or "none"), name
        assert cells[6] == function.info.fidelity and function.info.arxiv in cells[5], name
        own = section(text, name)
        assert all(f"`{request}`" in own for request in requests), name
        assert all(f"`{key} = {value!r}`" in own for key, value in hyper.items()), name
        assert len(own.split("```text\n")[1].split("\n```")[0].strip()) > 10, f"{name}: no formula"


def test_no_word_of_a_docstring_is_lost(text):
    for name, function in losses.INDEX.items():
        docstring = re.sub(r"\bRaises [^.]*\.", "", " ".join(function.__doc__.split()))
        docstring = docstring.replace("Left out: ", "")
        docstring = re.sub(r"\bSource:? (?!there)", "", docstring)
        found = words(section(text, name).replace("\\", ""))
        lost = [word for word in set(words(docstring)) if found.count(word) < words(docstring).count(word)]
        assert not lost, f"{name}: {lost}"


def test_links_lead_somewhere(text):
    anchors = set(re.findall(r'<a id="([^"]*)">', text))
    heads = {line[3:].lower().replace(" ", "-") for line in text.splitlines() if line.startswith("## ")}
    targets = set(re.findall(r"\]\(#([^)]*)\)", text))
    assert len(anchors) == len(losses.INDEX) and targets <= anchors | heads
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert len(pictures) > 10
    for picture in pictures:
        file = ROOT / "docs" / picture
        assert file.is_file(), f"{picture}: run python experiments/docs/losses.py --write"
        assert file.stat().st_size < 200_000, picture


def test_a_docstring_is_taken_apart(made):
    take_apart = made[0].take_apart
    one = take_apart("""Name: sp(-beta D), D = a - b; [B, 2] -> [B].

    logps: [B, 2]. Mean over pairs. Source: E. Mitchell's note (A. B. Author), and arXiv 1.2. Their defaults
    differ. Left out: lists of S. Raises ConfigError for nothing. A last remark.
    """)
    assert one.formula == ("Name: sp(-beta D), D = a - b; [B, 2] -> [B].",)
    assert one.notes == ("logps: [B, 2]. Mean over pairs. A last remark.",)
    assert one.source == "E. Mitchell's note (A. B. Author), and arXiv 1.2. Their defaults differ."
    assert one.left_out == "lists of S."
    two = take_apart("""A method.

    z = max(0, x).
    good: 1 - sigmoid(z); bad: sigmoid(z).

    All arrays [B, K]. Source as `dpo`.
    """)
    assert two.formula == ("A method.", "z = max(0, x).\ngood: 1 - sigmoid(z); bad: sigmoid(z).")
    assert two.notes == ("All arrays [B, K].",) and two.source == "as `dpo`."


def test_markup_is_escaped(made):
    plain = made[0].plain
    assert plain("s_j* of [B, K] and `a_*`, _x_ [1](2)") == r"s_j\* of [B, K] and `a_*`, \_x\_ [1\](2)"
    assert plain("p(c | y_<t)") == r"p(c \| y\_\<t)"


def test_relations_name_losses_and_keys_that_exist(made, text):
    relations = made[2].RELATIONS
    assert len(relations) > 80
    for relation in relations:
        losses.get(relation.name, **relation.hyper)
        for _, name, hyper in relation.right:
            losses.get(name, **hyper)
            assert f"](#{made[0].anchor(name)})" in section(text, relation.name).split("Reduces to:")[1]
    line = next(line for line in section(text, "cal_dpo").splitlines() if "Reduces to" in line)
    assert line == ("- Reduces to: [`dpo`](#loss-dpo) (`beta = 1.0`) + [`sppo:hard`](#loss-sppo-hard) "
                    "(`beta = 0.001`).")


def test_a_relation_can_fail(made):
    relations = made[2]
    assert relations.difference(relations.is_("h_dpo", "dpo", {"beta": 0.01}, alpha=1.0)) < relations.LIMIT
    assert relations.difference(relations.is_("h_dpo", "dpo", {"beta": 0.01}, alpha=0.99)) > 1e-6


@pytest.mark.slow
def test_relations_hold(made):
    relations = made[2]
    wrong = [f"{relation.name} {dict(relation.hyper)}: {gap}" for relation in relations.RELATIONS
             if not (gap := relations.difference(relation)) < relations.LIMIT]
    assert not wrong, wrong


def test_what_is_drawn(made, monkeypatch):
    figures = made[1]
    assert figures.why_not("dpo") == figures.why_not("kto") == ""
    assert figures.why_not("tdpo") == "needs token_logps, ref_token_logps, ref_policy_kl, mask"
    values, gradients = figures.value_and_gradient("dpo", np.array([[0.0, 0.0], [20.0, -10.0]]))
    np.testing.assert_allclose(values, [np.log(2), np.log1p(np.exp(-3))], rtol=1e-12)
    slope = 0.1 / (1 + np.exp(3))
    np.testing.assert_allclose(gradients, [[-0.05, 0.05], [-slope, slope]], rtol=1e-12)
    assert figures.pages("f", ["a"] * 20) == {"landscape_f": ["a"] * 18, "landscape_f_2": ["a"] * 2}
    mark = method(id="x", system="X", arxiv="", fidelity="paper")
    monkeypatch.setattr(losses, "INDEX", {"x": mark(lambda scores: scores)})
    assert figures.why_not("x") == "reads no log-probs"


def test_a_compact_picture_keeps_its_numbers(made):
    svg = '<path d="M 1.26 2.001 \nL -0.04 3" transform="scale(0.015625)"/><svg width="792.123pt" version="1.1234">'
    assert made[1].compact(svg) == ('<path d="M 1.3 2 -0 3" transform="scale(0.02)"/>'
                                    '<svg width="792.123pt" version="1.1234">')


@pytest.mark.slow
def test_figures_are_reproducible(made, tmp_path):
    pytest.importorskip("matplotlib")
    draw = lambda folder: made[1].draw({"trial": ["dpo", "slic_hf"], "none": ["tdpo"]}, tmp_path / folder)
    first, second = draw("a"), draw("b")
    assert [path.name for path in first] == ["landscape_trial.svg", "margin_trial.svg"]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes() and "dc:date" not in one.read_text()
        assert "slic_hf" in one.read_text()
