"""What every test shares: the platform, the compilation cache, strict rank promotion, and the `shared` folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _cpu_tag() -> str:
    """A short hash of the processor's features: XLA's cached CPU code must not run on a CPU with fewer."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "unknown")
    return hashlib.sha256(features.encode()).hexdigest()[:12]


# Set in the environment and before JAX is imported, so that processes which a test starts inherit the same settings.
# Compiling tiny programs is what the tests spend their time on: nothing is too quick to be cached.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("ALIGNAX_CACHE") or str(ROOT / ".cache" / "xla" / _cpu_tag())
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402  (after the settings above)

# [B] against [B, K] would broadcast along the wrong axis without a word; only in this process, for code of our own.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models, data and method notes; tests that read it are skipped where it is absent."""
    folder = Path(os.environ.get("ALIGNAX_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no shared material at {folder}; set ALIGNAX_SHARED to its folder")
    return folder
