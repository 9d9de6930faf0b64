"""Minutes of continuous batching with everything at random: memory stays constant and no request is lost.

    python scripts/checks/soak_serving.py --minutes 10 --json docs/benchmarks/soak_serving_cpu.json

Requests come at random times with prompts of very different lengths, some with the same beginning; some are cancelled,
before or after they start. The run fails unless

- every request that was not cancelled ends once, with as many tokens as it asked for, and none fails;
- in the end every row is free again, and nothing is remembered of requests that have ended;
- memory stays what it was after the first fifth of the time, up to the tolerance below: on a CPU the resident set of
  the process, on a GPU what torch has reserved and what it has allocated;
- on a CPU, in float64, a sample of the answers is what generate() makes of each prompt alone.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flash_dmattn_hf import dynamic_mask_config, iter_gates

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark_report import environment, header, save_json  # noqa: E402
from serving_load import SHAPES, Session, make_settings  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE_MIB = {"resident": 16, "allocated": 64, "reserved": 256}
SECONDS_A_SAMPLE = 5.0
COMPARED_EVERY, MOST_COMPARED = 37, 40


@dataclass
class Ledger:
    """What was asked for, and what came of it. asked, cancelled: name -> prompt and number of tokens."""

    asked: dict[str, tuple[list[int], int]] = field(default_factory=dict)
    cancelled: dict[str, tuple[list[int], int]] = field(default_factory=dict)
    samples: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    finished: int = 0
    finished_though_cancelled: int = 0
    tokens: int = 0

    def take(self, result) -> None:
        """Notes a result. Raises RuntimeError for one that nobody waits for, or of another length than asked."""
        name = result.request_id
        self.finished_though_cancelled += name in self.cancelled
        request = self.asked.pop(name, None) or self.cancelled.pop(name, None)
        if request is None:
            raise RuntimeError(f"request {name} ended twice, or was never sent")
        prompt, new_tokens = request
        if len(result.generated_tokens) != new_tokens:
            raise RuntimeError(f"request {name} asked for {new_tokens} tokens, got {len(result.generated_tokens)}")
        if int(name) % COMPARED_EVERY == 0 and len(self.samples) < MOST_COMPARED:
            self.samples[name] = prompt, result.generated_tokens
        self.finished += 1
        self.tokens += new_tokens


def main() -> None:
    args = parse()
    report = {"environment": environment(DEVICE), "settings": vars(args)}
    print(header(report["environment"]))
    model = make_model(args)
    settings = make_settings(
        "flash_dmattn", memory_gib=1e6, batch_tokens=args.batch_tokens, requests=args.rows, num_blocks=args.rows,
        allow_block_sharing=True, page_size=64, use_cuda_graph=(True, True) if args.capture_prompts else True,
    )  # fmt: skip
    with Session(model, "flash_dmattn", settings, 8) as session:
        ledger, memory = soak(session, args, model.config.vocab_size)
        left = leftovers(session)
    report.update(
        finished=ledger.finished,
        finished_though_cancelled=ledger.finished_though_cancelled,
        cancelled=len(ledger.cancelled),
        lost=len(ledger.asked),
        tokens=ledger.tokens,
        memory_mib=memory,
        growth_mib={name: growth(name, samples) for name, samples in memory.items()},
        tolerance_mib=TOLERANCE_MIB,
        left=left,
        samples=len(ledger.samples) if DEVICE == "cpu" else None,
        other_answers=sum(1 for _ in other_answers(model, ledger)) if DEVICE == "cpu" else None,
    )
    print({name: value for name, value in report.items() if name not in ("environment", "settings", "memory_mib")})
    if args.json:
        save_json(args.json, report)
    grows = any(grown > TOLERANCE_MIB[name] for name, grown in report["growth_mib"].items())
    if report["lost"] or any(left.values()) or report["other_answers"] or grows:
        sys.exit("the soak failed")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--shape", default="tiny", choices=SHAPES)
    parser.add_argument("--longest", type=int, default=600, help="tokens of a prompt at most")
    parser.add_argument("--new-tokens", type=int, default=24, help="at most")
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--rate", type=float, default=40.0, help="arrivals a second on average, unless too many wait")
    parser.add_argument("--most-waiting", type=int, default=48, help="then nothing arrives for a while")
    parser.add_argument("--batch-tokens", type=int, default=256)
    parser.add_argument("--capture-prompts", action="store_true", help="pad and capture forwards with prompts, too")
    parser.add_argument("--keep-window-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the record to this file")
    return parser.parse_args()


def make_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with random weights and importances, in bfloat16 on a GPU and float64 on a CPU."""
    torch.manual_seed(args.seed)
    longest = args.longest + args.new_tokens
    config = LlamaConfig(**SHAPES[args.shape], max_position_embeddings=longest, eos_token_id=None, pad_token_id=0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float64
    with torch.device(DEVICE), dynamic_mask_config(keep_window_size=args.keep_window_size):
        model = LlamaForCausalLM._from_config(config, attn_implementation="flash_dmattn", dtype=dtype).eval()
    for _, _, gate in iter_gates(model):
        torch.nn.init.normal_(gate.A)
        torch.nn.init.normal_(gate.dt_proj.weight, std=0.5)
    return model


def soak(session: Session, args: argparse.Namespace, vocabulary: int) -> tuple[Ledger, dict[str, list[float]]]:
    """Sends requests until the time is over; returns what came of all of them, and samples of memory."""
    choose, ledger, memory, number = random.Random(args.seed), Ledger(), {}, 0
    shared = [[choose.randrange(vocabulary) for _ in range(args.longest // 2)] for _ in range(3)]
    start = next_arrival = next_sample = time.monotonic()
    end = start + 60 * args.minutes
    while (now := time.monotonic()) < end or (ledger.asked and now < end + 120):
        if now >= next_sample:
            for name, size in held_mib().items():
                memory.setdefault(name, []).append(round(size, 1))
            next_sample = now + SECONDS_A_SAMPLE
        if now >= next_arrival and now < end and len(ledger.asked) < args.most_waiting:
            name, number = str(number), number + 1
            prompt = make_prompt(choose, args.longest, vocabulary, shared)
            ledger.asked[name] = prompt, choose.randint(1, args.new_tokens)
            session.send(name, *ledger.asked[name])
            next_arrival = now + choose.expovariate(args.rate)
            if choose.random() < 0.15:
                name = choose.choice(list(ledger.asked))
                session.manager.cancel_request(name)
                ledger.cancelled[name] = ledger.asked.pop(name)
        if (result := session.receive(min(0.05, max(0.0, next_arrival - now)))) is not None:
            ledger.take(result)
    return ledger, memory


def make_prompt(choose: random.Random, longest: int, vocabulary: int, shared: list[list[int]]) -> list[int]:
    """As many prompts of 1 to 10 tokens as of 10 to 100 and so on; every fourth begins as others do."""
    length = max(1, int(longest ** choose.random()))
    prompt = [choose.randrange(vocabulary) for _ in range(length)]
    return [*choose.choice(shared), *prompt][:longest] if choose.random() < 0.25 else prompt


def held_mib() -> dict[str, float]:
    """MiB that torch has allocated and reserved on the GPU, or of the resident set of this process."""
    if DEVICE == "cuda":
        return {"allocated": torch.cuda.memory_allocated() / 2**20, "reserved": torch.cuda.memory_reserved() / 2**20}
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"resident": pages * 4096 / 2**20}


def growth(name: str, samples: list[float]) -> float:
    """MiB more in the last fifth of the time than in the second.

    What is reserved never falls, what is allocated goes up with every forward, and a resident set goes up and down.
    """
    summary = {"reserved": max, "allocated": min, "resident": statistics.median}[name]
    fifth = max(1, len(samples) // 5)
    return round(summary(samples[-fifth:]) - summary(samples[fifth : 2 * fifth]), 1)


def leftovers(session: Session) -> dict[str, int]:
    """What is still held though every request has ended: everything must be 0."""
    deadline, processor = time.monotonic() + 10, session.manager.batch_processor
    cache, scheduler = processor.cache, processor.scheduler
    while scheduler.has_pending_requests() and time.monotonic() < deadline:
        time.sleep(0.05)  # until the last cancellation was seen
    return {
        "active": len(scheduler.active_requests),
        "waiting": len(scheduler.waiting_requests) + len(scheduler.waiting_requests_order),
        "held": len(cache.rows.held),
        "unavailable": cache.num_blocks - cache.rows.num_available,
        "prefixes": len(cache.prefixes._ends) + len(cache.prefixes._owners),
    }


def other_answers(model: LlamaForCausalLM, ledger: Ledger) -> Iterator[str]:
    """The names of samples to which generate() alone answers something else."""
    for name, (prompt, answer) in ledger.samples.items():
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(answer), do_sample=False, pad_token_id=0
        )
        if out[0, len(prompt) :].tolist() != answer:
            yield name


if __name__ == "__main__":
    main()
