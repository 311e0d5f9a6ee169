"""The losses of Sparsifiner's two training phases (arXiv 2303.13755; docs/methods/sparsifiner.md 6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from vtoken.errors import ConfigError, ShapeError
from vtoken.methods.sparsifiner.teacher import TeacherOutput


def reconstruction_loss(
    scores: Sequence[Tensor], attention: Sequence[Tensor], *, weight: float = 0.01, reduction: str = "sum"
) -> Tensor:
    """How far the predictors' scores are from the dense attention: the loss of the first phase.

    Args:
        scores: per layer, of the T - P patch queries, [B, H, T - P, T].
        attention: per layer, the teacher's softmax attention, [B, H, T, T] or its patch rows alone.
        weight: factor on the result.
        reduction: "sum" of squared errors over batch, heads, rows and keys (as published; grows with the batch), or
            their "mean". Layers are averaged in both cases.

    Raises:
        ShapeError: if the two do not fit each other.
        ConfigError: for another reduction.

    Example:
        >>> import torch, vtoken
        >>> attention = torch.rand(2, 3, 17, 17).softmax(-1)
        >>> vtoken.train.reconstruction_loss([attention[:, :, 1:]], [attention])
        tensor(0.)
    """
    if reduction not in ("sum", "mean"):
        raise ConfigError(f"reconstruction_loss(reduction={reduction!r}): must be sum or mean")
    if not scores or len(scores) != len(attention):
        raise ShapeError(f"{len(scores)} layers of scores and {len(attention)} of attention; give one for each layer")
    losses = []
    for ours, theirs in zip(scores, attention, strict=True):
        target = theirs[..., -ours.shape[-2] :, :].detach()
        if target.shape != ours.shape:
            raise ShapeError(f"scores {tuple(ours.shape)} do not fit attention {tuple(theirs.shape)}")
        losses.append(F.mse_loss(ours.float(), target.float(), reduction=reduction))
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return weight * total / len(losses)


def distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) at temperature 1, mean over the batch; logits [B, classes].

    Example:
        >>> import torch, vtoken
        >>> logits = torch.randn(2, 10)
        >>> vtoken.train.distillation_loss(logits, logits).abs() < 1e-6
        tensor(True)
    """
    student = F.log_softmax(logits.float(), -1)
    teacher = F.log_softmax(teacher_logits.detach().float(), -1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def token_loss(tokens: Tensor, teacher_tokens: Tensor, kept: Tensor | None = None) -> Tensor:
    """Mean squared error between the patch tokens after the final norm.

    Args:
        tokens: the student's, [B, N', C].
        teacher_tokens: the teacher's, [B, N, C].
        kept: with token pruning, which of the N patches the student still has, [B, N'] int64.

    Raises:
        ShapeError: if the two do not fit.

    Example:
        >>> import torch, vtoken
        >>> tokens = torch.randn(2, 9, 4)
        >>> kept = torch.tensor([[0, 3], [5, 8]])  # what pruning left of the student's
        >>> pruned = torch.stack([tokens[b, rows] for b, rows in enumerate(kept)])
        >>> vtoken.train.token_loss(pruned, tokens, kept)
        tensor(0.)
    """
    if kept is not None:
        teacher_tokens = teacher_tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, teacher_tokens.shape[-1]))
    if tokens.shape != teacher_tokens.shape:
        raise ShapeError(
            f"student tokens {tuple(tokens.shape)}, teacher tokens {tuple(teacher_tokens.shape)}; give `kept` if the "
            "student prunes tokens"
        )
    return F.mse_loss(tokens.float(), teacher_tokens.detach().float())


def fine_tuning_loss(
    classification: Tensor,
    logits: Tensor,
    tokens: Tensor,
    teacher: TeacherOutput,
    *,
    kept: Tensor | None = None,
    weights: tuple[float, float, float] = (1.0, 0.5, 0.5),
) -> Tensor:
    """The loss of the second phase: classification, distillation and token terms with their published weights.

    Args:
        classification: your cross entropy, with soft targets or label smoothing as you train.
        logits, tokens: the student's, [B, classes] and [B, N', C].
        teacher: of the same images.
        kept: as in `token_loss`.
        weights: of the three terms.

    Example:
        >>> import timm, torch, torch.nn.functional as F, vtoken
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> teacher = vtoken.train.Teacher(model)
        >>> images, labels = torch.randn(2, 3, 160, 160), torch.tensor([1, 7])
        >>> tokens = model.forward_features(images)
        >>> logits = model.forward_head(tokens)
        >>> loss = F.cross_entropy(logits, labels)
        >>> vtoken.train.fine_tuning_loss(loss, logits, tokens[:, 1:], teacher(images)).requires_grad
        True
    """
    terms = (classification, distillation_loss(logits, teacher.logits), token_loss(tokens, teacher.tokens, kept))
    return weights[0] * terms[0] + weights[1] * terms[1] + weights[2] * terms[2]
