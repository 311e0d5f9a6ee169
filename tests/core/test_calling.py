"""Calling a module with another forward against torch's own call of it, with hooks of every kind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from tests.helpers import assert_same
from vtoken.core.calling import call, call_with


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.factor = 2.0

    def forward(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
        return self.inner(x) * self.factor + shift


class Pair(Scaled):
    def forward(self, x: Tensor, *, shift: float = 0.0) -> Any:
        return super().forward(x, shift=shift), x + 1


class Named(Scaled):
    def forward(self, x: Tensor, *, shift: float = 0.0) -> Any:
        return {"name": "a", "out": super().forward(x, shift=shift)}


Note = Callable[..., None]


def _own(m: Any, note: Note) -> list[Any]:
    return [
        m.register_forward_pre_hook(lambda s, a: note("pre", s, a)),
        m.register_forward_pre_hook(lambda s, a, k: note("pre with names", s, a, k), with_kwargs=True),
        m.register_forward_hook(lambda s, a, o: note("after", s, a, o)),
        m.register_forward_hook(lambda s, a, k, o: note("after with names", s, a, k, o), with_kwargs=True),
    ]


def _changing(m: Any, note: Note) -> list[Any]:
    def after(s: Any, a: Any, o: Any) -> Any:
        note("after", s, a, o)
        return o * 3 if isinstance(o, Tensor) else o

    return [
        m.register_forward_pre_hook(lambda s, a: a[0] * 2),
        m.register_forward_pre_hook(lambda s, a: (a[0] + 1,)),
        m.register_forward_pre_hook(lambda s, a, k: (a, {"shift": k.get("shift", 0.0) + 5}), with_kwargs=True),
        m.register_forward_hook(after),
    ]


def _backward(m: Any, note: Note) -> list[Any]:
    return [
        m.register_full_backward_pre_hook(lambda s, g: note("before backward", s, g)),
        m.register_full_backward_hook(lambda s, g, o: tuple(2 * x for x in g)),
        m.register_full_backward_hook(lambda s, g, o: note("backward", s, g, o)),
    ]


def _everywhere(m: Any, note: Note) -> list[Any]:
    return [
        every_module.register_module_forward_pre_hook(lambda s, a: note("global pre", s, a)),
        every_module.register_module_forward_hook(lambda s, a, o: note("global", s, a, o)),
        every_module.register_module_forward_hook(lambda s, a, k, o: note("names", s, a, k, o), with_kwargs=True),
        every_module.register_module_full_backward_pre_hook(lambda s, g: note("global before", s, g)),
        every_module.register_module_full_backward_hook(lambda s, g, o: note("global backward", s, g, o)),
    ]


@pytest.mark.filterwarnings("ignore:.*non-full backward")
@pytest.mark.parametrize("kind", [Scaled, Pair, Named])
@pytest.mark.parametrize("hooks", [_own, _changing, _backward, _everywhere, "old", "all", "none"])
def test_hooks_see_what_torchs_own_call_shows_them(kind: type[Scaled], hooks: Any) -> None:
    if kind is Named and hooks in (_backward, _everywhere, "all"):
        pytest.skip("torch says that backward hooks want tensors")
    torch.manual_seed(0)
    module, given = kind(), torch.randn(2, 3)
    names = {m: n for n, m in module.named_modules()}

    def run(how: Callable[..., Any]) -> tuple[Any, list[Any]]:
        seen: list[Any] = []

        def note(what: str, m: nn.Module, *values: Any) -> None:
            seen.append((what, names[m], _plain(values)))

        handles: list[Any] = []
        if hooks == "old":
            handles.append(module.register_backward_hook(lambda s, g, o: note("old", s, g, o)))
        elif hooks != "none":
            for add in (_own, _changing, _backward, _everywhere) if hooks == "all" else (hooks,):
                handles += add(module, note)
        x = given.clone().requires_grad_()
        try:
            out = how(x, shift=1.0)
            first = out["out"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out
            first.square().sum().backward()
        finally:
            for handle in handles:
                handle.remove()
            every_module._global_forward_hooks_with_kwargs.clear()  # type: ignore[attr-defined]  # torch leaves them
        module.__dict__["_is_full_backward_hook"] = None
        return [_plain(out), x.grad], seen

    expected = run(module)
    assert_same("a call", expected, run(lambda *a, **k: call_with(module, {}, *a, **k)))
    assert (hooks == "none") == (not expected[1])
    if hooks in ("none", _own):
        three = run(lambda *a, **k: call_with(module, {"factor": 3.0}, *a, **k))
        with pytest.raises(AssertionError):
            assert_same("another part", expected, three)


def _plain(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.detach().clone()
    if isinstance(values, (tuple, list)):
        return [_plain(v) for v in values]
    return {k: _plain(v) for k, v in values.items()} if isinstance(values, dict) else values


def test_hooks_that_are_always_called_are_so_on_an_error() -> None:
    module, seen = Scaled(), []
    module.register_forward_hook(lambda m, a, o: seen.append((m, o)), always_call=True)
    module.register_forward_hook(lambda m, a, k, o: seen.append((m, k)), always_call=True, with_kwargs=True)
    module.register_forward_hook(lambda m, a, o: seen.append("not this"))
    module.register_forward_hook(lambda m, a, o: 1 / 0, always_call=True)
    with pytest.warns(UserWarning, match="division"), pytest.raises(RuntimeError, match="shapes"):
        call_with(module, {}, torch.randn(2, 4), shift=1.0)
    assert seen == [(module, None), (module, {"shift": 1.0})]


def test_nothing_is_written_to_the_module_and_threads_do_not_meet() -> None:
    module, x = Scaled(), torch.randn(2, 3)
    module.register_forward_hook(lambda m, a, o: o + 1)
    plain, before = module(x).detach(), dict(vars(module))
    ready, wrong = threading.Barrier(3), []

    def work(factor: float) -> None:
        def inner(x: Tensor) -> Tensor:
            ready.wait()  # both are inside of the same module
            return module.inner(x)

        for _ in range(5):
            out = call_with(module, {"factor": factor, "inner": inner}, x)
            if not torch.equal(out, module.inner(x) * factor + 1):
                wrong.append(factor)

    threads = [threading.Thread(target=work, args=(f,)) for f in (3.0, 5.0)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        ready.wait()
        assert torch.equal(module(x), plain)
    for thread in threads:
        thread.join()
    assert wrong == []
    assert vars(module) == before


def test_another_forward_that_is_no_view() -> None:
    module, x = nn.Identity(), torch.randn(2)
    assert call(module, torch.neg, x).equal(-x)
    module.register_forward_hook(lambda m, a, o: o + 1)
    assert call(module, torch.neg, x).equal(1 - x)
