"""`flash-dmattn serve`: transformers' OpenAI-compatible server, with slots of constant size for every request."""

import argparse
import sys

import transformers

from flash_dmattn_hf.cli import common
from flash_dmattn_hf.conversion.checkpoint import find_source
from flash_dmattn_hf.versions import FIRST_SERVING, can_serve

DESCRIPTION = """\
Serves chat and text completions over HTTP. There are no users, keys or limits: whoever reaches the port may use it.
"""


def add_parser(commands, shared: argparse.ArgumentParser) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser("serve", parents=[shared], help="serve over HTTP", description=DESCRIPTION)
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="a directory or a Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=common.not_negative, default=8000, help="default: %(default)s")
    parser.add_argument(
        "--requests", metavar="N", type=common.positive, help="live requests at once (default: as many as fit)"
    )
    parser.add_argument(
        "--memory-share", metavar="S", type=float, help="of the free memory, above 0 and at most 1 (default: 0.8)"
    )
    parser.add_argument(
        "--max-batch-tokens", metavar="N", type=common.positive, help="tokens of a forward (default: 2048)"
    )
    parser.add_argument(
        "--capture-prompts",
        action="store_true",
        help="on a GPU, capture forwards with part of a prompt in CUDA graphs too; such a part is of one prompt",
    )
    parser.add_argument("--dtype", choices=common.DTYPES, default="auto", help="default: the checkpoint's own")
    parser.add_argument("--device", default="auto", help="default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Serves until it is interrupted."""
    if not can_serve():
        raise ValueError(f"serve needs transformers {FIRST_SERVING} or newer, got {transformers.__version__}")
    if args.memory_share is not None and not 0 < args.memory_share <= 1:
        raise ValueError(f"--memory-share must be above 0 and at most 1, got {args.memory_share}")
    from flash_dmattn_hf.serving.server import check_room, make_server

    find_source(args.model, allow_pickle=False)

    settings = transformers.ContinuousBatchingConfig(
        num_blocks=args.requests,
        max_memory_percent=0.8 if args.memory_share is None else args.memory_share,
        max_batch_tokens=args.max_batch_tokens,
        use_cuda_graph=(True, True) if args.capture_prompts else None,
    )
    server = make_server(
        args.model, settings, device=args.device, dtype=args.dtype, host=args.host, port=args.port
    )
    num_requests, size = check_room(server.model, settings)
    print(
        f"room for {num_requests} requests of any length, {size / 2**20:.1f} MiB each; "
        f"listening at http://{args.host}:{args.port}",
        file=sys.stderr,
    )
    try:
        server.run()
    finally:
        server.generation_state.shutdown()
