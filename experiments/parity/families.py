"""Parity of every model family with transformers, on random tiny models built from its config classes.

Command: python experiments/parity/families.py [--write docs/families.md] [--only llama,gemma2]
Cost: about four minutes on two cores, most of it transformers' own generation loop. Needs the extra `parity`.
Expected result: one line per case; logits within 1e-4, loss gradients within 1e-3 relative, greedy tokens identical
over 64 tokens up to the first place where transformers' two best logits lie within 1e-3. Exit status 1 where one does
not.

A case is a transformers model with random parameters of every kind (norms and biases included: their neutral
starting values would hide a swap). It is saved by transformers and loaded by alignax; prompts of unequal lengths are
padded on the left and on the right. Baichuan has no class in transformers; tests/families_test.py holds it against a
statement of its own in numpy.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignax import models
from alignax.models import families
from alignax.rollout import generate
from alignax.types import ConfigError

VOCABULARY, NEW_TOKENS, LIMITS = 61, 64, {"logits": 1e-4, "gradients": 1e-3}
LENGTHS = (13, 7, 2)

_SHAPE = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, pad_token_id=0)
_GEMMA = _SHAPE | dict(head_dim=16, sliding_window=5)
_NEOX = {key: value for key, value in _SHAPE.items() if key not in ("num_key_value_heads", "rms_norm_eps")} | dict(
    layer_norm_eps=1e-5)


def _rope(kind: str = "default", **numbers) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **numbers}}


# Case -> (the prefix of transformers' class names, the keywords of its config class).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _SHAPE | _rope()),
    "llama, tied, biases": ("Llama", _SHAPE | _rope() | dict(tie_word_embeddings=True, attention_bias=True,
                                                             mlp_bias=True, head_dim=12)),
    "llama, rope linear": ("Llama", _SHAPE | _rope("linear", factor=4.0)),
    "llama 3.1, rope llama3": ("Llama", _SHAPE | _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                                       original_max_position_embeddings=32)),
    "llama, rope yarn": ("Llama", _SHAPE | _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "mistral, window": ("Mistral", _SHAPE | _rope() | dict(sliding_window=5)),
    "mistral, no window": ("Mistral", _SHAPE | _rope() | dict(sliding_window=None, head_dim=12)),
    "qwen2": ("Qwen2", _SHAPE | _rope() | dict(tie_word_embeddings=True)),
    "qwen2, upper windows, yarn": ("Qwen2", _SHAPE | _rope("yarn", factor=4.0, original_max_position_embeddings=32)
                                   | dict(use_sliding_window=True, sliding_window=5, max_window_layers=2)),
    "qwen3": ("Qwen3", _SHAPE | _rope() | dict(head_dim=16)),
    "gemma2": ("Gemma2", _GEMMA | _rope() | dict(query_pre_attn_scalar=24, attn_logit_softcapping=5.0,
                                                 final_logit_softcapping=3.0)),
    "gemma3_text": ("Gemma3", _GEMMA | dict(query_pre_attn_scalar=24, num_hidden_layers=7, sliding_window_pattern=3,
                                            rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}})),
    "gpt2": ("GPT2", dict(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128, n_inner=40,
                          resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0)),
    "gpt_neox": ("GPTNeoX", _NEOX | dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                                          "partial_rotary_factor": 0.25})),
    "gpt_neox, serial, no biases": ("GPTNeoX", _NEOX | dict(
        use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True, hidden_act="gelu_new",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})),
}
_CLASSES = {"Llama": ("LlamaConfig", "LlamaForCausalLM"), "Mistral": ("MistralConfig", "MistralForCausalLM"),
            "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM"), "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
            "Gemma2": ("Gemma2Config", "Gemma2ForCausalLM"), "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
            "GPT2": ("GPT2Config", "GPT2LMHeadModel"), "GPTNeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM")}


class Result(NamedTuple):
    """What one case measured: the largest difference of logits under left padding, under right padding, and of a model
    that alignax saved and transformers loaded; the largest relative difference of a tensor's gradient; greedy tokens
    compared, equal among them, and those that could be compared."""

    left: float
    right: float
    saved: float
    gradients: float
    compared: int
    equal: int
    possible: int

    def good(self) -> bool:
        """Whether the case keeps the limits."""
        return (max(self.left, self.right, self.saved) <= LIMITS["logits"] and self.gradients <= LIMITS["gradients"]
                and self.equal == self.compared > self.possible // 4)


def reference(case: str, seed: int = 0):
    """transformers' model of a case, every parameter random, in evaluation mode with eager attention."""
    import torch
    import transformers

    prefix, settings = CASES[case]
    config, model = (getattr(transformers, name) for name in _CLASSES[prefix])
    torch.manual_seed(seed)
    model = model(config(**settings, attn_implementation="eager")).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, 0.0 if name.endswith("bias") or "Gemma" in prefix else 1.0, 0.3)
        elif "embed" in name or "wte" in name or "wpe" in name:
            torch.nn.init.normal_(weight, 0.0, 0.5)
        else:
            torch.nn.init.normal_(weight, 0.0, 1.2 * (32 ** -0.5))
    return model


def padded(lengths=LENGTHS, *, left: bool, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, mask, position), int32 and bool [rows, longest]; the same texts on either side of the padding."""
    draws, width = np.random.default_rng(seed), max(lengths) + 2  # every row has padding
    tokens, mask = np.zeros((len(lengths), width), np.int32), np.zeros((len(lengths), width), bool)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if left else slice(0, length)
        tokens[row, place], mask[row, place] = draws.integers(1, VOCABULARY, length), True
    return tokens, mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)


def our_logits(config, params, tokens, mask, position):
    """Logits [rows, columns, V] of the decoder."""
    segment = jnp.asarray(mask, jnp.int32)
    hidden = models.forward(config, params, jnp.asarray(tokens), segment, segment, jnp.asarray(position))
    return models.logits(config, params, hidden)


def their_logits(model, tokens, mask, position):
    """The same of transformers, with gradients."""
    import torch
    as_long = lambda a: torch.tensor(np.asarray(a), dtype=torch.long)
    return model(as_long(tokens), attention_mask=as_long(mask), position_ids=as_long(position)).logits


def losses(model, config, params) -> float:
    """The largest relative difference, over file tensors, of the gradient of the mean next-token loss."""
    import torch
    tokens, mask, position = padded(left=False)
    scored = mask[:, 1:]

    def ours(params):
        logp = jax.nn.log_softmax(our_logits(config, params, tokens, mask, position)[:, :-1])
        picked = jnp.take_along_axis(logp, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(scored, picked, 0)) / scored.sum()

    found = jax.tree.map(np.asarray, jax.jit(jax.grad(ours))(params))
    model.zero_grad()
    logp = torch.log_softmax(their_logits(model, tokens, mask, position)[:, :-1], dim=-1)
    picked = logp.gather(-1, torch.tensor(tokens[:, 1:, None], dtype=torch.long))[..., 0]
    (-picked[torch.tensor(scored)].mean()).backward()
    theirs = {name: weight.grad.numpy() for name, weight in model.named_parameters()}
    worst = 0.0
    for name, slot in families.tensors(config).items():
        # transformers renamed this matrix and still writes the old name.
        given = theirs[name if name in theirs else name.replace("embed_out", "lm_head")]
        places = []
        for place in slot.places:
            leaf = found
            for part in place.path:
                leaf = leaf[part]
            places.append(leaf if place.layer is None else leaf[place.layer])
        mine = slot.from_params(*places)
        scale = np.linalg.norm(given)
        if scale > 1e-6 or np.linalg.norm(mine) > 1e-6:  # a key's bias shifts every score of a query: no gradient
            worst = max(worst, float(np.linalg.norm(mine - given) / scale))
    return worst


def greedy(model, config, params) -> tuple[int, int, int]:
    """(tokens compared, equal among them, tokens that could be compared) of NEW_TOKENS greedy tokens per row.

    A row counts up to the first place where transformers' two best logits lie within 1e-3: after it the texts may
    rightly differ."""
    import torch
    tokens, mask, _ = padded(left=True)
    as_long = lambda a: torch.tensor(np.asarray(a), dtype=torch.long)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        out = model.generate(as_long(tokens), attention_mask=as_long(mask), do_sample=False, max_new_tokens=NEW_TOKENS,
                             min_new_tokens=NEW_TOKENS, output_logits=True, return_dict_in_generate=True,
                             pad_token_id=0)
    theirs = out.sequences[:, tokens.shape[1]:].numpy()
    best = np.sort(torch.stack(out.logits, dim=1).float().numpy(), axis=-1)
    close = best[..., -1] - best[..., -2] <= 1e-3
    ours = np.asarray(generate(config, params, jnp.asarray(tokens), jnp.asarray(mask),
                               jnp.arange(len(tokens), dtype=jnp.uint32), jax.random.key(0),
                               max_new_tokens=NEW_TOKENS, temperature=0.0).tokens)[:, 0]
    counted = np.cumsum(close, axis=1) == 0
    return int(counted.sum()), int((counted & (ours == theirs)).sum()), counted.size


def resaved(model, config, params, folder: pathlib.Path):
    """transformers' reading of what alignax saves; ConfigError where it misses or does not know a tensor."""
    models.save(folder, config, params)
    back, info = type(model).from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    wrong = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if wrong:
        raise ConfigError(f"{folder}: found {wrong}, allowed: exactly the tensors of {type(model).__name__}")
    return back.eval()


def measure(case: str, folder: pathlib.Path) -> Result:
    """Saves transformers' model of `case` in `folder`, loads it with alignax, and compares; then the way back."""
    model = reference(case)
    model.save_pretrained(folder / "theirs")
    config, params = models.load(folder / "theirs")
    run = jax.jit(our_logits, static_argnums=0)
    worst = []
    for left in (True, False):
        tokens, mask, position = padded(left=left)
        theirs = their_logits(model, tokens, mask, position).detach().numpy()
        worst.append(float(np.abs(np.asarray(run(config, params, tokens, mask, position)) - theirs)[mask].max()))
    back = their_logits(resaved(model, config, params, folder / "ours"), tokens, mask, position).detach().numpy()
    worst.append(float(np.abs(back - theirs)[mask].max()))
    return Result(*worst, losses(model, config, params), *greedy(model, config, params))


def table(results: dict[str, Result], version: str) -> str:
    """The results as a Markdown table."""
    lines = [f"| case | transformers | logits, left padding | logits, right padding | logits, saved by alignax | "
             f"gradients, relative | greedy tokens equal / compared (of {len(LENGTHS) * NEW_TOKENS}) | within limits |",
             "|---|---|---|---|---|---|---|---|"]
    for case, result in results.items():
        numbers = (result.left, result.right, result.saved, result.gradients)
        lines.append(f"| {case} | {version} | {' | '.join(f'{number:.1e}' for number in numbers)} "
                     f"| {result.equal} / {result.compared} | {'yes' if result.good() else '**no**'} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measures the cases, prints the table, writes the page where asked; 1 where a case is out of its limits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=pathlib.Path, help="also write this Markdown page")
    parser.add_argument("--only", help="cases whose name begins with one of these, by commas")
    options = parser.parse_args(arguments)
    import transformers

    chosen = [case for case in CASES if not options.only or case.startswith(tuple(options.only.split(",")))]
    results = {}
    for case in chosen:
        with tempfile.TemporaryDirectory() as folder:
            results[case] = measure(case, pathlib.Path(folder))
        print(case, results[case], flush=True)
    text = table(results, transformers.__version__)
    print(text)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(PAGE.format(table=text, logits=LIMITS["logits"], gradients=LIMITS["gradients"]))
    return 0 if all(result.good() for result in results.values()) else 1


PAGE = """# Model families

One decoder (`alignax/models/decoder.py`) computes every family; `alignax/models/families/` says, one short module per
family, what its `config.json` and its tensors mean. A setting, an architecture or a tensor that is not computed is
refused by name. `model_type` is what `config.json` must hold.

| model_type | models | what is particular |
|---|---|---|
| llama | Llama 2, 3, 3.1, 3.2 | rotary scaling linear, llama3, yarn; optional biases |
| mistral | Mistral 7B | a window in every layer |
| qwen2 | Qwen2, Qwen2.5 | biases on query, key, value; optional windows in the upper layers |
| qwen3 | Qwen3 | norms of query and key heads |
| gemma2 | Gemma 2 | soft caps, windows in every other layer, norms after branches, scaled embeddings, (1 + w) norms |
| gemma3_text | Gemma 3 (text) | windows in five of six layers with a rotary base of their own, query and key norms |
| gpt2 | GPT-2 | learned positions, layer norms, fused QKV |
| gpt_neox | GPT-NeoX, Pythia | parallel residual, partial rotation, QKV fused head by head |
| baichuan | Baichuan 1 and 2, 7B and 13B | W_pack, RoPE (7B) or ALiBi (13B), normalised output matrix (2) |

Refused by name: rotary scaling `dynamic` and `longrope` (a token's rotation would depend on the length of its batch),
quantised weights, mixtures of experts, dropout (GPT-2's released rates are read and not applied), multimodal models.

## Parity with transformers

Random tiny models of transformers' own classes, every parameter random, saved by transformers and loaded by alignax;
rows of unequal lengths, padded on the left and on the right; float32 on a CPU. Limits: logits {logits:g}, gradients of
the mean next-token loss {gradients:g} (relative, the worst tensor), and greedy tokens equal up to the first place where
the two best logits of transformers lie within 1e-3. "Saved by alignax" compares transformers with itself after a round
trip through `models.save`. Made by `python experiments/parity/families.py --write docs/families.md`.

{table}

Baichuan has no class in transformers: `tests/families_test.py` holds logits, gradients and greedy tokens against a
statement of the architecture in numpy and float64.
"""

if __name__ == "__main__":
    sys.exit(main())
