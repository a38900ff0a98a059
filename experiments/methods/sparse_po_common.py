"""SparsePO: one common mask (arXiv 2410.05102).

    alignax train --config experiments/methods/sparse_po_common.py --workdir runs/sparse_po_common

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("sparse_po_common", tiny=configs.quick(arg))
