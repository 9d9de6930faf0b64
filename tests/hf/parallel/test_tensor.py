"""`tp_plan="auto"` on two ranks: the logits, loss, gradients, tokens and checkpoints of one process."""

import pytest
import torch

from flash_dmattn_hf.versions import can_serve, can_share_twice

from .processes import check_two_gpus_train_as_one, run_on_ranks
from .tensor_jobs import (
    CASES,
    compare,
    fail_on_one_rank,
    generate_on_gpus,
    refusals,
    share_sequence,
    start_dense,
    train_on_gpus,
)


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """Returns what `compare` does for all cases on each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_on_ranks(2, folder, compare, str(folder), list(CASES))


def allowed(name: str) -> float:
    """Latent attention of transformers rotates in float32."""
    return 1e-6 if CASES[name].model_type == "deepseek_v2" else 1e-9


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process(differences, name):
    assert all(isinstance(each, dict) for each in differences), differences
    for found in differences:
        wrong = {part: error for part, error in found[name].items() if not error < allowed(name)}
        assert found[name] and not wrong, wrong


def test_gates_that_no_checkpoint_has_start_alike_on_all_ranks(tmp_path):
    for found in run_on_ranks(2, tmp_path, start_dense, str(tmp_path / "dense")):
        assert isinstance(found, dict), found
        assert all(weights == 0 and logits < 1e-9 for weights, logits in found.values()), found


def test_layers_sequences_and_parameters_are_shared_at_once(tmp_path):
    for found in run_on_ranks(4, tmp_path, share_sequence, str(tmp_path / "model")):
        if not can_share_twice():
            assert "fsdp_size beside tp_size needs transformers 5.23.0 or newer with flash_dmattn" in found
        else:
            assert isinstance(found, dict), found
            assert max(found.values()) < 1e-9, found


def test_a_rank_that_fails_ends_the_others_with_its_reason(tmp_path):
    first, second = run_on_ranks(2, tmp_path, fail_on_one_rank, str(tmp_path / "model"))
    assert "ArithmeticError: the second layer is tired" in second
    assert "PeerFailure: tensor parallelism ends because rank 1: ArithmeticError: the second layer is tired" in first


REFUSALS = {
    "kv heads": "tensor parallelism needs a number of ranks that divides the 3 kv heads of layer 0, got 2 ranks",
    "doge": "tensor parallelism cannot split DogeAttention",
    "pipeline": "pp_size must be 1 with flash_dmattn, got 2",
    "gates afterwards": "LlamaForCausalLM is split over 2 ranks already, which leaves its gates out",
    "importance file": "model must be in memory to take an importance, but model.",
    "to an importance file": "dt_proj.weight of layer 0 must be in memory as a whole to be saved",
    "chunked loss": "must be a plain nn.Linear on one device for the chunked loss",
    "continuous batching": "continuous batching needs a whole model with flash_dmattn, got one split over 2 ranks",
}
if not can_serve():
    REFUSALS["continuous batching"] = "continuous batching with flash_dmattn needs transformers 5.23.0 or newer"


def test_what_cannot_be_split_is_refused_on_all_ranks(tmp_path):
    for found in run_on_ranks(2, tmp_path, refusals, str(tmp_path / "models")):
        assert isinstance(found, dict), found
        for name, sentence in REFUSALS.items():
            assert found[name].startswith("ValueError") and sentence in found[name], (name, found[name])


def two_gpus(test):
    return pytest.mark.gpu(pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")(test))


@two_gpus
def test_two_gpus_generate_as_one(tmp_path):
    for found in run_on_ranks(2, tmp_path, generate_on_gpus, str(tmp_path / "model"), device="cuda"):
        assert isinstance(found, dict), found
        assert found["logits"] < 1e-4
        for implementation in ("dynamic", "static"):
            split, one = found[implementation]
            assert split == one, implementation
        assert found["captured"] == 2  # one step of each model


@two_gpus
def test_two_gpus_train_as_one(tmp_path):
    check_two_gpus_train_as_one(tmp_path, train_on_gpus)
