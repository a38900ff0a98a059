"""Starting a config where machines are: processes here (local), Slurm (slurm), TPU pods and clouds (pods).

What runs is `alignax train` (job); what a backend can be told stands in options. Nothing is imported here, so that
`--help` answers at once.
"""
