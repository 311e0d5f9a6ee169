"""Tensor functions behind the methods: which tokens go together (plans) and how their rows are combined.

Everything here is plain torch, which runs on any device, compiles and exports; on a GPU, Triton kernels take over where
they can (`explain` says where). Nothing here knows a model.
`vtoken.ops.reference` holds slow, obviously right versions of the same functions; the tests compare the two.
"""

from vtoken.ops.attention import attention_with_bias, attention_with_sizes
from vtoken.ops.backend import BACKENDS, Choice, explain
from vtoken.ops.matching import key_metric, plan_pitome, plan_random, plan_stride, plan_tome
from vtoken.ops.merge import REDUCTIONS, MergePlan, size_bias
from vtoken.ops.norm import add_merge_norm

__all__ = [
    "BACKENDS",
    "REDUCTIONS",
    "Choice",
    "MergePlan",
    "add_merge_norm",
    "attention_with_bias",
    "attention_with_sizes",
    "explain",
    "key_metric",
    "plan_pitome",
    "plan_random",
    "plan_stride",
    "plan_tome",
    "size_bias",
]
