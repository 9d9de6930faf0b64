"""Every causal language model and image-text model of the installed transformers: is it right when loaded by name?

    python scripts/checks/walk_families.py                     # goes on where it was stopped
    python scripts/checks/walk_families.py --anew              # forgets what was recorded
    python scripts/checks/walk_families.py --models llama gpt_oss --tasks causal

Each type is tried in a process of its own with a time limit. The records go to docs/benchmarks, and the page
docs/supported_models.md is written from them. `checks/families/tries.py` says what is tried. Models with a vision tower
of timm (Gemma3n, FastVLM, PerceptionLM) need timm and torchvision.
"""

import argparse
import multiprocessing
import resource
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the files that all scripts share

import flash_dmattn_hf  # noqa: E402, F401
from benchmark_report import environment  # noqa: E402
from checks.families import table, tries  # noqa: E402
from checks.families.family import TASKS, model_types  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="these model types, again; default: all that have no record")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all")
    parser.add_argument("--anew", action="store_true", help="forget all records of this version of transformers")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one model type")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    path = table.path_of(transformers.__version__)
    walks, records = ([], {}) if arguments.anew else table.load(path)
    waiting = [
        (task, name)
        for task in arguments.tasks
        for name in model_types(task)
        if (name in arguments.models if arguments.models else name not in records.get(task, {}))
    ]
    walks.append({"command": shlex.join(["python", *sys.argv]), **environment("cpu")})
    start = time.perf_counter()
    for task, record in walk_all(waiting, arguments.processes, arguments.timeout):
        records.setdefault(task, {})[record["model_type"]] = record
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = {"wall": round(time.perf_counter() - start), "cpu": round(usage.ru_utime + usage.ru_stime)}
        walks[-1] |= {"tried": walks[-1].get("tried", 0) + 1, "seconds": seconds}
        table.save(path, walks, records)
        print(task, record["model_type"], record["verdict"], record["gates"], record["reason"], flush=True)
    table.PAGE.write_text(table.page())
    print(walks[-1])


def walk_all(waiting: list[tuple[str, str]], processes: int, timeout: float) -> Iterator[tuple[str, dict]]:
    """Yields task and record of every model type as it is done; a process that hangs or dies is a record, too."""
    context = multiprocessing.get_context("fork")  # the imports are done once
    waiting, running = list(waiting), {}
    while waiting or running:
        while waiting and len(running) < processes:
            task, name = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_walk, args=(task, name, sender))
            process.start()
            sender.close()
            running[task, name] = (process, receiver, time.perf_counter() + timeout)
        for (task, name), (process, receiver, deadline) in list(running.items()):
            is_late = time.perf_counter() > deadline
            if not (receiver.poll(0.05) or is_late):
                continue
            del running[task, name]
            yield task, _result(name, process, receiver, is_late)


def _walk(task: str, name: str, sender) -> None:
    sender.send(tries.walk(task, name))


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
    return tries.record_of(name, "not built", reason)


if __name__ == "__main__":
    main()
