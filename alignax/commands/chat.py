"""`alignax chat`: talk to a policy, answers shown while they are sampled."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from alignax.commands import policies, rules

CHUNK = 4
COMMANDS = """/reset              forget the dialogue (the system's turn stays)
/system TEXT        set the system's turn, or without a text remove it; forgets the dialogue
/temperature NUMBER set the temperature; 0 is greedy
/help               show these lines
/quit               end (so does the end of the input)"""


def add(commands) -> None:
    """Declares the command and its arguments."""
    import argparse

    parser = commands.add_parser(
        "chat", help="talk to a policy", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Reads a line, answers it, and so on; the whole dialogue goes through the chat template each time.",
        epilog="A line that begins with / is a command:\n" + COMMANDS)
    policies.add_arguments(parser)
    parser.add_argument("--template", default="", metavar="NAME",
                        help="chatml, plain, hh, a Jinja file or a folder (default: the model's own)")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system's turn")
    rules.add_arguments(parser, max_new_tokens=256)
    parser.set_defaults(execute=run)


class Dialogue:
    """The turns so far, and what of them fits the model."""

    def __init__(self, policy: policies.Policy, template: Any, system: str = ""):
        self.policy, self.template, self.system, self.turns = policy, template, system, []

    def reset(self, system: str | None = None) -> None:
        """Forgets the turns, and replaces the system's turn where one is given."""
        self.system, self.turns = self.system if system is None else system, []

    def add(self, role: str, text: str) -> None:
        """Appends a turn."""
        from alignax import data

        self.turns.append(data.Message(role, text))

    def ids(self, room: int) -> tuple[list[int], int]:
        """(ids of the dialogue, ready for an answer, in at most `room` tokens; how many old turns had to go for it).

        Old turns go for good, an exchange at a time, so that a user's turn comes first. Raises DataError where the last
        turn alone is too long, or the template refuses the dialogue.
        """
        from alignax import data
        from alignax.types import DataError

        dropped = 0
        while True:
            system = (data.Message("system", self.system),) if self.system else ()
            found = self.template.encode(self.policy.tokenizer, (*system, *self.turns), place="the dialogue")
            if len(found) <= room:
                return list(found), dropped
            if len(self.turns) < 3:
                raise DataError(f"the last turn makes {len(found)} tokens; the model has room for {room} before an "
                                "answer (--max-new-tokens leaves the rest)")
            del self.turns[:2]
            dropped += 2


def answer(policy: policies.Policy, ids: list[int], key: Any, stops: list[str], settings: dict) -> Iterator[str]:
    """The answer to a prompt of ids, as pieces of text in order; ends before a stop string."""
    import jax
    import numpy as np

    from alignax import rollout

    config, new = policy.spec.config, settings["max_new_tokens"]
    # Widths are doubled: a dialogue that grows is compiled for a few times, not at every turn.
    width = max(len(ids), min(max(64, 1 << (len(ids) - 1).bit_length()), config.max_positions - new))
    grid, mask = np.full((1, width), policy.text.pad_id, np.int32), np.zeros((1, width), bool)
    grid[0, width - len(ids):], mask[0, width - len(ids):] = ids, True
    shown = 0
    for part in rollout.stream(config, policy.params["model"], grid, mask, np.zeros((1,), np.uint32), key,
                               chunk=CHUNK, **settings):
        part = jax.device_get(part)
        tokens = [int(t) for t in part.tokens[0, 0][part.mask[0, 0]] if int(t) not in policy.text.eos_ids]
        whole = policy.tokenizer.decode_completion(ids, tokens).lstrip()
        text = rollout.cut_at_stop(whole, stops)
        last = bool(part.finished.all()) or int(part.mask.sum()) == new
        # A stop string that is only begun, or a character whose bytes are not all there, may yet be taken back.
        ready = len(text) if last or len(text) < len(whole) else len(text) - rollout.held_back(text, stops)
        if ready > shown:
            yield text[shown:ready]
            shown = ready


def run(arguments, console) -> int:
    """The loop; returns the exit code."""
    import jax

    from alignax.types import ConfigError, DataError

    policy = policies.load(arguments)
    settings = rules.settings(arguments, policy)
    room = policy.spec.config.max_positions - arguments.max_new_tokens
    if room < 1:
        raise ConfigError(f"--max-new-tokens={arguments.max_new_tokens}; allowed: fewer than the model's "
                          f"{policy.spec.config.max_positions} positions")
    dialogue = Dialogue(policy, policies.template(policy, arguments.template), arguments.system)
    say = lambda text, **more: console.print(text, markup=False, highlight=False, soft_wrap=True, **more)
    say(f"{policy.name}; /help lists the commands", style="dim")
    key, turn = jax.random.key(arguments.seed), 0
    for line in _lines(console):
        text = line.strip()
        if text.startswith("/"):
            if text.split()[0] == "/quit":
                break
            _obey(text, dialogue, settings, say)
            continue
        if not text:
            continue
        dialogue.add("user", text)
        try:
            ids, dropped = dialogue.ids(room)
            if dropped:
                say(f"({dropped} old turns were dropped: the model has {policy.spec.config.max_positions} positions)",
                    style="dim")
            said = _speak(answer(policy, ids, jax.random.fold_in(key, turn), arguments.stop, settings), say)
        except DataError as error:
            dialogue.turns.pop()
            say(f"error: {error}", style="red")
            continue
        turn += 1
        dialogue.add("assistant", said)
    return 0


def _lines(console) -> Iterator[str]:
    """Lines of the user: with a prompt on a terminal, plainly from a pipe; ends with the input."""
    while True:
        try:
            if sys.stdin.isatty():
                yield console.input("[bold]> [/]")
            else:
                line = sys.stdin.readline()
                if not line:
                    return
                yield line
        except (EOFError, KeyboardInterrupt):
            return


def _speak(pieces: Iterator[str], say) -> str:
    """Shows an answer as it comes and returns it; an interrupt (Ctrl-C) ends it where it is."""
    said = ""
    try:
        for piece in pieces:
            say(piece, end="")
            said += piece
    except KeyboardInterrupt:
        say(" (interrupted)", style="dim", end="")
    say("\n")
    return said.strip()


def _obey(text: str, dialogue: Dialogue, settings: dict, say) -> None:
    """Carries out a command of the user's; says what is allowed where it is none."""
    name, _, value = text.partition(" ")
    value = value.strip()
    if name == "/reset":
        dialogue.reset()
        say("(the dialogue is forgotten)", style="dim")
    elif name == "/system":
        dialogue.reset(value)
        say("(a new system's turn; the dialogue is forgotten)" if value else "(no system's turn)", style="dim")
    elif name == "/temperature":
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not (number == 0 or 1e-6 <= number <= 1e6):
            say(f"/temperature: found {value!r}, allowed: 0 (greedy) or a number in [1e-06, 1e+06]", style="red")
            return
        settings["temperature"] = number
        say(f"(temperature {number:g})", style="dim")
    else:
        if name != "/help":
            say(f"no command {name}", style="red")
        say(COMMANDS, style="dim")
