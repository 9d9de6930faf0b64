"""How the gradient of a bias is gathered: where its elements belong to one program each, and where they are shared."""

import torch

from flash_dmattn.calls import DenseCall


class BiasGradient:
    """Memory for dbias and how the kernel writes it.

    mode: "none"; "store": every element is written once, in the bias' dtype; "add": elements of (row, key) pairs that
    several programs share, float32; "column": one number a key, float32, summed over the rows.

    A bias that is the same for all keys of a row only shifts the row's lse, so its gradient is that of lse.
    """

    def __init__(self, call: DenseCall, is_needed: bool):
        self.call = call
        bias = call.attn_bias
        self.is_row_shift = is_needed and bias.shape[3] == 1 and call.key.shape[1] > 1
        if not is_needed or self.is_row_shift:
            self.mode, self.memory = "none", None
            return
        batch, num_kv_heads = call.query.shape[0], call.key.shape[2]
        is_owned = bias.shape[0] == batch and bias.shape[1] >= num_kv_heads
        shape = list(bias.shape)
        if call.deterministic and not is_owned:  # parts that are added in a fixed order at the end
            shape[:2] = batch, max(shape[1], num_kv_heads)
            is_owned = True
        if bias.shape[2] < call.query.shape[1]:
            self.mode = "column"
        else:
            self.mode = "store" if is_owned else "add"
        # A tile that no row sees is not visited: its gradient is the zero that stands there.
        dtype = bias.dtype if self.mode == "store" and tuple(shape) == tuple(bias.shape) else torch.float32
        self.memory = torch.zeros(shape, dtype=dtype, device=bias.device)

    @property
    def num_heads(self) -> int:
        return 1 if self.memory is None else self.memory.shape[1]

    def arguments(self) -> tuple:
        """Returns the address and the strides over batch, heads and rows, 0 where the gradient is shared."""
        if self.memory is None:
            return (self.call.query, 0, 0, 0)
        strides = zip(self.memory.stride()[:3], self.memory.shape[:3], strict=True)
        return (self.memory, *(stride if size > 1 else 0 for stride, size in strides))

    def result(self, stats: torch.Tensor, dlse: torch.Tensor) -> torch.Tensor:
        """Returns dbias in attn_bias' dtype and shape; stats (2, B, H, Sq), dlse (B, H, Sq)."""
        bias = self.call.attn_bias
        total = self.memory
        if self.is_row_shift:
            total = torch.where(stats[0] < torch.inf, dlse, 0)[..., None]
        if total.shape[1] != bias.shape[1]:
            total = total.unflatten(1, (bias.shape[1], -1)).sum(2)
        return total.sum_to_size(bias.shape).to(bias.dtype)
