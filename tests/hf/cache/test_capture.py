"""What a capture in a CUDA graph leaves behind, also when it fails."""

import gc

import pytest
import torch

from flash_dmattn_hf.cache import cuda_graph


@pytest.mark.parametrize("was_enabled", [True, False])
def test_no_garbage_is_collected_until_the_last_capture_ends(was_enabled, monkeypatch):
    monkeypatch.setattr(cuda_graph, "_captures", 0)
    first, second = cuda_graph._without_collection(), cuda_graph._without_collection()
    (gc.enable if was_enabled else gc.disable)()
    try:
        first.__enter__()
        second.__enter__()
        assert not gc.isenabled()
        first.__exit__(None, None, None)
        assert not gc.isenabled()
        with pytest.raises(RuntimeError, match="fails"):
            second.gen.throw(RuntimeError("fails"))
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_capture_that_fails_does_not_count_as_a_user_of_its_pool():
    pool, graph = torch.cuda.MemPool(), torch.cuda.CUDAGraph()
    device = torch.device("cuda", torch.cuda.current_device())
    with pytest.raises(RuntimeError), cuda_graph.capturing(graph, device, pool.id):
        torch.ones(4, device=device).sum().item()
    assert pool.use_count() == 1 and gc.isenabled()
    del graph, pool
    gc.collect()
    assert torch.rand(4, device=device).sum().item() > 0
