"""Compiling the block of a patched tower once for all its layers.

Every layer of a merging model has its own number of tokens, so a graph of the whole model holds every kernel once a
layer. Here one graph of one block serves all layers: token count, layer, amount and margin are its arguments.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from vtoken.core.method import AttentionMethod, BlockMethod, Methods
from vtoken.errors import ConfigError, VTokenError

M = TypeVar("M", bound=nn.Module)

#: Graphs that one function may have: stochastic depth makes one a layer, and torch's own limit is eight.
_GRAPHS = 256


class CompiledBlocks:
    """Functions over a block of one model, each compiled when it is first called.

    Args:
        options: further arguments of `torch.compile`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._made: dict[Hashable, Callable[..., Any]] = {}
        self._arguments: dict[float, torch.Tensor] = {}

    def __call__(self, function: Callable[..., Any], case: Hashable, *args: Any) -> Any:
        """`function(*args)`, compiled for each `case` by itself: cases would only recompile for each other."""
        made = self._made.get((function, case))
        if made is None:  # of two threads one's function is kept; no lock, which an interrupt might leave locked
            made = self._made.setdefault((function, case), self._compile(function))
        return made(*args)

    def argument(self, number: float) -> torch.Tensor:
        """A number as torch passes it into a graph, [] float64; made once, as a block at batch 1 feels every call."""
        made = self._arguments.get(number)
        if made is None:
            with torch.inference_mode(False):  # graphs that keep it for their gradients take it, too
                made = torch.tensor(number, dtype=torch.float64, device="cpu")
            made = self._arguments.setdefault(number, made)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledBlocks, (self._options,)  # copies compile anew

    def _compile(self, function: Any) -> Callable[..., Any]:
        # torch keeps its graphs by code object. One of its own for each model and case, so that they do not look
        # through each other's graphs, nor use up each other's limit.
        own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        options = dict(self._options)
        if "recompile_limit" in _ACCEPTED:
            options["recompile_limit"] = _GRAPHS
        if "mode" not in options:  # torch takes but one of the two
            options["options"] = {"guard_filter_fn": _varies, **(options.get("options") or {})}
        made: Callable[..., Any] = torch.compile(own, fullgraph=True, dynamic=True, **options)
        return made


#: What code is made of. A graph need not ask at each call of each layer whether torch's functions are still themselves:
#: several hundred questions, behind the weights of a layer all out of cache.
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType)


def _varies(guards: Any) -> list[bool]:
    """Which guards a graph keeps: all but those on the classes and functions of imported files."""
    return [not (guard.is_global and (isinstance(guard.value, _CODE) or not guard.has_value)) for guard in guards]


_ACCEPTED = inspect.signature(torch.compile).parameters


def compile(model: M, **options: Any) -> M:
    """Compile the blocks of a patched model, one graph for all layers; in place, undone by `vtoken.remove`.

    Compiles in a fraction of the time that `torch.compile(model)` takes on a merging model. A new ratio, margin, image
    size or batch runs the same graph; a batch of one, a layer that removes no or just one token, training, gradients,
    inference mode, autocast, and another dtype or device have graphs of their own. What stands around the blocks
    (embedding, head) stays eager, as do blocks with a hook on one of their parts (so that it is called) and blocks
    whose attention is read on the way (by VTC-CLS, in the tower of a multimodal model). `apply(replace=True)` undoes
    it, too.

    Whatever changes in a block is seen by its next call. A function or class that is replaced in an imported file, such
    as one of torch's own, is not: graphs do not ask for them.

    Args:
        model: a model, or a module that holds one, to which a merging method was applied.
        options: further arguments of `torch.compile`, such as `backend` or `mode`.

    Returns:
        The same model. Its blocks compile when they first run.

    Raises:
        VTokenError: if no method is applied to it.
        ConfigError: if the method cannot be compiled in this way (`torch.compile(model)` works for all), or an option
            is not for the caller to set.

    Example:
        >>> import timm, torch, vtoken
        >>> model = vtoken.apply(timm.create_model("test_vit").eval(), vtoken.PiToMe(ratio=0.9))
        >>> with torch.inference_mode():
        ...     vtoken.compile(model, backend="eager")(torch.randn(1, 3, 160, 160)).shape
        torch.Size([1, 1000])
    """
    fixed = {"model", "fullgraph", "dynamic", "dynamic_shapes", "recompile_limit"}
    wrong = [name for name in options if name in fixed or name not in _ACCEPTED]
    if wrong:
        names = ", ".join(name for name in _ACCEPTED if name not in fixed)
        raise ConfigError(f"vtoken.compile does not take {', '.join(wrong)}; it passes on {names}")
    carriers = [m for m in model.modules() if "_vtoken" in m.__dict__]
    if not carriers:
        raise VTokenError(
            f"nothing to compile: no method is applied to this {type(model).__name__}; vtoken.apply first"
        )
    towers = [m for m in carriers if BlockMethod in m.__dict__["_vtoken"].methods]
    for tower in towers:
        _check(tower.__dict__["_vtoken"].methods)
    if not towers:
        raise ConfigError(
            "vtoken.compile compiles blocks that merge tokens, and none do here; use torch.compile(model)"
        )
    for tower in towers:
        tower.__dict__["_vtoken"] = replace(tower.__dict__["_vtoken"], compiled=CompiledBlocks(options))
    return model


def _check(methods: Methods) -> None:
    method = methods[BlockMethod]
    if not method.exact:
        raise ConfigError(
            "vtoken.compile needs token counts that shapes tell, and here the images decide them: leave the model "
            "eager, or take torch.compile(model) without fullgraph, which runs what lies between the merges by graphs"
        )
    if AttentionMethod in methods or not method.reduces:
        which = methods.get(AttentionMethod, method)
        raise ConfigError(
            f"vtoken.compile serves merging methods, not {type(which).__name__}; torch.compile(model) serves all"
        )
