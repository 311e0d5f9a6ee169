"""Settings in the config of transformers models: written by save_pretrained, kept by from_pretrained, restored."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vtoken

transformers = pytest.importorskip("transformers")
from tests.hosts import llavas  # noqa: E402

PITOME, CLS = vtoken.PiToMe(ratio=0.8), vtoken.VTCCLS(keep_ratio=0.5)
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 4,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


def vit() -> Any:
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, num_labels=5)).eval()


def clip() -> Any:
    torch.manual_seed(0)
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=SIZES, text_config=TEXT)).eval()


def mean() -> Any:
    config = transformers.CLIPConfig(vision_config=SIZES, text_config=TEXT, num_labels=5)
    return transformers.CLIPForImageClassification(config).eval()


def pixels(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def entry(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text()).get("vtoken")


def prompt(model: Any) -> dict[str, Tensor]:
    """One image and text for a LLaVA, with as many placeholders as it wants."""
    return llavas.prompt([3, -vtoken.num_tokens(model), 4, 5]) | llavas.shown(model, llavas.images(1))


def as_json(*configs: Any) -> Any:
    return json.loads(json.dumps([config.to_dict() for config in configs]))


CHILD = """
import sys, torch, transformers, vtoken
from safetensors.torch import load_file
for name in ("ViTForImageClassification", "CLIPModel", "LlavaForConditionalGeneration"):
    folder = sys.argv[1] + "/" + name
    kept = load_file(folder + "/kept.st")
    model = getattr(transformers, name).from_pretrained(folder).eval()
    assert not any("_vtoken_base" in vars(type(m)) for m in model.modules()), "applied unasked"
    assert vtoken.restore(model) is model and vtoken.config_of(model) is not None
    out = kept.pop("out")
    with torch.inference_mode():
        if name == "CLIPModel":
            found = model.get_image_features(**kept)
            found = getattr(found, "pooler_output", found)
        else:
            found = model(**kept).logits
    assert torch.equal(found, out), name
"""


def test_saved_loaded_in_a_new_process_restored(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    both = [vtoken.ToMe(r=2), CLS]
    for model, configs in ((vit(), [PITOME]), (clip(), [vtoken.ToMe(r=5)]), (llavas.build("llava"), both)):
        vtoken.apply(model, configs)
        inputs = prompt(model) if configs is both else {"pixel_values": pixels()}
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        (place,) = entry(folder)["places"]
        assert place == {"at": "", "methods": as_json(*configs), "learned": []}
        with torch.inference_mode():
            if isinstance(model, transformers.CLIPModel):
                out = model.get_image_features(**inputs)
                out = getattr(out, "pooler_output", out)
            else:
                out = model(**inputs).logits
        save_file({name: value.contiguous() for name, value in inputs.items()} | {"out": out}, folder / "kept.st")
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("build", [vit, clip, mean, functools.partial(llavas.build, "llava")])
def test_a_save_says_what_is_carried_then_and_a_removed_model_saves_nothing(build: Any, tmp_path: Path) -> None:
    model = build()
    config, kind = model.config, type(model)
    model.save_pretrained(tmp_path / "plain")
    before = config.to_dict()  # with what transformers notes when it saves
    config.architectures = None
    vtoken.apply(model, PITOME)
    assert model.config is config
    vtoken.configure(model, ratio=0.5)
    model.save_pretrained(tmp_path / "patched")
    assert entry(tmp_path / "patched")["places"][0]["methods"][0]["ratio"] == 0.5
    assert model.config.to_dict() == before
    vtoken.remove(model)
    assert type(model) is kind
    model.save_pretrained(tmp_path / "removed")
    names = ("plain", "removed")
    plain, removed = (json.loads((tmp_path / name / "config.json").read_text()) for name in names)
    assert plain == removed
    patched = json.loads((tmp_path / "patched" / "config.json").read_text())
    assert {k: v for k, v in patched.items() if k != "vtoken"} == plain


def test_a_restored_and_removed_model_saves_a_clean_config(tmp_path: Path) -> None:
    vtoken.apply(model := vit(), PITOME).save_pretrained(tmp_path)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    vtoken.remove(vtoken.restore(again))
    again.save_pretrained(tmp_path / "clean")
    assert entry(tmp_path / "clean") is None
    with pytest.raises(vtoken.VTokenError, match="nothing to restore"):
        vtoken.restore(again)
    # One that was never restored still names them, and so does its copy.
    untouched = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    untouched.save_pretrained(tmp_path / "copy")
    assert entry(tmp_path / "copy") == entry(tmp_path)
    assert vtoken.config_of(vtoken.load_settings(vit(), tmp_path / "copy")) == vtoken.config_of(model)


def test_settings_that_are_not_applied_are_told(tmp_path: Path) -> None:
    vtoken.apply(vit(), PITOME).save_pretrained(tmp_path)
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            assert not vtoken.is_applied(model)
    assert [str(w.message) for w in told] == [
        "the config of this ViTForImageClassification names settings of vtoken that are not applied: "
        "vtoken.restore(model) applies them"
    ]
    for verb in (lambda: vtoken.plan(model), lambda: vtoken.trace(model, pixels())):
        with pytest.raises(vtoken.VTokenError, match=r"not applied: vtoken\.restore"):
            verb()
    with pytest.warns(vtoken.VTokenWarning, match="not applied"):
        assert vtoken.config_of(model) is None
    with pytest.raises(vtoken.VTokenError, match="not applied"):
        vtoken.save_settings(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vtoken.report(model, PITOME)  # counts what it is given, whatever the config names
    vtoken.restore(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vtoken.is_applied(model)


def test_models_that_share_a_config_do_not_tell_of_each_other(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**SIZES)
    a, b, c = (transformers.ViTModel(config) for _ in range(3))
    vtoken.apply(a, PITOME)
    vtoken.apply(b, vtoken.ToMe(r=3))
    methods = {}
    for name, model in {"a": a, "b": b, "c": c}.items():
        model.save_pretrained(tmp_path / name)
        told = entry(tmp_path / name)
        methods[name] = told and told["places"][0]["methods"][0]["method"]
    assert methods == {"a": "pitome", "b": "tome", "c": None}


def test_damaged_entries_change_nothing(tmp_path: Path) -> None:
    vtoken.apply(vit(), PITOME).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for wrong, match in (
        (5, "the config of ViTForImageClassification: expected"),
        (values["vtoken"] | {"version": 7}, "version 7, this vtoken reads version 1"),
        ({"version": 1, "places": [{"at": "", "methods": as_json(CLS)}]}, "cannot shorten the prompts"),
        ({"version": 1, "places": [{"at": "text", "methods": as_json(PITOME)}]}, "lacks"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | {"vtoken": wrong}))
        model = transformers.ViTForImageClassification.from_pretrained(tmp_path)
        with pytest.raises(vtoken.VTokenError, match=match):
            vtoken.restore(model)
        assert not any("_vtoken_base" in vars(type(m)) for m in model.modules())
        assert model.config.vtoken == wrong, "a failed restore can be tried again"


def test_two_files_in_a_folder_must_agree(tmp_path: Path) -> None:
    model = vtoken.apply(vit(), PITOME)
    model.save_pretrained(tmp_path)
    vtoken.save_settings(model, tmp_path)
    assert vtoken.config_of(vtoken.load_settings(vit(), tmp_path)) == PITOME
    vtoken.save_settings(vtoken.configure(model, ratio=0.5), tmp_path)
    with pytest.raises(vtoken.ConfigError, match="differ; take one of them away"):
        vtoken.load_settings(vit(), tmp_path)


@pytest.mark.parametrize("first", ["tower", "prompt"])
@pytest.mark.parametrize("gone", ["tower", "prompt"])
def test_parts_come_and_go_in_any_order(first: str, gone: str, tmp_path: Path) -> None:
    configs = {"tower": vtoken.ToMe(r=2), "prompt": CLS}
    model = llavas.build("llava")
    plain, classes = llavas.build("llava"), [type(m) for m in model.modules()]
    for part in (first, *(p for p in configs if p != first)):
        vtoken.apply(model, configs[part])
    vtoken.remove(model, configs[gone].method)
    (left,) = (c for p, c in configs.items() if p != gone)
    vtoken.apply(plain, left)
    with torch.inference_mode():
        assert torch.equal(model(**prompt(plain)).logits, plain(**prompt(plain)).logits)
    model.save_pretrained(tmp_path)
    assert entry(tmp_path)["places"][0]["methods"] == as_json(left)
    vtoken.remove(model)
    assert [type(m) for m in model.modules()] == classes
    assert not any(name.startswith("_vtoken") for m in model.modules() for name in m.__dict__)


def test_a_tower_that_was_patched_by_itself(tmp_path: Path) -> None:
    model = llavas.build("llava")
    vtoken.apply(model.model.vision_tower, vtoken.ToMe(r=2))
    model.save_pretrained(tmp_path)
    assert entry(tmp_path) is None
    vtoken.save_settings(model, tmp_path)
    again = vtoken.load_settings(transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval(), tmp_path)
    assert vtoken.config_of(again.model.vision_tower) == vtoken.ToMe(r=2)
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    tower = type(again.model.vision_tower)._vtoken_base.from_pretrained(tmp_path / "tower")
    assert vtoken.config_of(vtoken.restore(tower)) == vtoken.ToMe(r=2)


def test_a_holder_whose_tower_was_removed_alone(tmp_path: Path) -> None:
    model = vtoken.apply(vit(), PITOME)
    vtoken.remove(model.vit)
    assert not vtoken.is_applied(model)
    model.save_pretrained(tmp_path)
    assert entry(tmp_path) is None
    vtoken.apply(model, vtoken.ToMe(r=3)).save_pretrained(tmp_path)
    assert entry(tmp_path)["places"][0]["methods"] == as_json(vtoken.ToMe(r=3))
    kind = type(vit())
    assert type(vtoken.remove(model)) is kind


def test_a_tower_that_came_with_an_entry_into_another_model(tmp_path: Path) -> None:
    model = llavas.build("llava")
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    told = {"version": 1, "places": [{"at": "", "methods": as_json(vtoken.ToMe(r=2))}]}
    values["vision_config"]["vtoken"] = told
    (tmp_path / "config.json").write_text(json.dumps(values))
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    vtoken.restore(again)
    assert vtoken.config_of(again.model.vision_tower) == vtoken.ToMe(r=2)
    vtoken.remove(again).save_pretrained(tmp_path / "clean")
    assert "vtoken" not in (tmp_path / "clean" / "config.json").read_text()


def test_through_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted(model: Any) -> Any:
        torch.manual_seed(3)
        lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
        return peft.get_peft_model(model, lora).eval()

    model = adapted(vtoken.apply(vit(), PITOME))
    model.save_pretrained(tmp_path)
    vtoken.save_settings(model, tmp_path)
    with torch.inference_mode():
        expected = model(pixel_values=pixels()).logits
        again = peft.PeftModel.from_pretrained(vtoken.load_settings(vit(), tmp_path), tmp_path).eval()
        assert torch.equal(again(pixel_values=pixels()).logits, expected)
        later = vtoken.load_settings(peft.PeftModel.from_pretrained(vit(), tmp_path).eval(), tmp_path)
        assert torch.equal(later(pixel_values=pixels()).logits, expected)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert entry(tmp_path / "merged")["places"][0]["methods"] == as_json(PITOME)


def test_a_mixin_of_a_host_of_ones_own_takes_them_along(tmp_path: Path) -> None:
    from vtoken import hosting
    from vtoken.core.patch import mixin_of, patch
    from vtoken.core.patch import unpatch as leave

    model = vit()
    vtoken.apply(model.vit, PITOME)

    class Mixin(hosting.SavesSettings):
        """An entry method of somebody else's."""

    patch([(model, Mixin, {})])
    assert mixin_of(type(model)) is Mixin
    model.save_pretrained(tmp_path)
    assert entry(tmp_path)["places"] == [{"at": "", "methods": as_json(PITOME), "learned": []}]
    leave(model)
    assert type(model) is transformers.ViTForImageClassification
