"""The entry methods of patched transformers vision models: towers, backbones and heads that average tokens."""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from vtoken.core.bound import BoundBlocks, bound, changed
from vtoken.core.carried import SavesSettings
from vtoken.core.forward import block_method, forward_of
from vtoken.core.patch import base_of, forward_with, is_patched, view
from vtoken.core.slots import Slot
from vtoken.core.state import TokenState
from vtoken.core.watch import Watch
from vtoken.errors import InputError
from vtoken.ops import size_bias
from vtoken.ops.rows import take_rows


class TowerMixin(SavesSettings):
    """A model whose forward embeds an image and runs the layers."""

    _vtoken: Any
    #: Attributes that lead from the tower to its list of layers.
    _vtoken_path: ClassVar[tuple[str, ...]]

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

    def _vtoken_arguments(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of one call by name."""
        signature = inspect.signature(base_of(type(self)).forward)  # type: ignore[attr-defined]
        bound = signature.bind(self, *args, **kwargs).arguments
        rest = [n for n, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
        options = bound.pop(rest[0], {}) if rest else {}
        del bound["self"]
        return {**bound, **options}

    def _vtoken_stand_in(self: Any, state: TokenState, masked: bool) -> Any:
        """The tower with its layers bound to one forward's state."""
        return _bind(self, self._vtoken_path, state, masked)

    def _vtoken_grid(self: Any, arguments: dict[str, Any]) -> tuple[int, int] | None:
        """Patch rows and columns of the images of this call."""
        pixels = arguments["pixel_values"]
        return grid_of(self, (pixels.shape[-2], pixels.shape[-1]))


class ClipTowerMixin(TowerMixin):
    """CLIP: class token, no pooling beyond it."""

    _vtoken_path = ("encoder", "layers")


class ViTTowerMixin(TowerMixin):
    """ViT, DeiT."""

    _vtoken_path = ("layers",)


class DinoTowerMixin(TowerMixin):
    """DINOv2 with and without registers."""

    _vtoken_path = ("encoder", "layer")


class SiglipTowerMixin(TowerMixin):
    """SigLIP: no prefix, an attention pool that is told the sizes."""

    _vtoken_path = ("encoder", "layers")

    def _vtoken_stand_in(self: Any, state: TokenState, masked: bool) -> Any:
        stand_in = _bind(self, self._vtoken_path, state, masked)
        if self.use_head:
            stand_in.__dict__["head"] = functools.partial(_sized, self.head, state)
        return stand_in


class Siglip2TowerMixin(SiglipTowerMixin):
    """SigLIP 2: images come as rows of patches, with a padding mask."""

    def _vtoken_arguments(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        given = TowerMixin._vtoken_arguments(self, args, kwargs)
        mask = given.setdefault("pixel_attention_mask", None)
        if mask is None:
            return given
        if not torch.compiler.is_compiling() and bool(mask.all()):
            return given | {"pixel_attention_mask": None}  # nothing is padded
        if will_remove(self, given["pixel_values"].shape[1]):
            raise InputError(
                "pixel_attention_mask marks padding (or may: a compiled graph cannot look), and padded rows cannot be "
                "told from image tokens when they merge; batch images of one size with max_num_patches set to their "
                "patch count, and pass pixel_attention_mask=None"
            )
        return given

    def _vtoken_grid(self: Any, arguments: dict[str, Any]) -> tuple[int, int] | None:
        shapes = arguments["spatial_shapes"]
        first = shapes[0].tolist()
        return (first[0], first[1]) if bool((shapes == shapes[0]).all()) else None


class DinoBackboneMixin(DinoTowerMixin):
    """A backbone: it reshapes hidden states to maps, so it gets them spread over all patches."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = self._vtoken_arguments(args, kwargs)
        maybe_install_capturing_hooks(self.encoder)
        with forward_of(self, num_prefix(self), lambda: self._vtoken_grid(given), dest=True) as state:
            encoder = _encoder(self.encoder, state, _masked(given))
            stand_in = view(self, encoder=functools.partial(_dense_encoder, encoder, state))
            out = base_of(type(self)).forward(stand_in, *args, **kwargs)  # type: ignore[attr-defined]
        _refuse_attentions(_asked(self, given, "output_attentions"), state)
        return out


class MeanHeadMixin(SavesSettings):
    """An image classifier that averages the tower's tokens: each must count as the patches it stands for."""

    #: The attribute that holds the tower.
    _vtoken_tower: ClassVar[str]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        tower = getattr(self, self._vtoken_tower)
        stock = base_of(type(self)).forward  # type: ignore[attr-defined]
        if "_vtoken" not in tower.__dict__:  # removed from the tower alone
            return stock(self, *args, **kwargs)
        weighed = functools.partial(tower, vtoken_weighed=True)
        return stock(view(self, **{self._vtoken_tower: weighed}), *args, **kwargs)


class VisionModelHeadMixin(MeanHeadMixin):
    """CLIPForImageClassification, SiglipForImageClassification."""

    _vtoken_tower = "vision_model"


class Siglip2HeadMixin(VisionModelHeadMixin):
    """Siglip2ForImageClassification: averages by the padding mask, which merged rows no longer fit."""

    def forward(
        self: Any,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        tower = self.vision_model
        if "_vtoken" in tower.__dict__ and will_remove(tower, pixel_values.shape[1]):
            # The tower still refuses padding; the head then takes the plain mean of the weighed rows.
            kwargs["vtoken_mask"], pixel_attention_mask = pixel_attention_mask, None
        return MeanHeadMixin.forward(self, pixel_values, pixel_attention_mask, spatial_shapes, *args, **kwargs)


class Dinov2HeadMixin(MeanHeadMixin):
    """Dinov2ForImageClassification."""

    _vtoken_tower = "dinov2"


class Dinov2RegistersHeadMixin(MeanHeadMixin):
    """Dinov2WithRegistersForImageClassification."""

    _vtoken_tower = "dinov2_with_registers"


def run_tower(
    tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Watch | None = None
) -> tuple[Any, Slot]:  # fmt: skip
    """The host's forward with a state of its own, watched by `rows`.

    Returns:
        Its output, rows in raster order, and what is known of the rows of `last_hidden_state`.
    """
    raster = block_method(tower).order == "raster"
    watched = rows is not None  # then it must be known what became of every token
    given = tower._vtoken_arguments(args, kwargs)
    attentions = _asked(tower, given, "output_attentions")
    if attentions or _asked(tower, given, "output_hidden_states"):
        _install_hooks(tower)
    grid = functools.partial(tower._vtoken_grid, given)
    with forward_of(tower, num_prefix(tower), grid, anchor=raster or watched, dest=watched) as state:
        state.watch = rows
        stand_in = tower._vtoken_stand_in(state, _masked(given))
        out = base_of(type(tower)).forward(stand_in, **{**given, "return_dict": True})  # type: ignore[attr-defined]
    _refuse_attentions(attentions, state)
    slot = state.last
    if raster:
        out.last_hidden_state, slot = slot.in_raster_order(out.last_hidden_state)
        if out.hidden_states is not None:
            out.hidden_states = tuple(
                rows if rows is None else state.slots[layer].in_raster_order(rows)[0]
                for layer, rows in enumerate(out.hidden_states)
            )
    return out, slot


def _install_hooks(tower: Any) -> None:
    """transformers' recording hooks on the modules themselves: it would install them anew on every stand-in."""
    # An unpatched DINOv2 installs them on its encoder; a second set on the tower would record every state twice.
    if not getattr(getattr(tower, "encoder", None), "_output_capturing_hooks_installed", False):
        maybe_install_capturing_hooks(tower)


def num_prefix(tower: Any) -> int:
    """Class, distillation and register tokens of a tower."""
    kind = str(tower.config.model_type)
    if kind.startswith("siglip"):
        return 0
    if kind == "deit":
        return 2
    return 1 + int(getattr(tower.config, "num_register_tokens", 0))


def grid_of(tower: Any, img_size: tuple[int, int]) -> tuple[int, int]:
    """Patch rows and columns of an image of `img_size` (height, width) pixels."""
    patch = pair(tower.config.patch_size)
    return img_size[0] // patch[0], img_size[1] // patch[1]


def pair(value: Any) -> tuple[int, int]:
    """One side or (height, width) as a pair."""
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)


def will_remove(tower: Any, patches: int) -> bool:
    """Whether any layer takes tokens away from an image of so many patches."""
    method, layers = block_method(tower), functools.reduce(getattr, tower._vtoken_path, tower)
    return any(method.num_removed(layer, patches, patches) for layer in range(len(layers)))


def _asked(model: Any, arguments: dict[str, Any], name: str) -> bool:
    return bool(arguments.get(name, getattr(model.config, name, False)))


def _refuse_attentions(asked: bool, state: TokenState) -> None:
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

    _vtoken_list: ClassVar[str] = "layers"

    def forward(
        self: Any, *args: Any, vtoken_state: TokenState | None = None, vtoken_masked: bool = True, **kwargs: Any
    ) -> Any:  # fmt: skip
        if vtoken_state is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        layers = _layers(getattr(self, self._vtoken_list), vtoken_state, vtoken_masked)
        return forward_with(self, {self._vtoken_list: layers}, *args, **kwargs)


class DinoEncoderMixin(EncoderMixin):
    """DINOv2's calls its list otherwise."""

    _vtoken_list = "layer"


class SizedHeadMixin:
    """SigLIP's attention pool over tokens that merged."""

    def forward(self: Any, hidden_state: Tensor, *args: Any, vtoken_size: Tensor | None = None) -> Any:
        if vtoken_size is None:
            return super().forward(hidden_state, *args)  # type: ignore[misc]
        # A float key_padding_mask [B, T] is added to the logits of the keys.
        bias = size_bias(vtoken_size, hidden_state.dtype)[:, 0, 0]
        attention = functools.partial(self.attention, key_padding_mask=bias)
        return forward_with(self, {"attention": attention}, hidden_state, *args)


def tower_targets(tower: Any, path: tuple[str, ...]) -> list[tuple[Any, type, dict[str, Any]]]:
    """What `patch` needs for the modules around the layers."""
    found: list[tuple[Any, type, dict[str, Any]]] = []
    if len(path) > 1:
        found.append((getattr(tower, path[0]), DinoEncoderMixin if path[1] == "layer" else EncoderMixin, {}))
    if getattr(tower, "use_head", False):
        found.append((tower.head, SizedHeadMixin, {}))
    return found


def _sized(head: Any, state: TokenState, x: Tensor, *args: Any) -> Tensor:
    """SigLIP's attention pool, told the sizes."""
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


def _dense_encoder(encoder: Any, state: TokenState, *args: Any, **kwargs: Any) -> Any:
    """The encoder's output with every hidden state spread over all patches."""
    out = encoder(*args, **kwargs)
    out.hidden_states = tuple(
        None if rows is None else _spread(rows, state.slots[layer]) for layer, rows in enumerate(out.hidden_states)
    )
    return out


def _spread(rows: Tensor, slot: Slot) -> Tensor:
    return rows if slot.dest is None else take_rows(rows, slot.dest)
