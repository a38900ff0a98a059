"""Pairs that people compared: Anthropic HH, summarise-from-feedback, SHP, PKU-SafeRLHF, OpenAssistant trees."""

from __future__ import annotations

import re

from alignax.data.formats.base import Fields, Format, Place, Unusable, having, record, uses
from alignax.data.messages import ASSISTANT, Dialogue, Message
from alignax.data.records import Record

HUMAN, ANSWER = "\n\nHuman:", "\n\nAssistant:"


def split_hh(dialogue: str, fields: Fields, name: str) -> tuple[str, str]:
    """(prompt up to and with the last "\\n\\nAssistant:", the text behind it); DataError on another shape."""
    if not dialogue.startswith((HUMAN, ANSWER)):
        raise fields.fail(name, f"expected a dialogue that begins with {HUMAN!r}, found {dialogue[:40]!r}")
    head, turn, answer = dialogue.rpartition(ANSWER)
    if not turn:
        raise fields.fail(name, f"no turn {ANSWER!r} in the dialogue {dialogue[-60:]!r}")
    return head + turn, answer


def _hh(fields: Fields, place: Place) -> list[Record]:
    (prompt, chosen), (other, rejected) = (split_hh(fields.text(name), fields, name) for name in ("chosen", "rejected"))
    if prompt != other:
        raise Unusable(place, "the two dialogues differ before their last turn")
    if HUMAN in chosen or HUMAN in rejected:
        raise Unusable(place, "a dialogue ends with a human turn")
    return [record(place, prompt, (chosen, rejected))]


def hh_turns(text: str) -> Dialogue:
    """Messages of "\\n\\nHuman: ...\\n\\nAssistant: ..." text, each stripped of the white space around it.

    A trailing empty "\\n\\nAssistant:" is no turn.
    """
    parts = re.split(r"\n\n(Human|Assistant):", text)
    turns = [Message("user" if who == "Human" else ASSISTANT, said.strip())
             for who, said in zip(parts[1::2], parts[2::2], strict=True)]
    return tuple(turns[:-1] if turns and turns[-1] == Message(ASSISTANT, "") else turns)


def _hh_messages(fields: Fields, place: Place) -> list[Record]:
    [pair] = _hh(fields, place)
    answers = [(Message(ASSISTANT, answer.strip()),) for answer in pair.completions]
    return [record(place, hh_turns(pair.prompt), answers)]


def _summaries(fields: Fields, place: Place) -> list[Record]:
    info, summaries = fields.inside("info"), fields.each("summaries", 2)
    if len(summaries) != 2:
        raise fields.fail("summaries", f"expected 2, found {len(summaries)}")
    best = fields.choice("choice", (0, 1))
    if info.has("post"):
        prompt = (f"SUBREDDIT: r/{info.text('subreddit')}\nTITLE: {info.text('title')}\n"
                  f"POST: {info.text('post')}\nTL;DR:")
    else:
        title = f"Title: {info.text('title')}\n\n" if info.has("title") else ""
        prompt = f"{title}Article: {info.text('article', empty=False)}\n\nTL;DR:"
    texts = [summary.text("text") for summary in summaries]
    models = [summary.text("policy") if summary.has("policy") else None for summary in summaries]
    return [record(place, prompt, (texts[best], texts[1 - best]), models=(models[best], models[1 - best]))]


def _shp(fields: Fields, place: Place) -> list[Record]:
    best, other = ("A", "B") if fields.choice("labels", (0, 1)) else ("B", "A")
    scores = [fields.number(f"score_{side}") for side in (best, other)]
    texts = [fields.text(f"human_ref_{side}") for side in (best, other)]
    return [record(place, fields.text("history"), texts, aspects=[{"upvotes": score} for score in scores])]


def _safe_rlhf(which: str):
    def parse(fields: Fields, place: Place) -> list[Record]:
        best = fields.choice(which, (0, 1))
        answers = [fields.text(f"response_{k}") for k in (0, 1)]
        safe = [fields.choice(f"is_response_{k}_safe", (True, False)) for k in (0, 1)]
        return [record(place, fields.text("prompt"), (answers[best], answers[1 - best]),
                       aspects=[{"safe": float(safe[k])} for k in (best, 1 - best)])]
    return parse


_ROLES = {"prompter": "user", "assistant": ASSISTANT}


def _replies(node: Fields, path: Dialogue, place: Place, out: list[Record]) -> None:
    turn = Message(_ROLES[node.choice("role", tuple(_ROLES))], node.text("text"))
    path = (*path, turn)
    replies = node.each("replies") if node.has("replies") else []
    ranked = [reply for reply in replies if reply.has("rank") and reply.values.get("role") == "assistant"]
    if turn.role == "user" and len(ranked) > 1:
        answers = [(Message(ASSISTANT, reply.text("text")),) for reply in ranked]
        out.append(record(place, path, answers, scores=[-reply.number("rank") for reply in ranked]))
    for reply in replies:
        _replies(reply, path, place, out)


def _oasst(fields: Fields, place: Place) -> list[Record]:
    out: list[Record] = []
    try:
        _replies(fields.inside("prompt"), (), place, out)
    except RecursionError as error:
        raise fields.fail("prompt", "the tree is nested too deeply") from error
    if not out:
        raise Unusable(place, "no turn with two ranked replies")
    return out


_HH_SOURCE = "Anthropic/hh-rlhf, arXiv 2204.05862; MIT"
_SAFE = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
_SAFE_SOURCE = "PKU-Alignment/PKU-SafeRLHF, arXiv 2307.04657 and 2406.15513; CC BY-NC 4.0"


def _is_hh(fields) -> bool:
    return set(fields) == {"chosen", "rejected"} and not any(isinstance(value, list) for value in fields.values())


FORMATS = (
    Format("hh", "Two dialogues as text, split exactly at their last \"\\n\\nAssistant:\": prompt + completion is the "
           "file's text byte for byte. Left out, and counted: dialogues that differ earlier, empty answers.",
           _HH_SOURCE, _hh, _is_hh, uses("chosen", "rejected")),
    Format("hh_messages", "As `hh`, as messages: turns are split at \"\\n\\nHuman:\" and \"\\n\\nAssistant:\" and "
           "stripped of white space.", _HH_SOURCE, _hh_messages, _is_hh, uses("chosen", "rejected"), automatic=False),
    Format("summarize_feedback", "A Reddit post (or news article) and two summaries, `choice` the better one. The "
           "prompt is the paper's SUBREDDIT / TITLE / POST / TL;DR: form. Left out: workers, confidence, batches.",
           "openai/summarize_from_feedback, comparisons, arXiv 2009.01325; modified MIT", _summaries,
           having("info", "summaries", "choice"),
           uses("choice", "split", info=("post", "subreddit", "title", "article"), summaries=("text", "policy"))),
    Format("shp", "A Reddit post (`history`) and two comments; labels = 1 where A is preferred. Upvotes go to "
           "extra.aspects. Left out: post ids, domains, times, upvote ratios.",
           "stanfordnlp/SHP, arXiv 2110.08420; see its card, and Reddit's API terms", _shp,
           having("history", "human_ref_A", "human_ref_B", "labels"),
           uses("history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B")),
    Format("pku_better", "Two answers, the more helpful one (better_response_id) first; safety goes to extra.aspects. "
           "Left out: the safer one (format `pku_safer`), harm categories, severities, sources.", _SAFE_SOURCE,
           _safe_rlhf("better_response_id"), having(*_SAFE, "better_response_id"),
           uses(*_SAFE, "better_response_id")),
    Format("pku_safer", "As `pku_better`, with the safer answer (safer_response_id) first.", _SAFE_SOURCE,
           _safe_rlhf("safer_response_id"), having(*_SAFE, "safer_response_id"), uses(*_SAFE, "safer_response_id"),
           automatic=False),
    Format("oasst_trees", "One message tree: every prompter turn with at least two ranked assistant replies is a list "
           "in the order of `rank` (0 is best), score -rank. Left out: labels, emojis, users, unranked replies.",
           "OpenAssistant/oasst1 and oasst2, files *.trees.jsonl.gz, arXiv 2304.07327; Apache-2.0", _oasst,
           lambda fields: isinstance(fields.get("prompt"), dict) and "message_tree_id" in fields,
           uses(prompt=("text", "role", "replies", "rank"))),
)
