"""Forward and backward of a long sequence stay far below the memory of an N x N matrix."""

import subprocess
import sys

GIB = 2**30

# Resident memory is sampled by a thread (torch releases the GIL), above what it is when the inputs exist;
# ru_maxrss would not do: it starts from the peak of the process that spawned this one.
MEASURE = """
import threading, time
import psutil, torch
from flash_dmattn import dynamic_mask_attention

seqlen, num_heads = 8192, 9
torch.manual_seed(0)
query = torch.randn(1, seqlen, num_heads, 64, requires_grad=True)
key = torch.randn(1, seqlen, num_heads, 64, requires_grad=True)
value = torch.randn(1, seqlen, num_heads, 64, requires_grad=True)
importance = torch.randn(1, num_heads, seqlen, requires_grad=True)
dout = torch.randn_like(query)
warm = [x[:, :64].detach().requires_grad_() for x in (query, key, value)] + [importance[..., :64].detach()]
dynamic_mask_attention(*warm, keep_window_size=8).sum().backward()

process, peak, done = psutil.Process(), 0, False
before = process.memory_info().rss

def sample():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.001)

thread = threading.Thread(target=sample)
thread.start()
dynamic_mask_attention(query, key, value, importance, keep_window_size=512).backward(dout)
done = True
thread.join()
assert all(x.grad.isfinite().all() for x in (query, key, value, importance))
print(peak - before)
"""


def test_8192_tokens_with_9_heads_and_a_window_of_512_stay_below_one_and_a_half_gib():
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    peak = int(run.stdout)
    one_input = 4 * 8192 * 9 * 64  # bytes
    assert peak > 3 * one_input, "out and three gradients alone take more than was measured"
    assert peak < 1.5 * GIB, f"{peak / GIB:.2f} GiB"
