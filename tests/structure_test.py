"""The shape of the source tree: layering, docstrings, file length, where configs may be known, what configs define.

Each check is a function of a tree's root that returns the violations as lines of text. It runs on this repository,
and on a small tree in a temporary folder with one violation seeded, to show that it can fail.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 600

# A module imports lower levels and its own package only; `types`, which imports nothing of alignax, is open to all.
# `configs` holds the config templates: beside the step, below the loop that reads them. Level 6 is ordered in itself:
# what a run shares, the stages that are not training, and the loop that calls them; so is 7, the command at the end.
LEVELS: dict[str, float] = {
    "types": 0, "ops": 0,
    "losses": 1, "models": 1,
    "data": 2, "rollout": 2,
    "rewards": 3, "diagnostics": 3,
    "presence": 3.8, "supervise": 3.9, "distributed": 4, "memory": 4,
    "optim": 4, "sharding": 4, "checkpoint": 4, "metrics": 4, "reference": 4, "sources": 4,
    "step": 5, "configs": 5,
    "context": 6, "sample": 6.1, "scoring": 6.15, "evaluate": 6.2, "stage_data": 6.2, "planning": 6.2,
    "stage_setup": 6.25, "watch": 6.28, "train": 6.3, "examine": 6.35, "analyses": 6.37, "population": 6.4,
    "sweep": 6.5,
    "launch": 7, "launching": 7.05, "commands": 7.1, "cli": 7.2,
}
KNOW_CONFIGS = ("configs", "train", "examine", "population", "sweep", "launch", "commands", "cli")
MAY_PRINT = ("cli", "commands")
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|work|opt|tmp)/\w")


def sources(root: Path, *folders: str) -> Iterator[tuple[str, ast.Module]]:
    """(path relative to root, parsed module) of every Python file in the folders."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"), str(path))


def part(name: str) -> str:
    """The part of alignax that a file belongs to: alignax/ops/head.py -> ops, alignax/step.py -> step."""
    parts = Path(name).with_suffix("").parts[1:]
    return "" if parts == ("__init__",) else parts[0]


def imported(name: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a file imports, also inside functions and by import_module.

    `from a import b` counts as a.b, since b may be a module.
    """
    package = list(Path(name).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def layering(root: Path) -> list[str]:
    """Imports of the same or a higher level outside the own package, and modules without a level."""
    found = []
    for name, tree in sources(root, "alignax"):
        own = part(name)
        if own and own not in LEVELS:
            found.append(f"{name}: {own!r} has no level; give it one in LEVELS")
            continue
        for line, target in imported(name, tree):
            pieces = target.split(".")
            other = pieces[1] if len(pieces) > 1 else ""
            if pieces[0] != "alignax" or other in (own, "", "types", "__version__"):
                continue
            if not own:
                found.append(f"{name}:{line}: importing alignax must import nothing, found {target}")
            elif other not in LEVELS:
                found.append(f"{name}:{line}: imports {target}, which has no level")
            elif LEVELS[other] >= LEVELS[own]:
                found.append(f"{name}:{line}: {own} (level {LEVELS[own]}) imports {other} (level {LEVELS[other]})")
    return found


def config_knowledge(root: Path) -> list[str]:
    """Imports of ml_collections outside the modules that may know of configs."""
    return [
        f"{name}:{line}: imports {target}; only {', '.join(KNOW_CONFIGS)} may, pass plain arguments"
        for name, tree in sources(root, "alignax") if part(name) not in KNOW_CONFIGS
        for line, target in imported(name, tree) if target.split(".")[0] == "ml_collections"
    ]


def docstrings(root: Path) -> list[str]:
    """Modules and public module-level functions and classes of alignax without a docstring."""
    found = []
    for name, tree in sources(root, "alignax"):
        if not ast.get_docstring(tree):
            found.append(f"{name}: no module docstring")
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                if not node.name.startswith("_") and not ast.get_docstring(node):
                    found.append(f"{name}:{node.lineno}: {node.name} has no docstring")
    return found


def prints(root: Path) -> list[str]:
    """Calls of print in the library."""
    return [
        f"{name}:{node.lineno}: print( in the library"
        for name, tree in sources(root, "alignax") if part(name) not in MAY_PRINT
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def lengths(root: Path) -> list[str]:
    """Source files that have grown too long."""
    found = []
    for name, _ in sources(root, "alignax", "experiments", "tests"):
        lines = len((root / name).read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            found.append(f"{name}: {lines} lines, at most {MAX_LINES}")
    return found


def experiments(root: Path) -> list[str]:
    """Config files without get_config or without the docstring that tells command, cost and result."""
    found = []
    for name, tree in sources(root, "experiments"):
        # What measures or writes documentation is no run.
        scripts = ("benchmarks", "docs", "papers", "parity")
        script = name.startswith(tuple(f"experiments/{folder}/" for folder in scripts))
        if not script and not any(isinstance(n, ast.FunctionDef) and n.name == "get_config" for n in tree.body):
            found.append(f"{name}: defines no get_config")
        if not ast.get_docstring(tree):
            found.append(f"{name}: no docstring with command, cost and expected result")
    return found


def machine_paths(root: Path) -> list[str]:
    """Absolute paths of somebody's machine in strings."""
    return [
        f"{name}:{node.lineno}: machine path in {node.value[:60]!r}"
        for name, tree in sources(root, "alignax", "experiments")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and MACHINE_PATH.search(node.value)
    ]


CHECKS: tuple[Callable[[Path], list[str]], ...] = (
    layering, config_knowledge, docstrings, prints, lengths, experiments, machine_paths,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_this_repository(check):
    found = check(ROOT)
    assert not found, "\n".join(["", *found])


def test_the_checks_see_the_sources():
    """A check of nothing would pass: the tree must hold the parts that the checks are about."""
    names = {name for name, _ in sources(ROOT, "alignax")}
    assert {"alignax/types.py", "alignax/step.py", "alignax/losses/__init__.py", "alignax/ops/head.py"} <= names
    assert any(name.startswith("experiments/methods/") for name, _ in sources(ROOT, "experiments"))
    found = dict(imported("alignax/step.py", ast.parse((ROOT / "alignax/step.py").read_text(encoding="utf-8"))))
    assert any(target.startswith("alignax.models.") for target in found.values())


@pytest.fixture
def tree(tmp_path):
    """A small tree without violations."""
    files = {
        "alignax/__init__.py": '"""a."""\n__version__ = "1"\n',
        "alignax/types.py": '"""t."""\n',
        "alignax/ops/__init__.py": '"""o."""\nfrom alignax.ops import head\n',
        "alignax/ops/head.py": '"""h."""\n\n\ndef head():\n    """d."""\n\n\ndef _private():\n    pass\n',
        "alignax/losses/__init__.py": '"""l."""\nfrom alignax.ops.head import head\nfrom .pairs import dpo\n',
        "alignax/losses/pairs.py": '"""p."""\nfrom ..types import x\n\n\ndef dpo():\n    """`print(1)` in text."""\n',
        "alignax/train.py": '"""t."""\nimport ml_collections\nfrom alignax import losses, __version__\n',
        "alignax/cli.py": '"""c."""\n\n\ndef main():\n    """m."""\n    import alignax.train\n    print(1)\n',
        "experiments/dpo.py": '"""e."""\n\n\ndef get_config(arg=""):\n    return arg\n',
        "tests/x_test.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_clean_tree_has_no_findings(tree):
    assert [line for check in CHECKS for line in check(tree)] == []


@pytest.mark.parametrize(
    "check, name, added, message",
    [
        (layering, "alignax/ops/head.py", "from alignax.losses import dpo\n", "ops (level 0) imports losses (level 1)"),
        (layering, "alignax/losses/pairs.py", "import alignax.models\n", "losses (level 1) imports models (level 1)"),
        (layering, "alignax/losses/pairs.py", "from ..train import run\n", "imports train (level 6.3)"),
        (layering, "alignax/losses/pairs.py", "from .. import train\n", "imports train (level 6.3)"),
        (layering, "alignax/losses/pairs.py", "from alignax import cli\n", "imports cli (level 7.2)"),
        (layering, "alignax/ops/head.py", "def f():\n    import alignax.train\n", "imports train (level 6.3)"),
        (layering, "alignax/ops/head.py", "importlib.import_module('alignax.train')\n", "imports train (level 6.3)"),
        (layering, "alignax/types.py", "import alignax.ops.head\n", "types (level 0) imports ops (level 0)"),
        (layering, "alignax/train.py", "import alignax.nowhere\n", "alignax.nowhere, which has no level"),
        (layering, "alignax/__init__.py", "from alignax import losses\n", "must import nothing"),
        (layering, "alignax/nowhere.py", '"""n."""\n', "'nowhere' has no level"),
        (config_knowledge, "alignax/ops/head.py", "def f():\n    from ml_collections import ConfigDict\n",
         "imports ml_collections.ConfigDict"),
        (docstrings, "alignax/ops/head.py", "def naked():\n    pass\n", "naked has no docstring"),
        (docstrings, "alignax/ops/head.py", "class Naked:\n    pass\n", "Naked has no docstring"),
        (docstrings, "alignax/ops/new.py", "x = 1\n", "no module docstring"),
        (prints, "alignax/ops/head.py", "def _f():\n    print(1)\n", "print( in the library"),
        (lengths, "experiments/dpo.py", "x = 1\n" * 600, "at most 600"),
        (lengths, "tests/x_test.py", "x = 1\n" * 601, "601 lines"),
        (experiments, "experiments/methods/ipo.py", '"""i."""\n\n\ndef config():\n    pass\n', "defines no get_config"),
        (experiments, "experiments/ipo.py", "def get_config():\n    pass\n", "no docstring"),
        (machine_paths, "experiments/dpo.py", f"data = '{'/home'}/someone/data'\n", "machine path"),
    ],
)
def test_a_seeded_violation_is_found(tree, check, name, added, message):
    path = tree / name
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + added)
    found = check(tree)
    assert len(found) == 1 and message in found[0] and name in found[0], found
