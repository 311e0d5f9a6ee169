"""Tensor functions behind the methods: which tokens go together (plans) and how their rows are combined.

Everything here is plain torch, which runs on any device, compiles and exports; on a GPU, Triton kernels take over where
they can (`explain` says where). Nothing here knows a model.
`vtoken.ops.reference` holds slow, obviously right versions of the same functions; the tests compare the two.
"""

from vtoken.ops.attention import attention_with_bias, attention_with_sizes
from vtoken.ops.backend import BACKENDS, Choice, explain
from vtoken.ops.cls_scores import (
    ENSEMBLES,
    class_row,
    cls_scores,
    ensemble,
    projected_class_row,
    received_row,
    scored_layers,
    select_tokens,
)
from vtoken.ops.connections import Connections, select_grouped, select_threshold, select_topk
from vtoken.ops.matching import key_metric, plan_pitome, plan_random, plan_stride, plan_tome
from vtoken.ops.merge import REDUCTIONS, MergePlan, size_bias
from vtoken.ops.norm import add_merge_norm
from vtoken.ops.sparse_attention import sparse_attention

__all__ = [
    "BACKENDS",
    "ENSEMBLES",
    "REDUCTIONS",
    "Choice",
    "Connections",
    "MergePlan",
    "add_merge_norm",
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
    "plan_tome",
    "projected_class_row",
    "received_row",
    "scored_layers",
    "select_grouped",
    "select_threshold",
    "select_tokens",
    "select_topk",
    "size_bias",
    "sparse_attention",
]
