"""Calling a module of the model with another `forward`, for one call: its hooks run and are given the module itself.

Nothing is written to the module, so other threads may call it meanwhile.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules import module as _module
from torch.utils.hooks import BackwardHook

from vtoken.core.patch import view


def call_with(module: nn.Module, parts: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """`module(*args, **kwargs)`, run by its unpatched class with `parts` in place of its own (see `view`)."""
    return call(module, view(module, **parts).forward, *args, **kwargs)


def call(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`module(*args, **kwargs)` as if `forward` were its forward."""
    return _heard(module, forward, args, kwargs) if is_heard(module) else forward(*args, **kwargs)


def is_heard(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says: hooks, also global ones, another forward or call."""
    own = module.__dict__  # asked many times a block: its own entries are found faster than attributes
    return bool(
        "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or own.get("_compiled_call_impl")
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def is_heard_within(block: nn.Module) -> bool:
    """Whether `is_heard` holds for a module inside `block`."""
    left = [block]
    for module in left:  # which grows: asked at every call of a compiled block, so without recursion
        for child in module._modules.values():
            if child is not None:
                if is_heard(child):
                    return True
                if child._modules:
                    left.append(child)
    return False


def through(module: Any, x: Tensor) -> Tensor:
    """`module(x)`, without the call where it is an identity, or dropout at rest, that nobody listens to.

    In a graph the call costs nothing, whereas the graph would ask again for each hook whenever it runs.
    """
    kind = type(module)
    if (
        (kind is nn.Identity or (kind is nn.Dropout and not module.training))
        and not is_dynamo_compiling()
        and not is_heard(module)
    ):
        return x
    result: Tensor = module(x)
    return result


def _heard(module: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What torch's `Module._call_impl` does around a forward; it has no way to be given one."""
    ran: set[int] = set()
    try:
        return _between_hooks(module, forward, args, kwargs, ran)
    except Exception:
        # Hooks that want to be called in any case see no result; what they raise must not hide the error.
        if not torch.compiler.is_compiling():
            _call_always(module, args, kwargs, ran)
        raise


def _between_hooks(
    module: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], ran: set[int]
) -> Any:
    for number, hook in [*_module._global_forward_pre_hooks.items(), *module._forward_pre_hooks.items()]:
        if number in module._forward_pre_hooks_with_kwargs:
            changed: Any = hook(module, args, kwargs)
            args, kwargs = (args, kwargs) if changed is None else changed
        else:
            changed = hook(module, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
    full, old = module._get_backward_hooks()
    before = module._get_backward_pre_hooks()
    backward = BackwardHook(module, full, before) if full or before else None
    if backward is not None:
        args = backward.setup_input_hook(args)
    out = forward(*args, **kwargs)
    for number, hook in _forward_hooks(module):
        ran.add(number)
        changed = hook(module, args, *([kwargs] if _takes_kwargs(module, number) else []), out)
        out = out if changed is None else changed
    if backward is not None:
        out = backward.setup_output_hook(out)
    if old:
        _set_old_backward_hooks(module, old, args, out)
    return out


def _call_always(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], ran: Collection[int]) -> None:
    always = {*_module._global_forward_hooks_always_called, *module._forward_hooks_always_called}
    for number, hook in _forward_hooks(module):
        if number in always and number not in ran:
            try:
                hook(module, args, *([kwargs] if _takes_kwargs(module, number) else []), None)
            except Exception as error:
                warnings.warn(f"forward hook with always_call=True raised as well: {error}", stacklevel=4)


def _forward_hooks(module: Any) -> list[tuple[int, Any]]:
    return [*_module._global_forward_hooks.items(), *module._forward_hooks.items()]


def _takes_kwargs(module: Any, number: int) -> bool:
    return number in module._forward_hooks_with_kwargs or number in _module._global_forward_hooks_with_kwargs


def _set_old_backward_hooks(module: Any, hooks: Collection[Any], args: Any, out: Any) -> None:
    """`register_backward_hook`, which torch has deprecated: on the node that made the first tensor of the output."""
    first = out
    while not isinstance(first, Tensor):
        first = next(v for v in first.values() if isinstance(v, Tensor)) if isinstance(first, dict) else first[0]
    if first.grad_fn is not None:
        for hook in hooks:
            first.grad_fn.register_hook(_module._WrappedHook(hook, module))
        module._maybe_warn_non_full_backward_hook(args, out, first.grad_fn)
