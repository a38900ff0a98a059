"""Self-supervised preference optimization with preference degree (arXiv 2409.17791).

    alignax train --config experiments/methods/self_supervised_po.py --workdir runs/self_supervised_po

Cost: about a minute on two CPU cores. Expected: with batches that hold the stream
`degraded` (versions with key content removed; and parameters `degree_head`) the stages finish;
without, the method's stage stops at its first batch and names the stream.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("self_supervised_po", tiny=configs.quick(arg))
