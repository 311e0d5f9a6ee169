"""A transformers image tower whose layers report their attention."""

from __future__ import annotations

from typing import Any

from transformers.utils.output_capturing import maybe_install_capturing_hooks

from vtoken.core.patch import view, view_as
from vtoken.errors import UnsupportedModelError
from vtoken.hosts.class_rows import ClassRows, RowTap
from vtoken.hosts.transformers.blocks import attention_of


def watched_tower(tower: Any, path: tuple[str, ...], rows: ClassRows) -> Any:
    """A stand-in for an unpatched tower whose layers, at the end of `path`, report to `rows`."""
    maybe_install_capturing_hooks(tower)  # the host would install them anew on every stand-in
    return view_as(type(tower), tower, **_watched(tower, path, rows))


def _watched(module: Any, path: tuple[str, ...], rows: ClassRows) -> dict[str, Any]:
    name, *rest = path
    child = getattr(module, name)
    return {name: view(child, **_watched(child, tuple(rest), rows)) if rest else rows.watched(child, _tapped)}


def _tapped(layer: Any, tap: RowTap) -> Any:
    name = "self_attn" if hasattr(layer, "self_attn") else "attention"
    attn = attention_of(layer)
    if not hasattr(attn, "q_proj"):
        raise UnsupportedModelError(
            f"cannot read class attention of a {type(layer).__name__} of this transformers release: its attention is "
            "nested; newer releases can be read"
        )
    scale = getattr(attn, "scale", getattr(attn, "scaling", None))
    return view_as(type(layer), layer, **{name: tap.on(attn, "q_proj", "k_proj", scale)})
