"""Reading attention and leaving out patches: what hooks get, what threads see, rows against a slow reference."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

import vtoken
from tests.helpers import assert_close, images, randomise_, vit
from vtoken.core.host import find_adapter
from vtoken.core.visual import Needs, Seen, TowerFacts
from vtoken.core.watch import Watch
from vtoken.methods.sharing import ShareConfig, Sharing

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

BLOCKS, HEADS, WIDTH = 3, 3, 48
SMALL: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "image_size": 32, "patch_size": 4,
}  # fmt: skip


def _open_clip(**options: Any) -> Any:
    settings = {"image_size": 32, "patch_size": 4, "width": WIDTH, "layers": BLOCKS, "heads": HEADS, "mlp_ratio": 2.0}
    return open_clip.transformer.VisionTransformer(output_dim=8, **settings, **options)


def _transformers(kind: str) -> Any:
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**SMALL))


def _rotary() -> Any:
    return timm.create_model("vit_small_patch16_dinov3", img_size=64, depth=BLOCKS, num_classes=0)


TOWERS: dict[str, Callable[[], Any]] = {
    "timm": functools.partial(vit, qk_norm=True, num_classes=0),
    "timm rotary": _rotary,
    "packed": _open_clip,
    "own": functools.partial(_open_clip, block_type="custom", qk_norm=True),
    "clip": functools.partial(_transformers, "CLIPVision"),
    "vit": functools.partial(_transformers, "ViT"),
    "dino": functools.partial(_transformers, "Dinov2WithRegisters"),
}


def _tower(name: str) -> tuple[Any, Tensor]:
    model = randomise_(TOWERS[name](), 0).eval()
    first: Any = next((m for m in model.modules() if type(m).__name__.endswith("Layer")), None)
    if first is not None and not any(hasattr(m, "q_proj") for m in first.modules()):
        pytest.skip("this release nests its attention, which is refused")
    return model, images((3, 64, 64) if "rotary" in name else (3, 32, 32))


@contextlib.contextmanager
def heard(
    model: nn.Module, *, backward: bool = False
) -> Iterator[tuple[collections.Counter[tuple[str, str]], list[str]]]:
    """Hooks of every kind on every module and for all modules.

    Yields:
        How often each kind was called for each name by hooks of the module's own; what is no module of the model.
    """
    names = {m: n for n, m in model.named_modules()}
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    strange: list[str] = []

    def note(kind: str, name: str | None, module: nn.Module, *_: Any) -> None:
        if module not in names or name not in (None, names[module]):
            strange.append(f"{kind} of {name}: {type(module).__name__}")
        elif name is not None:
            seen[kind, name] += 1

    handles: list[Any] = [
        every_module.register_module_forward_pre_hook(functools.partial(note, "before", None)),
        every_module.register_module_forward_hook(functools.partial(note, "after", None)),
    ]
    if backward:
        handles.append(every_module.register_module_full_backward_hook(functools.partial(note, "backward", None)))
    for module, name in names.items():
        handles.append(module.register_forward_pre_hook(functools.partial(note, "before", name)))
        handles.append(module.register_forward_hook(functools.partial(note, "after", name)))
        if backward:
            handles.append(module.register_full_backward_hook(functools.partial(note, "backward", name)))
    try:
        yield seen, strange
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", list(TOWERS))
def test_modules_are_called_once_each_and_hooks_get_the_module_itself(name: str) -> None:
    model, x = _tower(name)
    run = model.forward_features if name.startswith("timm") else model
    with torch.no_grad(), heard(model) as (stock, strange):
        run(x)
    assert not strange
    before = {n: sorted(vars(m)) for n, m in model.named_modules()}
    with heard(model) as (seen, strange):
        scores = vtoken.cls_attention_scores(model, x, start_layer=0)
    assert strange == []
    assert stock == seen
    assert any("attn" in n or "attention" in n for _, n in seen)
    assert {n: sorted(vars(m)) for n, m in model.named_modules()} == before
    assert torch.equal(scores, vtoken.cls_attention_scores(model, x, start_layer=0))


def _inputs(model: Any, attentions: list[nn.Module], run: Callable[[], Any]) -> list[Tensor]:
    """What each attention is given in a stock forward."""
    found: list[Tensor] = []
    handles = [
        a.register_forward_pre_hook(lambda m, args, kw: found.append((*args, *kw.values())[0]), with_kwargs=True)
        for a in attentions
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return found


def _slow_row(attn: Any, x: Tensor) -> Tensor:
    """Row 0 of softmax(Q K^T), mean over heads, from the weights."""
    if hasattr(attn, "q_proj"):
        q, k = attn.q_proj(x), attn.k_proj(x)
    else:
        weight, bias = (
            (attn.qkv.weight, attn.qkv.bias) if hasattr(attn, "qkv") else (attn.in_proj_weight, attn.in_proj_bias)
        )
        q, k, _ = (x @ weight.T + bias).chunk(3, dim=-1)
    heads = getattr(attn, "num_heads", HEADS)
    q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))
    for norms in (("q_norm", "k_norm"), ("ln_q", "ln_k")):
        if hasattr(attn, norms[0]):
            q, k = getattr(attn, norms[0])(q), getattr(attn, norms[1])(k)
    maps = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
    return maps[:, :, 0].mean(1)


@pytest.mark.parametrize("name", [n for n in TOWERS if "rotary" not in n])
def test_scores_are_those_of_a_slow_reference_in_double_with_the_users_hooks(name: str) -> None:
    model, x = _tower(name)
    exact = copy.deepcopy(model).double()

    def both(tower: Any) -> tuple[list[Any], list[Any]]:
        attentions = [m for n, m in tower.named_modules() if n.endswith((".attn", "self_attn", "attention"))]
        blocks = [m for m in tower.modules() if any(a in list(m.children()) for a in attentions)]
        assert len(attentions) == len(blocks) == BLOCKS
        # Hooks that change what goes on: they belong to the model, whoever runs it.
        attentions[0].register_forward_hook(
            lambda m, args, out: (out[0] * 0.5, *out[1:]) if isinstance(out, tuple) else out * 0.5
        )
        blocks[1].register_forward_pre_hook(lambda m, args: (args[0] * 1.5, *args[1:]))
        return attentions, blocks

    attentions, _ = both(exact)
    rows = [
        _slow_row(a, i) for a, i in zip(attentions, _inputs(exact, attentions, lambda: exact(x.double())), strict=True)
    ]
    expected = torch.stack(rows).mean(0)[:, -64:]
    bare = vtoken.cls_attention_scores(model, x, start_layer=0)
    both(model)
    found = vtoken.cls_attention_scores(model, x, start_layer=0)
    assert_close(name, expected.float(), found, 1e-4)
    assert float((found - expected).abs().max()) < 1e-6
    assert float((bare - found).abs().max()) > 1e-4  # the hooks matter


@pytest.mark.parametrize("name", ["timm", "packed", "clip"])
def test_threads_with_different_watches_on_one_model(name: str) -> None:
    model, x = _tower(name)
    with torch.no_grad():
        plain = model(x)
    expected = [vtoken.cls_attention_scores(model, x, start_layer=i, last=i) for i in range(BLOCKS)]
    assert not torch.equal(expected[0], expected[1])
    wrong: list[int] = []
    ready = threading.Barrier(BLOCKS + 1)

    def work(layer: int) -> None:
        ready.wait()
        for _ in range(15):
            found = vtoken.cls_attention_scores(model, x, start_layer=layer, last=layer)
            if not torch.equal(found, expected[layer]):
                wrong.append(layer)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(BLOCKS)]
    for thread in threads:
        thread.start()
    ready.wait()
    for _ in range(15):
        with torch.no_grad():
            out = model(x)
        assert torch.equal(getattr(out, "last_hidden_state", out), getattr(plain, "last_hidden_state", plain))
    for thread in threads:
        thread.join()
    assert wrong == []


def test_hooks_of_a_llava_whose_prompt_is_shortened() -> None:
    from tests.hosts.llavas import build, prompt
    from tests.hosts.llavas import images as pictures

    model = build("llava")
    call = {**prompt([1, -36, 7]), "pixel_values": pictures(1)}
    vtoken.apply(model, vtoken.VTCCLS(num_tokens=4, start_layer=0))
    with heard(model, backward=True) as (seen, strange):
        model(**call).logits.sum().backward()
    assert strange == []
    layers = [n for n, m in model.named_modules() if type(m).__name__ == "CLIPEncoderLayer"]
    for name in [*layers[:-1], *(f"{n}.self_attn" for n in layers[:-1]), "model.multi_modal_projector"]:
        assert seen["before", name] == seen["after", name] == 1
    assert seen["backward", "model.multi_modal_projector"] == 1


@dataclass(frozen=True, kw_only=True)
class ByKeys(ShareConfig):
    """Keeps the first tokens, and the keys that it was shown; with or without the attention of their block."""

    method: ClassVar[str] = "by_keys"
    attention: bool = True

    def build(self, depth: int) -> Sharing:
        return _ByKeys(self)


class _ByKeys(Sharing):
    config: Any
    shown: ClassVar[list[Tensor]] = []

    def needs(self, tower: TowerFacts) -> Needs:
        if self.config.attention:
            return Needs("class", (tower.last,), frozenset({"keys"}))
        return Needs(features=frozenset({"keys"}))

    def choose(self, seen: Seen) -> Tensor:
        assert seen.keys is not None
        self.shown.append(seen.keys)
        return torch.arange(seen.count)


def test_keys_of_a_llava_are_shown_without_attention_too() -> None:
    from tests.hosts.llavas import build, prompt
    from tests.hosts.llavas import images as pictures

    model, found = build("llava"), []
    for attention in (True, False):
        _ByKeys.shown.clear()
        with vtoken.applied(model, ByKeys(num_tokens=4, attention=attention)), torch.no_grad():
            model(**prompt([1, -36, 7]), pixel_values=pictures(1))
        found.append(_ByKeys.shown[0])
    assert found[0].shape[0] == 36
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["packed", "own", "timm"])
def test_hooks_of_a_clip_in_attentive_training(kind: str) -> None:
    from tests.clip.models import batch, clip, timm_clip, wrap

    model = timm_clip() if kind == "timm" else clip(**({"qk_norm": True} if kind == "own" else {}))
    wrapper = wrap(model)
    x, t = batch(2, 160 if kind == "timm" else 32)
    plain = wrapper(x, t)["image_features"]
    with heard(wrapper, backward=True) as (seen, strange):
        out = wrapper(x, t)["image_features"]
        out.sum().backward()
    assert strange == []
    assert torch.equal(out, plain)
    tower = "visual.trunk" if kind == "timm" else "visual"
    blocks = [n for n, m in wrapper.named_modules() if type(m).__name__.endswith(("Block", "AttentionBlock"))]
    inside = [n for n in blocks if f".{tower}." in n]
    assert {n.partition(".")[0] for n in inside} == {"model", "teacher"}
    for name in [f"model.{tower}", f"teacher.{tower}", *inside, *(f"{n}.attn" for n in inside)]:
        assert seen["before", name] == seen["after", name] == 1, name
        assert seen["backward", name] == (1 if name.startswith("model") else 0), name


@pytest.mark.parametrize("kind", ["timm", "packed"])
def test_a_tower_with_patches_left_out(kind: str) -> None:
    """Against the same tower with its patch dropout doing it; all rows, and all of them read."""
    model, x = _tower(kind)
    adapter, slot = find_adapter(model), "patch_drop" if kind == "timm" else "patch_dropout"
    spec = adapter.patch_spec(model)
    assert spec.size == (4, 4)
    assert spec.image_size == (32, 32)
    assert spec.features == {"timm": 32, "packed": WIDTH}[kind]
    rows = torch.tensor([[0, 3, 9, 64], [0, 1, 2, 40]])

    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([tokens[r] for tokens, r in zip(x, rows, strict=True)])

    with torch.no_grad():
        out, whole = adapter.masked(model, x, rows)[1], adapter.masked(model, x, None)[1]
        watch = Watch([0, 2])
        assert torch.equal(adapter.masked(model, x, None, watch)[1], whole)
        assert torch.equal(whole, model(x))
        scores = vtoken.cls_attention_scores(model, x, start_layer=0, ensemble="sum")
        middle = vtoken.cls_attention_scores(model, x, start_layer=1, last=1)
        assert_close("two layers", scores - middle, watch.scores(2, "sum")[0][:, 1:], 1e-5)
        setattr(model, slot, Chosen())
        assert torch.equal(out, model(x))
    setattr(model, slot, Dropping())
    with pytest.raises(vtoken.ConfigError, match="drops patches itself"):
        adapter.patch_spec(model)
    setattr(model, slot, nn.Identity())
    vtoken.apply(model, vtoken.PiToMe(ratio=0.9))
    for verb in (lambda: adapter.patch_spec(model), lambda: adapter.masked(model, x, rows)):
        with pytest.raises(vtoken.UnsupportedModelError, match="carries a method"):
            verb()


class Dropping(nn.Module):
    prob = 0.5


def test_a_watch_may_stop_behind_the_last_block_that_it_reads() -> None:
    model, x = _tower("packed")
    adapter = find_adapter(model)
    for stop in (False, True):
        with heard(model) as (seen, _), torch.no_grad():
            watch = Watch([0, 1], stop=stop)
            adapter.masked(model, x, None, watch)
        assert seen["after", "transformer.resblocks.1"] == 1
        assert seen["after", "transformer.resblocks.2"] == (0 if stop else 1)
    with pytest.raises(vtoken.UnsupportedModelError, match="cannot leave out patches"):
        find_adapter(_tower("clip")[0]).patch_spec(nn.Identity())
