"""The index: lookup, unknown names and keys, requests, and what a call refuses."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import losses
from alignax.losses.info import method
from alignax.types import REQUESTS, ConfigError

PAIR = {"logps": jnp.array([[-10.0, -12.0]]), "ref_logps": jnp.array([[-11.0, -11.5]])}


def test_get_resolves_requests_and_hyper_parameters():
    loss = losses.get("dpo", beta=0.5)
    assert loss.requests == ("logps", "ref_logps") and dict(loss.hyper) == {"beta": 0.5, "label_smoothing": 0.0}
    assert loss.fn is losses.dpo and loss.info.arxiv == "2305.18290" and loss.init_state() is None
    np.testing.assert_array_equal(loss({**PAIR, "extra": 1}), losses.dpo(**PAIR, beta=0.5))
    np.testing.assert_array_equal(loss(PAIR, beta=0.1), losses.dpo(**PAIR, beta=0.1))
    assert losses.defaults("simpo") == {"beta": 2.0, "gamma": 0.5}


def test_function_names_and_ids_lead_to_the_same_method():
    for id, function in losses.INDEX.items():
        assert losses.get(id).name == losses.get(function.__name__).name == id
        assert getattr(losses, function.__name__) is function
    assert losses.names() == tuple(losses.INDEX)


def test_unknown_name_lists_close_matches_first():
    with pytest.raises(ConfigError, match=r"loss = 'simpoo' \(did you mean simpo") as error:
        losses.get("simpoo")
    assert all(name in str(error.value) for name in losses.names())


def test_unknown_or_impossible_values_are_refused():
    with pytest.raises(ConfigError, match=r"unknown hyper-parameter betta.*allowed: beta, label_smoothing"):
        losses.get("dpo", betta=0.1)
    with pytest.raises(ConfigError, match="unknown hyper-parameter tau"):
        losses.get("dpo")(PAIR, tau=1.0)
    with pytest.raises(ConfigError, match="label_smoothing = 0.5; allowed: 0.0 to 0.499"):
        losses.get("robust_dpo", label_smoothing=0.5)
    with pytest.raises(ConfigError, match="allowed: float"):
        losses.get("dpo", beta="0.1")
    with pytest.raises(ConfigError, match="allowed: bool"):
        losses.get("ipo", length_average=1)
    with pytest.raises(ConfigError, match="allowed: 'average', 'cumulative'"):
        losses.get("rpo", form="sum")({**PAIR, "lengths": jnp.ones((1, 2))})
    with pytest.raises(ConfigError, match=r"inputs lack ref_logps; found \['logps'\]"):
        losses.get("dpo")({"logps": PAIR["logps"]})
    with pytest.raises(ConfigError, match=r"allowed: \[B, 2"):
        losses.dpo(jnp.zeros((4, 3)), jnp.zeros((4, 3)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_sequence_sums_are_refused(dtype):
    narrow = {name: value.astype(dtype) for name, value in PAIR.items()}
    with pytest.raises(TypeError, match="allowed: float32 or float64"):
        losses.get("dpo")(narrow)
    with pytest.raises(TypeError, match="sequence sums"):
        losses.dpo(**narrow)
    mixed = {"logps": PAIR["logps"], "ref_logps": narrow["ref_logps"]}
    with pytest.raises(TypeError, match="ref_logps"):
        jax.jit(losses.get("dpo"))(mixed)


def test_every_signature_is_a_specification():
    for id, function in losses.INDEX.items():
        requests, hyper = losses.split_signature(function)
        assert set(requests) <= set(REQUESTS) and requests, id
        assert function.__doc__ and function.info.system, id
        words = function.__doc__
        assert "ource" in words or "SFT" in words or id == "sft", f"{id}: the docstring names no source"


def test_a_bad_method_cannot_enter_the_index():
    mark = method(id="x", system="X", arxiv="", fidelity="paper")

    def stranger(logps, prompt_colour):
        """Asks for what nobody provides."""

    with pytest.raises(ConfigError, match="'prompt_colour' is not a request; allowed: .*ref_logps"):
        losses.build_index((mark(stranger),))
    with pytest.raises(ConfigError, match="claimed twice"):
        losses.build_index((losses.dpo, losses.dpo))
    with pytest.raises(ConfigError, match="no @method"):
        losses.build_index((test_every_signature_is_a_specification,))
    with pytest.raises(ValueError, match="reconstruction"):
        method(id="x", system="X", arxiv="", fidelity="folklore")

    def stateful(logps, state):
        """Has a state but no initial one."""

    with pytest.raises(ConfigError, match="init_state"):
        losses.build_index((mark(stateful),))


def test_running_state_starts_at_zero():
    assert losses.get("beta_dpo").init_state() == {"mean": 0, "std": 0}


def test_the_catalogue_of_losses_is_covered(shared):
    """Every loss of the two catalogues of offline losses, under its id or as variants of it."""
    with (shared / "methods" / "ledger.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["catalogue"] in ("pairwise", "more")]
    wanted = {r["id"] for r in rows if r["owner"] == "losses" and r["kind"] == "loss"}
    stems = {name.split(":")[0] for name in losses.names()}
    assert len(wanted) > 60
    assert sorted(wanted - stems) == []
