"""Torch's counter of FLOPs, made for models on the meta device, whose layers repeat."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class _Kind(NamedTuple):
    """What is known of an operator: only its shapes count, it decomposes, it writes in place, torch's formula."""

    pure: bool
    composite: bool
    in_place: bool
    formula: Callable[..., int] | None


class _Seen(NamedTuple):
    flops: int
    outputs: list[tuple[torch.Size, tuple[int, ...], torch.dtype]]
    single: bool


class Repeats:
    """What operators made of which shapes: blocks that are alike are worked out once. Lives as long as one count."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode  # imports triton, which `import vtoken` must not

        self.registry: Mapping[Any, Any] = FlopCounterMode(display=False).flop_registry
        self.kinds: dict[Any, _Kind] = {}
        self.seen: dict[Any, _Seen] = {}

    def kind(self, func: Any) -> _Kind:
        """What is known of an operator."""
        if func not in self.kinds:
            composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
            aliases = [a.alias_info for a in (*func._schema.arguments, *func._schema.returns)]
            writes = bool(aliases) and aliases[0] is not None and aliases[0].is_write and func._schema.name[-1] == "_"
            self.kinds[func] = _Kind(
                pure=not composite and not any(aliases),
                composite=composite,
                in_place=writes and torch.Tag.pointwise in func.tags,
                formula=self.registry.get(func._overloadpacket),
            )
        return self.kinds[func]


class Meter(TorchDispatchMode):
    """Counts as torch's FlopCounterMode does, by its formulas; `total` may be read at any time.

    The counter's own bookkeeping and torch's shape rules, most of them in Python, cost more than the model's code. An
    operator that was seen with the same shapes is answered from `repeats`.
    """

    supports_higher_order_operators = True

    def __init__(self, repeats: Repeats) -> None:
        super().__init__()
        self.repeats = repeats
        self.total = 0

    @contextlib.contextmanager
    def apart(self, modules: Sequence[nn.Module]) -> Iterator[list[int]]:
        """What each module spends inside the block, read off the running total by hooks on its way in and out."""
        spent, handles = [0] * len(modules), []
        try:
            for index, module in enumerate(modules):
                handles.append(module.register_forward_pre_hook(functools.partial(self._read, spent, index, -1)))
                handles.append(module.register_forward_hook(functools.partial(self._read, spent, index, 1)))
            yield spent
        finally:
            for handle in handles:
                handle.remove()

    def _read(self, spent: list[int], index: int, sign: int, *_: Any) -> None:
        spent[index] += sign * self.total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return self._higher_order(func, args, kwargs)
        kind = self.repeats.kind(func)
        if kind.composite:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if kind.in_place and kind.formula is None and _on_meta(args[0]):
            return args[0]  # there are no values to write
        key = _key(func, args, kwargs) if kind.pure else None
        if key is not None and key in self.repeats.seen:
            return self._again(self.repeats.seen[key])
        out = func(*args, **kwargs)
        flops = 0 if kind.formula is None else int(kind.formula(*args, **kwargs, out_val=out))
        self.total += flops
        made = (out,) if isinstance(out, Tensor) else out
        if key is not None and isinstance(made, tuple) and all(_on_meta(o) for o in made):
            outputs = [(o.shape, o.stride(), o.dtype) for o in made]
            self.repeats.seen[key] = _Seen(flops, outputs, isinstance(out, Tensor))
        return out

    def _again(self, seen: _Seen) -> Any:
        self.total += seen.flops
        made = tuple(torch.empty_strided(s, t, dtype=d, device="meta") for s, t, d in seen.outputs)
        return made[0] if seen.single else made

    def _higher_order(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Branches, loops and kernels, which torch's counter knows how to look into."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            out = func(*args, **kwargs)
        self.total += counter.get_total_flops()
        return out


def _on_meta(value: Any) -> bool:
    return type(value) in (Tensor, torch.nn.Parameter) and value.device.type == "meta"


def _key(func: Any, args: Any, kwargs: Any) -> Any:
    """Equal for calls that make the same shapes; None where values could matter, or where it cannot be told."""
    try:
        key = (func, _shapes(args), _shapes(tuple(kwargs.items())))
        hash(key)
    except TypeError:
        return None
    return key


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not _on_meta(value):
            raise TypeError("this tensor has values")
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_shapes, value))
    return type(value), value
