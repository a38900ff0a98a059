"""Populations of other kinds: adapters over one base, ensembles of reward models, stages on samples of the policy
itself, and a disk that is full."""

from __future__ import annotations

import io
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from population_test import assert_alike, member, one_stage, rows
from rich.console import Console
from train_test import quiet, story_pairs, tiny_base

from alignax import checkpoint, cli, configs, context, population, rollout, train
from alignax.population import fit, rounds

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    return story_pairs(folder / "train.jsonl", 48, "train"), story_pairs(folder / "eval.jsonl", 8, "eval")


@pytest.mark.parametrize("rank", [2, 0])
def test_adapters_stand_over_one_copy_of_the_base(pairs, tmp_path, monkeypatch, rank):
    """Nothing is compiled: what the program would be given is looked at. rank 0 has a copy of the model per member."""
    seen = {}

    def look(self):
        seen.update(frozen=self.frozen, ref=self.ref, start=self.setups[0].start,
                    params=self.program.stacked([s.params for s in self.setups]))
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "largest", lambda count, compile_for, **_: (count, None))
    monkeypatch.setattr(rounds.Round, "run", look)
    members = [member(f"m{i}", one_stage(pairs, "dpo", hyper=dict(beta=beta), reference="adapter_off" if rank else
                                         "frozen", lora=dict(rank=rank)), tmp_path)
               for i, beta in enumerate((0.1, 0.3, 0.5))]
    with pytest.raises(KeyboardInterrupt):
        population.run(members, tmp_path, console=quiet())
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(seen["params"]))
    if rank:
        assert size(seen["frozen"]) == size(seen["ref"]) == size(seen["start"]) > size(seen["params"])
        place = lambda tree: [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]
        assert place(seen["ref"]) == place(seen["frozen"])  # the reference is the base, not another copy of it
    else:
        assert size(seen["frozen"]) == 0 and 3 * size(seen["ref"]) == 3 * size(seen["start"]) == size(seen["params"])


def test_an_ensemble_of_reward_models_is_what_its_members_are_alone(pairs, tmp_path):
    members = [member(f"m{seed}", one_stage(pairs, "bt_rm", seed=seed, steps=10), tmp_path) for seed in (3, 4)]
    found = population.run(members, tmp_path, console=quiet())
    train.run(members[1].config, tmp_path / "alone", console=quiet())
    assert_alike(rows(tmp_path / "m4"), rows(tmp_path / "alone"))
    prints = {result.summary["stages"]["method"]["fingerprint"] for result in found.values()}
    assert len(prints) == 2 and [result.summary["stages"]["method"]["population"]["members"]
                                 for result in found.values()] == [2, 2]


def test_rounds_follow_the_memory_that_the_compiled_program_takes(pairs, tmp_path, monkeypatch):
    told, needed = [], fit.needed
    monkeypatch.setattr(fit, "needed", lambda compiled: told.append(needed(compiled)) or told[-1])
    some = lambda place: [member(f"m{i}", one_stage(pairs, "dpo", steps=5, hyper=dict(beta=beta)), tmp_path / place)
                          for i, beta in enumerate((0.1, 0.3, 0.5))]
    population.run(some("all"), tmp_path / "all", console=quiet())
    said = Console(file=io.StringIO(), width=200)
    found = population.run(some("cut"), tmp_path / "cut", console=said, memory_limit=told[0] - 1)
    assert told[1] == told[0] > told[2] and len(told) == 3
    assert "3 members in 2 rounds of 2, which fit into memory" in said.file.getvalue()
    assert_alike(rows(tmp_path / "cut" / "m2"), rows(tmp_path / "all" / "m2"))
    assert not any(result.error for result in found.values())


def on_policy(pairs, beta: float):
    """Trained on pairs, then on pairs of its own samples."""
    config = one_stage(pairs, "dpo", hyper=dict(beta=beta), steps=5, optim=dict(learning_rate=1e-2))
    config.sample = configs.sample_stage(num_prompts=16, num_samples=4, max_new_tokens=12, batch_size=16)
    config.second = configs.train_stage("dpo", hyper=dict(beta=beta), data=dict(path="stage:sample", eval_records=4),
                                        steps=4, batch_size=4, log_every=1, eval_every=4)
    config.stages = ("method", "sample", "second")
    return config


def test_members_train_on_samples_of_their_own(pairs, tmp_path):
    members = [member(f"m{i}", on_policy(pairs, beta), tmp_path) for i, beta in enumerate((0.1, 5.0))]
    found = population.run(members, tmp_path, console=quiet())
    alone = train.run(members[1].config, tmp_path / "alone", console=quiet())
    samples = [(folder / "stages" / "sample" / "pairs.jsonl").read_text()
               for folder in (tmp_path / "m0", tmp_path / "m1", tmp_path / "alone")]
    assert samples[0] != samples[1] == samples[2]
    assert_alike(rows(tmp_path / "m1"), rows(tmp_path / "alone"))
    # The second stage starts from parameters that are equal to rounding only, which its updates carry on.
    place = lambda row: (row["split"], row["step"])
    one, two = (sorted(rows(tmp_path / name, "second"), key=place) for name in ("m1", "alone"))
    assert list(map(place, one)) == list(map(place, two))
    assert [row["loss"] for row in one if "loss" in row] == pytest.approx(
        [row["loss"] for row in two if "loss" in row], rel=1e-3)
    assert found["m1"].summary["stages"]["sample"]["pairs"] == alone["stages"]["sample"]["pairs"]
    assert not found["m0"].error


def test_generation_maps_over_members():
    """For a program of one's own; stages of a population: population_generate_test."""
    spec, _ = context.load_model(tiny_base(("m",)).model.to_dict(), vocab_size=20, seed=0)
    every = [context.load_model(tiny_base(("m",)).model.to_dict(), vocab_size=20, seed=s)[1]["model"] for s in (1, 2)]
    prompts, keys = np.asarray([[0, 3, 4], [5, 6, 7]], np.int32), jax.random.split(jax.random.key(0), 2)
    mask, ids = np.asarray([[False, True, True], [True] * 3]), np.arange(2, dtype=np.uint32)
    draw = lambda params, key: rollout.generate(spec.config, params, prompts, mask, ids, key, num_samples=2,
                                                max_new_tokens=6, eos_ids=(1,))
    together = jax.vmap(draw)(population.stack(every), keys)
    for i, params in enumerate(every):
        alone = draw(params, keys[i])
        assert together.tokens[i].tolist() == alone.tokens.tolist()
        assert together.reason[i].tolist() == alone.reason.tolist()
        np.testing.assert_allclose(together.logps[i], alone.logps, atol=1e-5)
    assert together.tokens[0].tolist() != together.tokens[1].tolist()


CONFIG = '''
from train_test import tiny_base
from alignax import configs

def get_config(arg=""):
    config = tiny_base(("method",))
    config.model.num_layers = 1
    config.method = configs.train_stage("dpo", data=dict(path={path!r}), steps=4, batch_size=8, checkpoint_every=2)
    return config
'''


def test_a_full_disk_ends_a_sweep_with_its_code_and_the_rerun_resumes(pairs, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.py").write_text(CONFIG.format(path=str(pairs[0])))
    argv = ["sweep", "--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "out"), "--sweep",
            "method.optim.learning_rate=0.001,0.01"]
    save = checkpoint.Checkpoints.save

    def full(self, step, *given):
        if step > 2:
            raise checkpoint.DiskError("the checkpoint of step 4: No space left on device")
        save(self, step, *given)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", full)
        assert cli.main(argv) == checkpoint.EXIT_DISK
    assert "No space left" in capsys.readouterr().err
    assert cli.main(argv) == 0 and "resuming method at step 2 of 4 (2 members)" in capsys.readouterr().out


def test_a_dry_run_times_an_update_of_each_structure(pairs, tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG.format(path=str(pairs[0])))
    assert cli.main(["sweep", "--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "out"), "--seeds",
                     "2", "--sweep", "method.batch_size=4,8", "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "4 members, 2 groups of one structure" in out and not (tmp_path / "out").exists()
    found = re.findall(r"method \(dpo\), 2 runs: 4 updates of ([\d.]+) ms", out)
    assert len(found) == 2 and all(0 < float(x) < 1e4 for x in found)
    assert re.search(r"about \d+ seconds; a population takes less", out)
