"""`vtoken.testing.check_host` passes an adapter that keeps its promises, and names the promise of one that does not."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

import vtoken
from vtoken import hosting
from vtoken.core import host
from vtoken.core.method import AttentionMethod, BlockMethod
from vtoken.hosts.timm.adapter import TimmAdapter
from vtoken.testing import check_host

PAGE = Path(__file__).resolve().parents[2] / "docs/extend/host.md"


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """The model and the adapter of docs/extend/host.md, as a module of their own."""
    module: Any = types.ModuleType("docs_extend_host")
    sys.modules[module.__name__] = module  # pickle finds classes by their module
    for program in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(program, str(PAGE), "exec"), module.__dict__)
    host.forget_adapter(module.MyAdapter)
    yield module
    del sys.modules[module.__name__]


def broken_by(page: Any, part: str, body: dict[str, Any]) -> type[vtoken.HostAdapter]:
    """The page's adapter with one of its mixins changed."""
    changed = type("Changed", (getattr(page, part),), body)

    class Adapter(page.MyAdapter):  # type: ignore[misc, name-defined]
        def targets(self, model: Any, methods: Any) -> Any:
            return [(m, changed if mixin is getattr(page, part) else mixin, attributes)
                    for m, mixin, attributes in super().targets(model, methods)]  # fmt: skip

    return Adapter


def test_adapters_that_keep_their_promises_pass(page: Any) -> None:
    assert len(check_host(page.MyAdapter, page.MyViT().eval())) == 6
    assert not any(type(known) is page.MyAdapter for known in host.registered())
    assert check_host(TimmAdapter, timm.create_model("test_vit").eval(), configs=[vtoken.ToMe(r=4)])


def test_hooks_of_an_adapter_of_version_0_1_are_read_as_the_kinds_it_serves(page: Any) -> None:
    class Old(page.MyAdapter):  # type: ignore[misc, name-defined]
        hooks = frozenset({"on_block", "on_attention"})

    try:
        with pytest.warns(DeprecationWarning, match=r"Old\.hooks is now called serves"):
            vtoken.register_adapter(Old)
        assert Old.serves == (BlockMethod, AttentionMethod)
        assert vtoken.plan(page.MyViT(), "tome", r=4).tokens[:2] == (65, 61)
    finally:
        host.forget_adapter(Old)


def test_a_method_of_a_kind_that_the_adapter_does_not_serve_is_refused(page: Any) -> None:
    vtoken.register_adapter(page.MyAdapter)
    try:
        with pytest.raises(
            vtoken.ConfigError, match=r"sparsifiner .* its kind is AttentionMethod, .* only BlockMethod in MyViT"
        ):
            vtoken.apply(page.MyViT(), "sparsifiner", phase="recon")
    finally:
        host.forget_adapter(page.MyAdapter)


def _deaf(self: Any, x: Any, tap: Any, **mask: Any) -> Any:
    return super(type(self).__mro__[1], self)._vtoken_attn(x, tap)


def _by_weights(self: Any, x: Any) -> Any:
    first, _, second = self.mlp
    return F.linear(F.gelu(F.linear(self.norm2(x), first.weight, first.bias)), second.weight, second.bias)


def _as_it_was(self: Any, images: Any) -> Any:
    return type(self)._vtoken_base.forward(self, images)


@pytest.mark.parametrize(
    ("part", "body", "promise"),
    [
        ("BlockMixin", {"_vtoken_attn": _deaf}, "sizes enter attention"),
        ("BlockMixin", {"_vtoken_mlp": _by_weights}, "hooks are those of the model's own modules"),
        ("ModelMixin", {"forward": _as_it_was}, "nothing was recorded|planned counts are kept"),
    ],
)
def test_a_mixin_that_does_not_is_named(page: Any, part: str, body: dict[str, Any], promise: str) -> None:
    with pytest.raises((AssertionError, vtoken.VTokenError), match=promise):
        check_host(broken_by(page, part, body), page.MyViT().eval())


def averaging(page: Any, mixin: Any) -> tuple[type[vtoken.HostAdapter], Any]:
    """The page's model with the mean of its tokens in the place of the class token, and an adapter with this mixin."""

    class Averaging(page.MyViT):  # type: ignore[misc, name-defined]
        def pool(self, x: Any) -> Any:
            return F.layer_norm(x, x.shape[-1:]).mean(1)

        def forward(self, images: Any) -> Any:
            x = self.patch(images).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
            for block in self.blocks:
                x = block(x)
            return self.pool(x)

    class Adapter(page.MyAdapter):  # type: ignore[misc, name-defined]
        def targets(self, model: Any, methods: Any) -> Any:
            return [(model, mixin, {}), *super().targets(model, methods)[1:]]

    Averaging.__module__, Averaging.__qualname__ = page.MyViT.__module__, "Averaging"  # pickle finds it there
    page.Averaging = Averaging
    return Adapter, Averaging().eval()


class Weighing:
    """An entry whose mean counts sizes."""

    def forward(self: Any, images: Any) -> Any:
        with hosting.forward_of(self, 1, lambda: (images.shape[2] // 8, images.shape[3] // 8)) as state:

            def pool(x: Any) -> Any:
                size = state.last.size
                if size is None:
                    return type(self)._vtoken_base.pool(self, x)
                rows = F.layer_norm(x, x.shape[-1:])
                return ((rows * size.unsqueeze(2)).sum(1) / size.sum(1, keepdim=True)).to(x.dtype)

            parts = {"blocks": hosting.bound(self.blocks, state), "pool": pool}
            return hosting.forward_with(self, parts, images)


def test_a_mean_over_tokens_must_count_their_sizes(page: Any) -> None:
    """Counts, groups and attention are right in both: only what is pooled tells them apart."""
    deaf, model = averaging(page, page.ModelMixin)
    with pytest.raises(AssertionError, match=r"sizes enter pooling: an output \(2, 32\) .* `state\.last\.size`"):
        check_host(deaf, model)
    assert check_host(*averaging(page, Weighing), configs=[vtoken.ToMe(r=4)])


def test_measures_that_are_not_the_models(page: Any) -> None:
    class Deeper(page.MyAdapter):  # type: ignore[misc, name-defined]
        def spec(self, model: Any) -> Any:
            spec = super().spec(model)
            return type(spec)(**{**vars(spec), "depth": spec.depth + 1})

    with pytest.raises(AssertionError, match="the measures fit the model: spec says 5 blocks, blocks\\(\\) gives 4"):
        check_host(Deeper, page.MyViT().eval())


def test_wrong_calls(page: Any) -> None:
    with pytest.raises(vtoken.ConfigError, match="must be in eval mode"):
        check_host(page.MyAdapter, page.MyViT())
    with pytest.raises(vtoken.ConfigError, match="lacks spec, grid, blocks, targets"):
        check_host(vtoken.HostAdapter, page.MyViT().eval())
