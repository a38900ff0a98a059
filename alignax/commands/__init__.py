"""The commands of `alignax`, a module each: `add(commands)` declares it, `run(arguments, console)` does it.

`add` runs at every start, so that `--help` lists all commands at once; what is heavy is imported inside `run`.
"""
