"""What a compiled program does, read from its text: collectives, weight products, donated buffers.

XLA's own cost analysis counts the body of a loop once. Here every instruction is counted as often as its computation
runs: a loop's body `known_trip_count` times, called computations as often as their callers.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4,
          "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAMED = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALL = re.compile(r"\s*([\w\-]+)\((.*)$")


class Instruction(NamedTuple):
    """One line: name, its arrays as (dtype, shape), opcode, everything after the opcode, and how often it runs."""

    name: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    opcode: str
    rest: str
    times: int
    computation: str


class Collective(NamedTuple):
    """Collectives of one kind: how many run, bytes of their results on a device, bytes that a device sends (`wire`)."""

    count: int
    bytes: int
    wire: float


def _split_type(text: str) -> tuple[str, str]:
    """(type, the rest) of the right side of an instruction; a tuple's type is in parentheses."""
    if not text.startswith("("):
        head, _, rest = text.partition(" ")
        return head, rest
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:place + 1], text[place + 1:]
    return text, ""


def instructions(text: str) -> list[Instruction]:
    """All instructions of a compiled module, each with the number of times that a run of the program executes it.

    A loop whose number of turns the compiler does not know counts once.
    """
    found: dict[str, list] = {}
    current, entry = None, None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
            continue
        named = _NAMED.match(line)
        if current is None or not named:
            continue
        kind, after = _split_type(named[2])
        call = _CALL.match(after)
        if call:
            arrays = tuple((dtype, tuple(int(n) for n in sizes.split(",") if n))
                           for dtype, sizes in _ARRAY.findall(kind) if dtype in _BYTES)
            current.append((named[1], arrays, call[1], call[2]))
    times: dict[str, int] = defaultdict(int)
    if entry is not None:
        _visit(found, entry, 1, times)
    return [Instruction(name, arrays, opcode, rest, times[computation], computation)
            for computation, lines in found.items() for name, arrays, opcode, rest in lines if times[computation]]


def _visit(found: dict[str, list], computation: str, count: int, times: dict[str, int]) -> None:
    times[computation] += count
    for _, _, opcode, rest in found.get(computation, ()):
        trips = _TRIPS.search(rest) if opcode == "while" else None
        inner = count * (int(trips[1]) if trips else 1)
        called = _CALLED.findall(rest)
        for branches in _BRANCHES.findall(rest):
            called += re.findall(r"[\w.\-]+", branches)
        for name in called:
            _visit(found, name, inner, times)


def _size(array: tuple[str, tuple[int, ...]]) -> int:
    return _BYTES[array[0]] * math.prod(array[1])


def group_size(rest: str, devices: int) -> int:
    """Devices that take part in one collective together; `devices` where the instruction names no groups."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", rest)
    if named:
        sizes = {k: int(v) for k, v in re.findall(r"'([^']+)'=(\d+)", named[1])}
        # An axis of a group stands whole, 'a', or as a part of it, 'a':(3)4 with 4 devices.
        return math.prod(int(part) if part else sizes[axis]
                         for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2]))
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=", rest)
    if tiled:
        return int(tiled[1].split(",")[-1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(listed[1].split(",")) if listed and listed[1] else devices


def collectives(text: str, devices: int) -> dict[str, Collective]:
    """Collectives of a compiled module by kind; `bytes` and `wire` are those of one device and one run.

    wire, for groups of n: (n-1)/n of the result for all-gather and all-to-all, twice that for all-reduce (a ring),
    n-1 results for reduce-scatter, the result for collective-permute. Groups of one device send nothing and are left
    out. An asynchronous pair counts once.
    """
    out: dict[str, list] = defaultdict(lambda: [0, 0, 0.0])
    for one in instructions(text):
        kind = one.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        n = 2 if kind == "collective-permute" else group_size(one.rest, devices)
        if n < 2:
            continue
        # The start of an asynchronous pair returns its operands before its results.
        started = one.opcode.endswith("-start") and kind in ("all-gather", "collective-permute") and len(one.arrays) > 1
        size = _size(one.arrays[1]) if started else sum(map(_size, one.arrays))
        share = {"all-gather": (n - 1) / n, "all-to-all": (n - 1) / n, "all-reduce": 2 * (n - 1) / n,
                 "reduce-scatter": n - 1, "collective-permute": 1}[kind]
        total = out[kind]
        total[0] += one.times
        total[1] += one.times * size
        total[2] += one.times * size * share
    return {kind: Collective(*out[kind]) for kind in KINDS if kind in out}


def dot_flops(text: str) -> int:
    """Multiplications and additions of the matrix products that one device computes in one run, loops multiplied."""
    lines = instructions(text)
    shapes = {(line.computation, line.name): line.arrays for line in lines}
    total = 0
    for line in lines:
        if line.opcode != "dot":
            continue
        operand = re.match(r"(?:[a-z]\w*\[[\d,]*\](?:\{[^}]*\})? )?%?([\w.\-]+)", line.rest)
        left = shapes[line.computation, operand[1]][0][1]
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)
        inner = math.prod(left[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
        total += line.times * 2 * math.prod(line.arrays[0][1]) * inner
    return total


def aliased(text: str) -> int:
    """Outputs that take the place of a donated input (entries of the module's input_output_alias)."""
    header = text.split("\n", 1)[0]
    return len(re.findall(r"(?:may|must)-alias", header))
