"""What others do to a patched model afterwards: parametrizations and FSDP2 subclass its classes once more."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize

import vtoken

PITOME = vtoken.PiToMe(ratio=0.8)


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def small_vit() -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    return model, torch.randn(2, 3, 32, 32)


def small_eva() -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.models.eva.Eva(
        img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=5, init_values=0.5
    )
    return model, torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize(("build", "path", "name"), [(small_vit, "", "pos_embed"), (small_eva, "blocks.1", "gamma_1")])
def test_parametrized_after_apply(build: Any, path: str, name: str) -> None:
    model, x = build()
    model.eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    owner = model.get_submodule(path)
    with torch.no_grad():
        before = model(x)
        vtoken.apply(model, PITOME)
        getattr(owner, name).mul_(2)
        expected = model(x)  # what doubling the parameter gives
        getattr(owner, name).div_(2)
        parametrize.register_parametrization(owner, name, Double())
        torch.testing.assert_close(model(x), expected)
        assert vtoken.is_applied(model)
        vtoken.remove(model)
        assert not vtoken.is_applied(model)
        assert not any(key.startswith("_vtoken") for m in model.modules() for key in vars(m))
        assert not any("Mixin" in c.__name__ for m in model.modules() for c in type(m).__mro__)
        parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
        assert torch.equal(model(x), before)
        vtoken.apply(model, PITOME)
        vtoken.remove(model)


def test_fsdp2_of_every_block_and_the_root_after_apply(tmp_path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, x = small_vit()
    before = model(x)
    vtoken.apply(model, PITOME)
    expected = model(x)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        out = model(x)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        vtoken.remove(model)
        assert not vtoken.is_applied(model)
        torch.testing.assert_close(model(x), before)
    finally:
        dist.destroy_process_group()


def test_cut_blocks_still_run() -> None:
    model, x = small_vit()
    vtoken.apply(model, PITOME)
    model.blocks = model.blocks[1:]
    _, trace = vtoken.trace(model, x)
    assert trace.tokens == [65, 53, 43]  # after the two blocks that are left
    assert trace.size.sum(1).tolist() == [65.0, 65.0]


def test_shared_blocks_and_replaced_methods_are_refused() -> None:
    model, _ = small_vit()
    model.blocks = nn.Sequential(*[model.blocks[0]] * 3)
    with pytest.raises(vtoken.UnsupportedModelError, match="one block module in several layers"):
        vtoken.apply(model, PITOME)
    model, _ = small_vit()
    model.forward_features = lambda x: x
    with pytest.raises(vtoken.UnsupportedModelError, match="forward_features was replaced on the instance"):
        vtoken.apply(model, PITOME)
    assert not vtoken.is_applied(model)


def test_messages_name_the_model_inside() -> None:
    wrapped = nn.Sequential(small_vit()[0])
    with pytest.raises(vtoken.UnsupportedModelError, match=r"supported VisionTransformer: use model\.0"):
        vtoken.apply(wrapped, PITOME)
    features = timm.create_model("vit_tiny_patch16_224", features_only=True)
    with pytest.raises(vtoken.UnsupportedModelError, match=r"use model\.model"):
        vtoken.apply(features, PITOME)
    with pytest.raises(vtoken.UnsupportedModelError, match="a single block"):
        vtoken.apply(small_vit()[0].blocks[0], PITOME)


@pytest.mark.parametrize("config", [vtoken.PiToMe, None, 0.9, [], [1]])
def test_things_that_are_no_settings(config: Any) -> None:
    with pytest.raises(vtoken.ConfigError, match="expected settings such as"):
        vtoken.apply(small_vit()[0], config)


def test_sizes_of_images_are_checked() -> None:
    model, _ = small_vit()
    for size in (-1, 0, "64", (32,), (32, 32, 3)):
        with pytest.raises(vtoken.ShapeError, match="image size"):
            vtoken.plan(model, PITOME, img_size=size)
    for size in (64, (64, 64), (1, 3, 32, 32)):
        with pytest.raises(vtoken.ShapeError, match="input_size"):
            vtoken.report(model, PITOME, input_size=size)
    with pytest.raises(vtoken.ConfigError, match="protect names patch 64"):
        vtoken.apply(model, vtoken.PiToMe(protect=(64,)))
    assert not vtoken.is_applied(model)


def test_applied_always_undoes_and_only_what_it_did() -> None:
    model, _ = small_vit()
    with vtoken.applied(model, PITOME):
        vtoken.remove(model)
    with vtoken.applied(model, PITOME), pytest.raises(vtoken.ConfigError, match="cannot replace"):
        vtoken.applied(model, PITOME, replace=True).__enter__()
    assert not vtoken.is_applied(model)
