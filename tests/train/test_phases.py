"""Phases, parameter groups, the teacher, and both phases of training on a small model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import vtoken
from tests.contract.table import run, snapshot
from tests.helpers import assert_close, assert_same, randomise_, vit
from tests.methods.sparse_hosts import HOSTS, blocks, open_clip_tower, sparse
from vtoken.train import (
    Teacher,
    backbone_parameters,
    fine_tuning_loss,
    parameter_groups,
    predictor_parameters,
    reconstruction_loss,
    set_phase,
)

F64 = torch.float64


def student(**options: Any) -> Any:
    return sparse(HOSTS["registers"].model(dtype=F64), **({"keep_ratio": 0.4} | options)).train()


def test_the_two_kinds_of_parameters_are_everything() -> None:
    model = student(share_proj=True)
    ours, rest = dict(predictor_parameters(model)), dict(backbone_parameters(model))
    assert not set(ours) & set(rest)
    assert set(ours) | set(rest) == {n for n, _ in model.named_parameters()}
    parts = {n.rpartition("predictor.")[2] for n in ours}
    assert parts == {"reduce_q.weight", "reduce_q.bias", "reduce_k.weight", "reduce_k.bias", "w_down"}
    alone = vtoken.nn.SparseAttention(16, 2, grid=(4, 6))
    assert len(list(predictor_parameters(alone))) == 6
    assert {n for n, _ in backbone_parameters(alone)} == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}


def test_phases_freeze_and_free() -> None:
    model = student()
    for phase, learns in (("recon", True), ("sparse", False), ("recon", True)):
        set_phase(model, phase)
        assert vtoken.config_of(model).phase == phase
        assert all(p.requires_grad is learns for _, p in predictor_parameters(model))
        assert all(p.requires_grad is not learns for _, p in backbone_parameters(model))
    with pytest.raises(vtoken.ConfigError, match="phase"):
        set_phase(model, "joint")
    vtoken.remove(model)
    with pytest.raises(vtoken.VTokenError, match="no connectivity predictors"):
        set_phase(model, "recon")


def test_parameter_groups() -> None:
    model = student()
    set_phase(model, "recon")
    groups = parameter_groups(model, weight_decay=0.1)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, plain = ([names[id(p)] for p in g["params"]] for g in groups)
    assert all(n.endswith(("weight", "w_down", "w_up")) and "predictor" in n for n in decayed)
    assert all(n.endswith("bias") and "predictor" in n for n in plain)
    assert len(decayed + plain) == len(set(decayed + plain)) == 18
    set_phase(model, "sparse")
    decayed, plain = ([names[id(p)] for p in g["params"]] for g in parameter_groups(model))
    assert not any("predictor" in n for n in decayed + plain)
    assert {n for n in plain if "norm" in n}
    assert set(decayed + plain) == {n for n, _ in backbone_parameters(model)}
    assert all(dict(model.named_parameters())[n].ndim > 1 for n in decayed)
    assert [g["weight_decay"] for g in parameter_groups(model)] == [0.05, 0.0]
    model.requires_grad_(False)
    assert parameter_groups(model) == []


def test_the_teacher_is_frozen_dense_and_its_own() -> None:
    model = student()
    before, x = snapshot(model), HOSTS["registers"].images(dtype=F64)
    teacher = Teacher(model)
    assert snapshot(model) == before
    assert not vtoken.is_applied(teacher.model)
    assert not any(p.requires_grad for p in teacher.parameters())
    dense = HOSTS["registers"].model(dtype=F64)
    for _ in range(2):
        assert not any(m.training for m in teacher.modules())
        out = teacher(x)
        assert_same("logits", run(dense, x), out.logits)
        with torch.no_grad():
            assert_same("tokens", dense.forward_features(x)[:, 3:], out.tokens)
        assert not out.logits.requires_grad
        teacher.train()
        nn.ModuleList([teacher]).train()
    with torch.no_grad():
        next(iter(model.parameters())).add_(1)
    assert_same("after the student has learnt", out.logits, teacher(x).logits)
    assert_same("of an unpatched model", out.logits, Teacher(dense.train())(x).logits)
    with pytest.raises(vtoken.UnsupportedModelError, match="make TeacherOutput from your own"):
        Teacher(open_clip_tower())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_first_phase(checkpointed: bool) -> None:
    """Outputs are the teacher's; only predictors have gradients, those of the plain formula; steps lower the loss."""
    model, x = student(), HOSTS["registers"].images(dtype=F64)
    teacher = Teacher(model)
    set_phase(model, "recon")
    model.set_grad_checkpointing(checkpointed)
    optimiser, losses = torch.optim.AdamW(parameter_groups(model), lr=3e-3), []
    frozen = {n: p.detach().clone() for n, p in backbone_parameters(model)}
    for step in range(12):
        with vtoken.tracing(model, maps=("scores", "attention")) as trace:
            logits = model(x)
        assert_close("the student's outputs", teacher(x).logits, logits, 1e-10)
        records = trace.attention
        loss = reconstruction_loss([r.scores for r in records], [r.attention for r in records])
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            expected = _reconstruction_by_hand(model, x)
            assert float(loss) == pytest.approx(float(expected), rel=1e-5)
            grads = {n: p.grad.clone() for n, p in predictor_parameters(model)}
            optimiser.zero_grad()
            expected.backward()
            for n, p in predictor_parameters(model):
                assert_close(n, p.grad, grads[n], 1e-4)
        assert all(p.grad is None for _, p in backbone_parameters(model))
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    for n, p in backbone_parameters(model):
        assert torch.equal(p, frozen[n])


def _reconstruction_by_hand(model: Any, x: torch.Tensor) -> torch.Tensor:
    """The loss from the inputs of every attention, without vtoken's forward."""
    seen: list[Any] = []
    handles = [
        b.attn.register_forward_pre_hook(lambda m, args: seen.append((m, args[0].detach()))) for b in blocks(model)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    total: Any = 0.0
    for attn, rows in seen:
        q, k, _ = attn.qkv(rows).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q).detach(), attn.k_norm(k).detach()
        dense, p = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)[:, :, 3:], attn.predictor
        a = (p.reduce_q(q[:, :, 3:]) @ (p.w_down.T @ p.reduce_k(k)).transpose(-1, -2) * 2**-0.5).softmax(-1)
        total = total + (a @ p.w_up.T - dense).square().sum()
    return 0.01 * total / len(seen)


@pytest.mark.parametrize("pruned", [False, True])
def test_the_second_phase(pruned: bool) -> None:
    """Masks are live, predictors stay what they are, the loss falls."""
    model = student(token_keep_ratio=0.6, prune_after=(0, 1)) if pruned else student()
    teacher, x = Teacher(model), HOSTS["registers"].images(batch=4, dtype=F64)
    target = torch.tensor([1, 3, 5, 7])
    set_phase(model, "sparse")
    optimiser, losses = torch.optim.AdamW(parameter_groups(model), lr=2e-3), []
    frozen = {n: p.detach().clone() for n, p in predictor_parameters(model)}
    for _ in range(8):
        with vtoken.tracing(model) as trace:
            features = model.forward_features(x)
        logits = model.forward_head(features)
        kept = torch.stack([trace.kept(i) for i in range(4)]) if pruned else None
        loss = fine_tuning_loss(
            nn.functional.cross_entropy(logits, target), logits, features[:, 3:], teacher(x), kept=kept
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        assert trace.attention[0].density == pytest.approx(11 / 27)
        assert trace.tokens[-1] == (12 if pruned else 27)
    assert losses[-1] < 0.9 * losses[0]
    for n, p in predictor_parameters(model):
        assert torch.equal(p, frozen[n])
        assert p.grad is None


def test_reconstruction_needs_all_tokens() -> None:
    model = vtoken.apply(HOSTS["cls"].model(), [vtoken.PiToMe(ratio=0.7), vtoken.Sparsifiner(phase="recon")])
    run(model, HOSTS["cls"].images())  # dense attention over merged tokens is well defined
    with pytest.raises(vtoken.ShapeError, match="reconstruction"), vtoken.tracing(model, maps=("scores",)):
        model(HOSTS["cls"].images())


def test_a_trained_model_is_saved_with_its_phase() -> None:
    model = student()
    set_phase(model, "recon")
    twin = copy.deepcopy(model)
    assert vtoken.config_of(twin).phase == "recon"
    set_phase(twin, "sparse")
    assert vtoken.config_of(model).phase == "recon"


def test_dropout_does_not_stand_between_student_and_teacher() -> None:
    model = randomise_(vit(drop_rate=0.5, attn_drop_rate=0.5), 0).double().train()
    teacher = Teacher(model)
    x = torch.randn(2, 3, 32, 32, dtype=F64)
    assert_same("teacher", teacher(x).logits, teacher.train()(x).logits)
