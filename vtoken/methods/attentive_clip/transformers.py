"""Attentive-mask training of transformers' models, in their own words: a `Trainer` and scripts see what they know."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken.core.calling import call_with
from vtoken.errors import InputError
from vtoken.methods.attentive_clip import fit
from vtoken.methods.attentive_clip.loss import TEMPERATURE, byol_loss, simclr_loss
from vtoken.methods.attentive_clip.model import AttentiveMaskCLIP


class AttentiveMaskTransformersCLIP(AttentiveMaskCLIP, library="transformers"):
    """What `AttentiveMaskCLIP` makes of a CLIPModel, SiglipModel or their like of transformers.

    It is called as the model is and returns what the model returns: with `return_loss=True` the model's own loss of
    masked images (CLIP's contrastive one, SigLIP's sigmoid one, with its own logit scale). So a `Trainer` trains it, or
    a script that was written for the model. The teacher follows by itself; `attach_ema` may be called. A checkpoint of
    a `Trainer` holds all of it, teacher and count of steps, and resumes. `save_pretrained` writes the wrapped model,
    which `from_pretrained` loads as ever, and `unwrap(ema=True).save_pretrained(folder)` the average.
    """

    #: Told to a `Trainer`: losses are means of a batch, so it divides them where it accumulates gradients.
    accepts_loss_kwargs = False

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        pixel_values: fit.Image | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        token_type_ids: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        *,
        teacher_image: Tensor | None = None,
        view_boxes: Tensor | None = None,
        teacher_boxes: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The model's own forward, of masked images in train mode.

        Args:
            pixel_values: [B, 3, H, W], or a list of V views of that shape.
            input_ids, attention_mask, position_ids, return_loss, token_type_ids, options: as of the wrapped model.
            interpolate_pos_encoding: whether images may have another size than the model's, a whole number of patches.
            teacher_image, view_boxes, teacher_boxes: as of `AttentiveMaskCLIP.forward`.

        Returns:
            The wrapped model's output. Of several views `loss` is the mean, `image_embeds` are [B, V, E],
            `logits_per_image` and `logits_per_text` [B, V, B], and `vision_model_output` is None. With heads their
            losses, times `simclr_weight` and `byol_weight`, are added to `loss`. Losses compare what this process has;
            `AttentiveMaskLoss(rank=..., world_size=...)` takes `image_embeds`, `text_embeds` and `logit_scale.exp()` of
            all of them.

        Raises:
            ShapeError, ConfigError: if views, teacher image and boxes do not fit each other or the settings.
            InputError: if there are heads and no `return_loss=True`, as nothing would train them; for images in the
                place of texts.
        """
        if isinstance(input_ids, Tensor) and input_ids.is_floating_point():
            raise InputError(
                f"input_ids are {tuple(input_ids.shape)} of {input_ids.dtype}, which are no tokens: texts come first "
                "in transformers' models; give pixel_values= and input_ids= by name"
            )
        texts = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "token_type_ids": token_type_ids,
        }  # fmt: skip
        given = options | {name: value for name, value in texts.items() if value is not None}
        if return_loss is not None:
            given["return_loss"] = return_loss
        sizes = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
        if pixel_values is None or not self.training:
            return self.model(pixel_values=fit.single(pixel_values), **given, **sizes)
        if not return_loss and (self.simclr_weight or self.byol_weight):
            raise InputError("the heads' losses are part of the output's loss: call with return_loss=True")
        views, images, rows, target = self._masked_views(
            pixel_values, teacher_image, view_boxes, teacher_boxes, None if sizes else self._image_size
        )
        wanted = given.pop("return_dict", None)
        wanted = self.model.config.return_dict if wanted is None else wanted
        look = _Once(self._host.masked_tower(self._tower, rows), pixel_values=images, return_dict=True)
        read = _Once(getattr(self.model, self._pair.text), return_dict=True)
        outs = []
        for view in range(views):
            parts = {self._pair.tower: functools.partial(_of_view, look, view, views), self._pair.text: read}
            batch = images.unflatten(0, (views, -1))[view]
            outs.append(call_with(self.model, parts, pixel_values=batch, return_dict=True, **given, **sizes))
        out = outs[0] if views == 1 else _joined(outs)
        heads = self._heads(look.out.pooler_output, views, target)
        if "simclr" in heads:
            z = F.normalize(heads["simclr"].float(), dim=-1)
            out.loss = out.loss + self.simclr_weight * simclr_loss(z, temperature=TEMPERATURE)
        if "byol" in heads:
            out.loss = out.loss + self.byol_weight * byol_loss(heads["byol"], heads["byol_target"])
        return out if wanted else out.to_tuple()

    def encode_image(self, image: Tensor, normalize: bool = False, *, ema: bool = False) -> Tensor:
        """Image features [B, E], nothing masked: of the wrapped model, or of the teacher without gradient."""
        if ema:
            return super().encode_image(image, normalize, ema=True)
        features: Tensor = self.model.get_image_features(pixel_values=image).pooler_output
        return F.normalize(features, dim=-1) if normalize else features


class _Once:
    """Stands where a tower stood: runs it at the first call and hands out its output at every call.

    Args:
        run: the tower.
        fixed: arguments in place of those of the call.
    """

    def __init__(self, run: Callable[..., Any], **fixed: Any) -> None:
        self._run = run
        self._fixed = fixed
        self.out: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.out is None:
            self.out = self._run(*args, **(kwargs | self._fixed))
        return copy.copy(self.out)  # models write projected features into it


def _of_view(look: _Once, view: int, views: int, **kwargs: Any) -> Any:
    """The output of an image tower for one of the views that it has seen together."""
    out = look(**kwargs)
    if views > 1:
        for name, value in out.items():
            several = isinstance(value, tuple)
            found = tuple(x.unflatten(0, (views, -1))[view] for x in (value if several else (value,)))
            out[name] = found if several else found[0]
    return out


def _joined(outs: list[Any]) -> Any:
    """The outputs of several views as one."""
    joined = outs[0]
    for name in ("image_embeds", "logits_per_image", "logits_per_text"):
        joined[name] = torch.stack([out[name] for out in outs], 1)
    if outs[0].loss is not None:
        joined["loss"] = torch.stack([out.loss for out in outs]).mean()
    joined["vision_model_output"] = None
    return joined
