"""Quality-aware self-refinement (Sr-IPO) (arXiv 2405.21040).

    alignax train --config experiments/methods/sr_ipo.py --workdir runs/sr_ipo

Cost: about a minute on two CPU cores. Expected: with batches that hold the stream
`aux_prompt` (the same completions behind the quality prompt) the stages finish;
without, the method's stage stops at its first batch and names the stream.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("sr_ipo", tiny=configs.quick(arg))
