"""Why timm models that cannot lose tokens cannot: for messages only; what is supported is decided by structure."""

from __future__ import annotations

from torch import nn

_WINDOW = "its attention works inside windows of the patch grid, so tokens cannot be removed"
_HIERARCHY = "it is a hierarchy that needs the full patch grid between its stages"
_BIAS_TABLE = "its attention adds a table of relative position biases, laid out for the full grid"
_PARALLEL = "its attention and MLP run in parallel, so there is no place between them"

# By the timm file that defines the class.
_FILES = {
    "swin_transformer": _WINDOW,
    "swin_transformer_v2": _WINDOW,
    "swin_transformer_v2_cr": _WINDOW,
    "maxxvit": _WINDOW,
    "gcvit": _WINDOW,
    "nest": _WINDOW,
    "twins": _WINDOW,
    "davit": _WINDOW,
    "vision_transformer_sam": _WINDOW,
    "hieradet_sam2": _WINDOW,
    "mvitv2": _HIERARCHY,
    "hiera": _HIERARCHY,
    "pvt_v2": _HIERARCHY,
    "pit": _HIERARCHY,
    "levit": _HIERARCHY,
    "efficientformer": _HIERARCHY,
    "efficientformer_v2": _HIERARCHY,
    "mobilevit": _HIERARCHY,
    "visformer": _HIERARCHY,
    "coat": _HIERARCHY,
    "beit": _BIAS_TABLE,
    "vision_transformer_relpos": _BIAS_TABLE,
    "xcit": "its attention runs over channels, not tokens",
    "cait": "its class token attends in a stage of its own",
    "volo": "its outlook attention needs the patch grid, and its class token attends in a stage of its own",
    "tnt": "its inner blocks tie every token to the pixels of one patch",
    "crossvit": "its two branches exchange class tokens between stages of different patch sizes",
}
# By class name, for parts of supported files.
_CLASSES = {
    "ParallelScalingBlock": _PARALLEL,
    "DiffParallelScalingBlock": _PARALLEL,
    "ParallelThingsBlock": "its attentions and MLPs run side by side, so there is no single place between them",
    "DiffAttention": "differential attention subtracts two maps; how sizes enter it is not defined",
}


def reason(module: nn.Module) -> str:
    """A sentence saying why tokens cannot be taken from this model, block or attention."""
    cls = type(module)
    if cls.__name__ in _CLASSES:
        return _CLASSES[cls.__name__]
    for base in cls.__mro__:
        stem = base.__module__.rpartition(".")[2]
        if base.__module__.startswith("timm.models.") and stem in _FILES:
            return _FILES[stem]
    return f"{cls.__name__} is not one of the plain-attention classes that vtoken knows how to take tokens from"
