"""The server over HTTP on loopback: answers of generate(), streams, many clients, cancelled ones, bad input."""

import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.import_utils import is_serve_available

from flash_dmattn_hf import dynamic_mask_config
from flash_dmattn_hf.cli import main
from tests.hf import cli_models
from tests.hf.serving.engine import batching, needs_serving

pytestmark = [
    needs_serving,
    pytest.mark.skipif(not is_serve_available(), reason="needs pip install 'transformers[serving]'"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Always likeliest tokens, never an end; a chat template of the bare messages."""
    path = cli_models.save_dense(tmp_path_factory.mktemp("served") / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(checkpoint):
    from flash_dmattn_hf.serving.server import make_server

    with dynamic_mask_config(keep_window_size=16, num_sink_tokens=2, local_window_size=6):
        server = make_server(
            str(checkpoint), batching(num_blocks=3), device="cpu", dtype="float32", host="127.0.0.1", port=0
        )
    server.model.generation_config.do_sample = False
    thread = threading.Thread(target=server.run)
    thread.start()
    server.url = url_of(server, thread)
    yield server
    server.should_exit = True
    thread.join()
    server.generation_state.shutdown()


def url_of(server, thread) -> str:
    """Waits until it listens."""
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


@pytest.fixture
def client(server):
    with client_at(server.url) as client:
        yield client


def client_at(url):
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)


def expected(server, checkpoint, prompt, count):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = server.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_chat_and_completions(server, client, checkpoint):
    prompt = "What does a window of sixteen keys hold, and for how long does it hold it?"
    answer = expected(server, checkpoint, prompt, 12)
    chat = client.chat.completions.create(
        model=str(checkpoint), messages=[{"role": "user", "content": prompt}], max_tokens=12
    )
    assert chat.choices[0].message.content == answer and chat.usage.completion_tokens == 12
    text = client.completions.create(model=str(checkpoint), prompt=prompt, max_tokens=12)
    assert text.choices[0].text == answer


def test_streaming(server, client, checkpoint):
    prompt = "token by token"
    chunks = client.completions.create(model=str(checkpoint), prompt=prompt, max_tokens=9, stream=True)
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert len(pieces) > 3 and "".join(pieces) == expected(server, checkpoint, prompt, 9)


def test_more_clients_than_rows_and_a_prompt_longer_than_a_batch(server, client, checkpoint):
    prompts = ["many clients at once " * repeats for repeats in (1, 2, 8, 1, 3, 5, 9)]

    def ask(prompt):
        return client.completions.create(model=str(checkpoint), prompt=prompt, max_tokens=6).choices[0].text

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, prompts))
    assert answers == [expected(server, checkpoint, prompt, 6) for prompt in prompts]


def test_a_client_that_goes_away_gives_its_row_back(server, client, checkpoint):
    stream = client.completions.create(model=str(checkpoint), prompt="long", max_tokens=100_000, stream=True)
    next(iter(stream))
    scheduler = server.generation_state._cb_manager.scheduler
    assert scheduler.active_requests
    stream.close()
    deadline = time.monotonic() + 120
    while scheduler.active_requests and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not scheduler.active_requests and not scheduler.cache.rows.held


def post(url, data):
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.status


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{not json", 422), (b"[]", 422), (json.dumps({"model": "another", "prompt": "x"}).encode(), 400)],
)
def test_bad_requests(server, body, status):
    with pytest.raises(urllib.error.HTTPError) as error:
        post(f"{server.url}/v1/completions", body)
    assert error.value.code == status
    with urllib.request.urlopen(f"{server.url}/health", timeout=120) as response:
        assert json.load(response) == {"status": "ok"}


def test_the_command_says_what_is_wrong(checkpoint, capsys):
    assert main(["serve", str(checkpoint), "--device", "cpu", "--memory-share", "2"]) == 2
    assert "--memory-share must be above 0 and at most 1, got 2.0" in capsys.readouterr().err
    assert main(["serve", str(checkpoint), "--device", "cpu", "--memory-share", "1e-9"]) == 2
    assert "must fit into 0% of the" in capsys.readouterr().err


@pytest.mark.parametrize("captures_prompts", [False, True], ids=["steps", "prompts"])
def test_the_command_serves(checkpoint, monkeypatch, captures_prompts):
    """With --capture-prompts forwards with part of a prompt are padded, as on a GPU; answers stay the same."""
    from flash_dmattn_hf.serving import server as server_module

    made, codes, make_server = [], [], server_module.make_server

    def make(*args, **options):
        made.append(make_server(*args, **options))
        made[0].model.generation_config.do_sample = False
        return made[0]

    monkeypatch.setattr(server_module, "make_server", make)
    options = ["--device", "cpu", "--dtype", "float32", "--port", "0", "--requests", "3", "--max-batch-tokens", "80"]
    options += ["--capture-prompts"] * captures_prompts
    thread = threading.Thread(target=lambda: codes.append(main(["serve", str(checkpoint), *options])))
    thread.start()
    while not made and thread.is_alive():
        time.sleep(0.01)
    (server,) = made
    prompt = "a prompt of more characters than the tokens of one forward " * 2
    with client_at(url_of(server, thread)) as client:
        answer = client.completions.create(model=str(checkpoint), prompt=prompt, max_tokens=6)
    runner = server.generation_state._cb_manager._cb.batch_processor.model_runner
    server.should_exit = True
    thread.join()
    assert codes == [0] and answer.choices[0].text == expected(server, checkpoint, prompt, 6)
    assert (runner.padded is not None) == captures_prompts and runner.asks_for_graphs is (captures_prompts or None)


def test_what_is_served_runs_through_flash_dmattn(server):
    assert isinstance(server.model, AutoModelForCausalLM._model_mapping[type(server.model.config)])
    assert server.model.config._attn_implementation == "flash_dmattn"
