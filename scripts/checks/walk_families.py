"""Every causal language model of the installed transformers: does it load by name, and compute what it should?

    python scripts/checks/walk_families.py                     # goes on where it was stopped
    python scripts/checks/walk_families.py --models llama gpt_oss

Each type is tried in a process of its own with a time limit. The records go to docs/benchmarks, and the page
docs/supported_models.md is written from them. `checks/families/tries.py` says what is tried.
"""

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the files that all scripts share

import flash_dmattn_hf  # noqa: E402, F401
from checks.families import table, tries  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="these model types, again; default: all that have no record")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one model type")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    path = table.path_of(transformers.__version__)
    records = table.load(path)
    waiting = arguments.models or [name for name in tries.causal_model_types() if name not in records]
    start = time.perf_counter()
    for record in walk_all(waiting, arguments.processes, arguments.timeout):
        records[record["model_type"]] = record
        table.save(path, records)
        print(record["model_type"], record["verdict"], record["gates"], record["reason"], flush=True)
    table.PAGE.write_text(table.page())
    print(f"{len(waiting)} model types in {time.perf_counter() - start:.0f} s")


def walk_all(waiting: list[str], processes: int, timeout: float):
    """Yields the record of every model type as it is done; a process that hangs or dies is a record, too."""
    context = multiprocessing.get_context("fork")  # the imports are done once
    waiting, running = list(waiting), {}
    while waiting or running:
        while waiting and len(running) < processes:
            name = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_walk, args=(name, sender))
            process.start()
            sender.close()
            running[name] = (process, receiver, time.perf_counter() + timeout)
        for name, (process, receiver, deadline) in list(running.items()):
            is_late = time.perf_counter() > deadline
            if not (receiver.poll(0.05) or is_late):
                continue
            del running[name]
            yield _result(name, process, receiver, is_late)


def _walk(name: str, sender) -> None:
    sender.send(tries.walk(name))


def _result(name: str, process, receiver, is_late: bool) -> dict:
    try:
        if receiver.poll():
            return receiver.recv()
        reason = "it took too long"
    except EOFError:
        reason = "its process died"
    finally:
        if is_late:
            process.kill()
        process.join()
    return {"model_type": name, "verdict": "not built", "gates": "", "tried": {}, "reason": reason}


if __name__ == "__main__":
    main()
