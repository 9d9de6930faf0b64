"""CUDA graphs as a CPU can have them: a replay runs the forward again, on the tensors that it was captured with."""

from contextlib import contextmanager, nullcontext

from flash_dmattn_hf.serving import runner as runner_module


class EmulatedGraph:
    def __init__(self):
        self.replays = 0
        self.forward = None

    def replay(self) -> None:
        self.replays += 1
        self.forward()

    def reset(self) -> None:
        self.forward = None


def emulate_graphs(engine, monkeypatch, refuses=lambda: False) -> dict[tuple[int, ...], EmulatedGraph]:
    """Has the steps of an engine captured, and returns what is captured, by number of tokens.

    Forwards with part of a prompt are captured, too, where the engine pads them. Capturing runs nothing, so the slots
    and the chosen tokens are then as they were. A replay knows of its requests what it finds at the addresses that it
    was captured with. refuses: whether capturing raises, as for a model
    that waits for the GPU.
    """
    runner, live = engine.processor.model_runner, engine.cache.live_requests
    forward, calls = runner._forward_process_and_sample, []

    def recorded(*args):
        calls.append(args)
        forward(*args)

    @contextmanager
    def capturing(graph, device, pool, stream):
        if refuses():
            raise RuntimeError("operation not permitted when stream is capturing")
        held = [state for slots in live.slots.values() for state in slots]
        held.append(engine.processor.inputs_and_outputs.output_ids)
        before = [state.clone() for state in held]
        yield
        for state, old in zip(held, before, strict=True):
            state.copy_(old)
        args, rows, chunks = calls[-1], live._rows, live._chunks

        def replay():
            live._rows, live._chunks = rows, chunks
            forward(*args)

        graph.forward = replay

    monkeypatch.setattr(runner_module, "capturing", capturing)
    monkeypatch.setattr(runner_module, "memory_pool_context", lambda pool: nullcontext())
    monkeypatch.setattr(runner_module.torch.cuda, "CUDAGraph", EmulatedGraph)
    monkeypatch.setattr(runner, "_forward_process_and_sample", recorded)
    runner.use_cuda_graph_decode = runner.pads_steps = True
    runner.use_cuda_graph_varlen = runner.padded is not None
    return engine.processor.inputs_and_outputs.graphs._storage
