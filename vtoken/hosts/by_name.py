"""Reading the attention of a tower whose blocks call it by the name in their settings, as all of transformers' do.

Queries and keys are seen as they are multiplied, image by image or window by window (`hosts/attending.py`).
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from vtoken.core.watch import Watch
from vtoken.errors import UnsupportedModelError
from vtoken.hosts.attending import attending
from vtoken.hosts.exchanged import Exchanged, Overheard, with_layers


def watched_by_name(watch: Watch, tower: Any, path: tuple[str, ...], attn: str, keys: str, **parts: Any) -> Exchanged:
    """The tower, to be called, with the blocks that `watch` reads telling it what they see.

    Args:
        path: attributes from the tower to its blocks.
        attn: attribute of a block that holds its attention.
        keys: attribute of the attention that makes keys; "qkv" makes queries and values, too.
        parts: what else takes the place of attributes of the tower.
    """
    maybe_install_capturing_hooks(tower)  # the host would install them anew on every stand-in

    def read(blocks: Any) -> list[Any]:
        heard = {*watch.layers, watch.keys_of}
        return [
            Exchanged(block, {attn: _attention(watch, i, getattr(block, attn), keys)}) if i in heard else block
            for i, block in enumerate(blocks)
        ]

    return Exchanged(tower, with_layers(tower, path, read) | parts)


def _attention(watch: Watch, layer: int, attn: Any, keys: str) -> Exchanged:
    parts: dict[str, Any] = {}
    if layer == watch.keys_of:
        parts[keys] = Overheard(getattr(attn, keys), behind=functools.partial(_keep_keys, watch, attn, keys == "qkv"))
    if layer in watch.layers:
        parts |= attending(attn, functools.partial(_attend, watch, layer, attn.config._attn_implementation))
    return Exchanged(attn, parts)


def _keep_keys(watch: Watch, attn: Any, packed: bool, made: Tensor) -> None:
    """Keys in what one module made, [..., T, H * D], or beside queries and values, [..., T, 3 * H * D]."""
    rows = made.detach().unflatten(-1, (3, attn.num_heads, -1) if packed else (attn.num_heads, -1))
    watch.keys = (rows[..., 1, :, :] if packed else rows).float().mean(-2)


def _attend(
    watch: Watch, layer: int, stock: str, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any,
    **options: Any,
) -> Any:  # fmt: skip
    """The attention function that would have run, and the row of scores that is read."""
    row = watch.row(layer)
    if row is not None:
        row.meet(query, key, options["scaling"], _bias(module, mask))
    own = sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(stock, own)(module, query, key, value, mask, **options)


def _bias(module: Any, mask: Any) -> Tensor | None:
    """What a mask adds to logits, broadcastable to [B, H, T, T]; implementations are given it in forms of their own."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):  # a block mask of flex attention
        raise UnsupportedModelError(
            f"the attention of {type(module).__name__} cannot be read under its masks of type {type(mask).__name__}; "
            "set_attn_implementation('sdpa') on the image tower"
        )
    if mask.dim() == 2:  # flash attention's: which keys are there
        mask = mask[:, None, None, :] != 0
    if mask.dtype == torch.bool:
        lowest = torch.finfo(torch.float32).min
        return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill(~mask, lowest)
    return mask
