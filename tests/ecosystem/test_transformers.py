"""transformers towers under the tools that people use with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtoken

transformers = pytest.importorskip("transformers")
PITOME = vtoken.PiToMe(ratio=0.8)


def tower() -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=4
    )
    model = transformers.CLIPVisionModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_peft_lora_counts_in_keys_and_values() -> None:
    peft = pytest.importorskip("peft")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "fc1"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(tower(), config)
    merged = peft.get_peft_model(tower(), config)
    merged.load_state_dict(adapted.state_dict())
    merged = merged.merge_and_unload()
    with torch.no_grad():
        vtoken.apply(adapted.base_model.model, PITOME)
        vtoken.apply(merged, PITOME)
        torch.testing.assert_close(
            adapted(pixel_values=x).last_hidden_state, merged(x).last_hidden_state, rtol=1e-4, atol=1e-5
        )
    adapted(pixel_values=x).pooler_output.sum().backward()
    learned = [n for n, p in adapted.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0]
    assert learned
    assert all("lora_" in name for name in learned)


def test_accelerate_hooks_around_a_patched_tower() -> None:
    accelerate = pytest.importorskip("accelerate")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    plain, offloaded = vtoken.apply(tower(), PITOME), tower()
    with torch.no_grad():
        expected = plain(x).last_hidden_state
        accelerate.cpu_offload(offloaded, execution_device="cpu")
        vtoken.apply(offloaded, PITOME)
        torch.testing.assert_close(offloaded(x).last_hidden_state, expected)
        vtoken.remove(offloaded)
        vtoken.remove(plain)
        torch.testing.assert_close(offloaded(x).last_hidden_state, plain(x).last_hidden_state)


def test_bf16_prepared_tower_merges_or_says_why_not() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    try:
        prepared = accelerator.prepare(tower())
        try:
            vtoken.apply(prepared, PITOME)
        except vtoken.VTokenError as error:
            assert "prepare" in str(error) or "replaced" in str(error)  # noqa: PT017
            return
        x = torch.randn(2, 3, 32, 32)
        assert prepared(x).last_hidden_state.shape[1] == 35
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
