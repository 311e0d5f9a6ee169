"""Which parameters learn in which phase."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from vtoken.core.apply import configure
from vtoken.core.patch import PREDICTOR
from vtoken.errors import ConfigError, VTokenError

PHASES = ("recon", "sparse")


def predictor_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of the connectivity predictors of a patched model.

    Example:
        >>> import timm, vtoken
        >>> model = vtoken.apply(timm.create_model("test_vit"), vtoken.Sparsifiner())
        >>> all(".predictor." in name for name, _ in vtoken.train.predictor_parameters(model))
        True
    """
    for name, parameter in model.named_parameters():
        if f".{PREDICTOR}." in f".{name}":
            yield name, parameter


def backbone_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of everything else.

    Example:
        >>> import timm, vtoken
        >>> model = vtoken.apply(timm.create_model("test_vit"), vtoken.Sparsifiner())
        >>> next(vtoken.train.backbone_parameters(model))[0]
        'cls_token'
    """
    for name, parameter in model.named_parameters():
        if f".{PREDICTOR}." not in f".{name}":
            yield name, parameter


def set_phase(model: nn.Module, phase: str) -> None:
    """Switch a model with Sparsifiner to a training phase and freeze the part that does not learn in it.

    "recon": attention runs dense and only the predictors learn; "sparse": the masks are live, only the backbone learns,
    all of it: freeze what is to stay frozen after the call.

    Raises:
        ConfigError: for another phase.
        VTokenError: if the model has no predictors.

    Example:
        >>> import timm, vtoken
        >>> model = vtoken.apply(timm.create_model("test_vit"), vtoken.Sparsifiner())
        >>> vtoken.train.set_phase(model, "recon")
        >>> [name for name, p in model.named_parameters() if p.requires_grad and "predictor" not in name]
        []
    """
    if phase not in PHASES:
        raise ConfigError(f"set_phase(phase={phase!r}): must be one of {', '.join(PHASES)}")
    if not any(True for _ in predictor_parameters(model)):
        raise VTokenError(f"this {type(model).__name__} has no connectivity predictors; vtoken.apply Sparsifiner first")
    configure(model, phase=phase)
    for _, parameter in predictor_parameters(model):
        parameter.requires_grad_(phase == "recon")
    for _, parameter in backbone_parameters(model):
        parameter.requires_grad_(phase == "sparse")


def parameter_groups(model: nn.Module, *, weight_decay: float = 0.05) -> list[dict[str, Any]]:
    """What an optimiser takes: the parameters that learn now, without weight decay on biases and 1-d parameters.

    Call it after `set_phase`: a frozen predictor must stay out of the optimiser, whose weight decay would shrink it.

    Example:
        >>> import timm, torch, vtoken
        >>> model = vtoken.apply(timm.create_model("test_vit"), vtoken.Sparsifiner())
        >>> vtoken.train.set_phase(model, "recon")
        >>> optimizer = torch.optim.AdamW(vtoken.train.parameter_groups(model), lr=1e-3)
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.05, 0.0]
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
