"""alignax: preference alignment of language models in JAX, as pure functions.

Import the parts by name: `from alignax import losses` opens the index of methods, `alignax.types` holds the words
that every part shares. Importing the package itself imports nothing, so that asking for its version costs nothing.
"""

__version__ = "0.1.0"
