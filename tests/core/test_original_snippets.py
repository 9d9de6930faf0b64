"""What the README of flash-dmattn (BSD-3-Clause) told its users to type, run as it stands.

On a GPU the code is unchanged. On a CPU its device line is another one, and its sizes are small.
"""

import pytest

from .kernel_cases import HAS_GPU

QUICK_START = """
import torch
from flash_dmattn import flash_dmattn_func_auto
import math

# Setup
batch_size, seq_len, num_heads, head_dim = 2, 4096, 16, 128
device = torch.device('cuda')
dtype = torch.bfloat16

# Input tensors
query = torch.randn(batch_size, seq_len, num_heads, head_dim,
                   device=device, dtype=dtype)
key = torch.randn(batch_size, seq_len, num_heads, head_dim,
                 device=device, dtype=dtype)
value = torch.randn(batch_size, seq_len, num_heads, head_dim,
                   device=device, dtype=dtype)

# Create mask and bias for sparse attention
attention_bias = torch.randn(batch_size, num_heads, seq_len, seq_len,
                           device=device, dtype=dtype)
attention_mask = torch.ones(batch_size, num_heads, seq_len, seq_len,
                          device=device, dtype=dtype)

# Apply dynamic masking (keep top-k for long sequences)
keep_window_size = 2048
if seq_len > keep_window_size:
    # Select top-k most important keys for each query
    topk_indices = torch.topk(attention_bias, keep_window_size, dim=-1,
                             largest=True, sorted=False).indices
    attention_mask.zero_()
    attention_mask.scatter(-1, topk_indices, 1.0)

# Select backend
flash_dmattn_func = flash_dmattn_func_auto(backend="cuda")

# Run Flash Dynamic Mask Attention
output = flash_dmattn_func(
    q=query,
    k=key,
    v=value,
    attn_mask=attention_mask,
    attn_bias=attention_bias,
    is_causal=True,
    scale=1.0/math.sqrt(head_dim),
)

print(f"Output shape: {output.shape}")
"""

GRADIENTS = """
import torch
from flash_dmattn import flash_dmattn_func_auto
import math

# Setup
batch_size, seq_len, num_heads, num_kv_heads, head_dim = 1, 256, 2, 1, 64
keep_window_size = 128
device = torch.device('cuda')
dtype = torch.bfloat16
min_dtype = torch.finfo(dtype).min

# Input tensors
query = torch.randn(batch_size, seq_len, num_heads, head_dim, device=device, dtype=dtype)
key = torch.randn(batch_size, seq_len, num_kv_heads, head_dim, device=device, dtype=dtype)
value = torch.randn(batch_size, seq_len, num_kv_heads, head_dim, device=device, dtype=dtype)

# Create mask and bias for sparse attention
attention_mask = torch.ones(batch_size, num_kv_heads, seq_len, seq_len, device=device, dtype=dtype)
attention_bias = torch.randn(batch_size, num_kv_heads, seq_len, seq_len, device=device, dtype=dtype)

# Generate sparse mask based on bias
if seq_len > keep_window_size:
    topk_values, topk_indices = torch.topk(
        attention_bias, keep_window_size, dim=-1,
        largest=True, sorted=False
    )
    valid_topk = (topk_values != min_dtype).to(dtype)
    attention_mask = torch.zeros_like(attention_bias, dtype=dtype, device=attention_bias.device)
    attention_mask = attention_mask.scatter(-1, topk_indices, valid_topk)
    attention_bias = attention_bias.masked_fill(attention_mask == 0.0, min_dtype)

flash_dmattn_func = flash_dmattn_func_auto(backend="cuda")

# Enable gradient computation
query.requires_grad_(True)
key.requires_grad_(True)
value.requires_grad_(True)
attention_bias.requires_grad_(True)

# Forward pass
output = flash_dmattn_func(
    query=query, key=key, value=value,
    attn_mask=attention_mask,
    attn_bias=attention_bias,
    is_causal=True,
    scale=1.0/math.sqrt(head_dim)
)

# Backward pass
loss = output.sum()
loss.backward()

print(f"Query gradient shape: {query.grad.shape}")
print(f"Key gradient shape: {key.grad.shape}")
print(f"Value gradient shape: {value.grad.shape}")
print(f"Bias gradient shape: {attention_bias.grad.shape}")
"""

TROUBLESHOOTING = """
try:
    from flash_dmattn import flash_dmattn_func, get_available_backends
    print("Flash Dynamic Mask Attention imported successfully")
    print(f"Available backends: {get_available_backends()}")
except ImportError as e:
    print(f"Import failed: {e}")
    print("Please ensure the package is properly installed with: pip install -e .")

# Monitor GPU memory usage
from flash_dmattn import flash_dmattn_func

def print_memory_stats():
    if torch.cuda.is_available():
        print(f"GPU Memory: {torch.cuda.memory_allocated() / 1e9:.2f} GB")

print_memory_stats()
output = flash_dmattn_func(q=query, k=key, v=value, is_causal=True)
print_memory_stats()

# Clear cache if needed
torch.cuda.empty_cache()
"""


def execute(source, namespace, small=()):
    if not HAS_GPU:
        for old, new in (("device('cuda')", "device('cpu')"), *small):
            assert old in source
            source = source.replace(old, new)
    exec(compile(source, "snippet", "exec"), namespace)
    return namespace


SMALL = (("2, 4096, 16, 128", "2, 64, 2, 32"), ("keep_window_size = 2048", "keep_window_size = 16"))


@pytest.fixture
def quick_start(capsys):
    found = execute(QUICK_START, {}, SMALL)
    assert "Output shape" in capsys.readouterr().out
    return found


def test_the_quick_start_runs(quick_start):
    output, mask, bias = (quick_start[name] for name in ("output", "attention_mask", "attention_bias"))
    assert output.shape == quick_start["query"].shape
    assert not mask.any() and not output.any()  # its scatter is not in place
    mask.scatter_(-1, quick_start["topk_indices"], 1.0)
    tensors = [quick_start[name] for name in ("query", "key", "value")]
    meant = quick_start["flash_dmattn_func"](*tensors, mask, bias, is_causal=True)
    assert meant.isfinite().all() and meant[:, -1].any()


def test_the_gradient_example_runs(capsys):
    found = execute(GRADIENTS, {})
    assert capsys.readouterr().out.count("gradient shape") == 4
    bias, mask = found["attention_bias"], found["attention_mask"]
    assert bias.grad.shape == bias.shape and bias.grad.isfinite().all()
    assert bias.grad.any() and not bias.grad[mask == 0].any()


def test_the_troubleshooting_runs(quick_start, capsys):
    exec(compile(TROUBLESHOOTING, "snippet", "exec"), quick_start)
    said = capsys.readouterr().out
    assert "imported successfully" in said and "reference" in said
    assert quick_start["output"].any() and quick_start["output"].isfinite().all()
