"""Sweeps: an algebra of settings, the members that it names, the folder that holds them, and their results."""

from alignax.sweep.algebra import Point, chain, choice, collect, log_uniform, parse, product, uniform, values, zipped
from alignax.sweep.folder import MEMBERS, PLAN, Progress, claim, dropped, finished, left, plan_of
from alignax.sweep.members import Member, resolve
from alignax.sweep.processes import run_processes
from alignax.sweep.results import gather, history, write

__all__ = [
    "MEMBERS", "Member", "PLAN", "Point", "Progress", "chain", "choice", "claim", "collect", "dropped", "finished",
    "gather", "history", "left", "log_uniform", "parse", "plan_of", "product", "resolve", "run_processes", "uniform",
    "values", "write", "zipped",
]
