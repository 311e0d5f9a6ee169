"""Which implementation serves a call: Triton kernels on a GPU, C functions on a CPU, plain torch everywhere else."""

from __future__ import annotations

import functools
import importlib.util
import inspect
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
    """Which backend serves a call ("torch", "native" or "triton"; of `sparse_attention` any of its ways), and why.

    "native" is C on a CPU, which "auto" takes where it can. The reason is what the others lack: empty unless "torch".
    """

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}" if self.reason else self.backend


#: How "auto" chooses in every op that has kernels, by its name; filled where the ops are (`limits_of`, `choice_of`).
_CHOICES: dict[str, Callable[..., Choice]] = {}


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


def limits_of(
    *ops: str, native: Callable[..., str] | None = None
) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Register a function as the limits of the kernels of these ops: this is how `explain` knows them.

    It takes the tensors of a call in the order of its op, then options that decide, and says what the kernels lack
    for them, "" if nothing. It stands in the file of its op, which asks it by `use_triton`.

    Args:
        native: says in the same way what C functions lack, where there are some.
    """

    def register(limits: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(limits)
        def choose(*tensors: Tensor, **options: Any) -> Choice:
            on = tensors[0]
            if native is not None and on.is_cpu and not FORCED:
                why = native(*tensors, **options)
                return Choice("torch", why) if why else Choice("native", "")
            if not on.is_cuda and not FORCED:
                return Choice("torch", f"the tensors are on {on.device.type!r}; kernels need a GPU")
            why = _no_device(on) or limits(*tensors, **options)
            return Choice("torch", why) if why else Choice("triton", "")

        _CHOICES.update(dict.fromkeys(ops, choose))
        return limits

    return register


def choice_of(op: str) -> Callable[[Callable[..., Choice]], Callable[..., Choice]]:
    """Register how an op with more ways than two chooses, for `explain`."""

    def register(choose: Callable[..., Choice]) -> Callable[..., Choice]:
        _CHOICES[op] = choose
        return choose

    return register


def explain(op: str, *tensors: Any, **options: Any) -> Choice:
    """Which backend `backend="auto"` takes for a call, and why.

    Args:
        op: a function of `vtoken.ops` that takes a `backend`, or "apply" (`MergePlan.apply`).
        tensors: the tensors of the call, in its order: (metric,) for "plan_pitome" and "plan_tome", (keys,) for
            "key_metric", (x,) for "apply", (x, branch) for "add_merge_norm", (q, k, v, bias or size) for
            "attention_with_bias" and "attention_with_sizes", (coefficients, basis) for "select_topk" and
            "select_grouped", (q, k, v, connections) for "sparse_attention".
        options: options that decide: reduction of "apply"; variant, energy and protect of "plan_pitome"; key_bias,
            attn_mask and dropout_p of "sparse_attention".

    Raises:
        ConfigError: if the op is unknown.
        InputError: if the first is no tensor, or the op does not take these.

    Example:
        >>> import torch, vtoken
        >>> print(vtoken.ops.explain("attention_with_bias", *torch.rand(3, 1, 6, 197, 64)))
        torch: the tensors are on 'cpu'; kernels need a GPU
    """
    checks.choice("explain", "op", op, tuple(_CHOICES))
    if not tensors:
        raise InputError(f"explain({op!r}): give the tensors of the call")
    checks.tensor("explain", "tensors", tensors[0])
    signature = inspect.signature(_CHOICES[op])
    try:
        signature.bind(*tensors, **options)
    except TypeError as error:
        raise InputError(f"explain({op!r}): takes ({', '.join(signature.parameters)}): {error}") from None
    return _CHOICES[op](*tensors, **options)


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


def dtype_reason(name: str, x: Tensor) -> str:
    """Why the kernels cannot compute in the dtype of x."""
    return "" if x.dtype in _KERNEL_DTYPES else f"{name} is {x.dtype}; kernels take float32, float16 and bfloat16"


def width_reason(name: str, x: Tensor, most: int) -> str:
    """Why the kernels cannot hold rows x [..., C] of at most that many channels."""
    if not 0 < x.shape[-1] <= most:
        return f"{name} has {x.shape[-1]} channels; kernels take 1 to {most}"
    return dtype_reason(name, x)


def heads_reason(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> str:
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
    return dtype_reason("q", q)
