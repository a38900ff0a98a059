"""Chat templates: dialogues to text, as the model's own Jinja template writes them, and nothing added.

Templates are code from elsewhere: they run in Jinja's immutable sandbox, with the filters and globals that chat
templates are written for (`raise_exception`, `strftime_now`, `tojson`, loop controls, trimmed blocks, and
`{% generation %}` blocks around what the assistant says). Messages reach them as plain dicts.

The text comes with two kinds of spans: `literal`, where the data spells a special token that must stay text, and
`generated`, what the template marks as the assistant's. Both are found by putting characters around the pieces that
occur nowhere in the input (Unicode noncharacters) and taking them out again after rendering.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from alignax.data.messages import Message, thaw
from alignax.data.tokens import Span, Tokenizer
from alignax.types import ConfigError, DataError

NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # valid in strings, meant for internal use (Unicode 23.7)
REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which data carry a turn's thoughts

BUILTIN: dict[str, str] = {
    # ChatML as Qwen 2 and others use it; its tokens are special only where the tokenizer has them.
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"),
    # For models that never saw a template: names, and the end token where `eos_token` is known.
    "plain": (
        "{{ bos_token }}{% for message in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
        "{{ message['role'] | capitalize + ':' }}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ ' ' + message['content'] + (eos_token or '') }}{% endgeneration %}"
        "{% else %}{{ ' ' + message['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\n' if messages else '' }}{{ 'Assistant:' }}{% endif %}"),
    # The form of Anthropic's HH data.
    "hh": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '\\n\\nAssistant:' }}"
        "{% generation %}{{ ' ' + message['content'] + (eos_token or '') }}{% endgeneration %}"
        "{% elif message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
        "{% else %}{{ raise_exception('the roles of this template are user and assistant, found ' + message['role']) }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"),
}


@dataclasses.dataclass(frozen=True)
class Rendered:
    """Text written by a template. literal: spans of special tokens spelled by the data. generated: the assistant's."""

    text: str
    literal: tuple[Span, ...] = ()
    generated: tuple[Span, ...] = ()


class _TemplateDict:
    """What templates get for `dict`: it builds dicts, and gives no access to the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable, value: Any = None) -> dict:
        return dict.fromkeys(keys, value)


class _Generation(jinja2.ext.Extension):
    """The block {% generation %} ... {% endgeneration %}: its output between the environment's two marks."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        opening, closing = self.environment.generation_marks
        return opening + caller() + closing


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
             sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=64)
def _compile(source: str, marks: tuple[str, str]) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.generation_marks = marks
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "dict": _TemplateDict()}
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", "?")
        raise ConfigError(f"the chat template does not parse: line {line}: {error}") from error


def _mapped(value: Any, change) -> Any:
    """A copy of a JSON value with `change` applied to every string that is no key."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def _with_reasoning(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn with its thoughts under the names that templates read, whichever of them the data use."""
    thoughts = next((turn[name] for name in REASONING if turn.get(name) is not None), None)
    return turn if thoughts is None else {"thinking": thoughts, **turn, "reasoning_content": thoughts}


def _unmarked(text: str, names: Sequence[str], marks: Sequence[str]) -> Rendered:
    """Takes the four marks out of a text and returns the spans that they enclosed.

    A spelling that lost one of its two marks to the template is literal all the same.
    """
    start, end, opening, closing = marks
    spelled = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"
    pattern = re.compile(f"{start}(?P<a>{spelled})|(?P<b>{spelled}){end}|[{start}{end}{opening}{closing}]")
    out: list[str] = []
    literal: list[Span] = []
    generated: list[Span] = []
    opened: list[int] = []
    length = at = 0
    for match in pattern.finditer(text):
        found = match["a"] or match["b"] or ""
        out += [text[at:match.start()], found]
        length += match.start() - at
        if found:
            literal.append((length, length + len(found)))
            length += len(found)
        elif match.group() == opening:
            opened.append(length)
        elif match.group() == closing and opened:
            generated.append((opened.pop(), length))
        at = match.end()
    out.append(text[at:])
    return Rendered("".join(out), tuple(literal), tuple(sorted(generated)))


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template with what it may refer to.

    sources: name -> Jinja text. name: the one to use; None takes `tool_use` where there are tools and it exists,
    else `default`, else the only one. specials: `bos_token`, `eos_token`, ... as templates read them. options:
    further variables (`enable_thinking`, ...). origin: where it came from, for messages. now: the moment that
    `strftime_now` gives, None for the clock's; a template that writes the date is reproducible only with one set.
    """

    sources: Mapping[str, str]
    name: str | None = None
    specials: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: str = "<template>"
    now: datetime.datetime | None = None

    def __post_init__(self):
        if self.name is not None and self.name not in self.sources:
            raise ConfigError(f"{self.origin}: no chat template {self.name!r}; there are {sorted(self.sources)}")
        if self.name is None and "default" not in self.sources and len(self.sources) != 1:
            raise ConfigError(f"{self.origin}: name one of the chat templates {sorted(self.sources)}")
        taken = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"} & set(self.options)
        if taken:
            raise ConfigError(f"{self.origin}: options may not set {sorted(taken)}, which every dialogue brings along")
        for source in self.sources.values():
            _compile(source, ("", ""))

    def source(self, tools: Any = None) -> str:
        """The Jinja text that is used with (or without) tools."""
        if self.name is not None:
            return self.sources[self.name]
        if tools and "tool_use" in self.sources:
            return self.sources["tool_use"]
        return self.sources["default"] if "default" in self.sources else next(iter(self.sources.values()))

    def marks_generation(self, tools: Any = None) -> bool:
        """Whether the template says by {% generation %} blocks which text is the assistant's."""
        return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source(tools)) is not None

    def _run(self, turns: list[dict], tools: list[dict] | None, add_generation_prompt: bool, marks: tuple[str, str],
             place: str) -> str:
        moment = self.now
        clock = lambda form: (moment or datetime.datetime.now()).strftime(form)
        template = _compile(self.source(tools), marks)
        try:
            return template.render(**self.specials | dict(self.options), messages=turns, tools=tools, documents=None,
                                   add_generation_prompt=add_generation_prompt, strftime_now=clock)
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
                RecursionError) as error:
            raise DataError(f"{place}: the chat template of {self.origin} refuses the dialogue with the roles "
                            f"{[turn['role'] for turn in turns]}: {error}") from error

    def rendered(self, messages: Sequence[Message], *, tools: Sequence[Mapping] | None = None,
                 add_generation_prompt: bool = False, special: Iterable[str] = (), place: str = "<dialogue>"
                 ) -> Rendered:
        """The dialogue's text with its spans; `special`: the spellings that must stay text where the data hold them.

        Raises DataError with `place` where the template refuses the dialogue (a role, an order of turns), or reads
        the texts in such a way that the spelling of a special token in them cannot be kept apart from its own.
        """
        turns = [_with_reasoning(turn.to_json()) for turn in messages]
        offered = None if tools is None else thaw(tuple(tools))
        everything = json.dumps([turns, offered, dict(self.options)], ensure_ascii=False) + self.source(offered)
        marks = [mark for mark in NONCHARACTERS if mark not in everything][:4]
        if len(marks) < 4:
            raise DataError(f"{place}: the dialogue uses nearly all of Unicode's noncharacters, U+FDD0 to U+FDEF")
        texts: list[str] = []
        _mapped([turns, offered], lambda text: texts.append(text) or text)
        names = [name for name in special if name and any(name in text for text in texts)]
        pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
        guard = lambda text: pattern.sub(lambda found: marks[0] + found.group() + marks[1], text)
        guarded = _mapped([turns, offered], guard)
        text = self._run(guarded[0], guarded[1], add_generation_prompt, (marks[2], marks[3]), place)
        out = _unmarked(text, names, marks)
        if names and out.text != self._run(turns, offered, add_generation_prompt, ("", ""), place):
            raise DataError(f"{place}: the texts spell special tokens of {sorted(names)}, and the chat template of "
                            f"{self.origin} takes them apart so that they cannot be kept as text")
        return out

    def render(self, messages: Sequence[Message], *, tools: Sequence[Mapping] | None = None,
               add_generation_prompt: bool = False, place: str = "<dialogue>") -> str:
        """The dialogue's text; DataError with `place` where the template refuses it."""
        return self.rendered(messages, tools=tools, add_generation_prompt=add_generation_prompt, place=place).text

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Sequence[Mapping] | None = None,
               add_generation_prompt: bool = True, place: str = "<dialogue>") -> list[int]:
        """Ids of the dialogue's text: what a model reads before it answers. Special tokens are ids only where the
        template wrote them; no BOS is added to those that it writes."""
        out = self.rendered(messages, tools=tools, add_generation_prompt=add_generation_prompt,
                            special=tokenizer.special_tokens, place=place)
        return tokenizer.encode_rendered(out.text, out.literal)[0]


def _json_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{str(path)!r}: expected a JSON object, found {type(found).__name__}")
    return found


def _named(value: Any, where: str) -> dict[str, str]:
    """name -> source of a `chat_template` entry: one text, or a list of {name, template}."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return dict(value)
    if isinstance(value, list) and all(isinstance(item, dict) and isinstance(item.get("name"), str)
                                       and isinstance(item.get("template"), str) for item in value):
        return {item["name"]: item["template"] for item in value}
    raise ConfigError(f"{where}: chat_template is {value!r:.80}; expected a text or a list of name and template")


def _specials(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token`, ... of a folder, spelled as text, as templates refer to them."""
    found = _json_file(folder / "special_tokens_map.json") | _json_file(folder / "tokenizer_config.json")
    pattern = re.compile(r"(bos|eos|unk|sep|pad|cls|mask)_token")
    named = {name: value for name, value in found.items() if pattern.fullmatch(name)}
    if isinstance(found.get("extra_special_tokens"), dict):
        named |= found["extra_special_tokens"]
    spelled = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: value for name, value in spelled.items() if isinstance(value, str)}


def load_template(source: str | os.PathLike, *, name: str | None = None, specials: Mapping[str, str] | None = None,
                  options: Mapping[str, Any] | None = None, now: datetime.datetime | None = None) -> ChatTemplate:
    """The chat template of a Hugging Face folder, of a Jinja file, or a built-in one by its name (BUILTIN).

    A folder's templates are `chat_template.jinja` with `additional_chat_templates/*.jinja`, else `chat_template` in
    tokenizer_config.json, else chat_template.json; special tokens come from tokenizer_config.json. specials: adds to
    or replaces them (built-in templates know none by themselves: see `template_specials`).
    Raises ConfigError where there is none, naming where it was looked for.
    """
    path = Path(source)
    found: dict[str, str] = {}
    own: dict[str, str] = {}
    if not path.exists() and str(source) in BUILTIN:
        found = {"default": BUILTIN[str(source)]}
    elif path.is_file():
        found = {"default": path.read_text("utf-8")}
    elif path.is_dir():
        own = _specials(path)
        more = sorted((path / "additional_chat_templates").glob("*.jinja"))
        if (path / "chat_template.jinja").is_file():
            found = {"default": (path / "chat_template.jinja").read_text("utf-8")}
        for file in ("tokenizer_config.json", "chat_template.json"):
            entry = _json_file(path / file).get("chat_template")
            if not found and entry is not None:
                found = _named(entry, str(path / file))
        found |= {file.stem: file.read_text("utf-8") for file in more}
    if not found:
        raise ConfigError(f"no chat template in {str(source)!r}; expected a folder with chat_template.jinja, "
                          "chat_template in tokenizer_config.json, or chat_template.json; a Jinja file; or one of the "
                          f"built-in {sorted(BUILTIN)}")
    return ChatTemplate(found, name, own | dict(specials or {}), dict(options or {}), str(source), now)


def template_specials(tokenizer: Tokenizer, *, bos_id: int | None, eos_id: int | None) -> dict[str, str]:
    """`bos_token` and `eos_token` spelled as the tokenizer does, for templates that do not bring them along."""
    named = {"bos_token": bos_id, "eos_token": eos_id}
    return {name: tokenizer.token(id) for name, id in named.items() if id is not None}
