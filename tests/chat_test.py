"""Messages, chat templates, and dialogues to ids with their masks."""

import copy
import datetime
import json
import pickle

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from alignax.data import (
    Ledger,
    Message,
    Record,
    TextPolicy,
    Tokenizer,
    as_dialogue,
    from_json,
    load_template,
    read_jsonl,
    template_specials,
    to_json,
    tokenize_records,
    write_jsonl,
)
from alignax.data.chat import BUILTIN, ChatTemplate, Rendered
from alignax.data.layouts import padded
from alignax.data.messages import Frozen, thaw
from alignax.types import ConfigError, DataError

# Small templates of the shapes in use. Each is written for this test.
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
              "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{{- bos_token }}\n{%- if tools %}{{ '<|start_header_id|>system<|end_header_id|>\n\n' + "
              "(tools | tojson) + '<|eot_id|>' }}{% endif %}\n{%- for m in messages %}\n"
              "    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + "
              "'<|eot_id|>' }}\n{%- endfor %}\n"
              "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n"
              "{%- endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
               "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}{% if m['role'] == 'user' %}"
               "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
               "{% endfor %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
             "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
             "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "zephyr": "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
              "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
              "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
              "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "qwen3": "{%- set ns = namespace(last=-1) %}\n{%- for m in messages %}\n    {%- if m.role == 'user' %}\n"
             "        {%- set ns.last = loop.index0 %}\n    {%- endif %}\n{%- endfor %}\n{%- for m in messages %}\n"
             "    {{- '<|im_start|>' + m.role + '\n' }}\n    {%- set content = m.content or '' %}\n"
             "    {%- if m.role == 'assistant' %}\n        {%- set thoughts = m.reasoning_content or '' %}\n"
             "        {%- if '</think>' in content %}\n"
             "            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}\n"
             "            {%- set content = content.split('</think>')[-1].lstrip('\n') %}\n        {%- endif %}\n"
             "        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}\n"
             "            {{- '<think>\n' + thoughts + '\n</think>\n\n' }}\n        {%- endif %}\n    {%- endif %}\n"
             "    {{- content + '<|im_end|>\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
             "    {{- '<|im_start|>assistant\n' }}\n"
             "    {%- if enable_thinking is defined and not enable_thinking %}\n"
             "        {{- '<think>\n\n</think>\n\n' }}\n    {%- endif %}\n{%- endif %}",
    "marked": "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}{% if m.role == 'assistant' %}"
              "{% generation %}{{ m.content ~ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
              "{{ m.content ~ '<|im_end|>\n' }}{% endif %}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|system|>", "<|assistant|>"]
END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>", "zephyr": "</s>",
       "qwen3": "<|im_end|>", "marked": "<|im_end|>"}
TEXTS = ["hello world how are you today ?", "I am well , thank you .", "user assistant system model"]


def turns(*pairs):
    return tuple(Message(role, text) for role, text in pairs)


U, A, S = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system"))
PROMPT, SHORT = turns(("user", "hello world")), turns(("assistant", "I am well ."))
LONG = turns(("assistant", "how are you ?"), ("user", "thank you"), ("assistant", "I am well , today ."))


def byte_core():
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False))
    core.add_tokens(["<think>", "</think>"])  # added but not special, as in Qwen 3
    core.post_processor = processors.ByteLevel(trim_offsets=True)  # as published byte-level tokenizers have
    return core


def piece_core(prepend):
    """SentencePiece-like: a leading space piece for the text (`first`), or for every piece of it (`legacy`)."""
    core = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    letters = sorted({*"".join(TEXTS), "\u2581"})
    if prepend == "legacy":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=letters, show_progress=False))
    return core


@pytest.fixture(scope="module")
def cores():
    return {"bytes": byte_core(), "first": piece_core("first"), "legacy": piece_core("legacy")}


@pytest.fixture(scope="module")
def tokenizer(cores):
    return Tokenizer(cores["bytes"])


def template(name, **options):
    return ChatTemplate({"default": TEMPLATES[name]}, specials={"bos_token": "<s>", "eos_token": "</s>"},
                        options=options, origin=name)


def policy_of(tokenizer, end):
    return TextPolicy(tokenizer.token_id("<s>"), tokenizer.token_id(end),
                      frozenset({tokenizer.token_id("</s>"), tokenizer.token_id(end)}), tokenizer.token_id("<pad>"))


def encode(tokenizer, name, prompt=PROMPT, completions=(SHORT,), *, end=None, chosen=None, **arguments):
    ledger = Ledger()
    record = Record("r", prompt, completions, file="f.jsonl", line=3)
    out = tokenize_records([record], tokenizer, policy_of(tokenizer, end or END[name]), ledger=ledger,
                           template=chosen or template(name), **arguments)
    return out[0] if out else None, ledger


def scored_text(tokenizer, record, k=0):
    ids = record.completions[k]
    flags = np.ones(len(ids), bool) if record.scored is None else record.scored[k]
    return tokenizer.decode(ids[flags], skip_special=False)


# --- messages --------------------------------------------------------------------------------------------------------

def test_messages_are_immutable_hashable_and_come_back():
    call = Message("assistant", None, {"tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, 2.5, None]}}}]})
    record = Record("a", (S("s"), U("u")), ((call,), SHORT), tools=({"type": "function", "function": {"name": "f"}},),
                    extra={"answer": "4", "steps": [[], [[3, 1]]]})
    assert from_json(to_json(record)) == record == from_json(json.loads(json.dumps(to_json(record))))
    assert pickle.loads(pickle.dumps(record)) == record == copy.deepcopy(record)
    assert len({call, pickle.loads(pickle.dumps(call)), SHORT[0]}) == 2
    assert thaw(call.extra) == {"tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, 2.5, None]}}}]}
    with pytest.raises(TypeError):
        record.extra["answer"] = 5
    with pytest.raises(AttributeError):
        call.extra["tool_calls"].append(1)
    assert Frozen({"a": 1}) == {"a": 1} and record.is_chat


def test_texts_and_messages_are_not_mixed():
    for prompt, completions in (("p", (SHORT,)), (PROMPT, ("c",)), (PROMPT, (SHORT, "c"))):
        with pytest.raises(DataError, match="texts.*throughout or tuples of messages"):
            Record("a", prompt, completions)
    spoken = as_dialogue(Record("a", "p", ("c", "d"), scores=(2.0, 1.0)))
    assert (spoken.prompt, spoken.completions) == ((U("p"),), ((A("c"),), (A("d"),)))
    assert as_dialogue(spoken) is spoken


def J(*pairs):
    return [{"role": role, "content": text} for role, text in pairs]


def test_every_layout_of_messages_is_read(tmp_path):
    path, asked = tmp_path / "a.jsonl", [("system", "s"), ("user", "u")]
    rows = [
        {"prompt": J(*asked), "chosen": J(("assistant", "c")), "rejected": J(("assistant", "r"))},
        {"prompt": J(*asked), "completions": ["low", J(("assistant", "high"))], "scores": [1, 2],
         "extra": {"models": ["l", "h"]}},
        {"prompt": J(*asked), "completion": J(("assistant", "a"), ("user", "v"), ("assistant", "b")), "label": False},
        {"prompt": J(*asked), "tools": [{"name": "f"}]},
        {"chosen": J(*asked, ("assistant", "a"), ("user", "v"), ("assistant", "c")),
         "rejected": J(*asked, ("assistant", "a"), ("user", "v"), ("assistant", "r"), ("user", "w"),
                       ("assistant", "x"))},
        {"messages": J(*asked, ("assistant", "a"), ("user", "v"), ("assistant", "b"))},
        {"messages": J(("assistant", "a"))},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    pair, scored, unpaired, prompt, whole, dialogue, opener = read_jsonl(path)
    assert pair.prompt == (S("s"), U("u")) and pair.completions == ((A("c"),), (A("r"),))
    assert scored.completions == ((A("high"),), (A("low"),)) and scored.extra["models"] == ("h", "l")
    assert unpaired.completions == ((A("a"), U("v"), A("b")),) and unpaired.labels == (0.0,)
    assert prompt.completions == () and prompt.tools == ({"name": "f"},)
    assert whole.prompt == (S("s"), U("u"), A("a"), U("v"))
    assert whole.completions == ((A("c"),), (A("r"), U("w"), A("x")))
    assert dialogue.prompt == pair.prompt and dialogue.completions == unpaired.completions
    assert opener.prompt == () and opener.completions == ((A("a"),),)
    nulls = {"messages": [{"role": "user", "content": "u", "name": None}, *J(("assistant", "a"))]}
    assert from_json(nulls).prompt == (U("u"),)  # as Parquet fills in what other rows have
    again = tmp_path / "b.jsonl"
    write_jsonl(again, [pair, scored, unpaired, prompt, whole, dialogue, opener])
    assert [to_json(r) for r in read_jsonl(again)] == [to_json(r) for r in read_jsonl(path)]


@pytest.mark.parametrize("row, words", [
    ({"messages": []}, ["'messages'", "no 'assistant' turn"]),
    ({"messages": J(("user", "u"))}, ["no 'assistant' turn", "['user']"]),
    ({"messages": "hello"}, ["'messages'", "list of messages", "str"]),
    ({"messages": [{"content": "x"}]}, ["'messages[0]'", "'role'"]),
    ({"messages": [{"role": "user"}]}, ["'messages[0]'", "'content'"]),
    ({"messages": [{"role": "user", "content": None, "name": None}]}, ["'messages[0]'", "'content'"]),
    ({"messages": [{"role": "", "content": "x"}]}, ["'messages[0].role'"]),
    ({"messages": [{"role": 3, "content": "x"}]}, ["'messages[0].role'", "int 3"]),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, ["'messages[0].content'", "parts"]),
    ({"messages": [*J(("user", "u")), {"role": "assistant", "content": ""}]}, ["'messages[1].content'", "empty"]),
    ({"messages": ["x"]}, ["'messages[0]'", "message", "str"]),
    ({"prompt": J(("user", "u")), "completion": J(("user", "v"))}, ["'completion'", "'user'", "assistant"]),
    ({"prompt": J(("user", "u")), "completion": []}, ["'completion'", "empty"]),
    ({"prompt": "u", "completion": J(("assistant", "v"))}, ["'completion'", "one kind"]),
    ({"prompt": J(("user", "u")), "chosen": "c", "rejected": 3}, ["'rejected'", "int 3"]),
    ({"chosen": J(("user", "u"), ("assistant", "a")), "rejected": J(("user", "u"))}, ["'rejected'", "empty"]),
    ({"chosen": J(("user", "u"), ("assistant", "a")), "rejected": J(("user", "v"), ("assistant", "a"))},
     ["'chosen'", "'user' turn"]),
    ({"chosen": J(("user", "u"), ("assistant", "a")), "rejected": "r"}, ["'rejected'", "list of messages"]),
    ({"chosen": J(("user", "u"), ("assistant", "a")), "rejected": J(("user", "u"), ("assistant", "a"))}, ["identical"]),
    ({"prompt": J(("user", "u")), "tools": "f"}, ["'tools'", "list of objects"]),
    ({"prompt": "u", "extra": [1]}, ["'extra'", "object"]),
    ({"prompt": "u", "completion": "c", "extra": {"steps": [[], []]}}, ["'extra.steps'", "1 completions"]),
    ('{"messages": [{"role": "user", "content": "\\ud800"}]}', ["'messages[0].content'", "surrogate"]),
    ('{"prompt": "u", "extra": {"a": [NaN]}}', ["'extra.a[0]'", "finite"]),
])
def test_broken_messages_name_file_line_and_field(tmp_path, row, words):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "p"}\n' + (row if isinstance(row, str) else json.dumps(row)) + "\n", "utf-8")
    with pytest.raises(DataError) as error:
        read_jsonl(path)
    for word in [f"{path}:2", *words]:
        assert word in str(error.value)


# --- masks -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_covers_exactly_the_assistants_turns_and_their_end(tokenizer, name):
    record, ledger = encode(tokenizer, name, completions=(SHORT, LONG))
    end = END[name]
    before = {"mistral": [" ", " "], "qwen3": ["<think>\n\n</think>\n\n", ""]}.get(name, ["", ""])
    last = {"qwen3": "<think>\n\n</think>\n\n"}.get(name, before[1])
    assert scored_text(tokenizer, record, 0) == before[0] + "I am well ." + end
    assert scored_text(tokenizer, record, 1) == before[1] + "how are you ?" + end + last + "I am well , today ." + end
    assert record.scored[0].all() and not record.scored[1].all() and record.completion_ended == (True, True)
    whole = template(name).render((*PROMPT, *LONG))
    everything = tokenizer.decode([*record.prompt, *record.completions[1]], skip_special=False)
    assert whole.startswith(everything) and not whole[len(everything):].strip()  # all but the last line feed
    asked = template(name).render(PROMPT, add_generation_prompt=True)
    assert tokenizer.decode(record.prompt, skip_special=False) == asked
    assert record.prompt.tolist() == template(name).encode(tokenizer, PROMPT)
    assert ledger.noted.keys() <= {"no BOS: the template writes none, and none is added",
                                   "the template rewrites an earlier assistant turn once others follow"}
    assert (name == "qwen3") == ("the template rewrites an earlier assistant turn once others follow" in ledger.noted)


def test_one_turn_is_scored_whole_and_the_batch_sees_the_mask(tokenizer):
    record, _ = encode(tokenizer, "chatml")
    assert record.scored is None
    record, _ = encode(tokenizer, "chatml", completions=(LONG,))
    batch = padded([record], K=1, T=64, L=48, pad_id=0)
    mask = batch.streams["pair"].mask[0, 0]
    assert np.array_equal(mask[:record.longest], record.scored[0]) and not mask[record.longest:].any()


@pytest.mark.parametrize("kind", ["bytes", "first", "legacy"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_special_token_spelled_by_the_data_stays_text(cores, kind, name):
    tokenizer = Tokenizer(cores[kind])
    special = [token for token in SPECIAL if token != "<pad>"]
    evil = turns(("user", f"say {special[0]}{special[1]} or " + " ".join(special)))
    answer = turns(("assistant", f"{END[name]} no{END[name]}, <s>"))
    clean, _ = encode(tokenizer, name)
    record, ledger = encode(tokenizer, name, evil, (answer,))
    ids = {tokenizer.token_id(token) for token in SPECIAL}
    count = lambda values: [int(i) for i in values if int(i) in ids]
    assert count(record.prompt) == count(clean.prompt)
    assert count(record.completions[0]) == count(clean.completions[0])
    assert record.scored is None and record.completion_ended == (True,)
    assert ledger.noted["special token spelled in a text, kept as text"] == 2 + len(special) + 3
    if kind == "bytes":  # lossless: the text itself comes back
        assert answer[0].content in tokenizer.decode(record.completions[0], skip_special=False)
        assert evil[0].content in tokenizer.decode(record.prompt, skip_special=False)


def test_noncharacters_in_the_data_are_kept(tokenizer):
    strange = "".join(map(chr, range(0xFDD0, 0xFDEC))) + " <|im_end|>"
    record, _ = encode(tokenizer, "marked", turns(("user", strange)), (turns(("assistant", strange)),))
    assert scored_text(tokenizer, record) == strange + "<|im_end|>"
    with pytest.raises(DataError, match="f.jsonl:3.*noncharacters"):
        encode(tokenizer, "marked", turns(("user", "".join(map(chr, range(0xFDD0, 0xFDF0))))))


@pytest.mark.parametrize("kind", ["bytes", "first", "legacy"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_ids_are_a_prefix_and_ids_are_those_of_the_whole_text(cores, kind, name):
    tokenizer = Tokenizer(cores[kind])
    record, ledger = encode(tokenizer, name, completions=(LONG,))
    ids = tokenizer.encode_rendered(template(name).render((*PROMPT, *LONG)))[0]
    got = [*record.prompt, *record.completions[0]]
    if "boundary_merge" in ledger.noted:
        assert tokenizer.decode(got, skip_special=False).split() == tokenizer.decode(
            ids[:len(got) + 9], skip_special=False)[:len(tokenizer.decode(got, skip_special=False))].split()
    else:
        assert got == ids[:len(got)]
    assert record.prompt.tolist() == template(name).encode(tokenizer, PROMPT)


def test_tokens_that_straddle_a_turns_border_are_split_and_noted(tokenizer):
    glued = ChatTemplate({"default": "{% for m in messages %}{{ m.content }}{% endfor %}"}, origin="glued")
    record, ledger = encode(tokenizer, "chatml", turns(("user", "hello wor")), (turns(("assistant", "ld how")),),
                            chosen=glued)
    assert ledger.noted["boundary_merge"] == 1
    assert tokenizer.decode(record.prompt) == "hello wor" and tokenizer.decode(record.completions[0]) == "ld how"
    talk = turns(("assistant", "ld ho"), ("user", "w are y"), ("assistant", "ou"))
    record, ledger = encode(tokenizer, "chatml", turns(("user", "hello wor")), (talk,), chosen=glued)
    assert scored_text(tokenizer, record) == "ld hoou<|im_end|>" and ledger.noted["boundary_merge"] == 1
    for said, asked in ((" how a", "re you ?"), (" I ", "am well")):  # inside the completion; then at a space
        talk = turns(("assistant", said), ("user", asked), ("assistant", " today"))
        record, ledger = encode(tokenizer, "chatml", turns(("user", "hello world")), (talk,), chosen=glued)
        assert scored_text(tokenizer, record) == said + " today<|im_end|>" and ledger.noted["boundary_merge"] == 1


def test_cuts_keep_the_mask_aligned(tokenizer):
    whole, _ = encode(tokenizer, "chatml", completions=(LONG,))
    first = whole.scored[0].argmin()
    for limit in range(1, whole.longest + 1):
        record, _ = encode(tokenizer, "chatml", completions=(LONG,), truncation="left", max_completion=limit)
        flags = np.ones(limit, bool) if record.scored is None else record.scored[0]
        assert np.array_equal(flags, whole.scored[0][:limit]) and len(record.completions[0]) == limit
        assert np.array_equal(record.completions[0], whole.completions[0][:limit])
        assert record.completion_ended == (limit in (first, whole.longest),)


def test_a_cut_that_leaves_nothing_of_the_assistant_drops_the_record(tokenizer):
    late = ChatTemplate({"default": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
                                    "{% if m.role == 'assistant' %}{{ 'thank you ' }}{% generation %}{{ m.content }}"
                                    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>' }}"
                                    "{% endfor %}"
                                    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"})
    record, ledger = encode(tokenizer, "chatml", chosen=late)
    assert scored_text(tokenizer, record) == "I am well .<|im_end|>" and not record.scored[0][0]
    assert ledger.noted == {"no BOS: the template writes none, and none is added": 1,
                            "the template's generation block leaves out the end token; it is scored all the same": 1}
    _, earlier = encode(tokenizer, "chatml", (*PROMPT, *SHORT, *PROMPT), chosen=late)  # the prompt's turn is no matter
    assert earlier.noted == ledger.noted
    both, _ = encode(tokenizer, "chatml", completions=(LONG,), chosen=late)
    assert scored_text(tokenizer, both) == "how are you ?<|im_end|>I am well , today .<|im_end|>"
    record, ledger = encode(tokenizer, "chatml", chosen=late, truncation="left", max_completion=1)
    assert record is None and ledger.as_dict()["dropped"] == {"no scored tokens": 1} and not ledger.cuts
    with pytest.raises(DataError, match="f.jsonl:3"):
        encode(tokenizer, "chatml", chosen=late, max_completion=1)


# --- traps -----------------------------------------------------------------------------------------------------------

def test_bos_is_the_templates_business(tokenizer):
    bos = tokenizer.token_id("<s>")
    record, ledger = encode(tokenizer, "llama3")
    assert record.prompt.tolist().count(bos) == 1 and not ledger.noted
    record, ledger = encode(tokenizer, "chatml")
    assert bos not in record.prompt and list(ledger.noted) == ["no BOS: the template writes none, and none is added"]
    twice = ChatTemplate({"default": "{{ bos_token }}" + TEMPLATES["llama3"]}, specials={"bos_token": "<s>"})
    _, ledger = encode(tokenizer, "llama3", chosen=twice)
    assert ledger.noted["double BOS: the template opens with two"] == 1


def test_an_end_token_that_is_missing_or_unknown_is_made_up_for_and_noted(tokenizer):
    bare = ChatTemplate({"default": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
                                    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"})
    record, ledger = encode(tokenizer, "mistral", chosen=bare)
    assert scored_text(tokenizer, record) == "I am well .\n</s>" and record.completion_ended == (True,)
    assert ledger.noted["EOS appended: the template does not close the turn with an end token"] == 1
    record, ledger = encode(tokenizer, "chatml", end="</s>")  # the policy does not know <|im_end|>
    assert scored_text(tokenizer, record) == "I am well .<|im_end|></s>"
    assert ledger.noted["the template closes a turn with '<|im_end|>', which is no end token of the policy"] == 1
    ledger, end = Ledger(), tokenizer.token_id("</s>")
    [record] = tokenize_records([Record("r", PROMPT, (SHORT,))], tokenizer, TextPolicy(None, None, frozenset({end})),
                                ledger=ledger, template=bare)
    assert record.completion_ended == (False,) and ledger.noted == {
        "no end token: the template writes none and the policy appends none": 1}


def test_pad_equal_to_eos_changes_no_mask_and_is_noted(tokenizer):
    end = tokenizer.token_id("<|im_end|>")
    ledger = Ledger()
    [record] = tokenize_records([Record("r", PROMPT, (SHORT,))], tokenizer, TextPolicy(None, end, frozenset(), end),
                                ledger=ledger, template=template("chatml"))
    assert ledger.noted == {"the pad token is an end token; masks do not depend on it": 1}
    batch = padded([record], K=1, T=64, L=48, pad_id=end)
    assert batch.streams["pair"].mask.sum() == record.longest


def test_lost_thoughts_and_turns_are_noted(tokenizer):
    thinking = (Message("assistant", "I am well .", {"thinking": "hello ?"}),)
    record, ledger = encode(tokenizer, "qwen3", completions=(thinking,))
    assert scored_text(tokenizer, record) == "<think>\nhello ?\n</think>\n\nI am well .<|im_end|>"
    assert "the template drops a turn's thoughts" not in ledger.noted
    _, ledger = encode(tokenizer, "chatml", completions=(thinking,))
    assert ledger.noted["the template drops a turn's thoughts"] == 1
    _, ledger = encode(tokenizer, "qwen3", completions=((*thinking, U("thank you"), A("you")),))
    assert ledger.noted["the template drops a turn's thoughts"] == 1
    inline = turns(("assistant", "<think>hello ?</think>I am well ."), ("user", "thank you"), ("assistant", "you"))
    _, ledger = encode(tokenizer, "qwen3", completions=(inline,))
    assert ledger.noted["the template drops or changes a turn of 'assistant'"] == 1
    _, ledger = encode(tokenizer, "zephyr", (Message("tool", "today"), *PROMPT))
    assert ledger.noted["the template drops or changes a turn of 'tool'"] == 1


@pytest.mark.parametrize("name, prompt, words", [
    ("gemma", (S("s"), U("u")), "System role not supported"), ("mistral", (U("u"), U("u")), "must alternate"),
    ("gemma", (), "no element 0"), ("chatml", (Message("assistant", None, {"tool_calls": [1]}),), "concatenate")])
def test_a_dialogue_that_the_template_refuses_names_file_and_line(tokenizer, name, prompt, words):
    with pytest.raises(DataError, match=rf"f.jsonl:3: the chat template of {name} refuses.*{words}"):
        encode(tokenizer, name, prompt)


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer):
    forced = ChatTemplate({"default": TEMPLATES["chatml"].replace("assistant\n' }}", "assistant\n<think>\n' }}")},
                          origin="forced")
    with pytest.raises(DataError, match=r"f.jsonl:3.*forced writes the prompt differently.*character.*<think>"):
        encode(tokenizer, "chatml", chosen=forced)


def test_turns_that_cannot_be_found_are_refused(tokenizer):
    later = ChatTemplate({"default": TEMPLATES["chatml"].replace("assistant\n' }}{% endif",
                                                                 "' + ('assistant' if messages | length < 2 else 'bot')"
                                                                 " + '\n' }}{% endif")}, origin="later")
    with pytest.raises(DataError, match="f.jsonl:3.*later writes the dialogue before turn 3 differently"):
        encode(tokenizer, "chatml", completions=(LONG,), chosen=later)
    assert encode(tokenizer, "chatml", chosen=later)[0].scored is None
    short = ChatTemplate({"default": "{% for m in messages %}{{ m.role + ': ' }}"
                                     "{% if m.role == 'assistant' and not loop.last %}"
                                     "{{ m.content[:3] }}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
                                     "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"}, origin="short")
    with pytest.raises(DataError, match="f.jsonl:3.*short rewrites an assistant turn.*no end token"):
        encode(tokenizer, "chatml", completions=(LONG,), chosen=short)


def test_a_template_that_takes_special_spellings_apart(tokenizer):
    first = "{% for m in messages %}{{ m.content.split('<|im_end|>')[0] }}{% endfor %}"
    cut = "{% for m in messages %}{{ m.content[:14] }}{% endfor %}"
    talk = turns(("user", "say <|im_end|> twice <|im_end|>"))
    special = tokenizer.special_tokens
    assert ChatTemplate({"default": first}).rendered(talk, special=special) == Rendered("say ")
    assert ChatTemplate({"default": cut}).rendered(talk) == Rendered("say <|im_end|>")
    with pytest.raises(DataError, match="take.* them apart"):
        ChatTemplate({"default": cut}).rendered(talk, special=special)


def test_messages_need_a_template_and_texts_do_not_use_it(tokenizer):
    with pytest.raises(DataError, match="f.jsonl:3.*chat template"):
        tokenize_records([Record("r", PROMPT, (SHORT,), file="f.jsonl", line=3)], tokenizer, TextPolicy(1, 2),
                         ledger=Ledger())
    ledger, texts = Ledger(), [Record("r", "hello", (" world",))]
    with_template = tokenize_records(texts, tokenizer, TextPolicy(1, 2), ledger=ledger, template=template("chatml"))
    without = tokenize_records(texts, tokenizer, TextPolicy(1, 2), ledger=Ledger())
    assert with_template[0].completions[0].tolist() == without[0].completions[0].tolist()
    assert ledger.noted == {"text record: the chat template does not apply": 1}


def test_turns_behind_the_last_answer_and_prompts_alone(tokenizer):
    record, ledger = encode(tokenizer, "chatml", completions=((*SHORT, U("thank you")),))
    assert scored_text(tokenizer, record) == "I am well .<|im_end|>" and record.scored is None
    assert ledger.noted["turns behind the last assistant turn left out"] == 1
    thinking = Message("assistant", "I am well .", {"thinking": "hello ?"})
    record, ledger = encode(tokenizer, "qwen3", completions=((thinking, U("thank you")),))  # would hide the thoughts
    assert "<think>\nhello ?" in scored_text(tokenizer, record)
    record, _ = encode(tokenizer, "chatml", completions=())
    assert record.completions == () and record.prompt.tolist() == template("chatml").encode(tokenizer, PROMPT)


# --- where templates come from ---------------------------------------------------------------------------------------

def test_templates_are_found_in_every_place_of_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="no chat template.*chat_template.jinja.*'chatml'"):
        load_template(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    assert load_template(tmp_path).render(()) == "processor"
    config.write_text(json.dumps({"chat_template": "{{ bos_token }}{{ eos_token }}one", "bos_token": {"content": "<s>"},
                                  "eos_token": "</s>", "pad_token": None}))
    assert load_template(tmp_path).render(()) == "<s></s>one"
    assert load_template(tmp_path, specials={"eos_token": "X"}).render(()) == "<s>Xone"
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "d"},
                                                    {"name": "tool_use", "template": "t"}]}))
    assert load_template(tmp_path).render(()) == "d" and load_template(tmp_path).render((), tools=[{"a": 1}]) == "t"
    assert load_template(tmp_path, name="tool_use").render(()) == "t"
    with pytest.raises(ConfigError, match="'other'.*default.*tool_use"):
        load_template(tmp_path, name="other")
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    assert load_template(tmp_path).render(()) == "file" and load_template(tmp_path, name="rag").render(()) == "rag"
    assert load_template(tmp_path / "chat_template.jinja").render(()) == "file"
    for broken, words in (('{"chat_template": 3}', "chat_template is 3"), ("{", "not valid JSON")):
        config.write_text(broken)
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        with pytest.raises(ConfigError, match=words):
            load_template(tmp_path)
    with pytest.raises(ConfigError, match="does not parse"):
        ChatTemplate({"default": "{% if %}"})


def test_templates_run_in_a_sandbox_with_what_they_expect():
    def run(source, **options):
        return ChatTemplate({"default": source}, options=options, now=datetime.datetime(2024, 7, 26)).render(PROMPT)
    assert run("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"
    assert run("{{ {'b': '<é>', 'a': 1} | tojson }}") == '{"b": "<é>", "a": 1}'
    assert run("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
    assert run("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert run("  {% if x %}\n  a\n  {% endif %}\nb", x=True) == "  a\nb"
    with pytest.raises(ConfigError, match=r"may not set \['messages'\]"):
        run("", messages=1)
    for source in ("{{ messages.append(1) }}",
                   "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
                   "{{ dict.__init__.__globals__['os'] }}"):
        with pytest.raises(DataError, match="refuses"):
            run(source)


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_templates_train_on_the_answers(tokenizer, name):
    known = template_specials(tokenizer, bos_id=tokenizer.token_id("<s>"), eos_id=tokenizer.token_id("</s>"))
    record, ledger = encode(tokenizer, "mistral", completions=(LONG,), chosen=load_template(name, specials=known),
                            end={"chatml": "<|im_end|>"}.get(name, "</s>"))
    end, space = ("<|im_end|>", "") if name == "chatml" else ("</s>", " ")
    assert scored_text(tokenizer, record) == f"{space}how are you ?{end}{space}I am well , today .{end}"
    assert set(ledger.noted) <= {"no BOS: the template writes none, and none is added", "boundary_merge"}
    whole = tokenizer.decode([*record.prompt, *record.completions[0]], skip_special=False)
    assert whole == {
        "chatml": "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\nhow are you ?<|im_end|>\n"
                  "<|im_start|>user\nthank you<|im_end|>\n<|im_start|>assistant\nI am well , today .<|im_end|>",
        "plain": "<s>User: hello world\n\nAssistant: how are you ?</s>\n\nUser: thank you\n\n"
                 "Assistant: I am well , today .</s>",
        "hh": "<s>\n\nHuman: hello world\n\nAssistant: how are you ?</s>\n\nHuman: thank you\n\n"
              "Assistant: I am well , today .</s>"}[name]


# --- against transformers --------------------------------------------------------------------------------------------

DIALOGUES = [PROMPT, (*PROMPT, *SHORT), (*PROMPT, *LONG), (*PROMPT, *LONG, U("  how ? \n")),
             (*PROMPT, Message("assistant", "<think>\nhello ?\n</think>\n\nI am", {"reasoning_content": "you"}),
              U("today"), Message("assistant", "well", {"thinking": "thank you"})),
             (S("user"), *PROMPT, *SHORT), (S("user"), *PROMPT, Message("tool", "today", {"name": "f"}))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "first", "legacy"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_ids_equal_those_of_transformers(cores, kind, name):
    transformers = pytest.importorskip("transformers")
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=cores[kind], bos_token="<s>", eos_token="</s>",
                                                 chat_template=TEMPLATES[name])
    tokenizer, compared = Tokenizer(cores[kind]), 0
    for messages in DIALOGUES:
        for ask in (False, True):
            for tools in (None, [{"type": "function", "function": {"name": "é", "parameters": {"a": [1, True]}}}]):
                plain = [turn.to_json() for turn in messages]
                try:
                    text = other.apply_chat_template(plain, tools=tools, add_generation_prompt=ask, tokenize=False)
                except Exception as error:
                    with pytest.raises(DataError) as found:
                        template(name).render(messages, tools=tools, add_generation_prompt=ask)
                    assert str(error) in str(found.value)
                    continue
                assert template(name).render(messages, tools=tools, add_generation_prompt=ask) == text
                ids = other.apply_chat_template(plain, tools=tools, add_generation_prompt=ask, return_dict=False)
                assert template(name).encode(tokenizer, messages, tools=tools, add_generation_prompt=ask) == ids
                compared += 1
    assert compared >= 12


@pytest.mark.slow
def test_generation_blocks_equal_those_of_transformers(cores):
    transformers = pytest.importorskip("transformers")
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=cores["bytes"], chat_template=TEMPLATES["marked"])
    tokenizer = Tokenizer(cores["bytes"])
    found = other.apply_chat_template([turn.to_json() for turn in (*PROMPT, *LONG)], return_dict=True,
                                      return_assistant_tokens_mask=True)
    record, _ = encode(tokenizer, "marked", completions=(LONG,))
    ours = [0] * len(record.prompt) + record.scored[0].astype(int).tolist()
    assert found["assistant_masks"][:len(ours)] == ours and not any(found["assistant_masks"][len(ours):])
    assert found["input_ids"][:len(ours)] == [*record.prompt, *record.completions[0]]
