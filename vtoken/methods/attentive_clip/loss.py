"""Losses of attentive-mask training (docs/methods/attentive_clip.md 7), gathered from all processes with gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtoken import checks
from vtoken.errors import ConfigError, InputError, ShapeError
from vtoken.ops.rows import full_precision

#: Divides the logits of the SimCLR term, as published.
TEMPERATURE = 0.1


class AttentiveMaskLoss(nn.Module):
    """Contrastive loss averaged over views, plus the self-supervised terms that the model's output holds.

    All terms see features of length 1: those that are not are normalised here, in float32.

    Args:
        contrastive: called once per view as (image_features, text_features, logit_scale[, logit_bias]), the features
            normalised and in the dtype that came; None is the ordinary CLIP loss over all processes. open_clip's
            ClipLoss and SigLipLoss fit, with their own settings for several processes.
        simclr_weight, byol_weight: factors on the two self-supervised terms.
        temperature: of the SimCLR term.
        rank, world_size: of this process; with several, features are gathered from all.

    Raises:
        ConfigError: for values out of range.

    Example:
        >>> import open_clip, torch, vtoken
        >>> tower = dict(layers=2, width=64, head_width=32, patch_size=16, image_size=64)
        >>> model = open_clip.CLIP(32, tower, dict(layers=1, width=64, heads=2), output_dict=True)
        >>> clip = vtoken.AttentiveMaskCLIP(model, keep_ratio=0.5).train()
        >>> out = clip(torch.randn(2, 3, 64, 64), open_clip.tokenize(["a shoe", "a bag"]))
        >>> vtoken.AttentiveMaskLoss()(**out).requires_grad
        True

    Source: arXiv 2212.08653.
    """

    def __init__(
        self,
        contrastive: Callable[..., Tensor] | None = None,
        simclr_weight: float = 1.0,
        byol_weight: float = 1.0,
        temperature: float = TEMPERATURE,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        if contrastive is not None and not callable(contrastive):
            raise ConfigError(f"contrastive={contrastive!r} must be a loss that can be called, or None")
        owner = type(self).__name__
        self.contrastive = contrastive
        self.simclr_weight = checks.number(owner, "simclr_weight", simclr_weight, 0)
        self.byol_weight = checks.number(owner, "byol_weight", byol_weight, 0)
        self.temperature = checks.number(owner, "temperature", temperature, above=0)
        self.world_size = checks.whole(owner, "world_size", world_size, 1)
        self.rank = checks.whole(owner, "rank", rank, 0, self.world_size - 1, what="the number of this process, ")

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        simclr: Tensor | None = None,
        byol: Tensor | None = None,
        byol_target: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The total loss, or its weighted terms by name; called as `loss(**model_output)`.

        Args:
            image_features: [B, E], or [B, V, E] of V views; of any length, as the next.
            text_features: [B, E].
            logit_scale, logit_bias: scalars.
            simclr: [B, 2, D] of the head.
            byol, byol_target: [B, V, D] of the predictor, [B, D] of the teacher's projector.
            output_dict: terms instead of their sum.

        Raises:
            ShapeError: for features of other shapes.
            InputError: if text features, or one of `byol` and `byol_target`, are missing.
        """
        check_features(image_features, text_features)
        extra = () if logit_bias is None else (logit_bias,)
        loss = self._clip_loss if self.contrastive is None else self.contrastive
        image_features, text_features = (self._unit(x) for x in (image_features, text_features))
        views = image_features.unbind(1) if image_features.dim() == 3 else (image_features,)
        per_view = torch.stack([loss(features, text_features, logit_scale, *extra) for features in views])
        terms = {"contrastive_loss": per_view.mean()}
        if simclr is not None:
            terms["simclr_loss"] = self.simclr_weight * self._simclr_loss(simclr)
        if (byol is None) != (byol_target is None):
            raise InputError("byol and byol_target belong together: the student's prediction and the teacher's target")
        if byol is not None and byol_target is not None:
            terms["byol_loss"] = self.byol_weight * byol_loss(byol, byol_target)
        return terms if output_dict else torch.stack(list(terms.values())).sum()

    def _unit(self, features: Tensor) -> Tensor:
        with full_precision(features):
            unit = F.normalize(features.float(), dim=-1)
        # A loss of the user's may have parameters of its own that must meet the model's dtype.
        return unit if self.contrastive is None else unit.to(features.dtype)

    def _clip_loss(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        everyone = (gather(image, self.world_size), gather(text, self.world_size))
        return clip_loss(image, text, scale, bias, everyone=everyone, rank=self.rank)

    def _simclr_loss(self, z: Tensor) -> Tensor:
        if z.dim() != 3 or z.shape[1] != 2:
            raise ShapeError(f"expected simclr [B, 2, D], got {tuple(z.shape)}")
        z = F.normalize(z.float(), dim=-1)
        everyone = gather(z, self.world_size)
        return simclr_loss(z, temperature=self.temperature, everyone=everyone, rank=self.rank)


def check_features(image: Tensor, text: Tensor | None) -> None:
    """Raise unless image features [B, E] or [B, V, E] and text features [B, E] are there and fit."""
    if text is None:
        raise InputError("no text_features: the contrastive loss compares images with texts; give the model both")
    if image.dim() not in (2, 3) or text.shape != (image.shape[0], image.shape[-1]):
        raise ShapeError(
            f"expected image_features [B, E] or [B, V, E] and text_features [B, E], got {tuple(image.shape)} and "
            f"{tuple(text.shape)}"
        )


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    everyone: tuple[Tensor, Tensor] | None = None,
    rank: int = 0,
) -> Tensor:
    """The CLIP loss of one view in float32: mean cross entropy of images to texts and of texts to images.

    Args:
        image, text: normalised features of this process, [B, E].
        logit_scale, logit_bias: factor on and summand of the logits.
        everyone: features of all processes, two times [W*B, E].
        rank: of this process.

    Raises:
        ShapeError: for features with a view axis.
    """
    if image.dim() != 2 or text.shape != image.shape:
        raise ShapeError(
            f"the CLIP loss takes image and text features [B, E], got {tuple(image.shape)} and {tuple(text.shape)}; "
            "features of several views [B, V, E] go through AttentiveMaskLoss(contrastive=...)"
        )
    with full_precision(image):
        image, text = image.float(), text.float()
        all_images, all_texts = (t.float() for t in everyone or (image, text))
        labels = _labels(image, rank)
        logits = [logit_scale * image @ all_texts.T, logit_scale * text @ all_images.T]
        if logit_bias is not None:
            logits = [x + logit_bias for x in logits]
        return (F.cross_entropy(logits[0], labels) + F.cross_entropy(logits[1], labels)) / 2


def simclr_loss(z: Tensor, *, temperature: float, everyone: Tensor | None = None, rank: int = 0) -> Tensor:
    """SimCLR between two views, in float32.

    Args:
        z: normalised features of this process, [B, 2, D].
        temperature: divides the logits.
        everyone: of all processes, [W*B, 2, D].
        rank: of this process.
    """
    with full_precision(z):
        z = z.float()
        all_a, all_b = (z if everyone is None else everyone.float()).unbind(1)
        a, b = z.unbind(1)
        labels = _labels(z, rank)
        itself = F.one_hot(labels, all_a.shape[0]).bool()
        losses = []
        for mine, same, other in ((a, all_a, all_b), (b, all_b, all_a)):
            own = (mine @ same.T).masked_fill(itself, -torch.inf)
            losses.append(F.cross_entropy(torch.cat([mine @ other.T, own], 1) / temperature, labels))
        return (losses[0] + losses[1]) / 2


def byol_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Sum over views of the mean over samples of 2 - 2 cos(predicted, target), in float32.

    Args:
        predicted: of the student, [B, V, D].
        target: of the teacher, without gradient, [B, D].

    Raises:
        ShapeError: if the two do not fit.
    """
    if predicted.dim() != 3 or target.shape != (predicted.shape[0], predicted.shape[2]):
        raise ShapeError(f"expected byol [B, V, D] and byol_target [B, D], got {predicted.shape} and {target.shape}")
    with full_precision(predicted):
        p, t = F.normalize(predicted.float(), dim=-1), F.normalize(target.detach().float(), dim=-1)
        return (2 - 2 * (p * t.unsqueeze(1)).sum(-1)).mean(0).sum()


def gather(x: Tensor, world_size: int) -> Tensor:
    """Rows of all processes, by rank, with gradient to the process that they came from."""
    if world_size == 1:
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x.contiguous()))  # type: ignore[no-untyped-call]


def _labels(x: Tensor, rank: int) -> Tensor:
    return torch.arange(x.shape[0], device=x.device) + x.shape[0] * rank
