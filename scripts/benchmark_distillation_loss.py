"""Times the loss of a distillation and its gradients, with the kernel for the divergence and with torch's operations.

    python scripts/benchmark_distillation_loss.py --json docs/benchmarks/distillation_loss_h200.json

A call makes the logits of student and teacher from random hidden states, chunk by chunk, the loss, and the gradients of
the student's hidden states and output weights. The errors are those against the definition in float64, of the first
tokens: relative, of the loss and of the largest gradients.
"""

import argparse
import functools
import shlex
import sys
from unittest.mock import patch

import torch
import torch.nn.functional as F

from benchmark_report import environment, header, median_milliseconds, save_json
from flash_dmattn.backends import triton
from flash_dmattn_hf.training import chunked_distillation_loss, divergence

KINDS = ("torch", "kernel")
COMPARED = 64  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden-size", type=int, default=576)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to see that it works")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed")
    reason = triton.why_unavailable()
    if reason is not None:
        parser.error(reason + ("" if arguments.device == "cuda" else "; TRITON_INTERPRET=1 runs it on a CPU"))

    where = environment(arguments.device)
    settings = {name: value for name, value in vars(arguments).items() if name != "json"}
    print(header(where))
    print(settings)
    inputs = make_inputs(arguments)
    rows = []
    for kind in KINDS:
        with patch.object(divergence, "_is_for_kernel", lambda *tensors, kind=kind: kind == "kernel"):
            rows.append({"kind": kind, **errors(*inputs), **measure(inputs, arguments)})
        print(", ".join(f"{name} {value:.3g}" if name != "kind" else value for name, value in rows[-1].items()))
    if arguments.json:
        command = shlex.join(["python", *sys.argv])
        save_json(arguments.json, {"environment": where, "command": command, "settings": settings, "rows": rows})


def make_inputs(arguments: argparse.Namespace) -> tuple[torch.Tensor, ...]:
    """Returns hidden states and output weights, of student and teacher, with logits about as wide as a model's."""
    torch.manual_seed(0)
    options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    shapes = (arguments.tokens, arguments.hidden_size), (arguments.vocabulary, arguments.hidden_size)
    teacher = [torch.randn(shape, **options) for shape in shapes]
    teacher[1] *= 3 / arguments.hidden_size**0.5
    student = [tensor + 0.1 * tensor.std() * torch.randn_like(tensor) for tensor in teacher]
    return *(tensor.requires_grad_() for tensor in student), *teacher


def step(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    loss = chunked_distillation_loss(*inputs).loss
    return loss.detach(), *torch.autograd.grad(loss, inputs[:2])


def measure(inputs: tuple[torch.Tensor, ...], arguments: argparse.Namespace) -> dict[str, float]:
    call = functools.partial(step, inputs)
    if arguments.device == "cpu":
        return {"milliseconds": median_milliseconds(call, "cpu", arguments.runs, arguments.warmup)}
    call()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    milliseconds = median_milliseconds(call, "cuda", arguments.runs, arguments.warmup)
    return {"milliseconds": milliseconds, "peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}


def errors(hidden: torch.Tensor, weight: torch.Tensor, *teacher: torch.Tensor) -> dict[str, float]:
    found = step((hidden[:COMPARED].detach().requires_grad_(), weight, teacher[0][:COMPARED], teacher[1]))
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden[:COMPARED], weight)]
    logits = [F.linear(*exact), F.linear(teacher[0][:COMPARED].double(), teacher[1].double())]
    loss = F.kl_div(*(some.log_softmax(-1) for some in logits), reduction="batchmean", log_target=True)
    truth = loss.detach(), *torch.autograd.grad(loss, exact)
    return {
        f"{name}_error": ((ours.double() - exactly).abs().max() / exactly.abs().max()).item()
        for name, ours, exactly in zip(("loss", "dhidden", "dweight"), found, truth, strict=True)
    }


if __name__ == "__main__":
    main()
