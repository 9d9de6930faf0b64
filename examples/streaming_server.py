"""Streams completions over HTTP; every request gets a cache of constant size. For a loopback address only.

python examples/streaming_server.py MODEL [PORT]     curl -N -d "import os" http://127.0.0.1:8000
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

import flash_dmattn_hf  # noqa: F401 - registers "flash_dmattn"


def make_server(name: str, port: int = 8000, max_new_tokens: int = 64) -> ThreadingHTTPServer:
    tokenizer = AutoTokenizer.from_pretrained(name)
    settings = {"attn_implementation": "flash_dmattn", "flash_dmattn": {"keep_window_size": 512}}
    model = AutoModelForCausalLM.from_pretrained(name, **settings).eval()
    one_at_a_time = Lock()

    class Completions(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            prompt = self.rfile.read(int(self.headers["Content-Length"])).decode()
            inputs = tokenizer(prompt, return_tensors="pt")
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
            options = {**inputs, "streamer": streamer, "max_new_tokens": max_new_tokens, "do_sample": False}
            self.send_response(200)
            self.end_headers()
            with one_at_a_time, ThreadPoolExecutor() as thread:  # which ends when the generation has
                thread.submit(model.generate, **options)
                for piece in streamer:
                    self.wfile.write(piece.encode())

    return ThreadingHTTPServer(("127.0.0.1", port), Completions)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    make_server(sys.argv[1], *map(int, sys.argv[2:3])).serve_forever()
