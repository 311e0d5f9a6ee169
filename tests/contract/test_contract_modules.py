"""Calls go through the modules that are in the model: hooks, counters, compiled parts, models changed after apply."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torchinfo
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from torch.utils.flop_counter import FlopCounterMode

import vtoken
from tests.contract.table import (
    PITOME,
    MethodRow,
    arguments,
    attention,
    blocks,
    distinct_hosts,
    every_case,
    installed,
    main,
    run,
    snapshot,
)
from tests.contract.table import host as host_row
from tests.helpers import Host, assert_same
from vtoken.core.patch import PREDICTOR
from vtoken.core.state import TokenState

TOME = vtoken.ToMe(r=9)


def small_vit(**options: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    model = timm.models.VisionTransformer(**(settings | options)).eval()
    return model, torch.randn(2, 3, 32, 32)


@contextlib.contextmanager
def global_hooks(note: Callable[[str, nn.Module], None], *, backward: bool) -> Iterator[None]:
    """Every kind of hook that torch runs for all modules."""
    handles = [
        every_module.register_module_forward_pre_hook(lambda m, args: note("before", m)),
        every_module.register_module_forward_hook(lambda m, args, out: note("after", m)),
    ]
    if backward:
        handles.append(every_module.register_module_full_backward_hook(lambda m, given, made: note("backward", m)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@every_case()
def test_global_hooks_get_modules_of_the_model(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    vtoken.apply(model, method.reduces)
    plain = run(model, x)
    names, strange, called = {m: n for n, m in model.named_modules()}, [], set()

    def note(when: str, module: nn.Module) -> None:
        called.add((when, names.get(module)))
        if module not in names:
            strange.append(f"{when} {type(module).__name__}")

    args, kwargs = arguments(model, x)
    with global_hooks(note, backward=_bears_backward_hooks(host)):
        out = main(model(*args, **kwargs))
        out.float().sum().backward()
    assert strange == []
    assert_same("hooks that only look", plain, run(model, x))
    found = {m: n for n, m in model.named_modules()}
    for block in blocks(model):
        for module in (block, attention(block)):
            assert {("before", found[module]), ("after", found[module])} <= called
    if any(when == "backward" for when, _ in called):
        assert {("backward", found[m]) for block in blocks(model)[:-1] for m in (block, attention(block))} <= called


def _bears_backward_hooks(host: Host) -> bool:
    """Whether the library's own model can run with a full backward hook on every module: some add to views in place."""
    model = host.model()
    args, kwargs = arguments(model, host.images())
    try:
        with global_hooks(lambda when, module: None, backward=True):
            model(*args, **kwargs)
    except RuntimeError:
        return False
    return True


def _called(model: nn.Module, x: Tensor) -> set[str]:
    """Names of the modules whose own hooks run; each must be given the module itself, and keep what is saved on it."""
    seen: dict[str, nn.Module] = {}

    def save(name: str, module: nn.Module, args: Any, out: Any) -> None:
        module.saved = name
        seen[name] = module

    handles = [m.register_forward_hook(functools.partial(save, n)) for n, m in model.named_modules()]
    run(model, x)
    for handle in handles:
        handle.remove()
    for name, module in model.named_modules():
        assert module.__dict__.pop("saved", None) == (name if name in seen else None)
        assert seen.get(name, module) is module
    return set(seen)


@distinct_hosts()
def test_own_hooks_get_the_module_itself(host: Host, method: MethodRow) -> None:
    model, x = host.model(), host.images()
    stock = _called(model, x)
    for settings in (method.reduces, method.noops[0]):
        with vtoken.applied(model, settings):
            called = _called(model, x)
            assert stock <= called
            # nn.MultiheadAttention reads the weights of its last projection, which we call.
            assert all(PREDICTOR in name or name.endswith("out_proj") for name in called - stock)


def test_hooks_with_kwargs_see_the_tap_and_plain_hooks_do_not() -> None:
    model, x = small_vit()
    vtoken.apply(model, TOME)
    plain, named = [], []
    model.blocks[1].attn.register_forward_pre_hook(lambda m, args: plain.append(args))
    model.blocks[1].attn.register_forward_pre_hook(lambda m, a, k: named.append(k), with_kwargs=True)
    run(model, x)
    assert [len(args) for args in plain] == [1]
    assert isinstance(plain[0][0], Tensor)
    assert set(named[0]) == {"vtoken_tap", "attn_mask"}


@pytest.mark.parametrize("name", installed("vit_token", "eva02", "oc_token", "oc_qk_norm", "hf_clip", "hf_dino_reg"))
def test_torchinfo_counts_every_parameter_once(name: str) -> None:
    host = host_row(name)
    model, x = vtoken.apply(host.model(), PITOME.reduces), host.images()
    expected = sum(p.numel() for p in model.parameters())
    assert torchinfo.summary(model, input_data=x, verbose=0).total_params == expected


def test_flop_counter_has_a_row_for_every_attention() -> None:
    model, x = small_vit()
    vtoken.apply(model, PITOME.reduces)
    with FlopCounterMode(display=False, depth=9) as counter, torch.no_grad():
        model(x)
    rows = counter.get_flop_counts()
    for i in range(4):
        assert f"VisionTransformer.blocks.{i}.attn" in rows
        assert f"VisionTransformer.blocks.{i}.attn.qkv" in rows
    assert "VisionTransformer.blocks" in rows


PARTS = {
    "vit_token": ("blocks", "blocks.1", "blocks.1.attn", ""),
    "vit_respost": ("blocks", "blocks.1.attn"),
    "eva02": ("blocks.1", "blocks.1.attn"),
    "oc_token": ("transformer", "transformer.resblocks.1", "transformer.resblocks.1.attn"),
    "oc_qk_norm": ("transformer.resblocks.1.attn",),
    "hf_clip": ("encoder", "encoder.layers.1", "encoder.layers.1.self_attn"),
    "hf_dino_reg": ("encoder", "encoder.layer.1.attention"),
    "hf_vit": ("layers.1", "layers.1.attention"),
}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name in installed(*PARTS) for part in PARTS[name]])
def test_parts_compiled_in_place_run_the_patched_code(name: str, part: str) -> None:
    host = host_row(name)
    model, x = host.model(), host.images()
    tower: Any = model
    for inner in ("visual", "vision_model", "vit", "dinov2_with_registers"):
        tower = getattr(tower, inner, tower)
    vtoken.apply(model, PITOME.reduces)
    merged = run(model, x)
    torch._dynamo.reset()
    ran: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        ran.append(1)
        return graph.forward

    args, kwargs = arguments(model, x)
    tower.get_submodule(part).compile(backend=backend)
    with torch.no_grad():
        assert_same(part, merged, main(model(*args, **kwargs)))
    assert ran, "nothing was compiled"
    torch._dynamo.reset()


def test_compiled_before_apply_is_refused_with_what_to_do() -> None:
    model, _ = small_vit()
    model.blocks[1].attn.compile(backend="eager")
    with pytest.raises(vtoken.VTokenError, match=r"apply before compiling: blocks\.1\.attn was compiled in place"):
        vtoken.apply(model, TOME)
    model.blocks[1].attn._compiled_call_impl = None  # as the message says
    vtoken.apply(model, TOME)


@pytest.mark.parametrize("part", ["", "blocks", "blocks.1", "blocks.1.attn"])
@pytest.mark.parametrize(
    ("method", "change"),
    [(vtoken.PiToMe(ratio=0.9), {"ratio": 0.7}), (vtoken.ToMe(r=9), {"r": 5}), (vtoken.ToMe(r=9), {"ratio": 0.8})],
    ids=str,
)
def test_settings_change_and_are_read_where_parts_were_compiled_in_place(part: str, method: Any, change: Any) -> None:
    model, x = small_vit()
    own = run(model, x)
    other = vtoken.apply(small_vit()[0], method.replace(**change))
    vtoken.apply(model, method)
    cost = vtoken.report(model).to_dict()
    torch._dynamo.reset()
    model.get_submodule(part).compile(backend="eager")
    run(model, x)
    assert vtoken.report(model).to_dict() == cost
    assert list(vtoken.plan(model).tokens) == cost["tokens"]
    assert vtoken.num_tokens(model) == cost["tokens"][-1]
    vtoken.configure(model, **change)
    assert_same("as configured", run(other, x), run(model, x))
    with pytest.raises(vtoken.VTokenError, match="apply before compiling"):
        vtoken.apply(model, TOME, replace=True)
    assert vtoken.config_of(model) == method.replace(**change)
    assert_same("removed", own, run(vtoken.remove(model), x))
    torch._dynamo.reset()


# Whoever runs parts of the model in a loop of their own.


@pytest.mark.parametrize("name", installed("vit_token", "eva02", "vit_respost", "oc_token", "oc_qk_norm", "hf_clip"))
def test_blocks_in_a_loop_of_ones_own_are_told_once(name: str) -> None:
    model = vtoken.apply(host_row(name).model(), PITOME.reduces)
    found, x = blocks(model), torch.randn(2, 9, 32)
    extra = (None,) if name.startswith("hf") else ()

    def loop(h: Tensor) -> Tensor:
        for block in found:
            h = block(h, *extra)
        return h

    def twice() -> None:
        loop(x)
        loop(x)

    with pytest.warns(vtoken.VTokenWarning, match="past the model's own entry methods") as caught:
        twice()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    run(model, host_row(name).images())
    vtoken.remove(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(x)


def test_a_forward_of_the_model_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", vtoken.VTokenWarning)
        for settings in (TOME, vtoken.PiToMe(ratio=1.0), vtoken.Sparsifiner()):
            model, x = small_vit()
            vtoken.apply(model, settings)
            model.set_grad_checkpointing()
            model.train()(x).sum().backward()
            model.forward_intermediates(x)
            model.forward_head(model.forward_features(x))
        model.blocks[0](torch.randn(2, 65, 32))  # thinned out there, too


def test_a_single_block_still_exports() -> None:
    model, _ = small_vit()
    vtoken.apply(model, TOME)
    x = torch.randn(2, 9, 32)
    with torch.no_grad(), pytest.warns(vtoken.VTokenWarning):
        program = torch.export.export(model.blocks[1], (x,))
    assert_same("exported block", model.blocks[1](x), program.module()(x))


# A model that was changed after apply.


def test_deleted_blocks_are_numbered_by_their_place() -> None:
    for settings in (vtoken.ToMe(r=(9, 1)), vtoken.ToMe(r=[9, 5, 2, 1]), vtoken.Sparsifiner(keep_ratio=0.3)):
        for cut in (lambda b: b.__delitem__(1), lambda b: b.__delitem__(0), lambda b: b.pop(3)):
            model, x = small_vit()
            vtoken.apply(model, settings)
            cut(model.blocks)
            _, trace = vtoken.trace(model, x)
            assert len(trace.tokens) == 4
            if isinstance(settings, vtoken.ToMe):
                amounts = settings.amounts(4)
                assert [a - b for a, b in zip(trace.tokens, trace.tokens[1:], strict=False)] == list(amounts[:3])
                assert trace.size.sum(1).tolist() == [65.0, 65.0]
                assert vtoken.plan(model).tokens == vtoken.report(model).tokens == tuple(trace.tokens)
                assert vtoken.num_tokens(model) == trace.tokens[-1]


def test_costs_behind_deleted_blocks_are_those_of_the_amounts_that_are_left() -> None:
    model, _ = small_vit()
    vtoken.apply(model, vtoken.ToMe(r=(9, -1)))
    del model.blocks[1]
    found = vtoken.report(model)
    removed = [a - b for a, b in zip(found.tokens, found.tokens[1:], strict=False)]
    vtoken.remove(model)
    assert found.layers == vtoken.report(model, vtoken.ToMe(r=removed)).layers


def _sliced(model: Any) -> None:
    model.blocks = model.blocks[1:3]


def _pruned(model: Any) -> None:
    model.prune_intermediate_layers([1])


@pytest.mark.parametrize("cut", [_sliced, _pruned])
def test_a_slice_of_the_blocks_may_take_their_place(cut: Callable[[Any], None]) -> None:
    model, x = small_vit()
    vtoken.apply(model, TOME)
    cut(model)
    heard: list[nn.Module] = []
    handle = model.blocks.register_forward_hook(lambda module, args, out: heard.append(module))
    _, trace = vtoken.trace(model, x)
    handle.remove()
    assert heard == [model.blocks]
    assert trace.tokens == [65, 56, 47]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert_same("a copy", model(x), copied(x))
    vtoken.apply(model, vtoken.ToMe(r=2), replace=True)
    assert vtoken.trace(model, x)[1].tokens == [65, 63, 61]
    vtoken.remove(model)
    assert type(model.blocks) is nn.Sequential
    assert not [name for m in model.modules() for name in vars(m) if "vtoken" in name]
    vtoken.remove(vtoken.apply(model, TOME))


class OwnOrder(timm.models.VisionTransformer):
    """A tower that runs its blocks as it likes."""

    order: tuple[int, ...] = (0, 1, 2, 3)

    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        for place in self.order:
            x = self.blocks[place](x)
        return self.norm(x)


def own_order(*order: int) -> tuple[Any, Tensor]:
    model, x = small_vit()
    twin = OwnOrder(img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=5).eval()
    twin.load_state_dict(model.state_dict())
    twin.order = order
    return twin, x


@pytest.mark.parametrize("order", [(0, 2, 3), (1, 3), (0,), (3, 1, 0, 2), (0, 1, 2, 3, 0, 1), (2, 2)])
def test_blocks_in_any_order_change_no_bit_where_nothing_is_removed(order: tuple[int, ...]) -> None:
    model, x = own_order(*order)
    before = model(x)
    assert_same("no-op", before, vtoken.apply(model, vtoken.ToMe(r=0))(x))


def test_a_forward_may_leave_blocks_out() -> None:
    model, x = own_order(0, 2, 3)
    _, trace = vtoken.trace(vtoken.apply(model, vtoken.ToMe(r=[9, 5, 2, 1])), x)
    cut, _ = own_order(0, 1, 2)
    del cut.blocks[1]
    expected, wanted = vtoken.trace(vtoken.apply(cut, vtoken.ToMe(r=[9, 2, 1])), x)
    assert_same("blocks left out", expected, model(x))
    assert_same("sizes", wanted.size, trace.size)
    assert_same("group map", wanted.dest, trace.dest)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 0), (3, 2, 1, 0), (0, 2, 1, 3), (1, 1)])
@pytest.mark.parametrize("traced", [False, True])
def test_a_forward_in_another_order_is_refused_where_tokens_are_removed(order: tuple[int, ...], traced: bool) -> None:
    # Sizes and positions are those of a place in the list: other tokens would be weighed by them.
    model, x = own_order(*order)
    vtoken.apply(model, TOME)
    with pytest.raises(vtoken.UnsupportedModelError, match=r"another order.*or twice.*vtoken.remove\(model\)"):
        vtoken.trace(model, x) if traced else model(x)
    model.order = (0, 1, 2, 3)
    assert vtoken.trace(model, x)[1].tokens == [65, 56, 47, 38, 29]


def _identity(block: nn.Module) -> nn.Module:
    return nn.Identity()


class Adapter(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        return self.inner(x, *args, **options)


def _list_of(model: nn.Module) -> Any:
    found = blocks(model)
    return next(m for m in model.modules() if isinstance(m, (nn.Sequential, nn.ModuleList)) and found[0] in list(m))


@pytest.mark.parametrize("change", [_identity, Adapter, "unpatched", "twice"])
@pytest.mark.parametrize("name", installed("vit_token", "eva02", "oc_token", "hf_clip", "hf_dino_reg"))
def test_replaced_blocks_are_refused_with_what_to_do(name: str, change: Any) -> None:
    host = host_row(name)
    model, x = vtoken.apply(host.model(), PITOME.reduces), host.images()
    container = _list_of(model)
    if change == "unpatched":
        container[1] = blocks(host.model())[1]
    elif change == "twice":
        container.append(container[0])
    else:
        container[1] = change(container[1])
    with pytest.raises(vtoken.UnsupportedModelError, match=r"vtoken.remove\(model\).*vtoken.apply again"):
        run(model, x)


@pytest.mark.parametrize("name", installed("vit_token", "eva02", "oc_token", "hf_clip", "hf_dino_reg"))
def test_a_replaced_attention_is_refused_with_what_to_do(name: str) -> None:
    host = host_row(name)
    model, x = vtoken.apply(host.model(), PITOME.reduces), host.images()
    block = blocks(model)[1]
    where = next(n for n, m in block.named_children() if m is attention(block))
    other = attention(blocks(host.model())[1])
    setattr(block, where, other)
    with pytest.raises(vtoken.UnsupportedModelError, match=r"attention of block 1 .*vtoken.remove\(model\)"):
        run(model, x)
    vtoken.remove(model)
    vtoken.apply(model, PITOME.reduces)
    run(model, x)


def test_another_container_of_the_same_blocks() -> None:
    model, x = small_vit()
    vtoken.apply(model, vtoken.ToMe(r=9))
    model.blocks = nn.Sequential(*list(model.blocks)[:2])
    assert vtoken.trace(model, x)[1].tokens == [65, 56, 47]
    model.blocks.register_forward_hook(lambda m, args, out: None)
    with pytest.raises(vtoken.UnsupportedModelError, match="container of the blocks"):
        model(x)


# Interrupts.


def _interrupted(verb: Callable[[], Any], at: int | None = None) -> int:
    """Run `verb` with a KeyboardInterrupt at the `at`-th line that it runs in the engine; how many lines it came to."""
    files, count = ("core/patch.py", "core/apply.py"), 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == "line":
            count += 1
            if count == at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            verb()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("settings", [TOME, vtoken.Sparsifiner(keep_ratio=0.5)])
@pytest.mark.parametrize("verb", ["remove", "replace", "apply"])
def test_an_interrupt_leaves_the_model_whole(verb: str, settings: Any) -> None:
    model, x = small_vit(depth=1, embed_dim=8)
    stock, bare = run(model, x), snapshot(model)

    def do() -> None:
        if verb == "remove":
            vtoken.remove(model)
        else:
            vtoken.apply(model, vtoken.PiToMe(ratio=0.7) if verb == "replace" else settings, replace=verb == "replace")

    def prepare() -> None:
        if vtoken.is_applied(model):
            vtoken.remove(model)
        if verb != "apply":
            vtoken.apply(model, settings)

    prepare()
    lines, whole = _interrupted(do), set()
    for at in range(1 + lines % 3, lines + 1, max(1, lines // 15)):
        prepare()
        assert _interrupted(do, at) == at
        whole.add(vtoken.is_applied(model))
        if vtoken.is_applied(model):
            assert vtoken.config_of(model) is not None
            run(model, x)
            vtoken.remove(model)
        assert snapshot(model) == bare, f"line {at} of {lines}"
    assert_same("in the end", stock, run(model, x))
    assert (verb != "apply") in whole


# Smaller things.


def test_post_norm_eva_with_rotary_positions_merges() -> None:
    torch.manual_seed(0)
    model = timm.models.eva.Eva(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, use_post_norm=True, use_rot_pos_emb=True,
        num_classes=3,
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    stock = run(model, x)
    with vtoken.applied(model, vtoken.ToMe(r=0)):
        assert_same("nothing removed", stock, run(model, x))
    vtoken.apply(model, vtoken.PiToMe(ratio=0.8))
    out, trace = vtoken.trace(model, x)
    assert trace.tokens == list(vtoken.plan(model).tokens)
    assert trace.size.sum(1).tolist() == [17.0, 17.0]
    vtoken.report(model, vtoken.PiToMe(ratio=0.8))
    assert out.shape == stock.shape


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every state that a forward makes."""
    made: list[int] = []
    engine = importlib.import_module("vtoken.core.forward")

    class Counted(TokenState):
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append(1)
            super().__init__(*args, **options)

    monkeypatch.setattr(engine, "TokenState", Counted)
    return made


@pytest.mark.parametrize("name", ["vit_token", "vit_avg_prefix", "eva02", "naflex_rope"])
def test_one_state_per_forward(name: str, states: list[int]) -> None:
    host = host_row(name)
    model, x = vtoken.apply(host.model(), PITOME.reduces), host.images()
    run(model, x)
    assert len(states) == 1


class ByFeatures(timm.models.VisionTransformer):
    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x)) + 1


class ByBlocks(timm.models.VisionTransformer):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        for i in range(len(self.blocks)):
            x = self.blocks[i](x)
        return self.head(self.fc_norm(self.pool(self.norm(x))))


class Twice(timm.models.VisionTransformer):
    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x)[:, 0] + self.blocks(self._pos_embed(self.patch_embed(x)))[:, 0]


@pytest.mark.parametrize(("cls", "passes"), [(ByFeatures, 1), (ByBlocks, 1), (Twice, 2)])
def test_a_forward_of_the_users_own_makes_a_state_for_each_pass(cls: Any, passes: int, states: list[int]) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
    for pool in ("token", "avg"):
        model, x = cls(num_classes=5, global_pool=pool, **options).eval(), torch.randn(2, 3, 32, 32)
        full = run(model, x)
        with vtoken.applied(model, vtoken.ToMe(r=0)):
            assert_same("nothing removed", full, run(model, x))
        vtoken.apply(model, vtoken.ToMe(r=9))
        states.clear()
        merged = run(model, x)
        assert len(states) == passes
        assert not torch.equal(full, merged)
        out, trace = vtoken.trace(model, x)
        assert trace.num_forwards == passes
        assert trace.tokens == [65, 56, 47, 38]
        assert_same("traced", merged, out.detach())
        if cls is ByBlocks:
            stock = timm.models.VisionTransformer(num_classes=5, global_pool=pool, **options).eval()
            stock.load_state_dict(model.state_dict())
            assert_same("a stock forward", run(vtoken.apply(stock, vtoken.ToMe(r=9)), x), merged)


def test_the_attention_pool_without_weights_is_called_itself() -> None:
    host = host_row("vit_prr_avg")
    model, x = vtoken.apply(host.model(), PITOME.reduces), host.images()
    merged, pool = run(model, x), model.attn_pool
    seen: list[nn.Module] = []
    pool.register_forward_hook(lambda m, args, out: seen.append(m))
    pool.post_norm.register_forward_hook(lambda m, args, out: seen.append(m))
    assert_same("heard", merged, run(model, x))
    assert [id(m) for m in seen] == [id(pool.post_norm), id(pool)]

    class Other(type(pool)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    Other.__name__ = type(pool).__name__
    model = host.model()
    model.attn_pool.__class__ = Other
    with pytest.raises(vtoken.UnsupportedModelError, match="forward of its own"):
        vtoken.apply(model, TOME)
