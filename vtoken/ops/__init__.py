"""Tensor functions behind the methods: which tokens go together (plans) and how their rows are combined.

Everything here is plain torch, which runs on any device, compiles and exports; where they can, Triton kernels take over
on a GPU and C on a CPU (`explain` says where). Nothing here knows a model.
`vtoken.ops.reference` holds slow, obviously right versions of the same functions; the tests compare the two.
"""

from vtoken.ops.backend import BACKENDS, Choice, explain
from vtoken.ops.frames.allocate import allocate_tokens
from vtoken.ops.frames.resample import Assigned, assign
from vtoken.ops.frames.row_plan import row_widths
from vtoken.ops.merging.attention import attention_with_bias, attention_with_sizes
from vtoken.ops.merging.matching import key_metric, plan_pitome, plan_random, plan_stride, plan_threshold, plan_tome
from vtoken.ops.merging.norm import add_merge_norm
from vtoken.ops.merging.plan import REDUCTIONS, MergePlan, size_bias
from vtoken.ops.scores import (
    ENSEMBLES,
    class_row,
    cls_scores,
    ensemble,
    projected_class_row,
    received_row,
    scored_layers,
    select_tokens,
)
from vtoken.ops.sparse.attention import sparse_attention
from vtoken.ops.sparse.connections import Connections, select_grouped, select_threshold, select_topk

__all__ = [
    "BACKENDS",
    "ENSEMBLES",
    "REDUCTIONS",
    "Assigned",
    "Choice",
    "Connections",
    "MergePlan",
    "add_merge_norm",
    "allocate_tokens",
    "assign",
    "attention_with_bias",
    "attention_with_sizes",
    "class_row",
    "cls_scores",
    "ensemble",
    "explain",
    "key_metric",
    "plan_pitome",
    "plan_random",
    "plan_stride",
    "plan_threshold",
    "plan_tome",
    "projected_class_row",
    "received_row",
    "row_widths",
    "scored_layers",
    "select_grouped",
    "select_threshold",
    "select_tokens",
    "select_topk",
    "size_bias",
    "sparse_attention",
]
