"""The DPO trajectory of TRL's DPOTrainer, step by step, on the same model, pairs and optimiser.

Both train a small random Llama on pairs of unequal length in file order. What is compared could all go wrong without
anybody noticing: margins and log-probs of every step against their own movement, the gradient norm before clipping,
and the direction of the whole parameter update. Four mistakes that look harmless are then made on our side, and each
has to be rejected by the same comparison.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignax import data, losses, models, step

pytestmark = pytest.mark.slow

BATCH, STEPS, BETA, RATE = 4, 20, 0.3, 2e-3
VOCAB, EOS, PAD = 96, 2, 0


class Trajectory(NamedTuple):
    """Per step: mean log-probs, margin (log-ratio difference, nats), gradient norm, loss; and the final update."""

    chosen: np.ndarray
    rejected: np.ndarray
    margin: np.ndarray
    norm: np.ndarray
    loss: np.ndarray
    update: np.ndarray


def disagreements(ours: Trajectory, theirs: Trajectory) -> list[str]:
    """The quantities that differ by more than the stated tolerance; empty where the trajectories agree."""
    found = []
    for name in ("chosen", "rejected", "margin"):
        a, b = getattr(ours, name), getattr(theirs, name)
        # The rounding of a float32 sum over some dozens of tokens is 1e-5 nats: the floor for steps without movement.
        allowed = 1e-4 * np.ptp(b) + 2e-5
        if np.abs(a - b).max() > allowed:
            found.append(f"{name}: {np.abs(a - b).max():.2e} > {allowed:.2e}")
    if (relative := np.abs(ours.norm / theirs.norm - 1).max()) > 1e-3:
        found.append(f"gradient norm: {relative:.2e} > 1e-3")
    cosine = ours.update @ theirs.update / np.linalg.norm(ours.update) / np.linalg.norm(theirs.update)
    if not cosine > 0.9999:
        found.append(f"update: cosine {cosine:.6f} <= 0.9999")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder: random Llama, large enough weights that the loss moves."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    pytest.importorskip("trl")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=EOS,
        pad_token_id=PAD, initializer_range=0.08)
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, list[int]]]:
    """Token pairs of unequal lengths; the chosen one prefers low ids, so that there is something to learn."""
    rng = np.random.default_rng(3)
    draw = lambda low, high, n: rng.integers(low, high, n).tolist()
    return [{"prompt_ids": [1, *draw(3, VOCAB, rng.integers(2, 9))],
             "chosen_ids": [*draw(3, VOCAB // 2, rng.integers(3, 14)), EOS],
             "rejected_ids": [*draw(VOCAB // 3, VOCAB, rng.integers(3, 14)), EOS]} for _ in range(BATCH * STEPS)]


def trainer_of(folder, pairs, out, **settings):
    """TRL's trainer on token ids that nobody tokenises again, in file order."""
    import datasets
    import transformers
    import trl

    class InOrder(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _get_train_sampler(self, *args, **kwargs):
            import torch

            return torch.utils.data.SequentialSampler(self.train_dataset)

    load = lambda: transformers.LlamaForCausalLM.from_pretrained(folder, dtype="float32")
    import tokenizers
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1",
                                                     eos_token="w2")
    defaults = dict(output_dir=str(out), per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=RATE,
                    lr_scheduler_type="constant", warmup_steps=0, beta=BETA, logging_steps=1, report_to=[],
                    max_grad_norm=1e9, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, weight_decay=0.0,
                    optim="adamw_torch", bf16=False, fp16=False, gradient_checkpointing=False, use_cpu=True, seed=0,
                    save_strategy="no", max_length=None, remove_unused_columns=False, disable_tqdm=True)
    return InOrder(model=load(), ref_model=load(), args=trl.DPOConfig(**defaults | settings),
                   train_dataset=datasets.Dataset.from_list(pairs), processing_class=tokenizer)


def flat(folder_or_params, config=None) -> np.ndarray:
    """All parameters of a tree as one float64 vector, in the order of their paths."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(folder_or_params)])


@pytest.fixture(scope="module")
def theirs(folder, pairs, tmp_path_factory) -> Trajectory:
    trainer = trainer_of(folder, pairs, tmp_path_factory.mktemp("trl"))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == STEPS
    after = tmp_path_factory.mktemp("after")
    trainer.model.save_pretrained(after)
    column = lambda name: np.asarray([row[name] for row in rows], np.float64)
    return Trajectory(column("logps/chosen"), column("logps/rejected"), column("rewards/margins") / BETA,
                      column("grad_norm"), column("loss"), flat(models.load(after)[1]) - flat(models.load(folder)[1]))


def records_of(pairs):
    return [data.token_record(str(i), p["prompt_ids"], (p["chosen_ids"], p["rejected_ids"]), eos_ids=(EOS,))
            for i, p in enumerate(pairs)]


def train(folder, records, *, beta=BETA, accumulation=1, moving_reference=False, shift=0) -> Trajectory:
    """Our side. The last three arguments are an equivalence and two of the seeded mistakes."""
    config, params = models.load(folder)
    spec, start = step.ModelSpec(config, unroll=2), {"model": params}
    optimizer = optax.adamw(RATE, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    loss = losses.get("dpo", beta=beta)
    update = jax.jit(step.make_update(spec, loss, optimizer, accumulation=accumulation))
    state = step.TrainState(jnp.int32(0), start, optimizer.init(start), loss.init_state())
    columns, slots = data.bucket_shape(records, 8)
    rows = []
    for number in range(STEPS):
        batch = data.padded(records[number * BATCH:(number + 1) * BATCH], K=2, T=columns, L=slots, pad_id=PAD)
        if shift:
            stream = batch.streams["pair"]
            moved = dataclasses.replace(stream, mask=np.roll(stream.mask, shift, axis=-1) & stream.mask)
            batch = dataclasses.replace(batch, streams={"pair": moved})
        reference = state.params if moving_reference else start
        state, out = update(state, reference, batch, {}, jax.random.key(0))
        rows.append(step.merge_metrics([out]))
    column = lambda name: np.asarray([row[name] for row in rows], np.float64)
    return Trajectory(column("logp_chosen"), column("logp_rejected"), column("margin"), column("grad_norm"),
                      column("loss"), flat(state.params["model"]) - flat(params))


@pytest.fixture(scope="module")
def ours(folder, pairs) -> Trajectory:
    return train(folder, records_of(pairs))


def test_the_task_moves(theirs):
    """A trajectory that stands still would agree with anything."""
    assert theirs.loss[-3:].mean() < 0.7 * theirs.loss[0]
    np.testing.assert_allclose(theirs.loss[0], np.log(2.0), atol=1e-4)  # TRL rounds what it logs


def test_the_trajectories_agree(ours, theirs):
    assert disagreements(ours, theirs) == []
    assert ours.loss[0] == pytest.approx(np.log(2.0), abs=1e-6)


def test_accumulation_changes_nothing(folder, pairs, ours, theirs):
    parts = train(folder, records_of(pairs), accumulation=4)
    assert disagreements(parts, ours) == []
    assert disagreements(parts, theirs) == []


@pytest.mark.parametrize("mistake", ["beta doubled", "mask off by one", "end token dropped", "reference trained"])
def test_a_seeded_mistake_is_rejected(mistake, folder, pairs, theirs):
    records, settings = records_of(pairs), {}
    if mistake == "beta doubled":
        settings["beta"] = 2 * BETA
    elif mistake == "mask off by one":
        settings["shift"] = 1
    elif mistake == "end token dropped":
        records = records_of([p | {"chosen_ids": p["chosen_ids"][:-1], "rejected_ids": p["rejected_ids"][:-1]}
                              for p in pairs])
    else:
        settings["moving_reference"] = True
    assert disagreements(train(folder, records, **settings), theirs)


# What TRL calls by its loss_type, and the same loss here. What is left out: sft_loss-like `sft` (its own trainer's
# mean), and `bco_pair`, whose running delta is not in TRL's pairwise form.
LOSSES = {
    "sigmoid": ({}, "dpo", {}),
    "sigmoid, smoothed": ({"loss_types": ["robust"], "label_smoothing": 0.1}, "robust_dpo", {"label_smoothing": 0.1}),
    "ipo per token": ({"loss_types": ["ipo"]}, "ipo", {"tau": BETA, "length_average": True}),
    "exo_pair": ({"loss_types": ["exo_pair"], "label_smoothing": 0.01}, "exo", {"label_smoothing": 0.01}),
    "apo_zero": ({"loss_types": ["apo_zero"]}, "apo_zero", {}),
    "apo_down": ({"loss_types": ["apo_down"]}, "apo_down", {}),
    "discopop": ({"loss_types": ["discopop"]}, "discopop", {"tau": 0.05}),
    "aot": ({"loss_types": ["aot"]}, "aot", {"paired": True}),
    "aot_unpaired": ({"loss_types": ["aot_unpaired"]}, "aot", {"paired": False}),
    "sigmoid_norm": ({"loss_types": ["sigmoid_norm"]}, "ln_dpo", {}),
    "forward_kl": ({"f_divergence_type": "forward_kl"}, "f_dpo", {"divergence": "forward_kl"}),
    "js_divergence": ({"f_divergence_type": "js_divergence"}, "f_dpo", {"divergence": "js"}),
    "weighted": ({"use_weighting": True}, "wpo", {}),
}


@pytest.fixture(scope="module")
def apart(folder, pairs, tmp_path_factory):
    """TRL's trainer with a policy that has left its reference, one batch, and our inputs of the same two models."""
    import torch

    # use_weighting from the start: TRL then has the model return what WPO needs, and each case sets it as it likes.
    trainer = trainer_of(folder, pairs, tmp_path_factory.mktemp("losses"), use_weighting=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    moved = tmp_path_factory.mktemp("moved")
    trainer.model.save_pretrained(moved)
    batch = trainer.data_collator(pairs[:BATCH])
    config, policy = models.load(moved)
    records = records_of(pairs)[:BATCH]
    columns, slots = data.bucket_shape(records, 8)
    ours = data.padded(records, K=2, T=columns, L=slots, pad_id=PAD)
    wanted = ("logps", "ref_logps", "token_logps", "ref_token_logps", "log_sum_sq", "mask", "lengths")
    inputs = step.compute(step.ModelSpec(config), {"model": policy}, {"model": models.load(folder)[1]}, ours, wanted)
    return trainer, batch, inputs


@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_equals_its_namesake(case, apart):
    """One batch with policy and reference apart: the mean loss to 1e-4 relative."""
    from alignax.ops.reductions import reduce_terms

    trainer, batch, inputs = apart
    settings, name, hyper = LOSSES[case]
    plain = {"loss_types": ["sigmoid"], "label_smoothing": 0.0, "f_divergence_type": "reverse_kl",
             "use_weighting": False}
    for key, value in (plain | settings).items():
        setattr(trainer, key, value)
    theirs = float(trainer._compute_loss(trainer.model, batch, return_outputs=False).detach())
    if "tau" not in hyper or name == "discopop":
        hyper = hyper | {"beta": BETA}
    loss = losses.get(name, **hyper)
    ours = float(reduce_terms(loss({n: inputs[n] for n in loss.requests}))[0])
    assert abs(theirs - np.log(2)) > 1e-3, "the policy has to have left its reference"
    assert ours == pytest.approx(theirs, rel=1e-4)
