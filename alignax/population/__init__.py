"""Populations: many runs that differ in numbers only, as one compiled program.

Arrays: `start`, `make_update`, `make_steps`, `take`, `deactivate` (see `arrays`). Configs: `run` takes members, each a
name, a config and a folder, and leaves in every folder what a run alone would leave; `groups` and `bases` tell
beforehand which members train together and which stages they share.
"""

from alignax.population.arrays import (
    AXIS,
    Population,
    deactivate,
    device_per_core,
    filled,
    make_mesh,
    make_steps,
    make_update,
    member,
    place,
    stack,
    start,
    take,
)
from alignax.population.rules import EarlyStop, Halving, early_stop, halving
from alignax.population.run import DROPPED, Result, run
from alignax.population.structure import SEEDS, Base, Member, bases, groups, signature

__all__ = [
    "AXIS", "Base", "DROPPED", "EarlyStop", "Halving", "Member", "Population", "Result", "SEEDS", "bases", "deactivate",
    "device_per_core", "early_stop", "filled", "groups", "halving", "make_mesh", "make_steps", "make_update", "member",
    "place", "run", "signature", "stack", "start", "take",
]
