"""Importing this registers all operators `torch.ops.vtoken.*`."""

from vtoken_kernels.attention_ops import attention, attention_bwd
from vtoken_kernels.merge_ops import add_merge_norm, merge, merge_amax_bwd, merge_bwd
from vtoken_kernels.plan_ops import group_sources, plan_pitome, plan_tome, sum_heads
from vtoken_kernels.sparse_ops import connect_lists, select_lists, select_rows, sparse_attention, sparse_attention_bwd

__all__ = [
    "add_merge_norm",
    "attention",
    "attention_bwd",
    "connect_lists",
    "group_sources",
    "merge",
    "merge_amax_bwd",
    "merge_bwd",
    "plan_pitome",
    "plan_tome",
    "select_lists",
    "select_rows",
    "sparse_attention",
    "sparse_attention_bwd",
    "sum_heads",
]
