"""Our side of the benchmarks: DPO updates and sampling through the library's own functions.

Orders: load (model, pairs, batch, layout, reference, beta, rate, clip, remat, unroll, multiple, columns, gate), steps
(count) and save (path); gate=False leaves out the log-probs that the parity gate reads. For sampling load (model,
task="generate") and generate (prompts, new, seed, ends, batch, show).
"""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from wire import peak_bytes, read_pairs, serve

from alignax import data, losses, models, optim, rollout, step


class Training:
    """A DPO run whose updates come one at a time."""

    def __init__(self, order: dict):
        began = time.perf_counter()
        config, params = models.load(order["model"])
        self.size, self.layout, self.number = order["batch"], order["layout"], 0
        self.records = [data.token_record(f"r{i}", prompt, (chosen, rejected), eos_ids=(2,))
                        for i, (prompt, chosen, rejected) in enumerate(read_pairs(order["pairs"]))]
        count = len(self.records) // self.size
        self.batches = [np.arange(i * self.size, (i + 1) * self.size) for i in range(count)]
        self.shape = data.plan_shape(self.records, self.layout, order["multiple"], batches=self.batches,
                                     columns=order["columns"])
        attention = models.choose_attention("auto", config, "float32", jax.default_backend())
        self.spec = step.ModelSpec(config, remat=order["remat"], unroll=order["unroll"], attention=attention)
        loss = losses.get("dpo", beta=order["beta"])
        optimizer = optim.make(learning_rate=order["rate"], clip_norm=order["clip"], weight_decay=0.0)
        start = {"model": params}
        self.cached = None
        self.evaluate = jax.jit(step.make_evaluate(self.spec, None))
        if order["reference"] == "precomputed":
            first = self.log_probs(start, 0)  # compiles; what follows is the cost of the reference
            began_reference = time.perf_counter()
            self.cached = np.concatenate([first] + [self.log_probs(start, i) for i in range(1, count)])
            self.reference_seconds = (time.perf_counter() - began_reference) / max(count - 1, 1) * count
            self.reference = None
        else:
            # A copy: the policy's buffers are donated to the update.
            self.reference, self.reference_seconds = jax.tree.map(jnp.copy, start), 0.0
        self.state = step.TrainState(jnp.int32(0), start, optimizer.init(start), loss.init_state())
        self.ready_seconds = time.perf_counter() - began
        self.update = jax.jit(step.make_update(self.spec, loss, optimizer), donate_argnums=0)
        self.parity = self.log_probs(self.state.params, 0).ravel().tolist() if order.get("gate", True) else None

    def batch(self, number: int) -> data.Record:
        """Batch `number`, filled on the host."""
        chosen = self.batches[number % len(self.batches)]
        made = data.fill([self.records[i] for i in chosen], self.shape, self.layout, pad_id=0)
        if self.cached is not None:
            made.data["ref_logps"] = self.cached[chosen]
        return made

    def log_probs(self, params, number: int) -> np.ndarray:
        """[B, 2] sums of a batch."""
        return np.asarray(self.evaluate(params, None, self.batch(number), {}, None, None)[1]["logps"])

    def facts(self) -> dict:
        """What is told of the loaded run."""
        rows, columns = self.batch(0).streams["pair"].tokens.shape
        return dict(log_probs=self.parity, reference_seconds=self.reference_seconds, load_seconds=self.ready_seconds,
                    cells=rows * columns)

    def once(self) -> tuple[float, float]:
        """(seconds, loss) of the next update, from records on the host to new parameters."""
        began = time.perf_counter()
        batch = jax.device_put(self.batch(self.number))
        self.state, metrics = self.update(self.state, self.reference, batch, {}, jax.random.key(0))
        jax.block_until_ready((self.state, metrics))
        self.number += 1
        return time.perf_counter() - began, float(metrics["loss"][0])

    def save(self, path: str) -> None:
        """The policy as a Hugging Face folder."""
        models.save(path, self.spec.config, self.state.params["model"], overwrite=True)


class Sampling:
    """Completions of random prompts."""

    def __init__(self, order: dict):
        self.config, self.params = models.load(order["model"])

    def generate(self, prompts: list[list[int]], new: int, seed: int, ends: list[int], batch: int, show: bool) -> dict:
        """Seconds and how many tokens were sampled, the end token included; show: the tokens too. batch: the rows that
        are decoded at once, refilled where there are more prompts."""
        array = jnp.asarray(prompts, jnp.int32)
        began, spent = time.perf_counter(), time.process_time()
        sample = rollout.generate if batch == len(prompts) else functools.partial(rollout.refill, lanes=batch)
        out = sample(self.config, self.params, array, jnp.ones(array.shape, bool),
                     jnp.arange(len(prompts), dtype=jnp.uint32), jax.random.key(seed), max_new_tokens=new,
                     eos_ids=tuple(ends))
        mask = np.asarray(out.mask)
        found = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - spent,
                 "tokens": int(mask.sum()), "peak": peak_bytes()}
        return found | ({"ids": np.asarray(out.tokens)[:, 0].tolist()} if show else {})


if __name__ == "__main__":
    serve(Training, Sampling, f"jax {jax.__version__}")
