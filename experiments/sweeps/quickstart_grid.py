"""Three losses, four strengths, three learning rates, four seeds: the task of the quickstart as a sweep of 144 runs.

    alignax sweep --config experiments/sweeps/quickstart_grid.py --workdir runs/grid --seeds 4
    alignax report runs/grid

Stages: sft and sample run once and are shared, so that all members see the same pairs; then dpo, ipo and simpo train
as one compiled program each, 48 members in it; every member is evaluated on the same held-out openings. A strength is
a loss's own hyper-parameter (beta of dpo, tau of ipo, beta of simpo) on a scale of 1 to 4. The three scales are not
comparable to each other: compare losses at the KL that they spend, in the report's frontier.

Cost: under 10 minutes on two CPU cores. Expected: all members finish, and the KL rises with the learning rate, whose
largest value is meant to be too large. `--config experiments/sweeps/quickstart_grid.py:tiny` is for tests.
"""

from alignax import configs
from alignax.sweep import chain, product, values, zipped

STRENGTHS = {
    "dpo": ("method.loss.beta", (1.0, 0.5, 0.3, 0.1)),
    "ipo": ("method.loss.tau", (0.5, 0.2, 0.1, 0.05)),
    "simpo": ("method.loss.beta", (1.0, 2.0, 5.0, 10.0)),
}
LEARNING_RATES = (3e-4, 1e-3, 3e-3)


def get_config(arg: str = ""):
    """`loss=NAME` chooses the loss of the stage `method`; `tiny` runs the same stages at toy size."""
    given, flags = configs.arguments(arg, "tiny", loss="dpo")
    tiny = "tiny" in flags
    config = configs.embedded_run(given["loss"], tiny=tiny, optim=dict(schedule="linear", warmup_steps=0))
    config.evaluate.examples = 0
    config.sample.pairs = "all"
    if not tiny:
        config.sft.steps = config.sft.eval_every = 300
        config.sample.num_samples = 6
        config.evaluate.num_prompts = config.evaluate.batch_size = 100
    return config


def sweep(add):
    """Every loss at its own four strengths, times the learning rates."""
    losses = [product(values("loss", (name,)), zipped(values("strength", (1, 2, 3, 4)), values(key, strengths)))
              for name, (key, strengths) in STRENGTHS.items()]
    for settings in product(chain(*losses), values("method.optim.learning_rate", LEARNING_RATES)):
        strength, rate = settings.pop("strength"), settings["method.optim.learning_rate"]
        add(name=f"{settings['loss']}-{strength}-{rate:g}",
            factors={"loss": settings["loss"], "strength": strength, "learning_rate": rate}, **settings)
