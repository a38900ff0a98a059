"""Analyses of data under a model, and of a finished run: what the functions of alignax.diagnostics say of real ones."""
