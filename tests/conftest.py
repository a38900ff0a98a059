"""What every test shares: the platform, the compilation cache, rank promotion as an error, the `shared` folder, and the
scripts of the benchmarks."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


# Set in the environment and before JAX is imported, so that processes which a test starts inherit the same settings.
# Compiling tiny programs is what the tests spend their time on: nothing is too quick to be cached.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALIGNAX_CACHE", str(ROOT / ".cache"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is no folder is looked up in the cache, never on the network

import jax  # noqa: E402  (after the settings above)

from alignax.launch import compilation_cache  # noqa: E402

if cache := compilation_cache():
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# [B] against [B, K] would broadcast along the wrong axis without a word: an error, in this process only.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models, data and method notes; tests that read it are skipped where it is absent."""
    folder = Path(os.environ.get("ALIGNAX_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no shared material at {folder}; set ALIGNAX_SHARED to its folder")
    return folder


@pytest.fixture(scope="module")
def scripts():
    """Imports a script of experiments/benchmarks by its name; their names are common ones, so nothing of them stays."""
    folder = ROOT / "experiments" / "benchmarks"
    names = [path.stem for path in folder.glob("*.py")]
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(folder))
    yield importlib.import_module
    sys.path.remove(str(folder))
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module
