"""What the chunked losses share: the operations on logits and their gradient, and the checks of an output layer."""

import torch


def apply_operations(logits: torch.Tensor, operations: str) -> tuple[torch.Tensor, list[tuple[str, object]]]:
    """Returns the logits after the operations, and what `undo_operations` needs to go back through them.

    operations: comma-separated, of "*x", "/x", "tanh" and "float32"; empty for none.
    """
    steps = []
    for operation in filter(None, operations.split(",")):
        if operation == "tanh":
            logits = torch.tanh(logits)
            steps.append(("tanh", logits))
        elif operation == "float32":
            logits = logits.float()
        else:
            number = float(operation[1:])
            logits = logits * number if operation[0] == "*" else logits / number
            steps.append(("factor", number if operation[0] == "*" else 1 / number))
    return logits, steps


def undo_operations(gradient: torch.Tensor, steps: list[tuple[str, object]]) -> torch.Tensor:
    """Takes the gradient of the logits after the operations to that before them."""
    for kind, value in reversed(steps):
        if kind == "tanh":
            gradient = gradient * (1 - value.to(gradient.dtype).square())
        elif kind == "factor":
            gradient = gradient * value
    return gradient


def empty_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, wants_hidden: bool, wants_weight: bool, wants_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of hidden, weight and bias without contents; one that nobody wants has no entries."""
    return (
        torch.empty_like(hidden if wants_hidden else hidden[:0]),
        torch.empty_like(weight if wants_weight else weight[:0]),
        weight.new_empty(weight.shape[0] if wants_bias else 0),
    )


def scale_gradients(ctx, dloss: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Returns the gradients that the forward has saved, times that of the loss; None for the unwanted."""
    return [
        gradient * dloss.to(gradient.dtype) if wanted and dloss is not None else None
        for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]


def precision_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a loss adds up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_output_layer(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, operations: str, prefix: str = ""
) -> None:
    """Raises ValueError, with `prefix` before the names, for shapes, dtypes or operations that do not fit."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden and {prefix}weight must have shapes (N, hidden size) and (vocabulary, hidden size), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(
                f"{prefix}{name} must have the dtype of {prefix}hidden, {hidden.dtype}, got {tensor.dtype}"
            )
    for operation in filter(None, operations.split(",")):
        if operation not in ("tanh", "float32") and operation[0] not in "*/":
            raise ValueError(f'{prefix}operations must be "*x", "/x", "tanh" and "float32", got {operation!r}')


def tokens_per_chunk(chunk_size: int | None, entries: int, vocabulary: int) -> int:
    """Returns chunk_size, or as many tokens as make `entries` logits. Raises ValueError for another chunk_size."""
    if chunk_size is None:
        return max(1, entries // vocabulary)
    if type(chunk_size) is not int or chunk_size < 1:
        raise ValueError(f"chunk_size must be None or an integer of at least 1, got {chunk_size!r}")
    return chunk_size
