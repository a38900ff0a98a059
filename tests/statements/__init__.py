"""Every loss of the index once more: plain NumPy in float64, example by example, from the published formulas.

`STATEMENTS[id](x, **hyper)` is the scalar that the loss's reduced terms give. Nothing here is shared with alignax.
"""

from statements import lists, margins, offline, pairs, plain, points, rewards, steps, tokens, unlearning
from statements.base import STATEMENTS, Arrays

__all__ = ["STATEMENTS", "Arrays", "lists", "margins", "offline", "pairs", "plain", "points", "rewards", "steps",
           "tokens", "unlearning"]
