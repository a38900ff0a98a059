"""Our side of the sweep benchmark: K runs that differ in strength, learning rate and order, as one compiled program.

Orders: first load (model, members, batch, updates, clip, remat, unroll, per_call), then train, which makes all updates
of all members and answers the losses. A member is {"beta", "rate", "pairs"}.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from wire import Wire, peak_bytes, read_pairs

from alignax import data, losses, models, optim, population, step


class Sweep:
    """The members' states, their batches on the host, and the program of `per_call` updates of all."""

    def __init__(self, order: dict):
        self.order, members = order, order["members"]
        config, params = models.load(order["model"])
        self.mesh = population.make_mesh()
        chosen = population.filled(len(members), self.mesh)  # the last member repeated where a device lacks one
        here = len(chosen) // (1 if self.mesh is None else self.mesh.size)  # members that share a device's budget
        spec = step.ModelSpec(config, remat=order["remat"], unroll=order["unroll"], byte_budget=64_000_000 // here,
                              attention=models.choose_attention("auto", config, "float32", jax.default_backend()))
        loss = losses.get("dpo")
        section = dict(name="adamw", learning_rate=0.0, schedule="constant", warmup_steps=0, clip_norm=order["clip"],
                       master=False, options={"weight_decay": 0.0})
        records: dict[str, list] = {}
        for one in members:
            if one["pairs"] not in records:
                records[one["pairs"]] = [
                    data.token_record(f"r{i}", prompt, (first, second), eos_ids=(2,))
                    for i, (prompt, first, second) in enumerate(read_pairs(one["pairs"]))]
        self.records = [records[members[i]["pairs"]] for i in chosen]
        every = [r for some in records.values() for r in some]
        self.shape = data.plan_shape(every, "padded", 8, batches=[np.arange(order["batch"])], columns=0)
        numbers = lambda name: np.asarray([members[i][name] for i in chosen], np.float32)
        self.hyper = self.place({"beta": numbers("beta"), "rate": numbers("rate")})
        start = {"model": jax.device_get(params)}

        def initial(tree):
            state = step.TrainState(jnp.int32(0), tree, optim.from_section(section, 1).init(tree), None)
            return jax.tree.map(lambda a: jnp.broadcast_to(a, (len(chosen), *a.shape)), state)

        # One compiled call: operation by operation, the states of a small model cost more than its first updates.
        where = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(population.AXIS))
        self.members = population.start(jax.jit(initial, out_shardings=where)(start), mesh=self.mesh)
        self.reference = population.place(start, self.mesh, axis=None)

        def update(state, ref, batch, hyper, key, frozen):
            optimizer = optim.from_section(section, 1, {"learning_rate": hyper["rate"]})
            state, metrics = step.make_update(spec, loss, optimizer)(state, ref, batch, {"beta": hyper["beta"]}, key,
                                                                     frozen)
            return state, {name: metrics[name] for name in ("loss", "finite")}

        self.run = population.make_steps(update, own=("batch",), mesh=self.mesh)

    def place(self, tree, axis: int = 0):
        """On the devices, cut along the members' axis."""
        return population.place(tree, self.mesh, axis=axis)

    def batches(self, first: int, count: int):
        """Updates `first` .. of all members, leaves [count, K, ...]."""
        size = self.order["batch"]
        make = lambda some, n: data.fill(some[n * size:(n + 1) * size], self.shape, "padded", pad_id=0)
        stacked = [jax.tree.map(lambda *a: np.stack(a), *[make(some, n) for some in self.records])
                   for n in range(first, first + count)]
        return self.place(jax.tree.map(lambda *a: np.stack(a), *stacked), axis=1)

    def train(self) -> dict:
        """All updates; losses [updates][K] and the seconds of each call."""
        rows, seconds, done, total = [], [], 0, self.order["updates"]
        key = jax.random.key(0)
        while done < total:
            began = time.perf_counter()
            count = min(self.order["per_call"], total - done)
            keys = self.place(jax.random.split(jax.random.fold_in(key, done), (count, len(self.records))), axis=1)
            self.members, metrics = self.run(self.members, self.reference, self.batches(done, count), self.hyper, keys)
            rows += np.asarray(metrics["loss"][0])[:, :len(self.order["members"])].tolist()
            seconds.append(time.perf_counter() - began)
            done += count
        return dict(losses=rows, seconds=seconds, peak=peak_bytes())


def main() -> None:
    """One sweep per process."""
    wire = Wire()
    orders = wire.orders()
    order = next(orders)
    if len(order["members"]) > 1:
        population.device_per_core()  # a single member has the whole machine on one device
    sweep = Sweep(order)
    wire.answer(version=f"jax {jax.__version__}")
    for _ in orders:
        wire.answer(**sweep.train())


if __name__ == "__main__":
    main()
