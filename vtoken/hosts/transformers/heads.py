"""Attention pools of transformers' towers, told how many patches every token stands for."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vtoken.core.patch import forward_with
from vtoken.ops import size_bias


class SizedHeadMixin:
    """SigLIP's attention pool over tokens that merged."""

    def forward(self: Any, hidden_state: Tensor, *args: Any, vtoken_size: Tensor | None = None) -> Any:
        if vtoken_size is None:
            return super().forward(hidden_state, *args)  # type: ignore[misc]
        # A float key_padding_mask [B, T] is added to the logits of the keys.
        bias = size_bias(vtoken_size, hidden_state.dtype)[:, 0, 0]
        attention = functools.partial(self.attention, key_padding_mask=bias)
        return forward_with(self, {"attention": attention}, hidden_state, *args)


class Aimv2HeadMixin:
    """AIMv2's: a class token that is not projected asks, and no mask can be given to it."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, vtoken_size: Tensor | None = None) -> Any:
        if vtoken_size is None:
            return super().forward(hidden_states, *args)  # type: ignore[misc]
        heads = (self.num_heads, -1)
        asked = self.cls_token.expand(hidden_states.shape[0], -1, -1)
        rows = (asked, self.k_proj(hidden_states), self.v_proj(hidden_states))
        q, k, v = (part.unflatten(2, heads).transpose(1, 2) for part in rows)  # [B, H, T, D]
        bias = size_bias(vtoken_size, hidden_states.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.output_proj(out.transpose(1, 2).flatten(2)[:, 0])
