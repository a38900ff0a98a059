"""The suite of seeded mistakes: its table fits the tree, its page is whole, and it can tell seen from unseen."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "mutations.md"


@pytest.fixture(scope="module")
def made():
    """experiments/docs/mutations.py as a module, which imports its neighbour."""
    sys.path.insert(0, str(ROOT / "experiments" / "docs"))
    try:
        return importlib.import_module("mutations")
    finally:
        sys.path.pop(0)


def test_every_mistake_has_its_place(made):
    """The old text stands exactly once, the new one is another, and names are unique."""
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in {m.file for m in made.MUTANTS}}
    assert {m.name: n for m in made.MUTANTS if (n := sources[m.file].count(m.old)) != 1} == {}
    assert all(m.old != m.new for m in made.MUTANTS)
    names = [m.name for m in made.MUTANTS]
    assert len(names) == len(set(names)) >= 40


def test_mistakes_leave_files_that_compile(made):
    """A mistake that cannot be imported would be found by any test."""
    for mutant in made.MUTANTS:
        source = (ROOT / mutant.file).read_text(encoding="utf-8")
        compile(source.replace(mutant.old, mutant.new), mutant.file, "exec")


def test_the_tests_that_are_named_exist(made):
    for mutant in made.MUTANTS:
        assert made.test_files(mutant), mutant.name
        for part in mutant.tests:
            file, _, function = part.partition("::")
            if file.startswith("tests/"):
                text = (ROOT / file).read_text(encoding="utf-8")
                assert not function or f"def {function.split('[')[0]}(" in text, part


def test_the_page_lists_every_mistake_and_no_survivor(made):
    rows = re.findall(r"^\| ([a-z0-9-]+) \| .+ \| `(\S+)` \| (.+) \| \d+ \|$", PAGE.read_text(encoding="utf-8"), re.M)
    assert [(name, file) for name, file, _ in rows] == [(m.name, m.file) for m in made.MUTANTS]
    assert [name for name, _, seen in rows if not re.fullmatch(r"`tests/\S+::.+`", seen)] == []


def test_outcomes_are_read_from_pytest(made):
    output = ("F\n===== short test summary info =====\nFAILED tests/a_test.py::test_x[1 2-b] - assert 1 == 2\n"
              "ERROR tests/b_test.py::test_y\n1 failed, 1 error in 0.1s\n")
    assert made.failed_tests(output) == ["tests/a_test.py::test_x[1 2-b]", "tests/b_test.py::test_y"]
    assert made.failed_tests("3 passed in 0.2s\n") == []


def test_what_no_name_matches_is_refused(made):
    assert [m.name for m in made.selected(["beta-tw*"])] == ["beta-twice"]
    assert made.selected([]) == list(made.MUTANTS)
    with pytest.raises(SystemExit, match="no such mistake"):
        made.selected(["beta-thrice"])


@pytest.mark.slow
def test_three_mistakes_are_seen_and_what_is_none_is_not(made, tmp_path, monkeypatch):
    """With them a change without effect, a text that is not there, and a file that does not compile."""
    chosen = made.selected(["schedule-ends-late", "logistic-sign", "resume-skips-a-batch"])
    real = chosen[0]
    more = [real._replace(name="none", new=real.old + "  # the same"), real._replace(name="absent", old="no such text"),
            real._replace(name="unreadable", new="rest = (")]
    console = made.Console(quiet=True)
    found = made.run_all([*chosen, *more], tmp_path, console, fresh=False)
    states = {name: outcome.state for name, outcome in found.items()}
    assert states == {m.name: made.KILLED for m in chosen} | {"none": made.SURVIVED, "absent": made.ABSENT,
                                                              "unreadable": made.BROKEN}
    assert found["resume-skips-a-batch"].test == "tests/data_test.py::test_a_plan_resumes_only_as_itself"
    # The copy is as it was, and what was seen is not run again.
    assert (tmp_path / "copy" / real.file).read_bytes() == (ROOT / real.file).read_bytes()
    monkeypatch.setattr(made, "run_one", lambda *_: pytest.fail("run again"))
    monkeypatch.setattr(made, "control", lambda outcomes, _: outcomes)
    again = made.run_all(chosen, tmp_path, console, fresh=False)
    assert again == {name: found[name] for name in again}


def test_a_test_that_always_fails_has_shown_nothing(made, monkeypatch, tmp_path):
    kinds = {"good": made.Outcome(made.KILLED, "tests/a_test.py::test_x", 1.0),
             "bad": made.Outcome(made.KILLED, "tests/b_test.py::test_y", 1.0),
             "late": made.Outcome(made.LATE, "", 300.0)}
    monkeypatch.setattr(made, "pytest", lambda *_: (1, "FAILED tests/b_test.py::test_y - boom\n"))
    out = made.control(kinds, tmp_path)
    assert (out["good"], out["late"]) == (kinds["good"], kinds["late"])
    assert out["bad"].state == made.BROKEN and out["bad"].test == "fails anyway: tests/b_test.py::test_y"
