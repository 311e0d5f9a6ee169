"""Tensor functions behind the methods: which tokens go together (plans) and how their rows are combined.

Everything here is plain torch: it runs on any device, compiles and exports, and knows no model.
`vtoken.ops.reference` holds slow, obviously right versions of the same functions; the tests compare the two.
"""

from vtoken.ops.connections import Connections, select_grouped, select_threshold, select_topk
from vtoken.ops.matching import key_metric, plan_pitome, plan_random, plan_stride, plan_tome
from vtoken.ops.merge import REDUCTIONS, MergePlan, size_bias
from vtoken.ops.sparse_attention import sparse_attention

__all__ = [
    "REDUCTIONS",
    "Connections",
    "MergePlan",
    "key_metric",
    "plan_pitome",
    "plan_random",
    "plan_stride",
    "plan_tome",
    "select_grouped",
    "select_threshold",
    "select_topk",
    "size_bias",
    "sparse_attention",
]
