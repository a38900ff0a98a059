"""`alignax chat`, and what `alignax generate` shares with it: files of prompts, chat templates, decoding options."""

from __future__ import annotations

import io
import json

import jax
import numpy as np
import pytest

from alignax import cli, data, models, rollout, sources
from alignax.commands import chat as chat_command
from alignax.commands import policies

TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m.role[0] + ':' + m.content + '\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a random byte-level model with 64 positions and a chat template."""
    folder = tmp_path_factory.mktemp("model") / "m"
    tokenizer = data.train_tokenizer(["aa bb"], 259)
    config = models.DecoderConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=24, num_layers=1,
                                  num_heads=2, num_kv_heads=1, head_dim=8, max_positions=64,
                                  tie_embeddings=False)
    params = models.init_params(config, jax.random.key(3))
    params |= {"embedding": params["embedding"] * 40, "head": params["head"] * 20}
    models.save(folder, config, params, bos_token_id=1, eos_token_id=2)
    tokenizer.save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"chat_template": TEMPLATE, "bos_token": "<bos>", "eos_token": "<eos>"}))
    return folder


def bare(folder, tmp_path):
    """The same model without its chat template."""
    for file in folder.iterdir():
        if file.name != "tokenizer_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def talk(folder, monkeypatch, capsys):
    """talk(lines, *options) runs `alignax chat` on piped lines; returns what it printed."""

    def run(lines, *options, model=folder, code=0):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        found = cli.main(["chat", "--model", str(model), "--max-new-tokens", "12", *options])
        captured = capsys.readouterr()
        assert found == code, captured
        return captured.out + captured.err

    return run


def expected_answer(folder, turns, seed=0, turn=0, **settings):
    """What generate says after the template of `turns`, through none of the command's own code."""
    config, params = models.load(folder)
    tokenizer = data.load_tokenizer(folder)
    text = "".join(f"{role[0]}:{content}\n" for role, content in turns) + "a:"
    prompt = np.asarray([1, *tokenizer.encode_prompt(text)], np.int32)
    out = rollout.generate(config, params, prompt[None], np.ones((1, len(prompt)), bool), np.zeros(1, np.uint32),
                           jax.random.fold_in(jax.random.key(seed), turn), max_new_tokens=12, eos_ids=(2,), **settings)
    tokens = np.asarray(out.tokens)[0, 0][np.asarray(out.mask)[0, 0]].tolist()
    return tokenizer.decode_completion(prompt.tolist(), [t for t in tokens if t != 2]).lstrip()


def squeezed(text):
    """Text without white space: a console wraps and pads nothing here, but control characters may move lines."""
    return "".join(c for c in text if c.isprintable() and not c.isspace())


def test_answers_are_those_of_generate_and_the_history_is_kept(talk, folder):
    out = talk(["hi", "yo"], "--temperature", "0.7", "--top-k", "40")
    first = expected_answer(folder, [("user", "hi")], temperature=0.7, top_k=40)
    second = expected_answer(folder, [("user", "hi"), ("assistant", first.strip()), ("user", "yo")], turn=1,
                             temperature=0.7, top_k=40)
    alone = expected_answer(folder, [("user", "yo")], turn=1, temperature=0.7, top_k=40)
    assert squeezed(first) in squeezed(out) and squeezed(second) in squeezed(out)
    assert alone != second


def test_commands(talk, folder):
    out = talk(["/help", "/temperature 0", "hi", "/reset", "hi", "/system be b", "hi", "/quit", "never"])
    plain = squeezed(expected_answer(folder, [("user", "hi")], temperature=0.0))
    told = squeezed(expected_answer(folder, [("system", "be b"), ("user", "hi")], temperature=0.0))
    assert plain != told and squeezed(out).count(plain) == 2 and told in squeezed(out)
    assert out.count("/temperature NUMBER") == 1 and "temperature 0" in out
    assert squeezed(talk(["hi"], "--system", "be b", "--temperature", "0")).count(told) == 1


def test_bad_commands_change_nothing(talk):
    out = talk(["/temperature warm", "/temperature -1", "/dance"])
    assert "found 'warm'" in out and "found '-1'" in out and "no command /dance" in out and "/quit" in out


def test_old_turns_go_with_a_notice(talk):
    out = talk(["0123456789"] * 6)
    assert "old turns were dropped: the model has 64 positions" in out
    out = talk(["x" * 60, "ok"])
    assert "error: the last turn makes" in out and "Traceback" not in out


def test_a_dialogue_drops_whole_exchanges(folder):
    class Arguments:
        model, run, stage = str(folder), None, ""

    policy = policies.load(Arguments)
    dialogue = chat_command.Dialogue(policy, policies.template(policy), "s")
    for n in range(3):
        dialogue.add("user", f"u{n}")
        dialogue.add("assistant", f"a{n}")
    dialogue.add("user", "u3")
    everything, none = dialogue.ids(64)
    assert none == 0 and policy.tokenizer.decode(everything) == (
        "s:s\nu:u0\na:a0\nu:u1\na:a1\nu:u2\na:a2\nu:u3\na:")
    shorter, dropped = dialogue.ids(len(everything) - 1)
    assert dropped == 2 and policy.tokenizer.decode(shorter) == "s:s\nu:u1\na:a1\nu:u2\na:a2\nu:u3\na:"
    assert len(dialogue.turns) == 5


def test_stop_strings_are_not_shown(talk, folder):
    whole = expected_answer(folder, [("user", "hi")], temperature=0.9)
    printable = [c for c in whole if c.isascii() and c.isalnum()]
    stop = printable[len(printable) // 2]
    out = talk(["hi"], "--temperature", "0.9", "--stop", stop)
    assert squeezed(whole[:whole.index(stop)]) in squeezed(out.split("commands", 1)[1])
    assert stop not in out.split("commands", 1)[1]


def test_a_model_without_template_needs_one_named(talk, folder, tmp_path):
    out = talk(["hi"], model=bare(folder, tmp_path), code=2)
    assert "--template" in out and "chatml" in out and "plain" in out
    assert "error" not in talk(["hi"], "--template", "plain", model=tmp_path)
    assert "allowed: fewer than the model's 64 positions" in talk([], "--max-new-tokens", "64", code=2)


# alignax generate


def generate(folder, *options):
    return cli.main(["generate", "--model", str(folder), "--max-new-tokens", "6", *options])


def test_prompts_from_a_file_to_a_file(folder, tmp_path, capsys):
    source, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": "x", "prompt": "hello"}, {"prompt": "a b", "chosen": "c"}, {"id": "z", "prompt": "\u00e9"}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ["--prompts", str(source), "--samples", "2", "--top-p", "0.9", "--repetition-penalty", "1.2"]
    assert generate(folder, *common, "--out", str(out), "--batch-size", "2") == 0
    assert "6 completions of 3 prompts" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["id"], r["sample"]) for r in rows] == [(i, k) for i in ("x", "2", "z") for k in (0, 1)]
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["out.jsonl", "prompts.jsonl"]
    assert all(r["reason"] in rollout.REASONS and len(r["completion_ids"]) == r["tokens"] for r in rows)
    assert all(r["behaviour_logp"] != r["logp"] for r in rows)

    before = out.read_bytes()
    assert generate(folder, *common, "--out", str(out)) == 2
    assert "it exists" in capsys.readouterr().err and out.read_bytes() == before
    # The draws follow from the ids, not from the place in the file or the batch.
    source.write_text(json.dumps(lines[2]) + "\n" + json.dumps(lines[0]) + "\n")
    assert generate(folder, *common, "--json") == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["completion"] for r in again] == [r["completion"] for r in rows[4:] + rows[:2]]


def test_chat_templates_in_generate(folder, tmp_path, capsys):
    assert generate(folder, "--chat", "--prompt", "hi", "--system", "s", "--json", "--temperature", "0") == 0
    row = json.loads(capsys.readouterr().out)
    expected = expected_answer(folder, [("system", "s"), ("user", "hi")], temperature=0.0)
    assert squeezed(expected).startswith(squeezed(row["completion"]))
    source = tmp_path / "p.jsonl"
    source.write_text(json.dumps({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]}))
    assert generate(folder, "--chat", "--prompts", str(source), "--json", "--temperature", "0") == 0
    assert json.loads(capsys.readouterr().out)["completion"] == row["completion"]
    assert generate(folder, "--prompts", str(source)) == 2
    assert "p.jsonl:1" in (error := capsys.readouterr().err) and "--chat" in error


def test_stops_and_bias_in_generate(folder, capsys):
    letter = data.load_tokenizer(folder).encode_prompt("q")[0]
    options = ["--prompt", "hi", "--json", "--bias", f"{letter}=1e4"]
    assert generate(folder, *options, "--stop", "qqq") == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["completion"], row["reason"], row["tokens"]) == ("qqq", "stop string", 3)
    assert generate(folder, *options, "--bias", f"{letter}=-inf") == 0
    assert "q" not in json.loads(capsys.readouterr().out)["completion"]
    assert generate(folder, "--prompt", "hi", "--json", "--bias", "0=1e4", "--stop", "<pad>") == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["completion"], row["reason"], row["tokens"]) == ("", "end token", 1)
    assert generate(folder, "--prompt", "hi", "--stop", "zzz") == 0
    assert "cut at the limit" in capsys.readouterr().out


@pytest.mark.parametrize("options, words", [
    (["--bias", "3"], ("--bias=3", "ID=NUMBER")), (["--bias", "999=1"], ("999", "0 .. 258")),
    (["--stop", ""], ("--stop=",)), (["--top-k", "-1"], ("top_k",)), (["--min-p", "2"], ("min_p",)),
    (["--system", "s"], ("--system=s", "--chat")), (["--batch-size", "0"], ("--batch-size=0",)),
    (["--stage", "x"], ("--stage=x",)), (["--out", "no/where.jsonl"], ("--out=no", "no such folder")),
    (["--min-new-tokens", "9"], ("min_new_tokens", "0 .. 6")),
])
def test_generate_refuses(folder, capsys, options, words):
    assert generate(folder, "--prompt", "hi", *options) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words) and "Traceback" not in error


@pytest.mark.parametrize("lines, words", [
    ("", "no prompts"), ('{"text": "a"}\n', "p.jsonl:1"), ('{"prompt": "a"}\n{"prompt": 3}\n', "p.jsonl:2"),
    ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n', "as on line 1"), ("{", "p.jsonl:1"),
])
def test_bad_files_of_prompts(folder, tmp_path, capsys, lines, words):
    (tmp_path / "p.jsonl").write_text(lines)
    assert generate(folder, "--prompts", str(tmp_path / "p.jsonl")) == 2
    assert words in capsys.readouterr().err


def test_a_prompt_that_fits_exactly_is_sampled(folder, capsys):
    assert generate(folder, "--prompt", "x" * 57, "--json") == 0  # BOS and 57 bytes, 6 new tokens: 64 positions
    assert json.loads(capsys.readouterr().out)["tokens"] >= 1
    assert generate(folder, "--prompt", "x" * 58) == 2
    assert "64 positions" in capsys.readouterr().err


def test_a_rollout_keeps_the_records_of_every_token(folder):
    config, params = models.load(folder)
    prompts = [np.array([1, 70, 71], np.int32), np.array([1, 80], np.int32), np.array([1], np.int32)]
    settings = dict(num_samples=2, max_new_tokens=5, eos_ids=(2,), pad_id=0, top_k=20)
    out = sources.rollout(config, params, prompts, [7, 8, 9], jax.random.key(0), batch_size=2,
                          temperature=np.array([1.0, 0.0, 0.5]), **settings)
    assert np.shape(out.reason) == (3, 2) and out.finished.dtype == bool
    for i in range(3):
        for k in range(2):
            lengths = {len(a[i][k]) for a in (out.tokens, out.token_logps, out.behaviour_logps, out.kept_mass)}
            assert len(lengths) == 1
            np.testing.assert_allclose(out.token_logps[i][k].sum(), out.logps[i, k], rtol=1e-5)
    assert (out.behaviour_logps[1][0] == 0).all() and (out.behaviour_logps[2][0] != 0).any()
    alone = sources.rollout(config, params, prompts[2:], [9], jax.random.key(0), batch_size=1, temperature=0.5,
                            **settings)
    assert [t.tolist() for t in alone.tokens[0]] == [t.tolist() for t in out.tokens[2]]
