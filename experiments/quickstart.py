"""The main job: from nothing to an aligned model, on generated stories, with no network.

    alignax train --config experiments/quickstart.py --workdir runs/quickstart

Stages: sft (a small decoder learns the stories) -> sample (K completions per prompt; gold reward = positive minus
negative words; labels drawn from a Bradley-Terry model of it) -> dpo at four strengths -> evaluate on held-out
openings, with the reward-KL frontier beside the exact best-of-n curve.

Cost: under 4 minutes on two CPU cores. Expected: some strength reaches win rate >= 0.85 at <= 8 nats, some
>= 0.75 at <= 3 nats. `--config experiments/quickstart.py:tiny` shrinks everything to seconds, for tests.
"""

from alignax import configs

STRENGTHS = (1.0, 0.5, 0.3, 0.2)


def get_config(arg: str = ""):
    """`tiny` runs the same stages at toy size."""
    tiny = configs.quick(arg)
    config = configs.base(tokenizer="builtin:stories")
    width = 32 if tiny else 96
    config.model = configs.model_section(hidden_size=width, intermediate_size=2 * width, num_layers=2, num_heads=4,
                                         num_kv_heads=2, head_dim=width // 4, max_positions=128, unroll=2)
    config.sft = configs.train_stage(
        "sft", data=dict(path="builtin:stories", max_records=400 if tiny else 6000, eval_records=64),
        optim=dict(learning_rate=3e-3, schedule="cosine", warmup_steps=5 if tiny else 20),
        batch_size=16 if tiny else 32, steps=20 if tiny else 450, eval_every=10 if tiny else 150,
        checkpoint_every=10 if tiny else 150)
    config.sample = configs.sample_stage(num_prompts=40 if tiny else 700, num_samples=4 if tiny else 6,
                                         max_new_tokens=40, batch_size=40 if tiny else 100, label_scale=1.0,
                                         pairs="all")
    names = []
    for beta in STRENGTHS[:2] if tiny else STRENGTHS:
        name = f"dpo_{beta:g}".replace(".", "_")
        names.append(name)
        config[name] = configs.train_stage(
            "dpo", hyper=dict(beta=beta), init="sft", data=dict(path="stage:sample", eval_records=64),
            optim=dict(learning_rate=1e-3, schedule="linear", warmup_steps=0 if tiny else 5),
            batch_size=16 if tiny else 64, epochs=1, eval_every=2 if tiny else 10, log_every=1 if tiny else 5,
            checkpoint_every=200)
    config.evaluate = configs.evaluate_stage(policies=tuple(names), baseline="sft", num_prompts=64 if tiny else 600,
                                             max_new_tokens=40, batch_size=64 if tiny else 200)
    config.stages = ("sft", "sample", *names, "evaluate")
    return config
