"""The chapter docs/losses.md: every loss of the index with its formula, inputs, defaults, relatives and pictures.

Command: python experiments/docs/losses.py --check | --write [--text-only]
Cost: seconds for the text, about two minutes on two cores for the figures. Expected result: --check says whether the
chapter agrees with the code (exit status 1 where it does not; figures are not compared), --write makes it and, without
--text-only, the figures in docs/losses/.

All words come from the code: a family's introduction is its module's docstring, a loss's text its own, taken apart
into the formula, notes, the source and what is left out. Relations are those of loss_relations.py.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import loss_figures
from loss_relations import RELATIONS, Relation

from alignax import losses
from alignax.losses.parts import KINDS
from alignax.types import REQUESTS

ROOT = Path(__file__).resolve().parents[2]
CHAPTER = ROOT / "docs" / "losses.md"
COMMAND = "python experiments/docs/losses.py --write"

# How a sentence about something other than the formula begins.
_SHAPES = re.compile(
    r"(All|Token|All token)? ?[Aa]rrays\b|Shapes|Terms,|Returns|(One|Two|Three|Four) terms?\b|\[B|Defaults|"
    rf"(?:{'|'.join(REQUESTS)})\b[^:.;]*[:,]")
_MATH = re.compile(r"[=^]|\b(sp|log|exp|relu|KL|max|min|sigmoid|softmax|smoothed logistic)\b ?[(a-z]|"
                   r"\bsp\(|log\(|-sg|-exp| \+ | - |-A |-R |-min")


class Text(NamedTuple):
    """A docstring taken apart: paragraphs of the formula, notes, where it comes from, what is not in it."""

    formula: tuple[str, ...]
    notes: tuple[str, ...]
    source: str
    left_out: str


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph; an initial (`E. Mitchell`) ends none unless a new heading follows."""
    pieces = re.split(r"(?<=[.;:]) (?=Source\b|Left out:|Raises )|(?<=[^.A-Z][.]|[)\]`][.]) (?=[A-Z`\[(])|"
                      rf"(?<=[^.A-Z][.]|[)\]`][.]) (?=(?:{'|'.join(REQUESTS)})\b[,:(])", paragraph)
    return [piece.strip() for piece in pieces if piece.strip()]


def take_apart(docstring: str) -> Text:
    """The parts of a loss's docstring; sentences that begin with `Raises` are left to the code.

    The formula is the first paragraph and, where that holds none or ends in a colon, the sentences after it up to the
    first that is about shapes, terms or the source.
    """
    raw = [p.strip("\n") for p in re.split(r"\n\s*\n", inspect.cleandoc(docstring))]
    paragraphs = [" ".join(p.split()) for p in raw]
    formula: list[str] = []
    notes: list[str] = []
    source: list[str] = []
    left_out: list[str] = []
    open_formula = True
    for number, paragraph in enumerate(paragraphs):
        own_formula: list[str] = []
        own_notes: list[str] = []
        in_source = False
        for place, sentence in enumerate(sentences(paragraph)):
            if sentence.startswith("Left out:"):
                left_out.append(sentence.removeprefix("Left out:").strip())
                in_source = False
            elif sentence.startswith("Raises "):
                in_source = False
            elif re.match(r"Source( as| of|:)", sentence) or in_source:
                source.append(re.sub(r"^Source:? ", "", sentence))
                in_source = True
            elif open_formula and (number == place == 0 or (number and not _SHAPES.match(sentence))):
                own_formula.append(sentence)
            else:
                open_formula = False
                own_notes.append(sentence)
        if own_formula:
            # A whole paragraph keeps its lines; of a part, every sentence has its own.
            formula.append(raw[number] if " ".join(own_formula) == paragraph else "\n".join(own_formula))
        notes += [" ".join(own_notes)] if own_notes else []
        whole = " ".join(formula)
        if number == 0 and _MATH.search(whole) and not whole.endswith(":"):
            open_formula = False
    return Text(tuple(formula), tuple(notes), " ".join(source), " ".join(left_out))


def plain(text: str) -> str:
    """Text of a docstring as Markdown: what would be markup is escaped, code in backticks stays.

    An underscore inside a word and brackets that no parenthesis follows are no markup.
    """
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([\\*<>|]|(?<!\w)_|_(?!\w)|\](?=\())", r"\\\1", p)
                   for p in pieces)


def families() -> dict[str, list[str]]:
    """Family file -> ids of its losses, both in the order of the index."""
    out: dict[str, list[str]] = {}
    for name, function in losses.INDEX.items():
        out.setdefault(function.__module__.rpartition(".")[2], []).append(name)
    return out


def anchor(name: str) -> str:
    """The name that a loss has as a place in the chapter."""
    return "loss-" + name.replace(":", "-").replace("_", "-")


def link(name: str) -> str:
    """A loss's id as a link to its section."""
    return f"[`{name}`](#{anchor(name)})"


def value(x: Any) -> str:
    """A default as it stands in the signature."""
    return repr(x)


def setting(hyper: Mapping[str, Any]) -> str:
    """`key = value, ...` in backticks; empty without any."""
    return ", ".join(f"`{key} = {value(x)}`" for key, x in hyper.items())


def paper(arxiv: str) -> str:
    """A link to the paper; a dash without one."""
    return f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else "-"


def relation_text(relation: Relation) -> str:
    """One line of "reduces to"."""
    right = " + ".join((f"{weight:g} x " if weight != 1 else "") + link(name)
                       + (f" ({setting(hyper)})" if hyper else "") for weight, name, hyper in relation.right)
    where = [setting(relation.hyper), relation.when]
    condition = "; ".join(part for part in where if part)
    return f"{right}" + (f" where {condition}" if relation.hyper else f" for {condition}" if condition else "")


def _rows(header: str, rows: Iterator[tuple[str, ...]] | list[tuple[str, ...]]) -> list[str]:
    columns = header.split(" | ")
    return ["| " + header + " |", "|" + "---|" * len(columns), *("| " + " | ".join(row) + " |" for row in rows), ""]


def _table() -> list[str]:
    def row(name: str, function: Callable) -> tuple[str, ...]:
        requests, hyper = losses.split_signature(function)
        return (link(name), f"`{function.__name__}`", f"`{function.__module__.rpartition('.')[2]}.py`",
                ", ".join(requests), ", ".join(f"{k} = {value(v)}" for k, v in hyper.items()) or "none",
                paper(function.info.arxiv), function.info.fidelity)

    return _rows("id | function | file | inputs | defaults | arXiv | formula",
                 [row(*item) for item in losses.INDEX.items()])


def _inputs_table() -> list[str]:
    used = {name for function in losses.INDEX.values() for name in losses.split_signature(function)[0]}

    def row(name: str) -> tuple[str, ...]:
        request = REQUESTS[name]
        axes = f"[{', '.join(request.axes)}]" if request.axes else "-"
        return (f"`{name}`", axes, request.dtype, request.provider, "yes" if request.grad else "no",
                plain(request.about))

    return _rows("input | axes | type | comes from | gradient | what it is", [row(n) for n in REQUESTS if n in used])


def _facts(function: Callable) -> str:
    info = function.info
    count = "any number of completions" if info.completions is None else f"{info.completions} completions"
    facts = [f"arXiv {paper(info.arxiv)}" if info.arxiv else "no arXiv paper", f"formula: {info.fidelity}",
             "the chosen completion alone" if info.chosen_only else count]
    if info.couples_batch:
        facts.append("depends on the whole batch")
    if info.init_state is not None:
        facts.append("keeps a running state")
    return "; ".join(facts) + "."


def _loss(name: str, function: Callable) -> list[str]:
    requests, hyper = losses.split_signature(function)
    text = take_apart(function.__doc__)
    limits = [f"`{low:g} <= {key} <= {high:g}`" for key, (low, high) in function.info.limits.items()]
    same = [relation_text(r) for r in RELATIONS if r.name == name]
    twins = [f"{link(r.name)}" for r in RELATIONS if any(right == name for _, right, _ in r.right)]
    out = [f'<a id="{anchor(name)}"></a>', f"### {name}", "", f"{plain(function.info.system)}: {_facts(function)}", "",
           "```text", *(short for p in text.formula for line in p.splitlines() for short in _wrapped(line)), "```", ""]
    for note in text.notes:
        out += [plain(note), ""]
    out += [f"- Requests: {', '.join(f'`{r}`' for r in requests)}.",
            f"- Defaults: {setting(hyper) or 'none'}." + (f" Limits: {', '.join(limits)}." if limits else "")]
    if text.source:
        source = plain(text.source).replace("see the module.", "see the module, whose text opens this family.")
        out.append(f"- Source: {source}")
    if text.left_out:
        out.append(f"- Left out: {plain(text.left_out)}")
    if same:
        out.append("- Reduces to: " + "; ".join(same) + ".")
    if twins:
        out.append("- A special case of: " + ", ".join(dict.fromkeys(twins)) + ".")
    return [*out, ""]


def _wrapped(paragraph: str, width: int = 120) -> list[str]:
    """Lines of at most `width` characters, broken before labels (`; value: `), then at spaces with an indent of two."""
    if len(paragraph) > width and len(parts := re.split(r"(?<=;) (?=\w+: )", paragraph)) > 1:
        return [line for part in parts for line in _wrapped(part, width)]
    lines, line = [], ""
    for word in paragraph.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = "  " + word
        else:
            line = f"{line} {word}" if line else word
    return [*lines, line]


def _family(family: str, names: list[str]) -> list[str]:
    module = importlib.import_module(f"alignax.losses.{family}")
    first, *rest = inspect.cleandoc(module.__doc__).split("\n\n")
    out = [f"## {family}", "", plain(" ".join(first.split())), ""]
    for paragraph in rest:
        formula = paragraph.startswith("    ")
        out += ["```text", inspect.cleandoc(paragraph), "```", ""] if formula else [plain(" ".join(paragraph.split())),
                                                                                 ""]
    drawn = [name for name in names if not loss_figures.why_not(name)]
    if drawn:
        for stem in loss_figures.pages(family, drawn):
            out += [f"![Loss landscapes of the family {family}](losses/{stem}.svg)", ""]
        out += [f"![Loss and slope along the margin, family {family}](losses/margin_{family}.svg)", ""]
    missing = [name for name in names if name not in drawn]
    if missing:
        out += ["Not drawn: " + "; ".join(f"{link(n)} ({loss_figures.why_not(n)})" for n in missing) + ".", ""]
    for name in names:
        out += _loss(name, losses.INDEX[name])
    return out


def _composed() -> list[str]:
    def row(kind: str, name: str, part: Callable) -> tuple[str, ...]:
        known = inspect.signature(part).parameters.values()
        hyper = ", ".join(f"{p.name} = {value(p.default)}" for p in known if p.kind is p.KEYWORD_ONLY)
        asked = ", ".join(p.name for p in known if p.kind is p.POSITIONAL_OR_KEYWORD and p.name in REQUESTS)
        return kind, f"`{name}`", plain(" ".join(inspect.cleandoc(part.__doc__).split())), asked or "-", hyper or "none"

    parts = importlib.import_module("alignax.losses.parts")
    first, formula, *rest = inspect.cleandoc(parts.__doc__).split("\n\n")
    return ["## Losses made of parts", "", plain(" ".join(first.split())), "", "```text", inspect.cleandoc(formula),
            "```", "", *(line for p in rest for line in (plain(" ".join(p.split())), "")),
            *_rows("kind | part | what it is | inputs | defaults",
                   [row(kind, name, part) for kind, table in KINDS.items() for name, part in table.items()]),
            "A weighted sum of losses is written `dpo+0.2*sft`, in Python "
            '`losses.weighted_sum({"dpo": 1.0, "sft": 0.2})`.', ""]


def chapter() -> str:
    """The text of docs/losses.md."""
    groups = families()
    out = [
        "# Losses", "",
        f"Made from the code by `{COMMAND}`; not edited by hand. {len(losses.INDEX)} losses in {len(groups)} families:",
        "", *(f"- [{family}](#{family.replace('_', '_')}): " + ", ".join(link(n) for n in names)
              for family, names in groups.items()),
        "- [Losses made of parts](#losses-made-of-parts): `compose` and weighted sums", "",
        "`losses.get(id, **hyper)` gives a loss, `alignax.losses.<function>` the pure function; ids and function "
        "names are accepted alike. B prompts, K completions of a prompt, L completion tokens; completion 0 of a pair "
        "is chosen, 1 rejected. Formulas are those of the docstrings: sp = softplus, sg = no gradient; a family's "
        "introduction names its other symbols.", "",
        "The column *formula* says what it was taken from: the paper, official code, third-party code, or neither "
        "(reconstruction).", "",
        "*Reduces to* states equalities of the reduced loss in value. `python experiments/docs/loss_relations.py` "
        f"checks all {len(RELATIONS)} of them on random inputs in float64.", "",
        "## All losses", "", *_table(), "## Inputs", "",
        "What a loss may ask for; nothing else is computed.", "", *_inputs_table(),
        "## How to read the figures", "", loss_figures.LEGEND, "",
    ]
    for family, names in groups.items():
        out += _family(family, names)
    return "\n".join([*out, *_composed()]).rstrip() + "\n"


def check(path: Path) -> str:
    """"" where the file holds `chapter()`, else one line that names the first difference."""
    if not path.is_file():
        return f"{path.name} does not exist; run {COMMAND}"
    found, wanted = path.read_text(encoding="utf-8").splitlines(), chapter().splitlines()
    if found == wanted:
        return ""
    place = next((i for i, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]),
                 min(len(found), len(wanted)))
    line = lambda lines: repr(lines[place][:100]) if place < len(lines) else "the end"
    return f"{path.name}:{place + 1}: found {line(found)}, the code says {line(wanted)}; run {COMMAND}"


def main(arguments: list[str] | None = None) -> int:
    """Check or write; 1 where the check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare docs/losses.md with the code, figures aside")
    action.add_argument("--write", action="store_true", help="write docs/losses.md and the figures")
    parser.add_argument("--text-only", action="store_true", help="with --write: leave the figures as they are")
    parser.add_argument("--family", action="append", help="with --write: draw the figures of this family only")
    parser.add_argument("--out", type=Path, default=CHAPTER, help="the chapter's file (default: docs/losses.md)")
    options = parser.parse_args(arguments)
    if options.check:
        problem = check(options.out)
        print(problem or f"{options.out.name} agrees with the code")
        return int(bool(problem))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(chapter(), encoding="utf-8")
    if not options.text_only:
        for path in loss_figures.draw(families(), options.out.parent / "losses", only=options.family):
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
