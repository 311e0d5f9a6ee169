"""Sparsifiner's predictors in transformers' models: both phases, by a loop and by the Trainer, and what is saved."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtoken
from tests.contract.table import attention, blocks, call, run
from tests.helpers import assert_close, assert_same, images
from tests.hosts.test_hf_masks import PLAIN, clip
from tests.methods.sparse_hosts import NESTED, TOWERS, sparse, taught
from vtoken.train import (
    Teacher,
    backbone_parameters,
    fine_tuning_loss,
    logits_and_tokens,
    parameter_groups,
    predictor_parameters,
    reconstruction_loss,
    set_phase,
)

hf = pytest.importorskip("transformers")
from safetensors.torch import load_file  # noqa: E402

F64 = torch.float64
x = images((3, 20, 20), 4)
labels = torch.tensor([1, 3, 5, 7])


def reconstruction(model: Any, pixels: Tensor) -> Tensor:
    """The loss of the first phase, with gradient."""
    with vtoken.tracing(model, maps=("scores", "attention")) as trace:
        call(model, pixels)
    records = trace.attention
    return reconstruction_loss([r.scores for r in records], [r.attention for r in records])


def _by_hand(model: Any, pixels: Tensor) -> Tensor:
    """The same from what enters every attention of a ViT or CLIP, by the weights themselves."""
    seen: list[Any] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((module, (args[0] if args else kwargs["hidden_states"]).detach()))

    handles = [attention(b).register_forward_pre_hook(hook, with_kwargs=True) for b in blocks(model)]
    with torch.no_grad():
        call(model, pixels)
    for handle in handles:
        handle.remove()
    total: Any = 0.0
    for attn, rows in seen:
        q, k = (part(rows).detach().unflatten(2, (2, 8)).transpose(1, 2) for part in (attn.q_proj, attn.k_proj))
        p = attn.predictor
        prefix = p.num_prefix
        dense = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)[:, :, prefix:]
        a = (p.reduce_q(q[:, :, prefix:]) @ (p.w_down.T @ p.reduce_k(k)).transpose(-1, -2) * 2**-0.5).softmax(-1)
        total = total + (a @ p.w_up.T - dense).square().sum()
    return 0.01 * total / len(seen)


@pytest.mark.parametrize("name", [n for n in PLAIN if n not in ("hf_dino", "hf_dinov3")])
def test_the_first_phase(name: str) -> None:
    """Outputs are the dense model's; predictors alone learn, by the plain formula's gradients."""
    model = TOWERS[name].model(dtype=F64)
    stock = run(model, x.double())
    sparse(model, keep_ratio=0.4).train()
    set_phase(model, "recon")
    assert_same("outputs", stock, run(model, x.double()))
    loss = reconstruction(model, x.double())
    loss.backward()
    grads = {n: p.grad.clone() for n, p in predictor_parameters(model)}
    assert all(p.grad is None for _, p in backbone_parameters(model))
    model.zero_grad()
    expected = _by_hand(model, x.double())
    expected.backward()
    assert_close("loss", expected, loss, 1e-6)
    for n, p in predictor_parameters(model):
        assert p.grad is not None
        assert_close(n, p.grad, grads[n], 1e-5)
    optimiser, losses = torch.optim.AdamW(parameter_groups(model), lr=3e-3), [float(loss.detach())]
    for _ in range(8):
        optimiser.zero_grad()
        loss = reconstruction(model, x.double())
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    assert_same("the backbone stayed", stock, run(model, x.double()))


@pytest.mark.parametrize("name", [n for n in ("hf_vit", "hf_dino") if n in TOWERS])
@pytest.mark.parametrize("pruned", [False, True])
def test_the_second_phase(name: str, pruned: bool) -> None:
    model = TOWERS[name].model(dtype=F64)
    sparse(model, keep_ratio=0.4, **({"token_keep_ratio": 0.6, "prune_after": (0, 1)} if pruned else {})).train()
    teacher, pixels = Teacher(model), x.double()
    set_phase(model, "sparse")
    optimiser, losses = torch.optim.AdamW(parameter_groups(model), lr=2e-3), []
    frozen = {n: p.detach().clone() for n, p in predictor_parameters(model)}
    for _ in range(6):
        with vtoken.tracing(model) as trace:
            logits, tokens = logits_and_tokens(model, pixels)
        kept = torch.stack([trace.kept(i) for i in range(4)]) if pruned else None
        ours = nn.functional.cross_entropy(logits, labels)
        loss = fine_tuning_loss(ours, logits, tokens, teacher(pixels), kept=kept)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        assert trace.attention[0].density == pytest.approx(11 / 26)
        assert tokens.shape == (4, 9 if pruned else 25, 16)
    assert losses[-1] < 0.9 * losses[0]
    for n, p in predictor_parameters(model):
        assert torch.equal(p, frozen[n])
        assert p.grad is None


@pytest.mark.parametrize("name", [n for n in ("hf_vit", "hf_dino") if n in TOWERS])
def test_logits_and_tokens_are_the_models_own(name: str) -> None:
    """A teacher has them of the model without masks, whatever becomes of the student."""
    model = TOWERS[name].model()
    tower = model.vit if name == "hf_vit" else model.dinov2
    with torch.no_grad():
        stock = (model(x).logits, tower(x).last_hidden_state[:, 1:])
        assert_same("stock", stock, logits_and_tokens(model, x))
    sparse(model, keep_ratio=0.4).train()
    teacher = Teacher(model)
    with torch.no_grad():
        next(iter(model.parameters())).add_(1)
    out = teacher.train()(x)
    assert_same("teacher", stock, (out.logits, out.tokens))
    assert not any(m.training for m in teacher.modules())
    logits, tokens = logits_and_tokens(model, x)
    assert logits.requires_grad
    assert tokens.requires_grad
    assert_same("student", run(model, x), logits.detach())


def test_models_without_logits_are_refused() -> None:
    for model in (clip(), TOWERS["hf_clip"].model()):
        with pytest.raises(vtoken.UnsupportedModelError, match=r"make TeacherOutput from your own frozen model"):
            logits_and_tokens(model, x)


@pytest.mark.parametrize("holder", [False, True])
def test_thresholds_of_sample_images(holder: bool) -> None:
    """A CLIP wants text besides: its image tower alone is shown the sample."""
    model = clip() if holder else TOWERS["hf_siglip"].model()
    sparse(model, keep_ratio=0.4)
    found = vtoken.calibrate_threshold(model, x, 0.3)
    assert vtoken.config_of(model).mode == "threshold"
    assert sorted(found) == [0, 1, 2]
    assert all(0.2 < density < 0.32 for density in found.values())


class _Recon(hf.Trainer):
    """The first phase, as a user writes it for the Trainer."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        loss = reconstruction(model, inputs["pixel_values"])
        return (loss, {}) if return_outputs else loss


class _Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": x[index], "labels": labels[index]}


def _arguments(folder: Path, **options: Any) -> Any:
    return hf.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_steps=1, seed=0, **options,
    )  # fmt: skip


def test_both_phases_by_the_trainer(tmp_path: Path) -> None:
    """Only what a phase teaches changes; a checkpoint is taken up again, masks and predictors as they were."""
    model = sparse(TOWERS["hf_vit"].model(), keep_ratio=0.4)
    set_phase(model, "recon")
    predictors, backbone = (
        {n: p.detach().clone() for n, p in some(model)} for some in (predictor_parameters, backbone_parameters)
    )
    trainer = _Recon(model=model, args=_arguments(tmp_path / "recon", save_strategy="no"), train_dataset=_Samples())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, backbone[n]) for n, p in backbone_parameters(model))
    assert not any(torch.equal(p, predictors[n]) for n, p in predictor_parameters(model))

    set_phase(model, "sparse")
    predictors = {n: p.detach().clone() for n, p in predictor_parameters(model)}
    trainer = hf.Trainer(model=model, args=_arguments(tmp_path / "tune", save_steps=2), train_dataset=_Samples())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, predictors[n]) for n, p in predictor_parameters(model))
    assert not torch.equal(model.classifier.weight, backbone["classifier.weight"])
    expected = run(model.eval(), x)

    again = sparse(TOWERS["hf_vit"].model(seed=3), keep_ratio=0.4, seed=3)
    set_phase(again, "sparse")
    arguments = _arguments(tmp_path / "again")
    resumed = hf.Trainer(model=again, args=arguments, train_dataset=_Samples())
    resumed.train(resume_from_checkpoint=str(tmp_path / "tune" / "checkpoint-2"))
    assert_close("taken up again", expected, run(again.eval(), x), 1e-5)


def _loaded(folder: Path, like: Any) -> Any:
    """The model that `like` was saved as, without its learned parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = vtoken.restore(type(like).from_pretrained(folder, attn_implementation=like.config._attn_implementation))
    return model.eval()


def _weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return weights


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_what_is_learnt_is_saved_by_the_models_own_names(name: str, share: bool, tmp_path: Path) -> None:
    """from_pretrained, restore, load_state_dict: docs/travel.md 3."""
    model = sparse(TOWERS[name].model(), keep_ratio=0.4, share_proj=share)
    model.save_pretrained(tmp_path)
    again = _loaded(tmp_path, model)
    again.load_state_dict(_weights(tmp_path))
    assert vtoken.config_of(again) == vtoken.config_of(model)
    assert_same("restored", run(model, x), run(again, x))
    vtoken.remove(again)
    vtoken.remove(model)
    assert_same("removed", run(model, x), run(again, x))
    vtoken.save_settings(taught(vtoken.apply(model, vtoken.Sparsifiner(keep_ratio=0.3))), tmp_path / "file")
    with pytest.warns(vtoken.VTokenWarning, match="learned parts are new"):
        vtoken.load_settings(again, tmp_path / "file")
    again.load_state_dict(model.state_dict())
    assert_same("from the file", run(model, x), run(again, x))


def test_a_model_without_learned_parts_is_saved_as_transformers_does(tmp_path: Path) -> None:
    model = TOWERS["hf_vit"].model()
    model.save_pretrained(tmp_path / "stock")
    vtoken.apply(model, vtoken.PiToMe(ratio=0.8)).save_pretrained(tmp_path / "merging")
    stock, merging = (_weights(tmp_path / name) for name in ("stock", "merging"))
    assert list(stock) == list(merging)


@pytest.mark.parametrize(
    "config", [vtoken.PiToMe(ratio=0.8), *([] if NESTED else [vtoken.Sparsifiner(keep_ratio=0.4)])]
)
def test_the_settings_of_a_backbone_travel(config: vtoken.MethodConfig, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
    stock = hf.Dinov2Backbone(hf.Dinov2Config(**sizes, image_size=20, out_features=["stage2"])).eval()
    model = vtoken.apply(copy.deepcopy(stock), config)
    model.save_pretrained(tmp_path)
    again = _loaded(tmp_path, model)
    if config.method == "sparsifiner":
        again.load_state_dict(_weights(tmp_path))
    assert vtoken.config_of(again) == config
    assert_same("restored", run(model, x), run(again, x))
