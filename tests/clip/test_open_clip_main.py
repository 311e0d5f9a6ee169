"""open_clip's own main, as it is, trains with attentive masks under `python -m vtoken run`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import assert_same

#: What open_clip_train imports for data sets that are not used here, and the names that it takes from them.
STAND_INS = {
    "webdataset/__init__.py": "class PipelineStage: pass",
    "webdataset/filters.py": "_shuffle = None",
    "webdataset/tariterators.py": "base_plus_ext = url_opener = tar_file_expander = valid_sample = None",
    "pandas.py": "",
    "braceexpand.py": "",
    "fsspec.py": "",
}
WORDS = (
    "--dataset-type synthetic --train-num-samples 16 --batch-size 4 --epochs 2 --workers 0 --device cpu "
    "--precision fp32 --warmup 1 --lr 1e-3 --save-frequency 1 --logs logs"
)
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
MODELS: dict[str, dict[str, Any]] = {
    "own": {"image_size": 64, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "map": {"timm_model_name": "vit_map", "timm_pool": "map", "timm_proj": "linear", "image_size": 32},
}
PROGRAM = f"""
import sys, open_clip
from open_clip_train.main import main
open_clip.add_model_config("configs")
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
@register_model
def vit_map(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **options):
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    model = VisionTransformer(class_token=False, global_pool="map", **(sizes | options))
    model.default_cfg = model.pretrained_cfg = dict()
    return model
def train(model, name, *words):
    main(["--model", model, "--name", name, *{WORDS.split()!r}, *words])
train("own", "whole")
train("own", "resumed", "--resume", "logs/whole/checkpoints/epoch_1.pt")
train("own", "accumulated", "--accum-freq", "2")
train("map", "siglip", "--siglip", "--grad-checkpointing")
"""


def load(folder: Path, name: str, epoch: int = 2) -> dict[str, torch.Tensor]:
    path = folder / "logs" / name / "checkpoints" / f"epoch_{epoch}.pt"
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


@pytest.mark.slow
def test_main_trains_and_resumes(tmp_path: Path) -> None:
    """Checkpoints hold the teacher, which moves once a step; a resumed run ends as one that was not interrupted."""
    for name, text in STAND_INS.items():
        if importlib.util.find_spec(name.partition("/")[0].removesuffix(".py")) is None:
            path = tmp_path / "stand_ins" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    (tmp_path / "configs").mkdir()
    for name, vision in MODELS.items():
        values = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}
        (tmp_path / "configs" / f"{name}.json").write_text(json.dumps(values))
    (tmp_path / "program.py").write_text(PROGRAM)
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(map(str, (root, root / "kernels", tmp_path / "stand_ins")))
    settings = ["keep_ratio=0.5", "momentum=0.9", "block=1", "total_steps=8"]
    command = [sys.executable, "-m", "vtoken", "run", "--method", "attentive_clip", *settings, "--", "program.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("attentive_clip is applied to open_clip.create_model") == 4
    states = {name: load(tmp_path, name) for name in ("whole", "resumed", "accumulated", "siglip")}
    assert {name: int(state["ema_step"]) for name, state in states.items()} == {
        "whole": 8, "resumed": 8, "accumulated": 4, "siglip": 8,
    }  # fmt: skip
    assert_same("state", states["whole"], states["resumed"])
    for name, state in states.items():
        teacher = [key for key in state if key.startswith("teacher.visual.") and key.endswith("mlp.fc1.weight")]
        teacher += [key for key in state if key.startswith("teacher.visual.") and key.endswith("mlp.c_fc.weight")]
        early = load(tmp_path, name, 1) if name != "resumed" else {}
        assert teacher, name
        for key in teacher:
            assert not torch.equal(state[key], state[key.replace("teacher.", "model.")]), key
            assert not early or not torch.equal(state[key], early[key]), key
