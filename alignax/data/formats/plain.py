"""This project's own layouts, ShareGPT's dialogues, and TOFU's questions for unlearning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from alignax.data.formats.base import Fields, Format, Place, having, record, uses
from alignax.data.messages import ASSISTANT, Message, trained_turns
from alignax.data.records import CONTENT, LAYOUTS, META, Record, from_json

_JSON_CELLS = ("completions", "scores", "labels", "label", "margin", "messages", "tools", "extra")
_SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT,
             "assistant": ASSISTANT, "tool": "tool", "observation": "tool", "function_call": ASSISTANT}


def _plain(fields: Fields, place: Place) -> list[Record]:
    values = dict(fields.values)
    if fields.decode:  # CSV: an empty cell is an absent field, and what is no text stands as JSON in its cell
        for name in _JSON_CELLS:
            if name in values and values[name] == "":
                del values[name]
            elif name in values:
                try:
                    values[name] = json.loads(values[name])
                except (ValueError, RecursionError) as error:
                    raise fields.fail(name, f"expected JSON in the cell, found {values[name]!r:.80}") from error
    return [from_json(values, place.file, place.line)]


def _is_plain(fields: Mapping[str, Any]) -> bool:
    """Whether the row has one of the plain layouts; prompts and texts alone only without unknown fields beside them,
    which may well be answers under another name."""
    present = CONTENT & fields.keys()
    if present in ({"prompt"}, {"text"}) and not fields.keys() <= CONTENT | META:
        return False
    if present == {"chosen", "rejected"} and not any(isinstance(fields[name], list) for name in present):
        return False
    return any(required <= present and present <= required | optional for required, optional in LAYOUTS)


def _sharegpt(fields: Fields, place: Place) -> list[Record]:
    turns = []
    for said in fields.each("conversations", 1):
        who = said.choice("from", tuple(_SPEAKERS))
        turns.append(Message(_SPEAKERS[who], said.text("value")))
    if fields.has("system") and turns[0].role != "system":
        turns.insert(0, Message("system", fields.text("system")))
    prompt, rest = trained_turns(tuple(turns), str(place), "conversations")
    return [record(place, prompt, (rest,))]


def _tofu(fields: Fields, place: Place) -> list[Record]:
    extra: dict[str, Any] = {}
    for name in ("paraphrased_question", "paraphrased_answer"):
        if fields.has(name):
            extra[name] = fields.text(name)
    if fields.has("perturbed_answer"):
        extra["perturbed_answers"] = fields.texts("perturbed_answer", 1)
    return [record(place, fields.text("question"), (fields.text("answer", empty=False),), **extra)]


FORMATS = (
    Format("alignax", "This project's own layouts (see alignax/data/records.py): prompt with chosen and rejected, with "
           "completions, with completion and label, alone; text; messages; as texts or as messages.",
           "alignax", _plain, _is_plain, uses(*sorted(CONTENT | META))),
    Format("sharegpt", "A dialogue to train on: conversations of {from, value}, with an optional system text.",
           "ShareGPT's form, used by many sets of dialogues; licences differ", _sharegpt, having("conversations"),
           uses("system", conversations=("from", "value"))),
    Format("tofu", "A question about an invented author and its answer; paraphrases and perturbed answers go to extra. "
           "Which rows are to be forgotten is said by the file, not by the row.",
           "locuslab/TOFU, arXiv 2401.06121; MIT", _tofu,
           lambda f: having("question", "answer", without=("labels", "ground_truth"))(f)
           and "####" not in str(f.get("answer", "")),
           uses("question", "answer", "paraphrased_question", "paraphrased_answer", "perturbed_answer")),
)
