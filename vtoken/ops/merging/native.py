"""The merge step of float32 tensors on a CPU as a few calls of C (kernels/native), where torch makes forty operators.

matching.py and plan.py ask here first, and hold the same in torch: for all other tensors, and as the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vtoken.ops import backend as _backend

#: Why the C functions are not there, "" if they are: installing vtoken compiles them where there is a C compiler, and
#: a folder that two systems share may hold those of the other one.
MISSING = ""
try:
    import vtoken_kernels.native as native
except ModuleNotFoundError:
    MISSING = "vtoken's C functions are not compiled: there was no compiler when it was installed"
except ImportError as error:
    MISSING = f"vtoken's C functions do not load, so install it anew on this system ({error})"

#: Where torch has several threads, the numbers and the multiply-adds of a call from which on it shares them out.
_MANY_NUMBERS, _MANY_PRODUCTS = 1 << 20, 1 << 23


def lacks(x: Tensor) -> str:
    """Why C cannot read x [..., C], "" if nothing."""
    if torch.compiler.is_compiling():
        return "a compiler makes its own code of torch's operators"
    if not x.is_cpu or _backend.FORCED:
        return f"the tensors are on {x.device.type!r}; kernels need a GPU"
    if MISSING:
        return MISSING
    if x.dtype != torch.float32:
        return f"on a CPU, C functions take float32, not {x.dtype}"
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return "something watches torch's operators, a counter, a transform or a tracer, which sees no C function"
    # No address: no numbers, or none in memory (zeros that torch only notes, a storage given back).
    if type(x) is not Tensor or x.stride(-1) != 1 or x.is_neg() or not x.data_ptr():
        return f"C functions take plain tensors whose channels lie side by side, not this {type(x).__name__}"
    if x.numel() > _MANY_NUMBERS and torch.get_num_threads() > 1:
        return "torch shares so much among its threads"
    return ""


def reads(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether C can read all of x, number after number of this dtype."""
    plain = type(x) is Tensor and x.is_cpu and x.dtype == dtype and not x.is_neg()
    return plain and x.is_contiguous() and x.data_ptr() != 0


def matching_lacks(metric: Tensor) -> str:
    """Why C cannot choose by a metric [B, T, d]."""
    why = lacks(metric)
    if why:
        return why
    if not native.INSTRUCTIONS:
        return "C functions that match take a processor with AVX2"
    batch, num_tokens, width = metric.shape
    if batch * num_tokens * num_tokens * width > _MANY_PRODUCTS and torch.get_num_threads() > 1:
        return "torch shares so much among its threads"
    return ""


def sum_heads(keys: Tensor) -> Tensor:
    """Keys [B, H, T, D] added over H."""
    batch, heads, num_tokens, width = keys.shape
    image_step, head_step, step, _ = keys.stride()
    out = keys.new_empty(batch, num_tokens, width)
    native.sum_heads(
        keys.data_ptr(), batch, heads, num_tokens, width, image_step, head_step, step, out.data_ptr()
    )  # fmt: skip
    return out


def tome(metric: Tensor, r: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    """ToMe's matching by a metric [B, T, d]: `rows` [B, T] and `slot` [B, r] of a MergePlan."""
    (batch, num_tokens, width), (image_step, step, _) = metric.shape, metric.stride()
    rows, slot = _empty_plan(batch, num_tokens, r)
    native.tome(
        metric.data_ptr(), batch, num_tokens, width, image_step, step, num_prefix, r, rows.data_ptr(), slot.data_ptr()
    )  # fmt: skip
    return rows, slot


def pitome(
    metric: Tensor, r: int, num_prefix: int, margin: float, alpha: float, pairs: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """PiToMe's matching by a metric [B, T, d], or that in `pairs`: `rows` [B, T] and `slot` [B, r] of a MergePlan."""
    (batch, num_tokens, width), (image_step, step, _) = metric.shape, metric.stride()
    rows, slot = _empty_plan(batch, num_tokens, r)
    native.pitome(
        metric.data_ptr(), batch, num_tokens, width, image_step, step, num_prefix, r, rows.data_ptr(), slot.data_ptr(),
        pairs, margin, alpha,
    )  # fmt: skip
    return rows, slot


def _empty_plan(batch: int, num_tokens: int, r: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(batch, num_tokens, dtype=torch.int64, device="cpu"),
        torch.empty(batch, r, dtype=torch.int64, device="cpu"),
    )


def merging_lacks(x: Tensor) -> str:
    """Why C cannot merge rows x [B, T, C]."""
    if (x.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0:
        return "the rows need a gradient"
    return lacks(x)


def merge(x: Tensor, rows: Tensor, slot: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows x [B, T, C] and sizes [B, T] by a plan's `rows` and `slot`, averages weighted by size.

    Raises:
        IndexError: if the plan names rows that are not there.
    """
    (batch, num_tokens, width), (image_step, step, _) = x.shape, x.stride()
    r = slot.shape[1]
    out, new_size = x.new_empty(batch, num_tokens - r, width), x.new_empty(batch, num_tokens - r)
    native.merge(
        x.data_ptr(), batch, num_tokens, width, image_step, step, r, rows.data_ptr(), slot.data_ptr(),
        0 if size is None else size.data_ptr(), out.data_ptr(), new_size.data_ptr(),
    )  # fmt: skip
    return out, new_size
