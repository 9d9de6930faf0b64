"""Collectives of torch.distributed that take and return one flat tensor, under the names they have had."""

import torch.distributed as dist

# Their names since torch 2.13, where the others warn.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
