"""The two losses of Sparsifiner, against plain formulas (docs/methods/sparsifiner.md 6)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtoken
from tests.helpers import assert_close
from vtoken.train import TeacherOutput, distillation_loss, fine_tuning_loss, reconstruction_loss, token_loss

RNG = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_reconstruction_loss(prefix: int) -> None:
    """0.01 times the mean over layers of the squared errors' sum (or mean) over batch, heads, patch rows and keys."""
    scores = [normal(2, 3, 4, 4 + prefix) for _ in range(5)]
    attention = [normal(2, 3, 4 + prefix, 4 + prefix) for _ in range(5)]
    total, count = 0.0, 0
    for s, a in zip(scores, attention, strict=True):
        for b in range(2):
            for h in range(3):
                for i in range(4):
                    for t in range(4 + prefix):
                        total += float(s[b, h, i, t] - a[b, h, prefix + i, t]) ** 2
                        count += 1
    for reduction, expected in (("sum", total / 5), ("mean", total / count)):
        found = reconstruction_loss([s.float() for s in scores], attention, reduction=reduction)
        assert float(found) == pytest.approx(0.01 * expected, rel=1e-5)
        found = reconstruction_loss(scores, [a[:, :, prefix:] for a in attention], weight=2.0, reduction=reduction)
        assert float(found) == pytest.approx(2 * expected, rel=1e-5)
    one, two = (reconstruction_loss([s.repeat(n, 1, 1, 1) for s in scores], [a.repeat(n, 1, 1, 1) for a in attention])
                for n in (1, 2))  # fmt: skip
    assert float(two) == pytest.approx(2 * float(one))  # as published, it grows with the batch


def test_reconstruction_loss_has_no_gradient_for_the_teacher() -> None:
    score, attention = normal(1, 1, 2, 3).requires_grad_(), normal(1, 1, 3, 3).requires_grad_()
    reconstruction_loss([score], [attention]).backward()
    assert attention.grad is None
    assert_close("gradient", 0.02 * (score - attention[:, :, 1:]), score.grad, 1e-6)


@pytest.mark.parametrize(
    ("scores", "attention", "options", "error"),
    [
        ([], [], {}, vtoken.ShapeError),
        ([normal(1, 1, 2, 3)], [], {}, vtoken.ShapeError),
        ([normal(1, 1, 2, 3)], [normal(1, 1, 3, 4)], {}, vtoken.ShapeError),
        ([normal(1, 1, 2, 3)], [normal(2, 1, 3, 3)], {}, vtoken.ShapeError),
        ([normal(1, 1, 2, 3)], [normal(1, 1, 1, 3)], {}, vtoken.ShapeError),
        ([normal(1, 1, 2, 3)], [normal(1, 1, 3, 3)], {"reduction": "max"}, vtoken.ConfigError),
    ],
)
def test_reconstruction_loss_errors(scores: Any, attention: Any, options: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        reconstruction_loss(scores, attention, **options)


def test_distillation_loss() -> None:
    student, teacher = normal(3, 5).requires_grad_(), normal(3, 5).requires_grad_()
    p, q = teacher.detach().softmax(-1), student.detach().softmax(-1)
    expected = sum(float(p[b, c]) * float((p[b, c] / q[b, c]).log()) for b in range(3) for c in range(5)) / 3
    found = distillation_loss(student, teacher)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(distillation_loss(teacher, teacher).detach()) == pytest.approx(0.0, abs=1e-6)
    found.backward()
    assert teacher.grad is None
    assert_close("gradient", (q - p) / 3, student.grad, 1e-5)


def test_token_loss() -> None:
    student, teacher = normal(2, 3, 4).requires_grad_(), normal(2, 6, 4).requires_grad_()
    kept = torch.tensor([[0, 2, 5], [1, 3, 4]])
    a, b = student.detach(), teacher.detach().gather(1, kept.unsqueeze(-1).expand(-1, -1, 4))
    expected = sum((x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    found = token_loss(student, teacher, kept)
    assert float(found.detach()) == pytest.approx(expected / 24, rel=1e-5)
    found.backward()
    assert teacher.grad is None
    teacher, whole = teacher.detach(), normal(2, 6, 4)
    assert float(token_loss(whole, teacher)) == pytest.approx(float((whole - teacher).square().mean()), rel=1e-5)
    with pytest.raises(vtoken.ShapeError, match="kept"):
        token_loss(student, teacher)


def test_fine_tuning_loss() -> None:
    logits, tokens = normal(2, 5), normal(2, 3, 4)
    teacher = TeacherOutput(normal(2, 5), normal(2, 6, 4))
    kept, classification = torch.tensor([[0, 2, 5], [1, 3, 4]]), torch.tensor(1.7, dtype=torch.float64)
    parts = [1.7, float(distillation_loss(logits, teacher.logits)), float(token_loss(tokens, teacher.tokens, kept))]
    found = fine_tuning_loss(classification, logits, tokens, teacher, kept=kept)
    assert float(found) == pytest.approx(parts[0] + 0.5 * parts[1] + 0.5 * parts[2])
    found = fine_tuning_loss(classification, logits, tokens, teacher, kept=kept, weights=(2.0, 3.0, 5.0))
    assert float(found) == pytest.approx(2 * parts[0] + 3 * parts[1] + 5 * parts[2])


def test_losses_are_single_precision_under_half() -> None:
    s, a = normal(1, 2, 4, 5).bfloat16(), normal(1, 2, 5, 5).bfloat16()
    assert reconstruction_loss([s], [a]).dtype == torch.float32
    assert distillation_loss(s[0, 0], a[0, 0, :4]).dtype == torch.float32
    assert token_loss(s[0], s[0]).dtype == torch.float32
