"""What lmms-eval is told of vtoken, through the entry point group `lmms_eval.models`."""

from __future__ import annotations

from typing import Any

MODEL = "vtoken"


def lmms() -> Any:
    """The `ModelManifest` of the model `vtoken`; lmms-eval calls this when it lists its models."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL, chat_class_path="vtoken.harness.lmms.ReducedModel")
