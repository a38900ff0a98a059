"""R9: few shapes; a count of compilations that ends a run over its budget; packing and padding give the same losses.

Each test replays a failure that users of other frameworks reported; the docstring names the thread.
"""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from alignax import configs, data, losses, metrics, train
from alignax.diagnostics import figures
from alignax.types import ConfigError

pytestmark = pytest.mark.slow

COUNT = 24
LAYOUTS = ("padded", "shared_prefix_packed")


@pytest.fixture(scope="module", autouse=True)
def cheap():
    """No curves of a few points are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "training_curves", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs whose completions have 1 to 14 words."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    words = ["tom was at the park .", "he smiled .", "the dog ran home ."]
    rows = [{"prompt": words[i % 3], "chosen": " " + " ".join(["the dog ran"] * (1 + i % 4)) + " .",
             "rejected": " he cried ."} for i in range(COUNT)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def config_of(path, loss="dpo", **over):
    config = configs.base(tokenizer="builtin:stories", stages=("method",))
    config.model = configs.model_section(hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1,
                                         head_dim=8, max_positions=64)
    config.method = configs.train_stage(loss, **dict(
        data=dict(path=str(path), eval_records=0), steps=4, batch_size=2, log_every=1, eval_every=100,
        checkpoint_every=100, optim=dict(name="sgd", learning_rate=0.1)) | over)
    return config


def run(config, workdir):
    return train.run(config, workdir, console=Console(file=io.StringIO(), width=160))["stages"]["method"]


def test_every_batch_of_other_lengths_compiles_again(pairs, tmp_path):
    """jax-gcm#592 (167 minutes of recompilation in a session), EasyDeL#166, EasyDeL#181, EasyDeL#183, trl#252,
    trl#4182, trlx#323, axolotl#3521: the run ends at the first compilation over its budget and names the shapes."""
    config = config_of(pairs, shapes="batch", bucket_multiple=1, compile_budget=1)
    with pytest.raises(ConfigError) as caught:
        run(config, tmp_path / "w")
    text = str(caught.value)
    assert "the step was compiled 2 times, over config.method.compile_budget=1, at step " in text
    assert "shapes seen (rows x columns, slots): 4 x " in text and text.count(";") >= 2
    assert "shapes='global'" in text and "bucket_multiple" in text and "compile_budget" in text


def test_one_shape_is_compiled_once(pairs, tmp_path):
    """trl#2001: 10 minutes a step became 2 seconds when shapes stood still. With one shape for the stage, or one
    bucket, a budget of one compilation is enough."""
    for number, over in enumerate((dict(shapes="global"), dict(shapes="batch", bucket_multiple=64))):
        assert run(config_of(pairs, compile_budget=1, **over), tmp_path / str(number))["compilations"] == 1


def test_buckets_bound_the_shapes():
    """Of the family of trl#2001: lengths of 1 to 60 tokens come in as many shapes as there are buckets, not 60."""
    rng = np.random.default_rng(0)
    rows = [data.token_record(str(i), [1] * 3, [[5] * n, [6] * int(rng.integers(1, 60))])
            for i, n in enumerate(rng.integers(1, 60, 200))]
    batches = [np.arange(start, start + 4) for start in range(0, 200, 4)]
    for layout in data.LAYOUT_NAMES:
        shapes = lambda multiple, layout=layout: {data.plan_shape([rows[i] for i in some], layout, multiple)
                                                  for some in batches}
        fine, coarse = shapes(1), shapes(32)
        assert len(coarse) <= 16 and len(coarse) < len(fine) / 2, (layout, len(fine), len(coarse))
        whole = data.plan_shape(rows, layout, 8, batches=batches)
        assert {data.fill([rows[i] for i in some], whole, layout, pad_id=0).streams["pair"].tokens.shape
                for some in batches} == {(whole.rows * (1 if layout.endswith("packed") else 4), whole.T)}


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_packing_changes_the_losses(pairs, tmp_path, loss):
    """trl#2469, trl#1274, trl#2422 (padding-free), NeMo-RL#719, NeMo-RL#730, ms-swift#4142, torchtune#2177: a whole run
    on packed rows writes the losses, margins and log-probs of the padded one, step by step."""
    written = {}
    for layout in LAYOUTS:
        result = run(config_of(pairs, loss, layout=layout, batch_size=4), tmp_path / layout)
        assert result["compilations"] == 1
        written[layout] = metrics.read_metrics(tmp_path / layout, split="train")
    first, second = (written[layout] for layout in LAYOUTS)
    assert len(first) == len(second) == 4
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() and a["grad_norm"] > 1e-4
        for key in a.keys() - {"stage", "split"}:
            if not key.endswith("_per_second"):
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=2e-5), (a["step"], key)


@pytest.mark.parametrize("layout", data.LAYOUT_NAMES)
def test_a_layout_is_offered_and_refused(layout):
    """LlamaFactory#6686 (packing refused for DPO), trl#6972, trl#7014 (advertised after it had been switched off): the
    names that a config may hold are the layouts that exist, for every loss."""
    for name in losses.names():
        config = configs.base(stages=("method",))
        config.method = configs.train_stage(name, layout=layout)
        configs.check(config)
    record = data.token_record("a", [1, 4], [[5, 2], [6, 7, 2]])
    assert data.fill([record], data.plan_shape([record], layout, 8), layout, pad_id=0).streams["pair"].mask.sum() == 5
    config.method.layout = "padding_free"
    with pytest.raises(ConfigError, match=f"config.method.layout='padding_free'; allowed: .*{layout}"):
        configs.check(config)
