"""LoRA through peft, on a patched model and under one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtoken
from tests.ecosystem.towers import OPEN_CLIP, PITOME, TIMM, Tower, either_order, every_tower, loss_of
from tests.helpers import assert_close, assert_same

peft = pytest.importorskip("peft")


def adapted(tower: Tower, model: nn.Module) -> Any:
    """The model with random (not zero) adapters, the same every time; eval mode."""
    config = peft.LoraConfig(target_modules=list(tower.lora), r=4, lora_alpha=8, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(model, config).eval()


def both(tower: Tower, first: str) -> Any:
    """A PeftModel around a patched model, made in either order."""
    model = tower.model(dtype=torch.float64)
    if first == "vtoken first":
        return adapted(tower, vtoken.apply(model, PITOME))
    wrapped = adapted(tower, model)
    vtoken.apply(wrapped.base_model.model, PITOME)
    return wrapped


def plain_weights(wrapped: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Adapters (leaves) by their name in the PeftModel, and W + B A * scaling by its name in the bare model."""
    leaves, sums = {}, {}
    merged = copy.deepcopy(wrapped).merge_and_unload()
    for name, layer in wrapped.base_model.model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        base = layer.get_base_layer()
        key = "in_proj_weight" if isinstance(base, nn.MultiheadAttention) else "weight"
        down, up = (part["default"].weight.detach().clone().requires_grad_() for part in (layer.lora_A, layer.lora_B))
        leaves |= {f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up}
        bare = f"{name.replace('.base_layer', '')}.{key}"
        weight, delta = getattr(base, key).detach(), up @ down * layer.scaling["default"]
        sums[bare] = weight + delta
        # peft 0.21 adds the output projection of packed attention twice (without vtoken too), once outside the graph.
        shown = delta.detach()
        times = float(((merged.get_parameter(bare).detach() - weight) * shown).sum() / shown.square().sum())
        sums[bare] = sums[bare] + (round(times) - 1) * shown
    return leaves, sums


@either_order
@every_tower
def test_adapters_are_added_weights_in_value_and_gradient(tower: Tower, first: str) -> None:
    x = tower.images(dtype=torch.float64)
    wrapped = both(tower, first)
    leaves, sums = plain_weights(wrapped)
    plain = vtoken.apply(tower.model(dtype=torch.float64), PITOME)
    expected = torch.func.functional_call(plain, sums, (x,))
    loss_of(expected).backward()
    with torch.no_grad():
        assert float((expected - plain(x)).norm() / expected.norm()) > 0.1, "the adapters do nothing"

    out, trace = vtoken.trace(wrapped, x)
    assert trace.tokens == tower.tokens
    assert_close("output", expected, out, 1e-9)
    loss_of(out).backward()
    found = dict(wrapped.base_model.model.named_parameters())
    assert {n for n, p in found.items() if p.grad is not None} == set(leaves), "only adapters learn"
    for name, leaf in leaves.items():
        assert float(leaf.grad.abs().max()) > 1e-6
        assert_close(f"gradient of {name}", leaf.grad, found[name].grad, 1e-7)


@every_tower
def test_training_moves_only_adapters_and_merging_them_in_keeps_the_output(tower: Tower) -> None:
    x = tower.images(dtype=torch.float64)
    wrapped = both(tower, "vtoken first").train()
    before = {n: p.detach().clone() for n, p in wrapped.named_parameters()}
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = loss_of(wrapped(x))
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    moved = {n for n, p in wrapped.named_parameters() if float((p.detach() - before[n]).abs().max()) > 1e-9}
    assert moved == {n for n in before if "lora_" in n}

    with torch.no_grad():
        out = wrapped.eval()(x)
        merged = wrapped.merge_and_unload()
        assert vtoken.trace(merged, x)[1].tokens == tower.tokens
        assert_close("merged into the weights", out, merged(x), 1e-9)
        stock = tower.model(dtype=torch.float64)
        stock.load_state_dict(merged.state_dict())
        assert_same("removed", stock(x), vtoken.remove(merged)(x))


@every_tower
def test_remove_and_apply_inside_a_peft_model(tower: Tower) -> None:
    x = tower.images(dtype=torch.float64)
    wrapped = both(tower, "vtoken first")
    with torch.no_grad():
        merged = wrapped(x)
        with wrapped.disable_adapter():
            plain = vtoken.apply(tower.model(dtype=torch.float64), PITOME)
            # peft adds an adapter to a packed weight and takes it off again, which costs the last digits.
            assert_close("adapters off", plain(x), wrapped(x), 1e-12)
        vtoken.configure(wrapped, ratio=0.9)
        assert vtoken.trace(wrapped, x)[1].tokens[-1] > tower.tokens[-1]
        vtoken.remove(wrapped)
        assert not vtoken.is_applied(wrapped)
        assert_close("removed", adapted(tower, tower.model(dtype=torch.float64))(x), wrapped(x), 1e-12)
        with pytest.raises(vtoken.UnsupportedModelError, match=r"model\.base_model\.model"):
            vtoken.apply(wrapped, PITOME)
        vtoken.apply(wrapped.base_model.model, PITOME)
        assert_close("applied again", merged, wrapped(x), 1e-12)


@every_tower
def test_adapter_files_do_not_know_of_vtoken(tower: Tower, tmp_path: Any) -> None:
    x = tower.images(dtype=torch.float64)
    wrapped = both(tower, "vtoken first")
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tower.model(dtype=torch.float64), tmp_path).eval()
    with torch.no_grad():
        expected = wrapped(x)
        assert_close("unpatched", vtoken.remove(wrapped)(x), loaded(x), 1e-9)
        vtoken.apply(loaded.get_base_model(), PITOME)
        assert_close("patched", expected, loaded(x), 1e-9)


def test_short_names_reach_the_patch_embedding_too() -> None:
    """The page warns of it: "proj" is the name of two layers of a timm ViT."""
    config = peft.LoraConfig(target_modules=["proj"], r=2)
    names = [n for n, m in peft.get_peft_model(TIMM.model(), config).named_modules() if hasattr(m, "lora_A")]
    assert any(n.endswith("patch_embed.proj") for n in names)


class Doubled(nn.MultiheadAttention):
    """An attention with a forward of its own."""

    def forward(self, *args: Any, **options: Any) -> Any:
        return 2 * super().forward(*args, **options)[0], None


def test_attention_that_was_replaced_is_not_bypassed() -> None:
    model, x = vtoken.apply(OPEN_CLIP.model(), PITOME), OPEN_CLIP.images()
    own = Doubled(32, 4, batch_first=True)
    model.transformer.resblocks[1].attn = own
    with pytest.raises(vtoken.UnsupportedModelError, match="Doubled after vtoken"):
        model(x)
    vtoken.remove(model)
    model(x)
    with pytest.raises(vtoken.UnsupportedModelError, match="Doubled"):
        vtoken.apply(model, PITOME)


def test_hooks_on_packed_attention_run_where_tokens_merge() -> None:
    model, x = OPEN_CLIP.model(), OPEN_CLIP.images()
    attn = model.transformer.resblocks[1].attn
    handle = attn.register_forward_hook(lambda module, args, out: (2 * out[0], out[1]))
    with torch.no_grad():
        doubled = copy.deepcopy(OPEN_CLIP.model())
        for parameter in doubled.transformer.resblocks[1].attn.out_proj.parameters():
            parameter.mul_(2)
        expected = vtoken.apply(doubled, PITOME)(x)
        assert_close("with the hook", expected, vtoken.apply(model, PITOME)(x), 1e-5)
        handle.remove()
        assert float((model(x) - expected).norm() / expected.norm()) > 0.05
