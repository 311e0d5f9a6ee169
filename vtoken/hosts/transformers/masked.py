"""A transformers image tower of whose tokens only some enter the layers, or whose class attention is read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vtoken.core.bound import BoundBlocks
from vtoken.core.calling import call_with
from vtoken.core.patch import is_patched
from vtoken.core.spec import PatchSpec
from vtoken.core.watch import Row, Watch
from vtoken.errors import UnsupportedModelError
from vtoken.hosts.exchanged import with_layers
from vtoken.hosts.tower import PATCHED, pair, patched_inside
from vtoken.hosts.transformers.entry import asked, install_hooks
from vtoken.hosts.transformers.families import family_of, layers_of, num_prefix, path_of
from vtoken.hosts.transformers.images import Pixels
from vtoken.hosts.transformers.watched import read
from vtoken.hosts.watched import watched
from vtoken.ops.rows import take_rows

#: The module that turns pixels into tokens, by the names that it has.
_EMBEDS = ("embeddings.patch_embedding", "embeddings.patch_embeddings")


def patch_spec(tower: Any) -> PatchSpec:
    """What is known of its patches; see `HostAdapter.patch_spec`."""
    family, config = family_of(tower), tower.config
    why = patched_inside(tower)
    if why:
        raise _refused(tower, why)
    names = dict(tower.named_modules())
    embed = next((name for name in _EMBEDS if name in names), None)
    if embed is None or family.rotary or type(family.images) is not Pixels or family.images.resize is None:
        raise _refused(tower, "its patches do not all carry their places when they enter the first layer")
    if not getattr(tower, "use_head", True) or getattr(tower, "pooler", tower) is None:
        raise _refused(tower, "it hands out no pooled features")
    head = getattr(tower, "head", None)
    query = getattr(tower, "use_head", False) and type(getattr(head, "attention", None)) is nn.MultiheadAttention
    return PatchSpec(
        embed, pair(config.patch_size), family.images.size(config), int(config.hidden_size),
        pool_query=query and not num_prefix(tower),
    )  # fmt: skip


def masked_tower(tower: Any, rows: Tensor | None, watch: Watch | None = None) -> Callable[..., Any]:
    """The tower, to be called as itself, of whose tokens `rows` go on; see `HostAdapter.masked`."""
    if is_patched(tower):
        raise _refused(tower, PATCHED)
    if rows is None and watch is None:
        return tower  # type: ignore[no-any-return]
    parts = with_layers(tower, path_of(tower), functools.partial(_layers, rows, watch))
    row = None if watch is None else watch.row(len(layers_of(tower)))
    if row is not None:
        parts["head"] = functools.partial(_pool, tower.head, row)
    return functools.partial(_run, tower, parts)


def run_masked(
    model: Any, images: Tensor, rows: Tensor | None, watch: Watch | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pooled features, twice: a projection, where there is one, belongs to the model around the tower.

    Patches are left out in front of the first layer.
    """
    given = family_of(model).images.arguments(model.config, images)
    if watch is not None:  # transformers would install its recording hooks on stand-ins
        given |= {"output_hidden_states": False, "output_attentions": False}
    pooled: Tensor = masked_tower(model, rows, watch)(**given, return_dict=True).pooler_output
    return pooled, pooled


def _run(tower: Any, parts: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if any(asked(tower, kwargs, f"output_{name}") for name in ("hidden_states", "attentions")):
        install_hooks(tower, path_of(tower)[0])
    return call_with(tower, parts, *args, **kwargs)


def _layers(rows: Tensor | None, watch: Watch | None, layers: Any) -> BoundBlocks:
    calls = list(layers if watch is None else watched(layers, watch, read))
    if rows is not None:
        calls[0] = functools.partial(_on_rows, calls[0], rows)
    return BoundBlocks(layers, list(layers), calls, watched=True)


def _on_rows(layer: Any, rows: Tensor, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    return layer(take_rows(hidden_states, rows), *args, **kwargs)


def _pool(head: Any, row: Row, x: Tensor) -> Any:
    """SigLIP's attention pool: the row of its own query, by the packed weights."""
    attn = head.attention
    (w_q, w_k, _), bias = attn.in_proj_weight.detach().chunk(3), attn.in_proj_bias
    b_q, b_k, _ = (None,) * 3 if bias is None else bias.detach().chunk(3)
    made = (F.linear(head.probe.detach().expand(x.shape[0], -1, -1), w_q, b_q), F.linear(x.detach(), w_k, b_k))
    q, k = (part.unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for part in made)
    row.queries(q, attn.head_dim**-0.5)
    row.keys(k, attn.head_dim**-0.5)
    return head(x)


def _refused(tower: nn.Module, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"cannot leave patches out of a {type(tower).__qualname__}: {why}. Supported: transformers' image towers that "
        "embed patches and their positions at once and hand out pooled features. The model was left as it was."
    )
