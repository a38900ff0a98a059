"""Problems with checkable answers, and solutions labelled step by step."""

from __future__ import annotations

from alignax.data.formats.base import Fields, Format, Place, Unusable, having, record, uses
from alignax.data.records import Record

MARK = "ки"  # ends every step in Math-Shepherd's `input`; `label` has + or - in its place


def _gsm8k(fields: Fields, place: Place) -> list[Record]:
    solution = fields.text("answer", empty=False)
    _, mark, answer = solution.rpartition("####")
    if not mark or not answer.strip():
        raise fields.fail("answer", f"expected a last line '#### number', found {solution[-40:]!r}")
    return [record(place, fields.text("question"), (solution,), answer=answer.strip())]


def _gsm8k_solutions(fields: Fields, place: Place) -> list[Record]:
    truth = fields.text("ground_truth", empty=False)
    _, mark, answer = truth.rpartition("A:")
    if not mark or not answer.strip():
        raise fields.fail("ground_truth", f"expected a last line 'A: number', found {truth[-40:]!r}")
    systems = [name for name in fields.values if name not in ("question", "ground_truth")]
    if not systems:
        raise fields.fail("ground_truth", "no system's solution beside it")
    parts = [fields.inside(name) for name in systems]
    labels = [float(part.choice("is_correct", (True, False))) for part in parts]
    return [record(place, fields.text("question"), [part.text("solution") for part in parts], labels=labels,
                   models=systems, answer=answer.strip(), solution=truth)]


def boxed(solution: str) -> str | None:
    r"""What the last \boxed{...} (or \fbox{...}) of a solution holds, braces balanced; None where there is none."""
    start = max(solution.rfind("\\boxed{"), solution.rfind("\\fbox{"))
    if start < 0:
        spaced = solution.rfind("\\boxed ")
        return None if spaced < 0 else solution[spaced + 7:].split("$")[0].strip() or None
    start, depth = solution.index("{", start) + 1, 1
    for end in range(start, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if not depth:
            return solution[start:end]
    return None


def _math(fields: Fields, place: Place) -> list[Record]:
    solution = fields.text("solution", empty=False)
    answer = fields.text("answer") if fields.has("answer") else boxed(solution)
    if answer is None:
        raise fields.fail("solution", f"no \\boxed answer in it and no field 'answer': {solution[-60:]!r}")
    level = fields.get("level") if fields.has("level") else None
    return [record(place, fields.text("problem"), (solution,), answer=answer, level=level)]


def _math_shepherd(fields: Fields, place: Place) -> list[Record]:
    text, label = fields.text("input", empty=False), fields.text("label", empty=False)
    pieces = text.split(MARK)
    if len(pieces) < 2:
        raise fields.fail("input", f"no step mark {MARK!r} in it")
    signs, at = [], 0
    for piece in pieces[:-1]:
        at += len(piece)
        if label[at - len(piece):at] != piece or label[at:at + 1] not in ("+", "-"):
            raise fields.fail("label", f"expected the text of 'input' with + or - for {MARK!r}; differs at character "
                                       f"{at - len(piece)}")
        signs.append(float(label[at] == "+"))
        at += 1
    if label[at:].strip() != pieces[-1].strip():
        raise fields.fail("label", "goes on after the last step of 'input'")
    start = pieces[0].find("Step 1:")
    if start < 0:
        raise fields.fail("input", "no 'Step 1:' in it, where the solution begins")
    prompt, solution, steps = pieces[0][:start], "", []
    for piece, sign in zip([pieces[0][start:], *pieces[1:-1]], signs, strict=True):
        solution += piece
        steps.append((len(solution.rstrip()), sign))
    return [record(place, prompt, (solution.rstrip(),), labels=(signs[-1],), steps=(steps,))]


def _prm800k(fields: Fields, place: Place) -> list[Record]:
    question, label = fields.inside("question"), fields.inside("label")
    solution, steps = "", []
    for step in label.each("steps"):
        options = step.each("completions") if step.has("completions") else []
        chosen = step.values.get("chosen_completion")
        if chosen is None and step.has("human_completion"):
            human = step.values["human_completion"]
            said = (step.text("human_completion") if isinstance(human, str) else
                    step.inside("human_completion").text("text"))
            rating = None
        elif options:
            if chosen is not None and not (type(chosen) is int and 0 <= chosen < len(options)):
                raise step.fail("chosen_completion", f"expected null or 0 to {len(options) - 1}, found {chosen!r:.80}")
            option = options[chosen or 0]
            said, rating = option.text("text"), option.number("rating") if option.has("rating") else None
        else:
            raise step.fail("completions", "the step has no completion")
        if rating is not None and rating not in (-1, 0, 1):
            raise step.fail("rating", f"expected -1, 0, 1 or null, found {rating:g}")
        solution += ("\n" if solution else "") + said
        steps.append((len(solution), rating))
        if rating == -1:
            break
    if not steps or all(rating is None for _, rating in steps):
        raise Unusable(place, "no rated step")
    answer = question.text("ground_truth_answer") if question.has("ground_truth_answer") else None
    right = float(steps[-1][1] != -1 and label.choice(
        "finish_reason", ("solution", "found_error", "give_up", "bad_problem")) == "solution")
    return [record(place, question.text("problem", empty=False), (solution,), labels=(right,), steps=(steps,),
                   answer=answer)]


FORMATS = (
    Format("gsm8k", "A problem and its worked solution that ends in `#### answer`; the answer goes to extra.answer.",
           "openai/gsm8k, arXiv 2110.14168; MIT", _gsm8k,
           lambda f: "question" in f and "####" in str(f.get("answer", "")), uses("question", "answer")),
    Format("gsm8k_solutions", "A problem with several systems' solutions (an object {solution, is_correct} each): a "
           "list with labels, the systems' names in extra.models, the reference in extra.solution and extra.answer.",
           "openai/grade-school-math, example_model_solutions, arXiv 2110.14168; MIT", _gsm8k_solutions,
           having("question", "ground_truth"), None),
    Format("math", "A problem and its solution with the answer in the last \\boxed{}, or in `answer`; the answer goes "
           "to extra.answer. Left out: type or subject, unique_id.",
           "hendrycks/competition_math, arXiv 2103.03874; MIT", _math, having("problem", "solution"),
           uses("problem", "solution", "answer", "level")),
    Format("math_shepherd", "One solution whose steps end in the mark \u043a\u0438, `label` the same text with + or - "
           "for each mark: extra.steps holds (end, 1 or 0) with the marks removed; the completion's label is that of "
           "its last step. Left out: task.",
           "peiyi9979/Math-Shepherd, arXiv 2312.08935; licence not stated", _math_shepherd,
           having("input", "label", "task"), uses("input", "label")),
    Format("prm800k", "One solution along the chosen steps, up to the first step rated -1: extra.steps holds (end, "
           "rating -1, 0 or 1, or null where a person wrote the step). The label is 1 where it ends in a solution "
           "without a bad step. Left out: the steps not chosen, labellers, times.",
           "openai/prm800k, arXiv 2305.20050; MIT", _prm800k, having("question", "label", "labeler"),
           uses(question=("problem", "ground_truth_answer"), label=("steps", "finish_reason"))),
)
