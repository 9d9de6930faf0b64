"""`flash-dmattn generate`: streams text, and says how fast it came and how large the cache is."""

import argparse
import sys
import time

import torch
from transformers import TextStreamer

from flash_dmattn_hf.arguments import get_cache
from flash_dmattn_hf.cache.cache import DynamicMaskCache
from flash_dmattn_hf.cli import common
from flash_dmattn_hf.conversion.checkpoint import find_source
from flash_dmattn_hf.evaluation.memory import bytes_of_cache

DESCRIPTION = """\
Generates text with a cache of constant size. The text goes to stdout, the numbers to stderr.
"""


def add_parser(commands, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser("generate", parents=[shared], help="stream text", description=DESCRIPTION)
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="a directory, a .gguf file or a Hub id")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", type=common.text_file, help="UTF-8 text to continue")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=common.positive, default=200, help="default: %(default)s"
    )
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 takes the likeliest token (default: 0)"
    )
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0, help="nucleus when sampling (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    common.add_model_options(parser.add_argument_group("model"))


def run(args: argparse.Namespace) -> None:
    """Streams the continuation to stdout, then reports on stderr."""
    if not args.temperature >= 0 or args.temperature == float("inf"):
        raise ValueError(f"--temperature must be a finite number of at least 0, got {args.temperature}")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {args.top_p}")
    source = find_source(args.model, allow_pickle=args.allow_pickle)
    tokenizer = common.need_tokenizer(source)
    input_ids = _prompt_ids(tokenizer, args)
    model = common.load(source, args)
    common.check_length(model, input_ids.shape[1] + args.max_new_tokens, "--max-new-tokens")
    sampling = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    torch.manual_seed(args.seed)
    streamer = _TimedStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    out = model.generate(
        input_ids.to(model.device),
        attention_mask=torch.ones_like(input_ids, device=model.device),
        max_new_tokens=args.max_new_tokens,
        pad_token_id=_padding(model, tokenizer),
        streamer=streamer,
        return_dict_in_generate=True,
        **sampling,
    )
    num_new = out.sequences.shape[1] - input_ids.shape[1]
    print(report(input_ids.shape[1], num_new, streamer.first - start, streamer.last - streamer.first), file=sys.stderr)
    print(cache_report(get_cache(out)), file=sys.stderr)


def report(num_prompt: int, num_new: int, prefill: float, decode: float) -> str:
    """Speed in words. prefill: seconds to the first new token; decode: seconds from there to the last."""
    rate = f"{(num_new - 1) / decode:.1f} tokens/s" if num_new > 1 and decode > 0 else "one token"
    return f"{num_prompt} prompt tokens in {prefill:.2f} s, {num_new} new tokens: {rate}"


def cache_report(cache) -> str:
    """Size of the cache in words."""
    if isinstance(cache, DynamicMaskCache):
        num_tokens = cache.get_seq_length()
        return f"cache: {cache.nbytes:,} bytes, at most {cache.max_keys} keys per head for {num_tokens} tokens"
    return f"cache: {bytes_of_cache(cache):,} bytes, all {cache.get_seq_length()} keys (dense model)"


def _prompt_ids(tokenizer, args: argparse.Namespace) -> torch.Tensor:
    prompt = args.prompt
    if prompt is None:
        try:
            prompt = args.prompt_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{args.prompt_file} must be UTF-8 text: {error}") from error
    if args.chat:
        if not tokenizer.chat_template:
            raise ValueError("--chat needs a model with a chat template, this one has none")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=not args.chat, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise ValueError("--prompt must have at least one token, got none")
    return ids.long()


def _padding(model, tokenizer) -> int | None:
    """generate() asks for a padding token although nothing is padded here."""
    candidates = (model.generation_config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None), None)


class _TimedStreamer(TextStreamer):
    """Prints text as it comes. first, last: when the first and the last new token came."""

    first = last = 0.0
    calls = 0

    def put(self, value):
        self.calls += 1
        if self.calls > 1:  # the first call brings the prompt
            self.last = time.perf_counter()
            self.first = self.first or self.last
        super().put(value)
