"""Entering a model, leaving it, failing half way, and what users put on models (docs/mechanism.md 2)."""

from __future__ import annotations

import copy
import functools
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vtoken
from tests.contract.table import (
    PITOME,
    MethodRow,
    attention,
    blocks,
    distinct_hosts,
    entries,
    every_host,
    library_of,
    outputs,
    run,
    signed_methods,
    snapshot,
    traced,
)
from tests.contract.table import host as host_row
from tests.contract.table import method as method_row
from tests.helpers import Host, assert_close, assert_same, images, randomise_
from vtoken.core import patch as patching
from vtoken.core.apply import patched_modules
from vtoken.core.bound import bound
from vtoken.core.method import KeepAll
from vtoken.core.state import TokenState


@every_host()
def test_applying_twice_raises_and_replace_replaces(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    stock, before = run(model, x), snapshot(model)
    vtoken.apply(model, method.reduces)
    out, carried = run(model, x), snapshot(model)
    with pytest.raises(vtoken.AlreadyAppliedError, match="replace=True"):
        vtoken.apply(model, method.reduces)
    assert snapshot(model) == carried
    other = vtoken.ToMe(r=3, layers=(0,))
    vtoken.apply(model, other, replace=True)
    assert vtoken.config_of(model) == other
    assert traced(model, x)[1].tokens[-1] == traced(model, x)[1].tokens[0] - 3
    vtoken.apply(model, method.reduces, replace=True)
    assert_same("replaced and replaced back", out, run(model, x))
    vtoken.remove(model)
    assert snapshot(model) == before
    assert_same("after one removal", stock, run(model, x))


def _break_last(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    """Make patching fail at the last module that it touches."""
    twin = copy.deepcopy(model)
    patched = patched_modules(twin if vtoken.is_applied(twin) else vtoken.apply(twin, PITOME.reduces))
    assert len(patched) > len(blocks(model)), "the blocks and the module that holds them"
    calls, last, derive = [0], len(patched), patching.derive

    def failing(base: type, mixin: type) -> type:
        calls[0] += 1
        if calls[0] == last:
            raise RuntimeError("injected")
        return derive(base, mixin)

    monkeypatch.setattr(patching, "derive", failing)


@every_host()
def test_failed_apply_leaves_no_residue(host: Host, method: MethodRow, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = host.model(), host.images()
    stock, before = run(model, x), snapshot(model)
    _break_last(monkeypatch, model)
    with pytest.raises(RuntimeError, match="injected"):
        vtoken.apply(model, method.reduces)
    assert snapshot(model) == before
    assert not vtoken.is_applied(model)
    assert_same("after the failure", stock, run(model, x))


@distinct_hosts()
def test_failed_replace_keeps_what_was_applied(
    host: Host, method: MethodRow, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    model, x = host.model(), host.images()
    vtoken.apply(model, method.reduces)
    out, before = run(model, x), snapshot(model)
    with monkeypatch.context() as patched:
        _break_last(patched, host.model())
        with pytest.raises(RuntimeError, match="injected"):
            vtoken.apply(model, vtoken.ToMe(r=2), replace=True)
    assert snapshot(model) == before
    assert_same("after the failure", out, run(model, x))
    with pytest.raises(vtoken.ConfigError):
        vtoken.apply(model, vtoken.PiToMe(layers=(99,)), replace=True)
    assert snapshot(model) == before


@distinct_hosts()
def test_failed_configure_keeps_the_old_settings(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    vtoken.apply(model, method.reduces)
    out, before = run(model, x), snapshot(model)
    for bad in (method.bad, {"layers": (77,)}, {"no_such_setting": 1}, {"metric": "keys"}):
        with pytest.raises(vtoken.ConfigError):
            vtoken.configure(model, **bad)
        assert vtoken.config_of(model) == method.reduces
    assert snapshot(model) == before
    assert_same("after refused changes", out, run(model, x))
    vtoken.configure(model, **({"layers": ()} if method.removes else {"keep_ratio": 1.0}))
    assert traced(model, x)[1].tokens[-1] == traced(model, x)[1].tokens[0]


def test_verbs_on_an_unpatched_model() -> None:
    model = host_row("vit_token").model()
    for verb in (vtoken.remove, vtoken.configure):
        with pytest.raises(vtoken.VTokenError):
            verb(model)
    assert not vtoken.is_applied(model)
    assert vtoken.config_of(model) is None
    with pytest.raises(vtoken.ConfigError):
        vtoken.plan(model)
    with pytest.raises(vtoken.ConfigError):
        vtoken.apply(model, [PITOME.reduces, vtoken.ToMe(r=2)])  # both act at the same place
    with pytest.raises(vtoken.ConfigError, match="ratio"):
        vtoken.apply(model, "pitome", ratoi=0.9)
    assert not vtoken.is_applied(model)
    assert vtoken.config_of(vtoken.apply(model, "pitome", ratio=0.9)) == vtoken.PiToMe(ratio=0.9)


def test_applied_is_undone_after_an_error() -> None:
    model = host_row("vit_token").model()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="in the middle"), vtoken.applied(model, PITOME.reduces):
        _raise(vtoken.is_applied(model))
    assert snapshot(model) == before


@distinct_hosts()
def test_signatures_are_kept(host: Host, method: MethodRow) -> None:
    """Exporters and trainers read them: `torch.export(..., dynamic_shapes={"x": ...})` goes by these names."""
    model = host.model()
    before = [(entry.__name__, inspect.signature(entry).parameters) for entry in signed_methods(model)]
    vtoken.apply(model, method.reduces)
    for (name, stock), entry in zip(before, signed_methods(model), strict=True):
        found = inspect.signature(entry).parameters
        assert list(found) == list(stock), name
        for key, value in stock.items():
            assert (found[key].kind, found[key].default) == (value.kind, value.default), f"{name}({key})"


def _raise(*_: Any) -> None:
    raise RuntimeError("raised in the middle")


@every_host()
def test_a_raising_forward_leaves_the_next_one_right(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    vtoken.apply(model, method.reduces)
    outputs(model, x)  # transformers hooks itself when it is first asked for hidden states
    out, before = run(model, x), snapshot(model)
    handle = blocks(model)[-1].mlp.register_forward_pre_hook(_raise)
    for entry in entries(model).values():
        with pytest.raises(RuntimeError, match="in the middle"):
            entry(x)
    handle.remove()
    assert snapshot(model) == before
    assert_same("the next forward", out, run(model, x))


@distinct_hosts()
def test_differently_patched_models_of_one_class_do_not_meet(host: Host, method: MethodRow) -> None:
    first, second, third, x = host.model(), host.model(seed=1), host.model(seed=2), host.images()
    stock = run(third, x)
    vtoken.apply(first, method.reduces)
    a = run(first, x)
    vtoken.apply(second, vtoken.ToMe(r=5, layers=(1,), metric="hidden"))
    b = run(second, x)
    assert type(first) is type(second), "one derived class per base and mixin"
    assert_same("first", a, run(first, x))
    assert_same("third, never patched", stock, run(third, x))
    vtoken.remove(first)
    assert_same("second after the first was unpatched", b, run(second, x))
    assert vtoken.is_applied(second)


@pytest.mark.parametrize("row", ["pitome", "random_merge"])
def test_saved_model_loads_in_a_fresh_process(row: str, tmp_path: Path) -> None:
    vit_map, config = host_row("vit_map"), method_row(row).reduces
    model, x = vit_map.model(), vit_map.images()
    out = run(vtoken.apply(model, config), x)
    torch.save(model, tmp_path / "model.pt")
    torch.save({"x": x, "out": out}, tmp_path / "case.pt")
    script = """
        import sys, torch
        torch.set_num_threads(1)
        case = torch.load(sys.argv[2])
        model = torch.load(sys.argv[1], weights_only=False)
        assert type(model).__name__ == "VisionTransformer", type(model)
        import vtoken
        assert vtoken.is_applied(model)
        with torch.no_grad():
            assert torch.equal(model(case["x"]), case["out"]), "another output"
        vtoken.remove(model)
        from timm.models.vision_transformer import Block, VisionTransformer
        assert type(model) is VisionTransformer and type(model.blocks[0]) is Block
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "model.pt"), str(tmp_path / "case.pt")]
    root = Path(vtoken.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr


@every_host()
def test_user_hooks_see_tensors_and_are_obeyed(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    seen: list[tuple[str, Any]] = []

    def note(name: str, module: nn.Module, args: Any, out: Any) -> Any:
        seen.append((name, args))
        seen.append((name, out))
        return (out[0] * 1.25, *out[1:]) if isinstance(out, tuple) else out * 1.25

    def note_input(name: str, module: nn.Module, args: Any) -> None:
        seen.append((name, args))

    found = blocks(model)
    modules = {"block 1": found[1], "attn 1": attention(found[1]), "last": found[-1]}
    if library_of(model) == "timm":  # the others loop over their blocks
        modules["blocks"] = model.blocks
    handles = [m.register_forward_hook(functools.partial(note, n)) for n, m in modules.items()]
    handles += [m.register_forward_pre_hook(functools.partial(note_input, n)) for n, m in modules.items()]
    hooked, count = run(model, x), len(seen)
    assert count >= 9
    with vtoken.applied(model, method.noops[0]):
        seen.clear()
        assert_same("hooks change the output as before", hooked, run(model, x))
        assert len(seen) == count
    with vtoken.applied(model, method.reduces):
        seen.clear()
        _, trace = traced(model, x)
        assert len(seen) == count, "every hook runs exactly as often as without vtoken"
    for name, value in seen:
        for tensor in value if isinstance(value, tuple) else (value,):
            if tensor is None and library_of(model) != "timm":
                continue  # no mask, or no attention weights
            assert isinstance(tensor, Tensor), f"{name} saw {type(tensor)}"
    lengths = [value.shape[1] for name, value in seen if name == "last" and isinstance(value, Tensor)]
    assert lengths == [trace.tokens[-1]]
    for handle in handles:
        handle.remove()


def test_full_backward_hooks_on_blocks_run() -> None:
    vit, calls = host_row("vit_token"), []
    model = vtoken.apply(vit.model(), PITOME.reduces)
    model.blocks[1].register_full_backward_hook(lambda m, gin, gout: calls.append((gin[0].shape, gout[0].shape)))
    plain = host_row("vit_token").model()
    vtoken.apply(plain, PITOME.reduces)
    x = vit.images()
    for m in (model, plain):
        m(x).sum().backward()
    assert calls == [((2, 49, 32), (2, 37, 32))]
    assert_close("gradient", plain.cls_token.grad, model.cls_token.grad, 1e-5)


class DoublingViT(VisionTransformer):
    """A user's subclass: runs timm's features and works on them."""

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2.0 * super().forward_features(x + 0.5, *args, **kwargs)


class DoublingEva(Eva):
    """The same for Eva."""

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2.0 * super().forward_features(x + 0.5, *args, **kwargs)


class TwoCropViT(VisionTransformer):
    """A user's subclass whose forward runs the features of two crops before either head."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first, second = self.forward_features(x), self.forward_features(x.flip(-1))
        return self.forward_head(first) + 3.0 * self.forward_head(second)


_TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 10,
}


@pytest.mark.parametrize("cls", [DoublingViT, DoublingEva])
def test_user_subclass_with_super_is_honoured(cls: type) -> None:
    model = randomise_(cls(**_TINY, global_pool="avg"), 0).eval()
    plain = randomise_(cls.__mro__[1](**_TINY, global_pool="avg"), 0).eval()
    x = images((3, 32, 32))
    stock = run(model, x)
    assert_close("stock", plain.forward_head(2.0 * plain.forward_features(x + 0.5)), stock, 1e-6)
    with vtoken.applied(model, vtoken.PiToMe(ratio=1.0)):
        assert_same("nothing removed", stock, run(model, x))
    vtoken.apply(model, PITOME.reduces)
    vtoken.apply(plain, PITOME.reduces)
    assert isinstance(model, cls)
    out, trace = traced(model, x)
    rows, _ = traced(plain, x + 0.5, "forward_features")
    dest = trace.dest
    assert trace.tokens[-1] < trace.tokens[0]
    whole = 2.0 * torch.stack([rows[b, dest[b]] for b in range(2)])[:, plain.num_prefix_tokens :].mean(1)
    assert_close("through the user's code", plain.head(plain.fc_norm(whole)), out, 1e-5)
    assert_close("features", 2.0 * rows, traced(model, x, "forward_features")[0], 1e-6)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_user_forward_that_runs_the_features_twice(pool: str) -> None:
    model = TwoCropViT(**_TINY, global_pool=pool, class_token=pool == "token")
    plain = VisionTransformer(**_TINY, global_pool=pool, class_token=pool == "token")
    x = images((3, 32, 32))
    for m in (model, plain):
        vtoken.apply(randomise_(m, 0).eval(), PITOME.reduces)
    assert_close("both crops", run(plain, x) + 3.0 * run(plain, x.flip(-1)), run(model, x), 1e-5)


class LookingViT(VisionTransformer):
    """A user's subclass whose own loop reads attributes of blocks and of their container."""

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        widths = [block.attn.qkv.in_features for block in self.blocks.children()]
        for i, block in enumerate(self.blocks[:2]):
            x = block(x) * (block.attn.num_heads / 4) + (widths[i] - block.norm1.normalized_shape[0])
        return self.norm(self.blocks[-1](x))


class LookingForwardViT(LookingViT):
    """The same in its forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.forward_head(LookingViT.forward_features(self, x))


@pytest.mark.parametrize("cls", [LookingViT, LookingForwardViT])
def test_loops_of_the_users_own_may_read_attributes_of_blocks(cls: type) -> None:
    model = randomise_(cls(**_TINY), 0).eval()
    plain, x = randomise_(VisionTransformer(**_TINY), 0).eval(), images((3, 32, 32))
    assert_same("stock", run(plain, x), run(model, x))
    for m in (model, plain):
        vtoken.apply(m, PITOME.reduces)
    (out, trace), (expected, known) = traced(model, x), traced(plain, x)
    assert trace.tokens == known.tokens
    assert trace.tokens[-1] < trace.tokens[0]
    assert_same("merged", expected, out)
    blocks = bound(model.blocks, TokenState(KeepAll(), 1, track_anchor=False, track_dest=False))
    with pytest.raises(AttributeError, match="'Block' object has no attribute 'nothing'"):
        next(iter(blocks)).nothing


class HalvedCropsViT(VisionTransformer):
    """A user's subclass that works on the features of two crops before either head sees them."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first, second = 0.5 * self.forward_features(x), 0.5 * self.forward_features(x.flip(-1))
        return self.forward_head(first) + 3.0 * self.forward_head(second)


class ChunkedHeadViT(VisionTransformer):
    """A user's subclass that runs its head image by image."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.cat([self.forward_head(one) for one in self.forward_features(x).split(1)])


@pytest.mark.parametrize("cls", [HalvedCropsViT, ChunkedHeadViT])
def test_user_forward_that_pools_something_else_is_right_or_an_error(cls: type) -> None:
    """Rows whose sizes vtoken cannot know must never be pooled with the sizes of others."""
    model = randomise_(cls(**_TINY, global_pool="avg", class_token=False), 0).eval()
    plain = randomise_(VisionTransformer(**_TINY, global_pool="avg", class_token=False), 0).eval()
    x = images((3, 32, 32))
    vtoken.apply(model, PITOME.reduces)
    vtoken.apply(plain, PITOME.reduces)
    try:
        out = run(model, x)
    except vtoken.ShapeError:
        return
    expected = run(plain, x)
    if cls is HalvedCropsViT:

        def half(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            return 0.5 * out

        plain.norm.register_forward_hook(half)
        expected = run(plain, x) + 3.0 * run(plain, x.flip(-1))
    assert_close("pooled", expected, out, 1e-5)


class LoraLinear(nn.Module):
    """A linear layer with a low-rank addition, as adapters put in its place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        rng = torch.Generator().manual_seed(7)
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=rng) * 0.3)
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=rng) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("before", [True, False], ids=["lora first", "vtoken first"])
@pytest.mark.parametrize("place", ["place between", "place after"])
def test_replaced_linear_layers_count(before: bool, place: str) -> None:
    vit = host_row("vit_avg_prefix")
    adapted, merged, x = vit.model(), vit.model(), vit.images()
    config = vtoken.PiToMe(ratio=0.75, place=place.split()[1])
    if not before:
        vtoken.apply(adapted, config)
    untouched = run(vtoken.apply(vit.model(), config), x)
    for one, other in zip(adapted.blocks, merged.blocks, strict=True):
        for part, name in ((one.attn, "qkv"), (one.attn, "proj"), (one.mlp, "fc1")):
            lora = LoraLinear(getattr(part, name))
            setattr(part, name, lora)
            linear = getattr(other.mlp if name == "fc1" else other.attn, name)
            with torch.no_grad():
                linear.weight += lora.up @ lora.down
    if before:
        vtoken.apply(adapted, config)
    out = run(adapted, x)
    assert_close("adapted against merged weights", run(vtoken.apply(merged, config), x), out, 1e-4)
    assert not torch.allclose(untouched, out, atol=0.1)
