"""TRL's side of the benchmarks: its DPOTrainer's own loop, held before every step, and transformers' generate.

Runs in an environment with torch, transformers and TRL; knows nothing of alignax. Orders as in worker_ours.py; `bf16`
asks for bfloat16 autocast, `reference="precomputed"` for TRL's precompute_ref_log_probs. A `load` after the first
leaves the trainer where it is and builds another.
"""

from __future__ import annotations

import tempfile
import time

import torch
import transformers
from wire import Wire, forget_peak, peak_bytes, read_pairs


def tokenizer_of(vocab: int):
    """A tokenizer that is never used on text; TRL wants one."""
    import tokenizers

    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w3")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), pad_token="w0",
                                                bos_token="w1", eos_token="w2")


def load_model(folder: str):
    """The checkpoint in float32."""
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype="float32")


class NextRun(Exception):
    """Ends a trainer's loop: the driver wants another run in this process."""

    def __init__(self, order: dict):
        super().__init__()
        self.order = order


def train(wire: Wire, orders, order: dict) -> None:
    """Builds the trainer, answers `load`, and runs its loop; each step begins when the driver says so."""
    import datasets
    import trl

    pairs = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in read_pairs(order["pairs"])]
    began = time.perf_counter()
    spent: dict[str, float] = {}
    losses: list[torch.Tensor] = []

    class InOrder(trl.DPOTrainer):
        """Ids as they are, in file order, with the losses kept."""

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _precompute_ref_logps(self, *args, **kwargs):
            start = time.perf_counter()
            out = super()._precompute_ref_logps(*args, **kwargs)
            spent["reference"] = time.perf_counter() - start
            return out

        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    class Held(transformers.TrainerCallback):
        """Waits before a step until the driver orders it; a step lasts until the next one could begin."""

        def __init__(self):
            self.left, self.times, self.first, self.mark, self.spent = 1, [], True, None, 0.0

        def on_step_begin(self, args, state, control, **kwargs):
            now = time.perf_counter()
            if self.mark is not None:
                self.times.append(now - self.mark)
                self.left -= 1
            if self.left == 0:
                shown = [float(x) for x in losses[-len(self.times):]]
                if self.first:
                    wire.answer(**facts, first_seconds=self.times[0], loss=shown[0], peak=peak_bytes())
                    forget_peak()
                else:
                    spent = (time.process_time() - self.spent) / len(self.times)
                    wire.answer(cpu=spent, seconds=self.times, losses=shown, peak=peak_bytes())
                self.first, self.times = False, []
                while (following := next(orders, None)) and following["do"] == "save":
                    model.save_pretrained(following["path"])
                    wire.answer()
                if following and following["do"] == "load":
                    raise NextRun(following)
                if following is None:
                    control.should_training_stop = True
                    raise SystemExit
                self.left, self.spent = following["count"], time.process_time()
            self.mark = time.perf_counter()

    precomputed = order["reference"] == "precomputed"
    model = load_model(order["model"])
    settings = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl_"), per_device_train_batch_size=order["batch"], max_steps=10_000,
        learning_rate=order["rate"], lr_scheduler_type="constant", warmup_steps=0, beta=order["beta"],
        logging_strategy="no", report_to=[], max_grad_norm=order["clip"], adam_beta1=0.9, adam_beta2=0.999,
        adam_epsilon=1e-8, weight_decay=0.0, optim="adamw_torch", bf16=order["bf16"], fp16=False,
        gradient_checkpointing=False, use_cpu=True, seed=0, save_strategy="no", max_length=None,
        remove_unused_columns=False, disable_tqdm=True, precompute_ref_log_probs=precomputed,
        precompute_ref_batch_size=order["batch"])
    trainer = InOrder(model=model, ref_model=None if precomputed else load_model(order["model"]), args=settings,
                      train_dataset=datasets.Dataset.from_list(pairs),
                      processing_class=tokenizer_of(model.config.vocab_size))
    batch = trainer.data_collator(pairs[:order["batch"]])
    told = trainer.compute_ref_log_probs(trainer.model, batch) if order.get("gate", True) else None
    facts = dict(log_probs=told and torch.stack(told, 1).float().flatten().tolist(),
                 reference_seconds=spent.get("reference", 0.0), load_seconds=time.perf_counter() - began,
                 version=f"TRL {trl.__version__}, torch {torch.__version__}", cells=batch["input_ids"].numel())
    trainer.add_callback(Held())
    trainer.train()


def generate(wire: Wire, orders, order: dict) -> None:
    """Sampling with transformers' generate, static cache where asked."""
    model = load_model(order["model"]).eval()
    wire.answer(version=f"transformers {transformers.__version__}, torch {torch.__version__}")
    for one in orders:
        ids = torch.tensor(one["prompts"])
        torch.manual_seed(one["seed"])
        ends = one["ends"] or None
        began, spent, tokens, shown = time.perf_counter(), time.process_time(), 0, []
        for part in ids.split(one["batch"]):
            with torch.inference_mode():
                out = model.generate(part, attention_mask=torch.ones_like(part), do_sample=True, temperature=1.0,
                                     top_k=0, top_p=1.0, max_new_tokens=one["new"], eos_token_id=ends, pad_token_id=0)
            new = out[:, ids.shape[1]:]
            lengths = torch.full((len(part),), new.shape[1])
            if ends is not None:
                hit = torch.isin(new, torch.tensor(ends))
                lengths = torch.where(hit.any(1), hit.int().argmax(1) + 1, lengths)
            tokens += int(lengths.sum())
            shown += new.tolist()
        seconds, spent = time.perf_counter() - began, time.process_time() - spent
        shown = {"ids": shown} if one.get("show") else {}
        wire.answer(seconds=seconds, cpu=spent, tokens=tokens, peak=peak_bytes(), **shown)


def main() -> None:
    """One benchmark per process."""
    wire = Wire()
    orders = wire.orders()
    order = next(orders)
    while order is not None:
        try:
            (generate if order.get("task") == "generate" else train)(wire, orders, order)
            order = None
        except NextRun as following:
            order = following.order


if __name__ == "__main__":
    main()
