"""The entry methods of patched transformers vision models: towers, backbones and heads that average tokens."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from vtoken.core.bound import BoundBlocks, bound, changed
from vtoken.core.carried import SavesSettings
from vtoken.core.forward import block_method, forward_of, masks_attention
from vtoken.core.patch import base_of, forward_with, is_patched, view
from vtoken.core.slots import Slot
from vtoken.core.state import TokenState
from vtoken.core.watch import Watch
from vtoken.errors import InputError
from vtoken.hosts.transformers.families import family_of, layers_of, num_prefix, path_of, tower_known


class TowerMixin(SavesSettings):
    """A model whose forward embeds an image and runs the layers."""

    _vtoken: Any
    #: The name of its record in families.py.
    _vtoken_family: str

    def forward(
        self: Any, *args: Any, vtoken_weighed: bool = False, vtoken_rows: Watch | None = None, **kwargs: Any
    ) -> Any:  # fmt: skip
        if vtoken_weighed:
            return _weighed(self, args, kwargs)
        if vtoken_rows is None and "_vtoken" not in self.__dict__:  # only watched, and not in this call
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return_dict = kwargs.pop("return_dict", getattr(self.config, "return_dict", True))
        out = run_tower(self, args, kwargs, vtoken_rows)[0]
        return out if return_dict else out.to_tuple()


class BackboneMixin(SavesSettings):
    """A backbone: it reshapes hidden states to maps, so it gets them spread over all patches."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given, family = _arguments(self, args, kwargs), family_of(self)
        name = path_of(self)[0]
        encoder = getattr(self, name)
        maybe_install_capturing_hooks(encoder)
        grid = functools.partial(family.images.grid, self.config, given)
        with forward_of(self, num_prefix(self), grid, anchor=family.rotary, dest=True) as state:
            stand_in = view(self, **{name: _DenseEncoder(encoder, state, _masked(given))})
            out = base_of(type(self)).forward(stand_in, *args, **kwargs)  # type: ignore[attr-defined]
        _refuse_attentions(asked(self, given, "output_attentions"), state)
        return out


class MeanHeadMixin(SavesSettings):
    """An image classifier that averages the tower's tokens: each must count as the patches it stands for."""

    #: The attribute that holds the tower.
    _vtoken_tower: str

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        tower = getattr(self, self._vtoken_tower)
        stock = base_of(type(self)).forward  # type: ignore[attr-defined]
        if "_vtoken" not in tower.__dict__:  # removed from the tower alone
            return stock(self, *args, **kwargs)
        weighed = functools.partial(tower, vtoken_weighed=True)
        given = _arguments(self, args, kwargs)
        mask = given.get("pixel_attention_mask")
        if mask is not None and will_remove(tower, given["pixel_values"].shape[1]):
            # A head that averages by the padding mask, which merged rows no longer fit. The tower still refuses
            # padding; the head then takes the plain mean of the weighed rows.
            weighed = functools.partial(weighed, vtoken_mask=mask)
            given["pixel_attention_mask"] = None
        return stock(view(self, **{self._vtoken_tower: weighed}), **given)


def _arguments(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one call by name."""
    signature = inspect.signature(base_of(type(model)).forward)  # type: ignore[attr-defined]
    bound = signature.bind(model, *args, **kwargs).arguments
    rest = [n for n, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
    options = bound.pop(rest[0], {}) if rest else {}
    del bound["self"]
    return {**bound, **options}


def _without_mask(tower: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a tower that may be told of padding, without a mask that marks none."""
    mask = given.get("pixel_attention_mask")
    if mask is None or (not torch.compiler.is_compiling() and bool(mask.all())):
        return given | {"pixel_attention_mask": None}
    if will_remove(tower, given["pixel_values"].shape[1]) or masks_attention(tower, len(layers_of(tower))):
        raise InputError(
            "pixel_attention_mask marks padding (or may: a compiled graph cannot look), and padded rows cannot be "
            "told from image tokens when they merge, nor have they places on the grid of connectivity masks; batch "
            "images of one size with max_num_patches set to their patch count, and pass pixel_attention_mask=None"
        )
    return given


def _refuse_unserved(tower: Any, given: dict[str, Any]) -> None:
    """Raise InputError for an argument that names rows which will be gone."""
    for name, why in family_of(tower).images.unserved.items():
        if given.get(name) is not None and removes(tower):
            raise InputError(f"{name} cannot be combined with removed tokens: {why}; use vtoken.remove(model)")
    if family_of(tower).images.packed and given["pixel_values"].shape[0] > 1 and removes(tower):
        raise InputError(
            f"{type(tower).__name__} packs the patches of all images of a call into one row, where tokens of different "
            "images would merge; give it one image at a time, or use vtoken.remove(model)"
        )


def run_tower(
    tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Watch | None = None
) -> tuple[Any, Slot]:  # fmt: skip
    """The host's forward with a state of its own, watched by `rows`.

    Returns:
        Its output, rows in raster order, and what is known of the rows of `last_hidden_state`.
    """
    raster = block_method(tower).order == "raster"
    watched = rows is not None  # then it must be known what became of every token
    given, family = _arguments(tower, args, kwargs), family_of(tower)
    path = path_of(tower)
    if family.images.padded:
        given = _without_mask(tower, given)
    _refuse_unserved(tower, given)
    # The mask that keeps packed images apart is all that tells them from one image, which needs none.
    masked = _masked(given) or (family.images.packed and not removes(tower))
    attentions = asked(tower, given, "output_attentions")
    if attentions or asked(tower, given, "output_hidden_states"):
        install_hooks(tower, path[0])
    grid = functools.partial(family.images.grid, tower.config, given)
    with forward_of(tower, num_prefix(tower), grid, anchor=raster or watched or family.rotary, dest=watched) as state:
        if state.grid is None and masks_attention(tower, len(layers_of(tower))):
            raise InputError(
                "connectivity masks belong to places on a patch grid, so all images of a batch must have one patch "
                "grid (spatial_shapes); batch images of one size, or use vtoken.remove(model)"
            )
        state.watch = rows
        stand_in = _bind(tower, path, state, masked)
        if getattr(tower, "use_head", False):
            stand_in.__dict__["head"] = functools.partial(_sized, tower.head, state)
        out = base_of(type(tower)).forward(stand_in, **{**given, "return_dict": True})  # type: ignore[attr-defined]
    _refuse_attentions(attentions, state)
    slot = state.last
    if raster:
        out.last_hidden_state, slot = slot.in_raster_order(out.last_hidden_state)
        if getattr(out, "features", None) is not None:  # RADIO's name for the patches among the same rows
            out.features = out.last_hidden_state[:, num_prefix(tower) :]
        if out.hidden_states is not None:
            out.hidden_states = tuple(
                rows if rows is None else state.slots[layer].in_raster_order(rows)[0]
                for layer, rows in enumerate(out.hidden_states)
            )
    return out, slot


def install_hooks(tower: Any, first: str) -> None:
    """transformers' recording hooks on the modules themselves: it would install them anew on every stand-in."""
    # An unpatched DINOv2 installs them on its encoder; a second set on the tower would record every state twice.
    if not getattr(getattr(tower, first), "_output_capturing_hooks_installed", False):
        maybe_install_capturing_hooks(tower)


def will_remove(tower: Any, patches: int) -> bool:
    """Whether any layer takes tokens away from an image of so many patches."""
    method, layers = block_method(tower), layers_of(tower)
    return any(method.num_removed(layer, patches, patches) for layer in range(len(layers)))


def removes(tower: Any) -> bool:
    """Whether any layer takes tokens away from an image of the tower's own size."""
    height, width = family_of(tower).images.patches(tower.config, family_of(tower).images.size(tower.config))
    return will_remove(tower, height * width)


def asked(model: Any, arguments: dict[str, Any], name: str) -> bool:
    """Whether a call, or the configuration, wants hidden states or attention maps."""
    return bool(arguments.get(name, getattr(model.config, name, False)))


def _refuse_attentions(asked: bool, state: TokenState) -> None:
    if asked and any(state.masks(layer) for layer in state.slots):
        raise InputError(
            "output_attentions=True cannot be served while a connectivity mask thins out attention: its maps are not "
            "made. Use vtoken.tracing(model, maps=('attention',)), or vtoken.remove(model)"
        )
    if asked and state.last is not state.first:
        raise InputError(
            "output_attentions=True cannot be served while tokens are removed: attention maps of different layers then "
            "have different sizes and rows; use vtoken.trace for what merged, or vtoken.remove(model)"
        )


def _masked(arguments: dict[str, Any]) -> bool:
    """Whether the caller gave a mask; export makes the host build one, of ones, even where there is none."""
    return any(arguments.get(name) is not None for name in ("attention_mask", "pixel_attention_mask"))


def _bind(module: Any, path: tuple[str, ...], state: TokenState, masked: bool) -> Any:
    """The module with the layers at the end of `path` bound to one forward's state."""
    name, *rest = path
    child = getattr(module, name)
    return view(module, **{name: _encoder(child, state, masked) if rest else _layers(child, state, masked)})


def _encoder(encoder: Any, state: TokenState, masked: bool) -> Any:
    """The encoder, whose call is given one forward's state."""
    if not is_patched(encoder):
        raise changed("the encoder", encoder)
    return functools.partial(encoder, vtoken_state=state, vtoken_masked=masked)


def _layers(layers: Any, state: TokenState, masked: bool) -> BoundBlocks:
    return bound(layers, state, None if masked else [functools.partial(_unmasked, layer) for layer in layers])


def _unmasked(layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
    """One layer of a forward whose caller gave no mask."""
    rows: Tensor = layer(hidden_states, None, **options)
    return rows


class EncoderMixin:
    """A module between the tower and its list of layers."""

    #: The attribute of that list.
    _vtoken_list: str

    def forward(
        self: Any, *args: Any, vtoken_state: TokenState | None = None, vtoken_masked: bool = True, **kwargs: Any
    ) -> Any:  # fmt: skip
        if vtoken_state is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        layers = _layers(getattr(self, self._vtoken_list), vtoken_state, vtoken_masked)
        return forward_with(self, {self._vtoken_list: layers}, *args, **kwargs)


def tower_targets(tower: Any) -> list[tuple[Any, type, dict[str, Any]]]:
    """What `patch` needs for the tower itself and the modules around its layers."""
    known = tower_known(type(tower))
    assert known is not None
    family, path = known.family, path_of(tower)
    mixin = BackboneMixin if known.name in family.backbones else TowerMixin
    found: list[tuple[Any, type, dict[str, Any]]] = [(tower, mixin, {"_vtoken_family": known.module})]
    if len(path) > 1:
        found.append((getattr(tower, path[0]), EncoderMixin, {"_vtoken_list": path[-1]}))
    if getattr(tower, "use_head", False):
        found.append((tower.head, family.pool, {}))
    return found


def _sized(head: Any, state: TokenState, x: Tensor, *args: Any) -> Tensor:
    """An attention pool, told the sizes."""
    size = state.last.size
    return head(x, *args) if size is None else head(x, *args, vtoken_size=size)


def _weighed(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tower's output with rows scaled so that their plain mean is the mean over all patches."""
    mask = kwargs.pop("vtoken_mask", None)
    if mask is not None:
        kwargs["pixel_attention_mask"] = mask  # taken away from the head, which would average by it
    out, slot = run_tower(tower, args, kwargs)
    if slot.size is not None:
        rows, first = out.last_hidden_state, num_prefix(tower)
        share = slot.size[:, first:].to(torch.promote_types(rows.dtype, torch.float32))
        scale = share * (share.shape[1] / share.sum(1, keepdim=True))
        patches = (rows[:, first:] * scale.unsqueeze(-1)).to(rows.dtype)
        out.last_hidden_state = torch.cat([rows[:, :first], patches], dim=1)
    return out


class _DenseEncoder:
    """An encoder for one call, whose output has every hidden state spread over all patches.

    What else a backbone asks of its encoder, the encoder answers.
    """

    def __init__(self, encoder: Any, state: TokenState, masked: bool) -> None:
        self._bound, self._state, self._own = _encoder(encoder, state, masked), state, encoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out, slots = self._bound(*args, **kwargs), self._state.slots
        out.hidden_states = tuple(
            None if rows is None else slots[layer].spread(rows) for layer, rows in enumerate(out.hidden_states)
        )
        return out
