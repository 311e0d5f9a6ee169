"""The losses against versions written in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from open_clip import ClipLoss
from open_clip.loss import SigLipLoss

import vtoken
from vtoken.methods.attentive_clip.loss import byol_loss, clip_loss

B, E, D = 6, 10, 7


def unit(x: Any) -> Any:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cross_entropy(logits: Any) -> float:
    """Of rows whose label is their index, -inf for what does not count."""
    peak = logits.max(1, keepdims=True)
    total = np.log(np.exp(logits - peak).sum(1)) + peak[:, 0]
    return float((total - logits[np.arange(len(logits)), np.arange(len(logits))]).mean())


def numpy_clip(u: Any, t: Any, scale: float, bias: float = 0.0) -> float:
    logits = scale * u @ t.T + bias
    return (cross_entropy(logits) + cross_entropy(logits.T)) / 2


def numpy_simclr(a: Any, b: Any, tau: float) -> float:
    a, b = unit(a), unit(b)
    off = np.where(np.eye(len(a), dtype=bool), -np.inf, 0.0)
    first = np.concatenate([a @ b.T / tau, a @ a.T / tau + off], 1)
    second = np.concatenate([b @ a.T / tau, b @ b.T / tau + off], 1)
    return (cross_entropy(first) + cross_entropy(second)) / 2


def numpy_byol(p: Any, t: Any) -> float:
    return sum(float((2 - 2 * (unit(p[:, v]) * unit(t)).sum(-1)).mean()) for v in range(p.shape[1]))


@pytest.fixture
def made() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "image_features": unit(rng.standard_normal((B, 2, E))), "text_features": unit(rng.standard_normal((B, E))),
        "logit_scale": np.float64(14.3), "simclr": rng.standard_normal((B, 2, D)),
        "byol": rng.standard_normal((B, 2, D)), "byol_target": rng.standard_normal((B, D)),
    }  # fmt: skip


def tensors(made: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {name: torch.as_tensor(value).to(dtype) for name, value in made.items()}


def test_all_terms(made: dict[str, Any]) -> None:
    u, t = made["image_features"], made["text_features"]
    expected = {
        "contrastive_loss": (numpy_clip(u[:, 0], t, 14.3) + numpy_clip(u[:, 1], t, 14.3)) / 2,
        "simclr_loss": 0.3 * numpy_simclr(made["simclr"][:, 0], made["simclr"][:, 1], 0.2),
        "byol_loss": 0.7 * numpy_byol(made["byol"], made["byol_target"]),
    }
    loss = vtoken.AttentiveMaskLoss(simclr_weight=0.3, byol_weight=0.7, temperature=0.2)
    found: Any = loss(**tensors(made), output_dict=True)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert abs(float(found[name]) - value) < 1e-5, name
    assert abs(float(loss(**tensors(made))) - sum(expected.values())) < 1e-5


def test_published_writing_gives_the_same_numbers(made: dict[str, Any]) -> None:
    """0.5 + 0.5 of two contrastive terms, and twice the mean over 2B BYOL terms."""
    u, t, p = made["image_features"], made["text_features"], made["byol"]
    found: Any = vtoken.AttentiveMaskLoss()(**tensors(made), output_dict=True)
    contrastive = 0.5 * numpy_clip(u[:, 0], t, 14.3) + 0.5 * numpy_clip(u[:, 1], t, 14.3)
    both = [2 - 2 * float(unit(p[i, v]) @ unit(made["byol_target"][i])) for i in range(B) for v in (0, 1)]
    assert abs(float(found["contrastive_loss"]) - contrastive) < 1e-5
    assert abs(float(found["byol_loss"]) - 2 * float(np.mean(both))) < 1e-5


@pytest.mark.parametrize("theirs", [None, ClipLoss(), SigLipLoss()], ids=["ours", "ClipLoss", "SigLipLoss"])
def test_features_of_any_length_are_normalised(theirs: Any) -> None:
    """Of orthogonal pairs at scale 1 the CLIP loss is log(1 + 1/e), whatever the features' lengths."""
    u, loss = torch.eye(2), vtoken.AttentiveMaskLoss(contrastive=theirs)
    scale, bias = torch.tensor(1.0), torch.zeros(()) if isinstance(theirs, SigLipLoss) else None
    expected = float(loss(u, u, scale, bias))
    if theirs is None or isinstance(theirs, ClipLoss):
        assert abs(expected - np.log1p(np.exp(-1))) < 1e-6
    for image, text in ((2 * u, u), (u, 0.1 * u), (torch.stack([3 * u, 0.5 * u], 1), 7 * u)):
        assert abs(float(loss(image, text, scale, bias)) - expected) < 1e-6


def test_a_loss_of_the_users_gets_the_dtype_of_the_features() -> None:
    seen = []
    loss = vtoken.AttentiveMaskLoss(contrastive=lambda u, t, s: seen.append((u, t)) or (u * t).sum())
    u = torch.randn(3, 8).bfloat16()
    loss(5 * u, u, torch.tensor(1.0))
    assert {x.dtype for x in seen[0]} == {torch.bfloat16}
    assert torch.allclose(seen[0][0].float().norm(dim=1), torch.ones(3), atol=1e-2)


def test_one_view_is_open_clips_loss(made: dict[str, Any]) -> None:
    given = tensors({name: made[name] for name in ("image_features", "text_features", "logit_scale")})
    given["image_features"] = given["image_features"][:, 0]
    bias = {"logit_bias": torch.tensor(-3.0)}
    assert torch.allclose(vtoken.AttentiveMaskLoss()(**given), ClipLoss()(**given), atol=1e-6)
    assert torch.allclose(vtoken.AttentiveMaskLoss()(**given, **bias), ClipLoss()(**given, **bias), atol=1e-6)


@pytest.mark.parametrize("kind", [ClipLoss, SigLipLoss])
def test_open_clips_losses_are_called_once_per_view(made: dict[str, Any], kind: Any) -> None:
    given = tensors({name: made[name] for name in ("image_features", "text_features", "logit_scale")})
    bias = torch.tensor(-3.0)
    views = [kind()(f, given["text_features"], given["logit_scale"], bias) for f in given["image_features"].unbind(1)]
    found = vtoken.AttentiveMaskLoss(contrastive=kind())(**given, logit_bias=bias)
    assert torch.allclose(found, (views[0] + views[1]) / 2, atol=1e-6)


def test_known_values(made: dict[str, Any]) -> None:
    given = tensors(made)
    same = given["byol_target"].unsqueeze(1) * torch.tensor([2.0, 0.5]).view(1, 2, 1)
    assert abs(float(byol_loss(same, given["byol_target"]))) < 1e-6
    assert abs(float(byol_loss(-same, given["byol_target"])) - 8) < 1e-5
    loss = vtoken.AttentiveMaskLoss()
    twice = given["simclr"][:, :1].expand(-1, 2, -1)
    equal: Any = loss(**given | {"simclr": twice}, output_dict=True)
    different: Any = loss(**given, output_dict=True)
    assert float(equal["simclr_loss"]) < 0.1 * float(different["simclr_loss"])


def test_targets_get_no_gradient(made: dict[str, Any]) -> None:
    given = {name: value.requires_grad_() for name, value in tensors(made).items()}
    vtoken.AttentiveMaskLoss()(**given).backward()
    assert given["byol_target"].grad is None
    assert all(given[n].grad is not None for n in given if n != "byol_target")


def test_losses_are_float32_in_half_precision(made: dict[str, Any]) -> None:
    """Features that are bfloat16 are taken as they are; nothing after them is rounded."""
    given = tensors(made, torch.bfloat16)
    given["logit_scale"] = torch.tensor(14.3)
    exact: Any = vtoken.AttentiveMaskLoss()(**{n: v.float() for n, v in given.items()}, output_dict=True)
    with torch.autocast("cpu", torch.bfloat16):
        found: Any = vtoken.AttentiveMaskLoss()(**given, output_dict=True)
    for name, value in exact.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value), name


def test_errors(made: dict[str, Any]) -> None:
    given = tensors(made)
    with pytest.raises(vtoken.ShapeError, match=r"\(6, 2, 10\).*AttentiveMaskLoss\(contrastive=\.\.\.\)"):
        clip_loss(given["image_features"], given["text_features"], given["logit_scale"])
    with pytest.raises(RuntimeError):  # open_clip's own message; it must not go through
        ClipLoss()(given["image_features"], given["text_features"], given["logit_scale"])
    with pytest.raises(vtoken.ShapeError, match=r"simclr \[B, 2, D\]"):
        vtoken.AttentiveMaskLoss()(**given | {"simclr": torch.zeros(6, 3, 7)})
    with pytest.raises(vtoken.ShapeError, match="byol_target"):
        vtoken.AttentiveMaskLoss()(**given | {"byol_target": torch.zeros(6, 8)})
    with pytest.raises(vtoken.InputError, match="belong together"):
        vtoken.AttentiveMaskLoss()(**{name: value for name, value in given.items() if name != "byol_target"})
    with pytest.raises(vtoken.InputError, match="no text_features"):
        vtoken.AttentiveMaskLoss()(**given | {"text_features": None})
    for shape in ((10,), (6, 2, 2, 10), (5, 10), (6, 9)):
        with pytest.raises(vtoken.ShapeError, match="expected image_features"):
            vtoken.AttentiveMaskLoss()(**given | {"image_features": torch.zeros(shape)})
    for bad in (
        {"simclr_weight": -1.0}, {"byol_weight": -1.0}, {"temperature": 0.0}, {"simclr_weight": float("nan")},
        {"byol_weight": "1"}, {"temperature": float("inf")}, {"temperature": True}, {"world_size": 0}, {"rank": 0.5},
        {"rank": -1}, {"contrastive": 3},
    ):  # fmt: skip
        with pytest.raises(vtoken.ConfigError, match=next(iter(bad))):
            vtoken.AttentiveMaskLoss(**bad)
    with pytest.raises(vtoken.ConfigError, match="rank=2"):
        vtoken.AttentiveMaskLoss(rank=2, world_size=2)
