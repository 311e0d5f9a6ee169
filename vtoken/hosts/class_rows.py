"""Reading how much attention patches get while an image tower runs, without asking it for attention maps.

The tower runs through a view whose chosen layers keep one row of scores each; nothing is left on the model.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtoken import checks
from vtoken.core.apply import is_applied
from vtoken.core.host import find_adapter
from vtoken.core.patch import view_as
from vtoken.core.state import Slot, TokenState
from vtoken.errors import ConfigError, ShapeError, UnsupportedModelError, VTokenError
from vtoken.ops import ENSEMBLES, class_row, received_row, scored_layers
from vtoken.ops import ensemble as as_one


def cls_attention_scores(
    tower: Any,
    pixel_values: Tensor,
    *,
    start_layer: int | None = None,
    last: int | None = None,
    ensemble: str = "mean",
    how: str | None = None,
) -> Tensor:
    """How much the class token of a vision transformer attends to every patch, averaged over heads and layers.

    Args:
        tower: an unpatched transformers, open_clip or timm model with a class token, or a model that holds one.
            Queries and keys are read as they meet, behind their norms and rotation.
        pixel_values: images [B, C, H, W].
        start_layer, last: first and last block that is read; negative ones count from the end. By default from
            ceil(2/3 depth) to the last block, of a LLaVA to the block that its projector reads, as `vtoken.VTCCLS`.
        ensemble: "mean", "sum", "max" or "min" over the blocks.
        how: the old name of `ensemble`.

    Returns:
        Scores [B, N], float32, detached; rows sum to less than 1, the rest is what prefix tokens get.

    Raises:
        UnsupportedModelError: if the model is not understood, with the reason.
        ConfigError: if it has no class token, or for blocks that it does not have.
        ShapeError: if the images are not a batch.
        VTokenError: if it is patched.

    Example:
        >>> import timm, torch, vtoken
        >>> scores = vtoken.cls_attention_scores(timm.create_model("test_vit"), torch.randn(1, 3, 160, 160))
        >>> scores.shape
        torch.Size([1, 100])

    Source: arXiv 2412.05819.
    """
    if how is not None:
        warnings.warn("cls_attention_scores(how=...) is now called ensemble", DeprecationWarning, stacklevel=2)
        ensemble = how
    checks.choice("cls_attention_scores", "ensemble", ensemble, ENSEMBLES)
    adapter = find_adapter(tower)
    spec = adapter.spec(tower)
    if is_applied(tower):
        raise VTokenError(f"{spec.name} carries a method; use vtoken.remove first, or read the record of vtoken.trace")
    if spec.num_prefix == 0 or not spec.class_token:  # registers alone are no class token
        raise ConfigError(f"{spec.name} has no class token whose attention could be read")
    if isinstance(pixel_values, Tensor) and pixel_values.dim() != 4:
        raise ShapeError(f"expected images [B, C, H, W], got {tuple(pixel_values.shape)}")
    if last is None:
        last = _read_last(tower, spec.depth)
    rows = ClassRows(scored_layers(spec.depth, start_layer, last), "cls")
    with torch.no_grad():
        adapter.run_watched(tower, rows, pixel_values)
    if spec.position == "rotary" and not rows.rotated:
        raise UnsupportedModelError(f"cannot read class attention of {spec.name}: its rotation of keys is not shown")
    return rows.scores(spec.depth - 1, ensemble)[0][:, spec.num_prefix :]


def _read_last(model: Any, depth: int) -> int:
    """The block whose output is handed on: what a LLaVA's projector reads, else the last one."""
    config = getattr(model, "config", None)
    named = [getattr(config, n, None) for n in ("vision_feature_layer", "vision_feature_layers")]
    value = next((v for v in named if v is not None), depth)
    block = max(v % (depth + 1) for v in ([value] if isinstance(value, int) else value)) - 1
    if block < 0:
        raise ConfigError("the projector reads the embeddings themselves: no block is there to read attention from")
    return block


class ClassRows:
    """What the chosen layers' attention says in one pass of images through a tower.

    Args:
        layers: their indices.
        scorer: "cls" or "received".
        keys: whether the keys of the last layer are kept, too.
    """

    def __init__(self, layers: Collection[int], scorer: str, *, keys: bool = False) -> None:
        #: The layers that are read.
        self.layers = sorted(layers)
        self._wants_keys = keys
        #: Keys of the last of them as projected, mean over heads, [B, T, D].
        self.keys: Tensor | None = None
        self._scorer = scorer
        self._rows: dict[int, Tensor] = {}
        #: Where every token went, if the tower merges tokens.
        self._state: TokenState | None = None
        #: Whether queries and keys were rotated in any of them.
        self.rotated = False

    def tap(self, layer: int, state: TokenState) -> RowTap | None:
        """What reads queries and keys of block `layer` of a patched tower; None if nothing is to be read there.

        Activation checkpointing runs a block again, which changes nothing here.
        """
        self._state = state
        if layer not in self.layers or layer in self._rows:
            return None
        sizes = state.bias(layer, torch.float32)
        bias = None if sizes is None else sizes[:, 0]
        return RowTap(self._scorer, bias, functools.partial(self._take, layer))

    def _take(self, layer: int, row: Tensor, keys: Tensor) -> None:
        self._rows[layer] = row
        if self._wants_keys and layer == self.layers[-1]:
            self.keys = keys.mean(1)

    def watched(self, layers: Iterable[Any], tapped: Callable[[Any, RowTap], Any]) -> Layers:
        """The layers of an unpatched tower, the chosen ones reporting here.

        Args:
            tapped: makes the stand-in of a layer whose attention runs with a tap.
        """
        chosen = set(self.layers)
        return Layers(
            functools.partial(self._run, tapped, layer, i) if i in chosen else layer for i, layer in enumerate(layers)
        )

    def scores(self, last: int, how: str) -> tuple[Tensor, Tensor | None]:
        """Scores of the rows that block `last` hands out, and the embedded row whose place each keeps.

        Returns:
            [B, T] float32, prefix tokens included; [B, T] int64, or None if no token was merged.
        """
        rows, anchor = self.each(last)
        return as_one([row.to(rows[-1].device) for row in rows], how), anchor

    def each(self, last: int) -> tuple[list[Tensor], Tensor | None]:
        """The same without an ensemble: a [B, T] for every layer."""
        slot = Slot() if self._state is None else self._state.slots[last + 1]
        if slot.anchor is not None and self._state is not None and self._state.method.order == "raster":
            slot = slot.in_raster_order(slot.anchor.new_empty(*slot.anchor.shape, 0))[1]
        return [self._carried(layer, slot) for layer in self.layers], slot.anchor

    def _carried(self, layer: int, slot: Slot) -> Tensor:
        """One layer's scores brought to the rows of `slot`: tokens that merged later pass on their sum."""
        if layer not in self._rows:
            raise RuntimeError(f"the attention of block {layer} never computed queries and keys: there are no scores")
        row = self._rows[layer]
        if self._state is None or slot.dest is None or slot.anchor is None:
            return row
        was = self._state.slots[layer].anchor
        now = slot.dest if was is None else slot.dest.gather(1, was)
        return torch.zeros(slot.anchor.shape, dtype=row.dtype, device=row.device).scatter_add(1, now, row)

    def _run(self, tapped: Any, layer: Any, index: int, *args: Any, **kwargs: Any) -> Any:
        """One layer with a tap."""
        tap = RowTap(self._scorer, None, functools.partial(self._take, index))
        out = tapped(layer, tap)(*args, **kwargs)
        self.rotated |= tap.rotate is not None
        return out


Rotation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _rotation(attn: Any, given: dict[str, Any]) -> Rotation | None:
    """How an attention rotates queries and keys in a call with these arguments, by the host's own function."""
    if given.get("rope") is None:
        return None
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat  # of timm, whose prefix tokens have no place

    prefix, half, rope = int(attn.num_prefix_tokens), bool(getattr(attn, "rotate_half", False)), given["rope"]

    def turned(x: Tensor) -> Tensor:
        patches = apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)
        return torch.cat([x[:, :, :prefix], patches], dim=2).type_as(x)

    return lambda q, k: (turned(q), turned(k))


class Layers(list[Any]):
    """Stands where a tower's list of layers stood, be it called or iterated over."""

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class RowTap:
    """Turns the queries and keys of one attention call into one row of scores as soon as both have arrived.

    Later calls (activation checkpointing runs a layer again) pass through it untouched.

    Args:
        scorer: "cls" or "received".
        bias: added to the logits of the keys, [B, 1, T].
        take: is given the row [B, T] float32 and the keys [B, H, T, D] as they were projected.
    """

    def __init__(self, scorer: str, bias: Tensor | None, take: Callable[[Tensor, Tensor], None]) -> None:
        self._score = class_row if scorer == "cls" else received_row
        self._bias = bias
        self._take = take
        #: What the attention does to queries and keys [B, H, T, D] in front of their product, where it rotates them.
        self.rotate: Rotation | None = None
        self._head_dim = 0
        self._scale: float | None = None
        self._q: Tensor | None = None
        self._k: Tensor | None = None
        self._done = False

    def on(self, attn: Any, query: str, key: str, scale: float | None = None) -> Any:
        """The attention of an unpatched block with this tap behind its modules `query` and `key`."""
        tapped = view_as(type(attn), attn, **self.parts(attn, query, key, scale))
        if "rope" not in inspect.signature(type(attn).forward).parameters:
            return tapped

        def run(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(type(attn).forward).bind(attn, *args, **kwargs).arguments
            self.rotate = _rotation(attn, given)
            return tapped(*args, **kwargs)

        return run

    def parts(self, attn: Any, query: str, key: str, scale: float | None = None) -> dict[str, Callable[..., Tensor]]:
        """What stands where the modules `query` and `key` of an attention stood: calls go to them and are read.

        `scale` is the factor on its logits; None: head_dim ** -0.5.
        """
        self._head_dim, self._scale = int(attn.head_dim), scale
        return {
            query: functools.partial(self._queries, getattr(attn, query)),
            key: functools.partial(self._keys, getattr(attn, key)),
        }

    def on_packed(self, attn: Any) -> Callable[..., Any]:
        """`nn.MultiheadAttention` with this tap; queries and keys are projected once more, it does not show its own."""
        self._head_dim = int(attn.head_dim)

        def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            rows = (x if attn.batch_first else x.transpose(0, 1)).detach()
            weights = attn.in_proj_weight.detach().chunk(3)
            biases = (None,) * 3 if attn.in_proj_bias is None else attn.in_proj_bias.detach().chunk(3)
            self._queries(lambda r: F.linear(r, weights[0], biases[0]), rows)
            self._keys(lambda r: F.linear(r, weights[1], biases[1]), rows)
            return attn(x, *args, **kwargs)

        return run

    def _queries(self, project: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        q = project(x)
        if not self._done:
            heads = self._heads(q)
            self._q = heads[:, :, :1] if self._score is class_row and self.rotate is None else heads
            self._finish()
        return q

    def _keys(self, project: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        k = project(x)
        if not self._done:
            self._k = self._heads(k)
            self._finish()
        return k

    def _heads(self, x: Tensor) -> Tensor:
        """[B, H, T, D] of a projection [B, T, C], or as it is."""
        x = x.detach()
        return x if x.dim() == 4 else x.unflatten(2, (-1, self._head_dim)).transpose(1, 2)

    def _finish(self) -> None:
        if self._q is not None and self._k is not None:
            scale = self._head_dim**-0.5 if self._scale is None else self._scale
            q, k = (self._q, self._k) if self.rotate is None else self.rotate(self._q, self._k)
            if k.shape[1] != q.shape[1]:  # grouped queries
                k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            q = q[:, :, 0] if self._score is class_row else q
            self._take(self._score(q, k, scale=scale, bias=self._bias), self._k)
            self._done = True
            self._q = self._k = self._bias = None
