"""Answers rated or ranked by models and people: UltraFeedback, HelpSteer, Nectar, Tulu, RewardBench, AlpacaEval."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from alignax.data.formats.base import Fields, Format, Place, Unusable, by_prompt, having, record, uses
from alignax.data.messages import ASSISTANT, Message, shared_prompt
from alignax.data.records import Record

UF_ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
HS_ASPECTS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def _ultrafeedback(fields: Fields, place: Place) -> list[Record]:
    texts, scores, aspects, models = [], [], [], []
    for answer in fields.each("completions"):
        annotations, rated = answer.inside("annotations"), {}
        for name in UF_ASPECTS:
            rating = annotations.inside(name).get("Rating") if annotations.has(name) else "N/A"
            if rating == "N/A":
                continue
            try:
                rated[name] = float(rating)
            except (TypeError, ValueError) as error:
                raise answer.fail(f"annotations.{name}.Rating", f"expected a number or 'N/A', found {rating!r:.80}") \
                    from error
        if not rated:
            raise Unusable(place, "a completion without any rating")
        texts.append(answer.text("response"))
        scores.append(sum(rated.values()) / len(rated))
        aspects.append(rated)
        models.append(answer.text("model") if answer.has("model") else None)
    if not texts:
        raise Unusable(place, "no completions")
    return [record(place, fields.text("instruction"), texts, scores=scores, aspects=aspects, models=models)]


def dialogue_pair(fields: Fields, place: Place, **extra: Any) -> Record:
    """A pair of whole dialogues as messages; the prompt is what both begin with."""
    names = ("chosen", "rejected")
    for item in (item for name in names for item in fields.items(name, 1)):
        if isinstance(item, Mapping) and item.get("role") == ASSISTANT and item.get("content") == "":
            raise Unusable(place, "empty completion")
    whole = [fields.dialogue(name) for name in names]
    if whole[0] != whole[1]:
        turns = next(iter((a, b) for a, b in itertools.zip_longest(*whole) if a != b))
        if not all(turn is None or turn.role == ASSISTANT for turn in turns):
            raise Unusable(place, "the two dialogues differ before an answer")
        if None in turns:
            raise Unusable(place, "one dialogue is the beginning of the other")
    prompt, rests = shared_prompt(whole, str(place), names)
    return record(place, prompt, rests, **extra)


def _ultrafeedback_binarized(fields: Fields, place: Place) -> list[Record]:
    return [dialogue_pair(fields, place, margin=fields.number("score_chosen") - fields.number("score_rejected"))]


def _tulu(fields: Fields, place: Place) -> list[Record]:
    models = [fields.text(name) if fields.has(name) else None for name in ("chosen_model", "rejected_model")]
    ratings = [fields.number(name) if fields.has(name) else None for name in ("chosen_rating", "rejected_rating")]
    margin = None if None in ratings else ratings[0] - ratings[1]
    return [dialogue_pair(fields, place, margin=margin, models=None if models == [None, None] else models,
                          source=fields.text("source"))]


def _helpsteer(fields: Fields, place: Place) -> list[Record]:
    rated = {name: fields.number(name) for name in HS_ASPECTS}
    return [record(place, fields.text("prompt"), (fields.text("response"),), scores=(rated["helpfulness"],),
                   aspects=(rated,))]


def _helpsteer3(fields: Fields, place: Place) -> list[Record]:
    prompt, preference = fields.dialogue("context"), fields.number("overall_preference")
    if not prompt:
        raise fields.fail("context", "the dialogue is empty")
    answers = [(Message(ASSISTANT, fields.text(name)),) for name in ("response1", "response2")]
    if abs(preference) > 3:
        raise fields.fail("overall_preference", f"expected -3 to 3, found {preference:g}")
    if preference == 0:
        raise Unusable(place, "tie")
    return [record(place, prompt, answers if preference < 0 else answers[::-1], margin=abs(preference))]


def _nectar(fields: Fields, place: Place) -> list[Record]:
    answers = fields.each("answers", 2)
    return [record(place, fields.text("prompt"), [a.text("answer") for a in answers],
                   scores=[-a.number("rank") for a in answers],
                   models=[a.text("model") if a.has("model") else None for a in answers])]


def _reward_bench(fields: Fields, place: Place) -> list[Record]:
    models = [fields.text(name) if fields.has(name) else None for name in ("chosen_model", "rejected_model")]
    return [record(place, fields.text("prompt"), (fields.text("chosen"), fields.text("rejected")),
                   models=None if models == [None, None] else models, subset=fields.text("subset"))]


def _reward_bench_2(fields: Fields, place: Place) -> list[Record]:
    chosen, rejected = fields.texts("chosen", 1, empty=True), fields.texts("rejected", 1, empty=True)
    return [record(place, fields.text("prompt"), chosen + rejected, labels=[1.0] * len(chosen) + [0.0] * len(rejected),
                   subset=fields.text("subset"))]


def _alpaca_eval(fields: Fields, place: Place) -> list[Record]:
    value = fields.values.get("preference")
    preference = None if value is None else fields.number("preference")
    outputs = [fields.text("output_1"), fields.text("output_2")]
    models = [fields.text(name) if fields.has(name) else None for name in ("generator_1", "generator_2")]
    if preference is not None and preference != 0 and not 1 <= preference <= 2:
        raise fields.fail("preference", f"expected 1 (output_1) to 2 (output_2), or 0 for a tie, found {preference:g}")
    if preference in (None, 0, 1.5):
        raise Unusable(place, "tie" if preference is not None else "no preference")
    best = int(preference > 1.5)
    return [record(place, fields.text("instruction"), (outputs[best], outputs[1 - best]),
                   models=(models[best], models[1 - best]), probability=max(preference - 1, 2 - preference))]


def _lists(fields: Mapping[str, Any], *names: str) -> bool:
    """Whether the named fields hold lists (or, in CSV, the JSON text of one)."""
    return all(isinstance(fields.get(name), (list, tuple)) or str(fields.get(name))[:1] == "[" for name in names)


FORMATS = (
    Format("ultrafeedback", "An instruction and its completions, each rated for four aspects; the score is the mean of "
           "the ratings present (overall_score is known to be faulty in places and is left out, as are critiques, "
           "rationales and the system prompts given to the models).",
           "openbmb/UltraFeedback, arXiv 2310.01377; MIT", _ultrafeedback,
           lambda f: "instruction" in f and "completions" in f,
           uses("instruction", completions=("response", "model", "annotations"))),
    Format("ultrafeedback_binarized", "Two whole dialogues as messages, split at their common prefix; margin = "
           "score_chosen - score_rejected. Left out: prompt (it is the dialogues' first turn), messages, prompt_id.",
           "HuggingFaceH4/ultrafeedback_binarized, arXiv 2310.16944; MIT", _ultrafeedback_binarized,
           having("chosen", "rejected", "score_chosen", "score_rejected"),
           uses("chosen", "rejected", "score_chosen", "score_rejected")),
    Format("tulu", "Two whole dialogues as messages with their source; models and the ratings' difference where given. "
           "Left out: ids, and prompt (it is the dialogues' first turn).",
           "allenai/llama-3.1-tulu-3-*-preference-mixture, arXiv 2411.15124; ODC-BY, parts non-commercial", _tulu,
           lambda f: having("chosen", "rejected", "source", without=("score_chosen",))(f)
           and _lists(f, "chosen", "rejected"),
           uses("chosen", "rejected", "source", "chosen_model", "rejected_model", "chosen_rating", "rejected_rating")),
    Format("helpsteer", "HelpSteer 1 and 2: one answer with five ratings from 0 to 4; the score is helpfulness. "
           "Neighbouring rows of one prompt become a list, best first, all ratings in extra.aspects.",
           "nvidia/HelpSteer (arXiv 2311.09528), HelpSteer2 (arXiv 2406.08673); CC BY 4.0", _helpsteer,
           having("prompt", "response", *HS_ASPECTS), uses("prompt", "response", *HS_ASPECTS), gather=by_prompt),
    Format("helpsteer3", "A dialogue and two answers, overall_preference from -3 (response1) to 3 (response2); the "
           "margin is its size. Left out: ties (counted), single annotators, domain, language.",
           "nvidia/HelpSteer3, preference, arXiv 2505.11475; CC BY 4.0", _helpsteer3,
           having("context", "response1", "response2", "overall_preference"),
           uses("context", "response1", "response2", "overall_preference")),
    Format("nectar", "A prompt in HH's text form and seven ranked answers: a list in the order of rank (1 is best), "
           "score -rank. Left out: sources, numbers of turns, good_natured.",
           "berkeley-nest/Nectar; Apache-2.0, not to compete with OpenAI", _nectar,
           having("prompt", "answers"), uses("prompt", answers=("answer", "rank", "model"))),
    Format("reward_bench", "Text prompt, chosen, rejected and the subset they test. Left out: ids.",
           "allenai/reward-bench, arXiv 2403.13787; ODC-BY", _reward_bench,
           lambda f: having("prompt", "chosen", "rejected", "subset")(f) and not _lists(f, "chosen", "rejected"),
           uses("prompt", "chosen", "rejected", "subset", "chosen_model", "rejected_model")),
    Format("reward_bench_2", "Text prompt with lists of right (chosen) and wrong (rejected) answers: a list with "
           "labels 1 and 0, right ones first. Left out: ids, models, counts.",
           "allenai/reward-bench-2, arXiv 2506.01937; ODC-BY", _reward_bench_2,
           lambda f: having("prompt", "chosen", "rejected", "subset")(f) and _lists(f, "chosen", "rejected"),
           uses("prompt", "chosen", "rejected", "subset")),
    Format("alpaca_eval", "An instruction, two outputs and a judge's preference from 1 (output_1) to 2 (output_2): the "
           "preferred one first, extra.probability the judge's probability of it. Left out: ties (counted), data set.",
           "tatsu-lab/alpaca_eval, arXiv 2404.04475; Apache-2.0, outputs for research", _alpaca_eval,
           having("instruction", "output_1", "output_2", "preference"),
           uses("instruction", "output_1", "output_2", "preference", "generator_1", "generator_2")),
)

