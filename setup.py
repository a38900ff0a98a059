"""Packaging of alignax: what it needs to run, and the extras for tests, parity checks, notebooks and accelerators."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """The version stands once, in alignax/__init__.py, and is read without importing the package."""
    text = (ROOT / "alignax" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE).group(1)


EXTRAS = {
    # Reading preference data through TFDS builder classes without TensorFlow, and prefetching it.
    "data": ["tensorflow-datasets>=4.9.9", "array_record>=0.7", "grain>=0.2.10", "pyarrow>=15.0"],
    "test": ["pytest>=8.0", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff>=0.9", "scipy>=1.13"],
    # torch's default wheel brings CUDA: `make test-all` installs $(TORCH) before this extra.
    "parity": ["torch>=2.6", "transformers>=5.0", "trl>=1.0", "peft>=0.13", "rax>=0.4"],
    "notebooks": ["nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"],
    "slurm": ["submitit>=1.5"],
    "search": ["optuna>=4.0"],
    "cuda12": ["jax[cuda12]>=0.6"],
    "cuda13": ["jax[cuda13]>=0.7.2"],
    "tpu": ["jax[tpu]>=0.6"],
}

setup(
    name="alignax",
    version=read_version(),
    description="Preference alignment of language models in JAX, as pure functions",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["alignax", "alignax.*"]),
    install_requires=[
        "absl-py>=2.1",
        "flax>=0.10",
        "huggingface_hub>=0.30",
        "jax>=0.6",
        "jinja2>=3.1.6",
        "matplotlib>=3.9",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.4",
        "orbax-checkpoint>=0.11",
        "rich>=13.7",
        "safetensors>=0.5",
        "scipy>=1.13",
        "tensorboardX>=2.6.2",
        "tokenizers>=0.21",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["alignax = alignax.cli:main"]},
)
