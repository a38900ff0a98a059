"""How the cost of one update grows with devices, batch, length, depth and vocabulary, from compiled programs.

    python experiments/benchmarks/scaling.py                          # all tables, to the console
    python experiments/benchmarks/scaling.py --only devices --json FILE
    python experiments/benchmarks/scaling.py --write docs/scaling.md  # puts the tables between the page's markers

No array is made: the update of DPO on a model of 1.2 billion parameters is compiled for simulated devices (up to 2,048;
for 4,096 it is traced and lowered), and its memory, products and collectives are read from the compiled program. Wall
time is not measured: simulated devices share the cores of one machine.

Cost: some 25 compilations of 5 to 20 seconds on two CPU cores, and 2 GB of memory. Expected: the bytes of a device fall
as 1/devices up to the size of the `fsdp` axis; beyond it, where the batch grows with the devices, all costs stay level.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys

from alignax import data, losses, models, optim, planning, step

CONFIG = models.DecoderConfig(vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32,
                              num_kv_heads=8, head_dim=64, rope_theta=500_000.0, max_positions=8192)
BEGIN, END = "<!-- tables of experiments/benchmarks/scaling.py -->", "<!-- end of the tables -->"


def point(mesh, *, prompts: int, length: int = 1024, config=CONFIG, accumulation: int = 1) -> dict:
    """Costs of one update of DPO (bfloat16 with float32 master weights, every layer computed again) on `mesh`."""
    spec = step.ModelSpec(config, remat="full")
    setup = planning.make_setup(spec, losses.get("dpo"), optim.make(clip_norm=1.0, master=True), dtype="bfloat16",
                                reference="frozen", accumulation=accumulation)
    return planning.measure(setup, planning.Size(prompts, data.Shape(2, length, length // 2, 2)), mesh)


def sweeps(wanted: set[str]) -> dict[str, list[tuple[str, dict]]]:
    """Table -> (label, costs). Simulated devices are counted once per process, so the largest mesh comes first."""
    # The first mesh fixes how many devices there are.
    planning.simulated_mesh({"data": planning.MOST_DEVICES})
    mesh = lambda n: planning.simulated_mesh({"data": max(n // 8, 1), "fsdp": min(n, 8)})
    eight = {"data": 1, "fsdp": 8}
    plans = {
        "devices": [(f"{n:,}", lambda n=n: point(mesh(n), prompts=2 * n)) for n in (1, 2, 4, 8, 64, 512, 2048, 4096)],
        "layout": [(" ".join(f"{k} {v}" for k, v in s.items()),
                    lambda s=s: point(planning.simulated_mesh(s), prompts=16))
                   for s in ({"data": 8}, {"data": 2, "fsdp": 4}, eight, {"fsdp": 4, "tensor": 2})],
        "batch": [(f"{n} prompts", lambda n=n: point(planning.simulated_mesh(eight), prompts=n)) for n in (8, 16, 32)]
                 + [("32 in 4 parts", lambda: point(planning.simulated_mesh(eight), prompts=32, accumulation=4))],
        "length": [(f"{n:,} tokens", lambda n=n: point(planning.simulated_mesh(eight), prompts=16, length=n))
                   for n in (512, 1024, 2048)],
        "depth": [(f"{n} layers", lambda n=n: point(planning.simulated_mesh(eight), prompts=16,
                                                    config=dataclasses.replace(CONFIG, num_layers=n)))
                  for n in (4, 8, 16, 32)],
        "vocabulary": [(f"{n:,}", lambda n=n: point(planning.simulated_mesh(eight), prompts=16,
                                                    config=dataclasses.replace(CONFIG, vocab_size=n)))
                       for n in (32_000, 64_128, 128_256)],
    }
    out = {}
    for name, points in plans.items():
        if name in wanted:
            out[name] = []
            for label, make in points:
                out[name].append((label, make()))
                sys.stderr.write(f"{name} {label}\n")
    return out


def tables(results: dict[str, list[tuple[str, dict]]]) -> str:
    """The results as Markdown."""
    lines = []
    gigabytes = lambda n: "not known" if n is None else f"{n / 1e9:.2f}"
    wire = lambda r, kind: "not known" if r["collectives"] is None else gigabytes(
        r["collectives"].get(kind, {"wire": 0})["wire"])
    for name, points in results.items():
        lines += [f"**{name.capitalize()}**", "",
                  "| | parameters, reference, state (GB) | temporaries (GB) | TFLOP by formula | TFLOP compiled | "
                  "all-gather (GB sent) | all-reduce (GB sent) | other (GB sent) |", "|---|" + "---:|" * 7]
        for label, r in points:
            b = r["bytes"]
            known = r["collectives"]
            other = None if known is None else sum(c["wire"] for k, c in known.items()
                                                   if k not in ("all-gather", "all-reduce"))
            compiled = r["flops"]["compiled"]
            lines.append(f"| {label} | {gigabytes(b['parameters'] + b['reference'] + b['optimizer'])} | "
                         f"{gigabytes(b['temporaries'])} | {r['flops']['analytic'] / 1e12:.2f} | "
                         f"{'not known' if compiled is None else f'{compiled / 1e12:.2f}'} | {wire(r, 'all-gather')} | "
                         f"{wire(r, 'all-reduce')} | {gigabytes(other)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measures and writes."""
    names = ("devices", "layout", "batch", "length", "depth", "vocabulary")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(names), help=f"comma-separated of {', '.join(names)}")
    parser.add_argument("--json", type=pathlib.Path, help="also write all numbers there")
    parser.add_argument("--write", type=pathlib.Path, help="the page whose tables are replaced")
    arguments = parser.parse_args()
    wanted = set(arguments.only.split(","))
    if wanted - set(names):
        parser.error(f"--only={arguments.only}: allowed: {', '.join(names)}")
    results = sweeps(wanted)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    text = tables(results)
    if arguments.write:
        page = arguments.write.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        arguments.write.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
