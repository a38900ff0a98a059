"""Tunix's side of the benchmarks: its DPOTrainer's prepared inputs and jitted step, and its sampler.

Runs in an environment with Tunix; knows nothing of alignax. Orders as in worker_ours.py.
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import time

import jax
import numpy as np
import optax
from flax import nnx
from tunix.generate import sampler as samplers
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as weights
from tunix.sft.dpo import dpo_trainer
from wire import peak_bytes, read_pairs, serve

VERSION = f"Tunix {importlib.metadata.version('google-tunix')}, jax {jax.__version__}"


def load_model(folder: str):
    """(model in float32, its config) of a Hugging Face folder."""
    shape = json.loads((pathlib.Path(folder) / "config.json").read_text())
    theta = shape.get("rope_theta") or shape["rope_parameters"]["rope_theta"]
    config = llama.ModelConfig(
        num_layers=shape["num_hidden_layers"], vocab_size=shape["vocab_size"], embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"], num_heads=shape["num_attention_heads"],
        head_dim=shape["hidden_size"] // shape["num_attention_heads"], num_kv_heads=shape["num_key_value_heads"],
        rope_theta=theta, norm_eps=shape["rms_norm_eps"], weight_tying=False)
    return weights.create_model_from_safe_tensors(folder, config, dtype=np.float32), config


class Training:
    """The steps of DPOTrainer.train, one at a time."""

    def __init__(self, order: dict):
        began, self.gate = time.perf_counter(), order.get("gate", True)
        self.model, self.reference = load_model(order["model"])[0], load_model(order["model"])[0]
        optimizer = optax.chain(optax.clip_by_global_norm(order["clip"]), optax.adamw(order["rate"], weight_decay=0.0))
        settings = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9, beta=order["beta"])
        self.trainer = dpo_trainer.DPOTrainer(self.model, self.reference, optimizer, settings)
        self.step = self.trainer.jit_train_and_eval_step(cache_nnx_graph=True)[0]
        pairs, size = read_pairs(order["pairs"]), order["batch"]
        self.batches = [pairs[i:i + size] for i in range(0, len(pairs) - size + 1, size)]
        # One shape for the whole run, since every other one costs a compilation.
        self.prompt = max(len(p) for p, _, _ in pairs)
        self.response = max(max(len(c), len(r)) for _, c, r in pairs)
        self.number = 0
        self.load_seconds = time.perf_counter() - began

    def batch(self, number: int) -> dpo_trainer.TrainingInput:
        """Prompts padded on the left, completions on the right."""
        pairs = self.batches[number % len(self.batches)]
        arrays = {}
        for column, name, width in ((0, "prompt", self.prompt), (1, "chosen", self.response),
                                    (2, "rejected", self.response)):
            ids, mask = np.zeros((len(pairs), width), np.int32), np.zeros((len(pairs), width), bool)
            for row, pair in enumerate(pairs):
                where = slice(width - len(pair[0]), None) if column == 0 else slice(0, len(pair[column]))
                ids[row, where], mask[row, where] = pair[column], True
            arrays[f"{name}_ids"], arrays[f"{name}_mask"] = ids, mask
        return dpo_trainer.TrainingInput(**arrays)

    def log_probs(self) -> list[float]:
        """Chosen and rejected sums of batch 0, pair by pair, through the trainer's own function."""
        one = self.trainer._prepare_inputs(self.batch(0))
        chosen, rejected = dpo_trainer.compute_logps(self.model, one.input_ids, one.positions, one.attention_mask,
                                                     one.logits_to_keep, one.completion_mask)
        return np.stack([chosen, rejected], 1).ravel().tolist()

    def facts(self) -> dict:
        """What is told of the loaded run."""
        return dict(log_probs=self.log_probs() if self.gate else None, reference_seconds=0.0,
                    load_seconds=self.load_seconds, cells=2 * len(self.batches[0]) * (self.prompt + self.response))

    def once(self) -> tuple[float, float]:
        """(seconds, loss) of the next step: inputs, reference and update."""
        began = time.perf_counter()
        loss, _, _ = self.step(self.trainer._prepare_inputs(self.batch(self.number)))
        jax.block_until_ready((loss, nnx.state(self.model)))
        self.number += 1
        return time.perf_counter() - began, float(loss)


class Ids:
    """The tokenizer that the sampler wants: a prompt is text of ids."""

    def encode(self, text, **kwargs):
        del kwargs
        return [int(word) for word in text.split()]

    def decode(self, ids, **kwargs):
        del kwargs
        return " ".join(str(int(number)) for number in ids)

    def bos_id(self):
        return 0  # falsy: nothing is put before a prompt

    def eos_id(self):
        return -2

    def pad_id(self):
        return 0


class Sampling:
    """Tunix's own sampler; one cache as long as prompt and completion."""

    def __init__(self, order: dict):
        self.model, self.config = load_model(order["model"])
        self.made: dict[int, samplers.Sampler] = {}

    def generate(self, prompts: list[list[int]], new: int, seed: int, ends: list[int], batch: int, show: bool) -> dict:
        """Seconds and how many tokens were sampled, the end token included; show: the tokens too. batch: the rows that
        are decoded at once."""
        size = len(prompts[0]) + new
        if size not in self.made:
            cache = samplers.CacheConfig(cache_size=size, num_layers=self.config.num_layers,
                                         num_kv_heads=self.config.num_kv_heads, head_dim=self.config.head_dim)
            self.made[size] = samplers.Sampler(self.model, Ids(), cache)
        began, spent, parts = time.perf_counter(), time.process_time(), []
        for start in range(0, len(prompts), batch):
            texts = [" ".join(map(str, prompt)) for prompt in prompts[start:start + batch]]
            out = self.made[size](texts, max_generation_steps=new, max_prompt_length=len(prompts[0]), temperature=1.0,
                                  top_p=1.0, seed=seed + start, eos_tokens=ends or [-2], pad_output=True)
            parts.append(np.asarray(out.tokens))
        tokens = np.concatenate(parts)
        seconds, spent = time.perf_counter() - began, time.process_time() - spent
        hit = np.isin(tokens, [*ends, 0]) if ends else np.zeros(tokens.shape, bool)  # padding stands for the end
        lengths = np.where(hit.any(1), hit.argmax(1) + 1, new)
        found = {"seconds": seconds, "cpu": spent, "tokens": int(lengths.sum()), "peak": peak_bytes()}
        return found | ({"ids": tokens.tolist()} if show else {})


if __name__ == "__main__":
    serve(Training, Sampling, VERSION)
