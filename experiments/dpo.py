"""Any preference loss on your own model and data: one stage, all keys at the top.

    alignax train --config experiments/dpo.py --config.model.path=FOLDER --config.data.path=FILE --workdir runs/dpo
    alignax train --config experiments/dpo.py:loss=simpo ... --config.loss.beta=2.5
    alignax train --config experiments/dpo.py ... --config.lora.rank=16

FOLDER is a Hugging Face folder or name; FILE holds preferences in any layout that `alignax data show FILE` reads.
Prompts too long for the model lose their oldest tokens (`truncation`), and the table at the start says how many.
All batches have one shape, so the step compiles once; where lengths differ much, `--config.layout=packed` or
`shared_prefix_packed` wastes less of it, and `--config.shapes=batch` compiles a shape for each bucket instead.

Cost: with a model of 260 thousand parameters and 512 positions, 100 steps of 8 pairs take about a minute on two CPU
cores. Expected: the loss at step 0 is log 2 = 0.6931 for DPO, since policy and reference are equal.
"""

from alignax import configs


def get_config(arg: str = ""):
    """`loss=NAME` chooses the loss (its hyper-parameters then stand in `config.loss`); `tiny` is for tests."""
    values, flags = configs.arguments(arg, "tiny", loss="dpo")
    tiny = "tiny" in flags
    return configs.single(
        values["loss"], steps=2 if tiny else 0, batch_size=4 if tiny else 8, truncation="left",
        data=dict(path="", eval_records=8 if tiny else 64), bucket_multiple=32,
        optim=dict(learning_rate=1e-5, schedule="linear"), eval_every=2 if tiny else 100, log_every=1 if tiny else 10,
        checkpoint_every=500)
