"""The same load through HTTP on loopback: `flash-dmattn serve` in a process of its own, one connection per request."""

import http.client
import json
import os
import random
import socket
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from serving_load import Load, Times, figures

LETTERS = string.ascii_letters + string.digits


def save_checkpoint(model: PreTrainedModel, folder: Path) -> None:
    """Writes the model, and a tokenizer for which every letter of a prompt is one token."""
    model.set_attn_implementation("flash_dmattn")
    model.save_pretrained(folder)
    words = [*LETTERS, *(f"<{number}>" for number in range(len(LETTERS), model.config.vocab_size))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="a", pad_token="a").save_pretrained(folder)


@contextmanager
def running_server(folder: Path, options: list[str], log: Path, deadline: float) -> Iterator[int]:
    """Starts the server and yields its port once it answers. RuntimeError with its log if it ends or is too slow."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "flash_dmattn_hf.cli", "serve", str(folder), "--port", str(port), *options]
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        while not answers(port):
            if process.poll() is not None or time.perf_counter() > deadline:
                raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def run_http_load(port: int, model: str, load: Load, deadline: float, seed: int) -> dict:
    """Returns the figures of a load, as clients see it. deadline: of `time.perf_counter()`."""
    choose = random.Random(seed)
    texts = ["".join(choose.choices(LETTERS, k=len(prompt))) for prompt in load.prompts]
    ask(port, model, texts[0][:64], 2, deadline, [])  # starts the engine
    start = time.perf_counter()

    def client(number: int) -> tuple[bool, Times]:
        times = Times(start + load.arrivals[number], [])
        time.sleep(max(0.0, times.sent - time.perf_counter()))
        return ask(port, model, texts[number], load.new_tokens, deadline, times.tokens), times

    with ThreadPoolExecutor(len(texts)) as pool:
        finished, requests = zip(*pool.map(client, range(len(texts))), strict=True)
    seconds = max((times.tokens[-1] for times in requests if times.tokens), default=time.perf_counter()) - start
    return {"finished": sum(finished), "cut_off": not all(finished), **figures(requests, seconds)}


def ask(port: int, model: str, text: str, new_tokens: int, deadline: float, times: list[float]) -> bool:
    """Streams one completion and notes when each piece of it comes. Returns whether it came to its end in time."""
    body = json.dumps({"model": model, "prompt": text, "max_tokens": new_tokens, "stream": True})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=max(1.0, deadline - time.perf_counter()))
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"the server answered {response.status}: {response.read()[:500]!r}")
        for line in response:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                return True
            choices = json.loads(line[6:]).get("choices")
            if choices and choices[0].get("text"):
                times.append(time.perf_counter())
            if time.perf_counter() > deadline:
                return False
        return True
    except TimeoutError:
        return False
    finally:
        connection.close()
