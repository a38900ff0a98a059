"""New desiderata for DPO (proposed loss) (arXiv 2407.09072).

    alignax train --config experiments/methods/typo.py --workdir runs/typo

Cost: about a minute on two CPU cores. Expected: with batches that hold the stream
`reference_sample` (completions sampled from the reference) the stages finish;
without, the method's stage stops at its first batch and names the stream.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("typo", tiny=configs.quick(arg))
