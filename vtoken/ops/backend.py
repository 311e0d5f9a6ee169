"""Which implementation serves a call: Triton kernels where they can, plain torch everywhere else."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtoken import checks
from vtoken.errors import ConfigError, InputError

BACKENDS = ("auto", "torch", "triton")
#: For tests only: "triton" makes "auto" take the kernels wherever they can run, on the CPU too if Triton interprets
#: them (TRITON_INTERPRET=1). Read once, so that nothing is looked up per call.
FORCED = os.environ.get("VTOKEN_TEST_BACKEND", "")
#: Constants, not functions: the compiler traces through the choice.
HAS_TRITON = importlib.util.find_spec("triton") is not None
#: Whether kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Choice(NamedTuple):
    """Which backend serves a call ("torch" or "triton"), and why not the other one (empty for "triton")."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}" if self.reason else self.backend


def use_triton(backend: str, on: Tensor, reason: Callable[[], str]) -> bool:
    """Whether a call whose main tensor is `on` goes to the kernels.

    Args:
        backend: "auto", "torch" or "triton".
        reason: says what the kernels lack for this call, "" if nothing; only asked where it matters.

    Raises:
        ConfigError: for an unknown backend, and for "triton" where the kernels cannot serve the call.
    """
    if backend == "auto" and (on.is_cuda or FORCED):
        return not (_no_device(on) or reason())
    if backend in ("auto", "torch"):
        return False
    if backend != "triton":
        raise ConfigError(f"unknown backend {backend!r}; supported: {', '.join(BACKENDS)}")
    why = _no_device(on) or reason()
    if why:
        raise ConfigError(f"backend='triton' cannot serve this call: {why}. Use backend='auto' to fall back to torch.")
    return True


def explain(op: str, *tensors: Tensor, **options: Any) -> Choice:
    """Which backend `backend="auto"` takes for a call, and why not Triton.

    Args:
        op: "plan_pitome", "plan_tome", "key_metric", "apply", "add_merge_norm", "attention_with_bias",
            "attention_with_sizes", "select_topk" or "select_grouped". For sparse attention, which has more ways to run,
            see `vtoken.ops.sparse.attention.explain`.
        tensors: the tensors of the call, in its order: (metric,), (keys,), (x,), (x, y), (q, k, v, bias or size),
            (coefficients, basis).
        options: options that decide: reduction of "apply"; variant and protect of "plan_pitome".

    Raises:
        ConfigError: if the op is unknown.
        InputError: if there is no tensor.
    """
    checks.choice("explain", "op", op, tuple(REASONS))
    if not tensors:
        raise InputError(f"explain({op!r}): give the tensors of the call")
    checks.tensor("explain", "tensors", tensors[0])
    if not tensors[0].is_cuda and not FORCED:
        return Choice("torch", f"the tensors are on {tensors[0].device.type!r}; kernels need a GPU")
    why = _no_device(tensors[0]) or REASONS[op](*tensors, **options)
    return Choice("torch", why) if why else Choice("triton", "")


def _no_device(on: Tensor) -> str:
    """Why no kernel runs on the device of a tensor, or none here and now."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "torch.func transforms do not see through custom operators"
    if on.is_cuda:
        return _no_architecture(on.device.index or 0)
    if on.device.type == "cpu" and INTERPRETED:
        return ""
    return f"the tensors are on {on.device.type!r}; kernels need a GPU (or, on the CPU, TRITON_INTERPRET=1 for tests)"


def _no_architecture(device: int) -> str:
    if torch.version.hip is not None:
        return ""
    found = torch.cuda.get_device_properties(device)  # which the compiler knows, unlike get_device_capability
    major, minor = found.major, found.minor
    return "" if major >= 8 else f"compute capability {major}.{minor}; the kernels are checked from 8.0 on"


def _dtype_reason(name: str, x: Tensor) -> str:
    return "" if x.dtype in _KERNEL_DTYPES else f"{name} is {x.dtype}; kernels take float32, float16 and bfloat16"


def metric_reason(metric: Tensor, *, variant: str = "pitome", protect: object = None) -> str:
    """Why the kernels cannot match by this metric [B, T, d]."""
    if variant == "text":
        return 'the variant "text"'
    if variant == "pitome_pairs" and protect is not None:
        return 'protect with the variant "pitome_pairs"'
    return _width_reason("metric", metric, metric.shape[-1], 8192)


def keys_reason(keys: Tensor) -> str:
    """Why the kernels cannot add up the heads of keys [B, H, T, D]."""
    return _width_reason("keys", keys, keys.shape[-1], 8192)


def rows_reason(x: Tensor, *, reduction: str = "wavg") -> str:
    """Why the kernels cannot merge rows x [B, T, C]."""
    return _dtype_reason("x", x)


def norm_reason(x: Tensor, y: Tensor | None = None) -> str:
    """Why the kernels cannot add, merge and norm x and y [B, T, C]."""
    if y is not None and torch.promote_types(x.dtype, y.dtype) != x.dtype:
        return f"the sum of {x.dtype} and {y.dtype} is not {x.dtype}"
    if x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type):
        return "autocast norms in float32"
    return _width_reason("x", x, x.shape[-1], 8192)


def attention_reason(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> str:
    """Why the kernels cannot attend with q [B, H, T, D], k and v [B, H, S, D] and a bias per key."""
    if not q.shape[:2] == k.shape[:2] == v.shape[:2] or not q.shape[3] == k.shape[3] == v.shape[3]:
        return "q, k and v differ in batch, heads or head width"
    if not 16 <= q.shape[3] <= 128:
        return f"heads are {q.shape[3]} wide; kernels take 16 to 128"
    if k.shape[2] == 0:
        return "there are no keys"
    # Autocast leaves norms of queries and keys in float32; whoever calls the kernels casts all three to its dtype.
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        return "q, k and v differ in dtype"
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return "the bias needs a gradient"
    return _dtype_reason("q", q)


def select_reason(coefficients: Tensor, basis: Tensor | None = None) -> str:
    """Why the kernels cannot select keys by coefficients [B, H, T, K] times a basis [K, N] or [B, K, N]."""
    for name, x in (("coefficients", coefficients), ("basis", coefficients if basis is None else basis)):
        if x.dtype != torch.float32:
            return f"{name} are {x.dtype}; kernels select by float32 scores"
    return _width_reason("coefficients", coefficients, coefficients.shape[-1], 1024)


def _width_reason(name: str, x: Tensor, width: int, most: int) -> str:
    if not 0 < width <= most:
        return f"{name} has {width} channels; kernels take 1 to {most}"
    return _dtype_reason(name, x)


REASONS: dict[str, Callable[..., str]] = {
    "plan_pitome": metric_reason,
    "plan_tome": metric_reason,
    "key_metric": keys_reason,
    "apply": rows_reason,
    "add_merge_norm": norm_reason,
    "attention_with_bias": attention_reason,
    "select_topk": select_reason,
    "select_grouped": select_reason,
    "attention_with_sizes": lambda q, k, v, size=None: attention_reason(q, k, v),  # sizes never need a gradient
}
