"""Settings that travel: saved, loaded in another process, refused where they do not fit, gone after `remove`."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vtoken

PITOME = vtoken.PiToMe(ratio=0.8)


def small(**options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=7, **options).eval()


def image(side: int = 160) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def place(at: str = "", *configs: Any) -> dict[str, Any]:
    return {"version": 1, "places": [{"at": at, "methods": [c.to_dict() for c in configs or (PITOME,)]}]}


def in_new_process(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_timm_model_in_a_new_process(tmp_path: Path) -> None:
    model, x = vtoken.apply(small(), vtoken.PiToMe(ratio=[1.0, 0.9, 0.8, 1.0, 1.0, 1.0], margin=0.7)), image()
    assert vtoken.save_settings(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / "vtoken.json"
    vtoken.save_settings(model, tmp_path)
    vtoken.save_settings(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["vtoken.json"]
    with torch.inference_mode():
        save_file({"x": x, "out": model(x)} | {f"w.{k}": v for k, v in model.state_dict().items()}, tmp_path / "t.st")
    code = """
import sys, timm, torch, vtoken
from safetensors.torch import load_file
kept = load_file(sys.argv[1] + "/t.st")
model = timm.create_model("test_vit", num_classes=7).eval()
model.load_state_dict({k[2:]: v for k, v in kept.items() if k.startswith("w.")})
assert vtoken.load_settings(model, sys.argv[1]) is model
with torch.inference_mode():
    assert torch.equal(model(kept["x"]), kept["out"])
"""
    in_new_process(code, tmp_path)
    assert vtoken.config_of(vtoken.load_settings(small(), json.loads((tmp_path / "vtoken.json").read_text()))) == (
        vtoken.config_of(model)
    )


def test_learned_parts_come_with_the_state_dict_after_the_settings(tmp_path: Path) -> None:
    model, x = vtoken.apply(small(), vtoken.Sparsifiner(keep_ratio=0.3)), image()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    path = vtoken.save_settings(model, tmp_path)
    (told,) = json.loads(path.read_text())["places"]
    assert told["learned"]
    assert {name.rpartition(".")[2] for name in told["learned"]} == {"predictor"}
    with torch.inference_mode():
        expected = model(x)
        with pytest.warns(vtoken.VTokenWarning, match="learned parts are new.*load the state dict now"):
            again = vtoken.load_settings(small(), tmp_path)
        assert not torch.equal(again(x), expected)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(x), expected)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ([], "expected .*version"),
        ({"version": 1}, '"places" is a list'),
        ({"version": 2, "places": []}, "version 2, this vtoken reads version 1"),
        ({"version": True, "places": [{"at": "", "methods": []}]}, "version True"),
        ({"version": 1, "places": []}, '"places" is a list'),
        ({"version": 1, "places": ["x"]}, "a place is"),
        ({"version": 1, "places": [{"at": "", "methods": []}], "more": 1}, "no setting 'more'"),
        ({"version": 1, "places": [{"at": "", "methods": [], "code": "x"}]}, "no setting 'code'"),
        ({"version": 1, "places": [{"at": 3, "methods": [PITOME.to_dict()]}]}, '"at" names a module'),
        ({"version": 1, "places": [{"at": "", "methods": "pitome"}]}, '"methods" is a list'),
        ({"version": 1, "places": [{"at": "", "methods": []}]}, '"methods" is a list'),
        ({"version": 1, "places": [{"at": "", "methods": [PITOME.to_dict()], "learned": 5}]}, '"learned" is a list'),
        ({"version": 1, "places": [{"at": "", "methods": [{"method": "pitom", "version": 1}]}]}, "unknown method 'pit"),
        ({"version": 1, "places": [{"at": "", "methods": [PITOME.to_dict() | {"version": 9}]}]}, "version 9"),
        ({"version": 1, "places": [{"at": "", "methods": [PITOME.to_dict() | {"ratio": {}}]}]}, "ratio"),
        ({"version": 1, "places": [{"at": "", "methods": [PITOME.to_dict() | {"hook": 1}]}]}, "no setting 'hook'"),
        (place("blocks.99"), "'blocks.99', which this VisionTransformer lacks"),
        (place("", vtoken.PiToMe(ratio=[0.9, 0.8])), "ratio"),
        (place("", PITOME, vtoken.ToMe(r=2)), "two methods act"),
    ],
)
def test_what_is_damaged_or_does_not_fit_changes_nothing(values: Any, match: str, tmp_path: Path) -> None:
    (tmp_path / "vtoken.json").write_text(json.dumps(values))
    model, x = small(), image()
    before, classes = model(x), [type(m) for m in model.modules()]
    with pytest.raises(vtoken.ConfigError, match=match):
        vtoken.load_settings(model, tmp_path)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(x), before)


def test_files_that_are_none(tmp_path: Path) -> None:
    model = small()
    for text in ("{", "[" * 100_000, '{"version": 1, "places": [{"at": "", "methods": [{"ratio": NaN}]}]}'):
        (tmp_path / "vtoken.json").write_text(text)
        with pytest.raises(vtoken.ConfigError, match=r"vtoken\.json"):
            vtoken.load_settings(model, tmp_path)
    (tmp_path / "vtoken.json").write_bytes(b"\xff\xfe")
    with pytest.raises(vtoken.ConfigError, match="is no JSON"):
        vtoken.load_settings(model, tmp_path)
    (tmp_path / "vtoken.json").unlink()
    with pytest.raises(vtoken.ConfigError, match=r"has no vtoken\.json"):
        vtoken.load_settings(model, tmp_path)
    with pytest.raises(vtoken.ConfigError, match="no such folder"):
        vtoken.load_settings(model, tmp_path / "nowhere")
    with pytest.raises(vtoken.VTokenError, match="no method is applied"):
        vtoken.save_settings(model, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(vtoken.ConfigError, match="is a file"):
        vtoken.save_settings(vtoken.apply(model, PITOME), tmp_path / "file")
    with pytest.raises(vtoken.AlreadyAppliedError):
        vtoken.load_settings(model, place())
    other = vtoken.ToMe(r=3)
    assert vtoken.config_of(vtoken.load_settings(model, place("", other), replace=True)) == other


def test_of_several_places_all_are_patched_or_none() -> None:
    both = nn.ModuleDict({"a": small(), "b": small(), "c": nn.Linear(2, 2)})
    vtoken.apply(both["a"], PITOME)
    vtoken.apply(both["b"], vtoken.ToMe(r=4))
    with pytest.raises(vtoken.VTokenError, match="no method is applied"):
        vtoken.save_settings(both["c"], "nowhere")
    places = [*place("a")["places"], *place("c")["places"]]
    plain = nn.ModuleDict({"a": small(), "b": small(), "c": nn.Linear(2, 2)})
    with pytest.raises(vtoken.UnsupportedModelError):
        vtoken.load_settings(plain, {"version": 1, "places": places})
    assert not vtoken.is_applied(plain)


def test_settings_of_parts_keep_their_places(tmp_path: Path) -> None:
    both = nn.ModuleDict({"a": small(), "b": small()})
    vtoken.apply(both["a"], PITOME)
    vtoken.apply(both["b"], vtoken.ToMe(r=4))
    vtoken.save_settings(both, tmp_path)
    again = vtoken.load_settings(nn.ModuleDict({"a": small(), "b": small()}), tmp_path)
    assert [vtoken.config_of(again[name]) for name in "ab"] == [PITOME, vtoken.ToMe(r=4)]


def test_open_clip_in_a_folder(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(16, vision, text).eval()
    again = copy.deepcopy(model)
    vtoken.save_settings(vtoken.apply(model, "tome", r=3), tmp_path)
    with torch.inference_mode():
        expected = model.encode_image(image(32))
        assert torch.equal(vtoken.load_settings(again, tmp_path).encode_image(image(32)), expected)
    assert vtoken.config_of(again) == vtoken.ToMe(r=3)


def test_nothing_is_written_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vtoken.apply(small(), PITOME)
    path = vtoken.save_settings(model, tmp_path)
    before = path.read_text()
    vtoken.configure(model, ratio=0.5)

    def full(self: Path, target: Any) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        vtoken.save_settings(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["vtoken.json"]
    assert path.read_text() == before


def test_settings_of_a_wrapper_are_compared_as_it_is_built_with_them(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")

    def wrapped(ratio: float) -> Any:
        vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
        text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
        return vtoken.AttentiveMaskCLIP(open_clip.CLIP(16, vision, text), keep_ratio=ratio, block=1)

    model = wrapped(0.5)
    path = vtoken.save_settings(model, tmp_path)
    assert [place["at"] for place in json.loads(path.read_text())["places"]] == [""]
    again = wrapped(0.5)
    assert vtoken.load_settings(again, tmp_path) is again
    for other in (wrapped(0.25), small()):
        with pytest.raises(vtoken.ConfigError, match="is not applied but built: make the wrapper with these settings"):
            vtoken.load_settings(other, tmp_path)
