"""Pipelines, streamers and `transformers serve`: the text is that of sdpa."""

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from transformers import TextIteratorStreamer, pipeline

from .conftest import CHOICES, load, text


def test_a_pipeline(dense, tokenizer):
    prompts, said = [text(1, 8), text(5, 20)], {}
    for name in CHOICES:
        generate = pipeline("text-generation", model=load(dense, name), tokenizer=tokenizer)
        said[name] = generate(prompts, max_new_tokens=12, do_sample=False, batch_size=2)
    assert said["flash_dmattn"] == said["sdpa"]


def test_a_streamer(dense, tokenizer):
    said = {}
    for name in CHOICES:
        model, streamer = load(dense, name), TextIteratorStreamer(tokenizer, skip_prompt=True)
        inputs = tokenizer(text(3, 10), return_tensors="pt")
        options = {**inputs, "streamer": streamer, "max_new_tokens": 12, "do_sample": False}
        thread = threading.Thread(target=model.generate, kwargs=options)
        thread.start()
        said[name] = "".join(streamer)
        thread.join()
    assert said["flash_dmattn"] and said["flash_dmattn"] == said["sdpa"]


def ask(port, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def serve(dense):
    """Starts `transformers serve` for a checkpoint, asks it once, and returns what it says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "flash_dmattn_hf.cli", "run", "transformers", "serve", str(dense)]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            for _ in range(240):
                try:
                    ask(port, "/health")
                    break
                except OSError:
                    assert server.poll() is None, server.stdout.read()
                    time.sleep(0.5)
            body = {"model": str(dense), "messages": [{"role": "user", "content": text(2, 12)}], "stream": False}
            body |= {"max_tokens": 10, "temperature": 0.0, "generation_config": json.dumps({"do_sample": False})}
            return ask(port, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
        finally:
            server.terminate()


def test_transformers_serve(dense, tokenizer, tmp_path):
    """Its option --attn-implementation knows no registered names, so the checkpoint has to be a converted one."""
    pytest.importorskip("fastapi")
    load(dense, "flash_dmattn").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    said = {"sdpa": serve(dense), "flash_dmattn": serve(tmp_path)}
    assert said["flash_dmattn"] and said["flash_dmattn"] == said["sdpa"]
