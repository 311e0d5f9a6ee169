"""`python -m vtoken run`: programs as they are, their models patched on the way out of the libraries."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.models._factory

import vtoken
from vtoken.__main__ import main
from vtoken.cli.factories import watched

OWN = timm.create_model


def program(folder: Path, text: str, name: str = "program.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def run(*words: object, method: str = "pitome ratio=0.9", options: str = "") -> int:
    return main(["run", *options.split(), "--method", *method.split(), "--", *map(str, words)])


@pytest.fixture(autouse=True)
def _libraries_are_as_they_were() -> Any:
    argv, path = list(sys.argv), list(sys.path)
    yield
    assert timm.create_model is timm.models.create_model is timm.models._factory.create_model is OWN
    assert sys.argv == argv
    assert sys.path == path
    assert not any(type(finder).__module__.startswith("vtoken") for finder in sys.meta_path)


def test_a_program_gets_patched_models_and_its_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program(tmp_path, "WHERE = 'beside'", "beside.py")
    path = program(tmp_path, """
        import sys, beside, torch, vtoken
        from timm.models import create_model
        model = create_model("test_vit", num_classes=3).eval()
        other = create_model("resnet10t")
        out, trace = vtoken.trace(model, torch.randn(1, 3, 160, 160))
        print(sys.argv[1:], __name__, beside.WHERE, out.shape[1], trace.tokens == list(vtoken.plan(model).tokens))
    """)  # fmt: skip
    manifest = tmp_path / "new" / "m.json"
    assert run(path, "a", "--b", "--", "c", options=f"--manifest {manifest}") == 0
    out, err = capsys.readouterr()
    assert out == "['a', '--b', '--', 'c'] __main__ beside 3 True\n"
    assert "pitome is applied to timm.create_model('test_vit'), a VisionTransformer" in err
    assert "left as it was: timm.create_model('resnet10t'), a ResNet: cannot reduce" in err
    values = json.loads(manifest.read_text())
    assert (values["status"], values["method"]["ratio"], values["program"][1:]) == (0, 0.9, ["a", "--b", "--", "c"])
    assert [(m["name"], m["patched"], bool(m["why"])) for m in values["models"]] == [
        ("test_vit", True, False),
        ("resnet10t", False, True),
    ]


def test_a_module_in_a_new_process_that_imports_its_libraries_itself(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    program(tmp_path / "package", "", "__init__.py")
    program(tmp_path / "package", """
        import sys
        assert not {"timm", "transformers", "open_clip"} & set(sys.modules), "imported before the program did"
        import timm, timm.models._factory, vtoken
        assert vtoken.is_applied(timm.create_model(model_name="test_vit"))
        assert timm.models._factory.__spec__.loader is timm.models._factory.__loader__
        print(sys.argv[1:], sys.path[0] == __import__("os").getcwd())
    """, "inner.py")  # fmt: skip
    command = [sys.executable, "-m", "vtoken", "run", "--method", "tome", "r=4", "--", "-m", "package.inner", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['x'] True\n"
    assert "timm.create_model('test_vit')" in done.stderr


def test_from_pretrained_with_and_without_a_second_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    own = vars(transformers.PreTrainedModel)["from_pretrained"]
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64}
    transformers.ViTModel(transformers.ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    path = program(tmp_path, f"""
        import vtoken
        from transformers import AutoModel, ViTForImageClassification
        assert vtoken.is_applied(AutoModel.from_pretrained({str(tmp_path / "vit")!r}))
        model, info = ViTForImageClassification.from_pretrained({str(tmp_path / "vit")!r}, output_loading_info=True)
        assert vtoken.config_of(model).r == 2 and "missing_keys" in info
    """)  # fmt: skip
    assert run(path, method="tome r=2") == 0, capsys.readouterr().err
    assert vars(transformers.PreTrainedModel)["from_pretrained"] is own
    assert capsys.readouterr().err.count("tome is applied to from_pretrained") == 2


def test_a_model_around_another_is_patched_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_clip = pytest.importorskip("open_clip")
    own = open_clip.create_model
    path = program(tmp_path, """
        import open_clip, vtoken
        open_clip.add_model_config("configs")
        model, _, _ = open_clip.create_model_and_transforms("tiny")
        assert vtoken.is_applied(model)
    """)  # fmt: skip
    (tmp_path / "configs").mkdir()
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    tiny = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "configs" / "tiny.json").write_text(json.dumps(tiny))
    text_of = path.read_text().replace('"configs"', repr(str(tmp_path / "configs")))
    path.write_text(text_of)
    assert run(path, method="tome r=2") == 0, capsys.readouterr().err
    err = capsys.readouterr().err
    assert err.count("is applied to") == 1
    assert "open_clip.create_model('tiny')" in err
    assert open_clip.create_model is open_clip.factory.create_model is own


@pytest.mark.parametrize(
    ("text", "method", "match"),
    [
        ("pass", "tome r=2", "it got none from timm.create_model, open_clip.create_model, from_pretrained"),
        ("import timm; timm.create_model('resnet10t')", "tome r=2", "left as it was: .*ResNet"),
        (  # what an evaluation does that counts a failed model as a wrong answer
            "import timm\ntry: timm.create_model('test_vit')\nexcept Exception: pass",
            "pitome ratio=[0.9,0.9]",
            "left as it was: timm.create_model.'test_vit'.*ratio",
        ),
    ],
)
def test_nothing_patched_is_an_error(
    text: str, method: str, match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(program(tmp_path, text), method=method) == 2
    err = capsys.readouterr().err
    assert re.search(match, err), err


def test_swallowed_refusals_are_told_though_another_model_was_patched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = program(tmp_path, """
        import timm
        try:
            timm.create_model("test_vit")
        except ValueError:
            pass
        timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2)
    """)  # fmt: skip
    assert run(path, method="pitome ratio=[0.9,0.9]") == 2
    err = capsys.readouterr().err
    assert "pitome is applied to timm.create_model('vit_tiny_patch16_224')" in err
    assert "was not applied to a model of this program: left as it was: timm.create_model('test_vit')" in err


def test_exceptions_and_statuses_are_the_programs_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = "import timm, sys\ntimm.create_model('test_vit')\n"
    assert run(program(tmp_path, start + "def fails():\n    raise OSError('no disk')\nfails()")) == 1
    err = capsys.readouterr().err
    assert err.endswith("OSError: no disk\n")
    assert 'program.py", line 5, in <module>' in err
    assert "vtoken/cli" not in err
    assert run(program(tmp_path, start + "sys.exit(7)")) == 7
    assert run(program(tmp_path, start + "sys.exit()")) == 0
    capsys.readouterr()
    assert run(program(tmp_path, start + "sys.exit('bad data')")) == 1
    assert capsys.readouterr().err.endswith("bad data\n")
    assert run(program(tmp_path, "import sys; sys.exit(3)")) == 3
    assert "was not applied" in capsys.readouterr().err
    assert run(program(tmp_path, start + "raise KeyboardInterrupt")) == 130


def test_wrong_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = program(tmp_path, "raise SystemError('must not run')")
    for words, match in (
        (["run", "--method", "tome", "r=2"], "goes behind --"),
        (["run", "--method", "tome", "r=2", "--"], "goes behind --"),
        (["run", "--method", "tome", "r=2", "--", "-m"], "goes behind --"),
        (["run", "--method", "tome", "r=2", "--", "nowhere.py"], "no such file"),
        (["run", "--method", "tom", "--", str(path)], "did you mean 'tome'"),
        (["run", "--method", "tome", "r", "--", str(path)], "KEY=VALUE"),
        (["run", "--method", "tome", "a=1", "--", str(path)], "no setting 'a'"),
        (["run", "--", str(path)], "--method"),
    ):
        assert main(words) == 2, words
        assert match in capsys.readouterr().err


def test_whoever_kept_the_watched_function_has_the_librarys_own_afterwards() -> None:
    seen: list[str] = []

    def told(by: str, source: object, model: object) -> object:
        seen.append(f"{by} {source}")
        return model

    with watched(told):
        kept = timm.create_model
        assert kept is not OWN
        kept("test_vit")
        with pytest.raises(RuntimeError, match="Unknown model"):
            kept("no_such_model")
        kept("test_vit")
    assert not vtoken.is_applied(kept("test_vit"))
    assert seen == ["timm.create_model test_vit"] * 2


def test_a_method_that_trains_is_built_around_the_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the mode that the library gives them; what is no CLIP is left as it was."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    config = transformers.CLIPConfig(vision_config=sizes, text_config=text)
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    path = program(tmp_path, f"""
        import timm, vtoken
        from transformers import CLIPModel, CLIPVisionModel
        model = CLIPModel.from_pretrained({str(tmp_path / "clip")!r})
        assert isinstance(model, vtoken.AttentiveMaskCLIP) and type(model.unwrap()) is CLIPModel
        assert not model.training and not model.unwrap().training and model.config.projection_dim == 512
        assert vtoken.config_of(model) == vtoken.AttentiveMasks(keep_ratio=0.25, block=1)
        assert type(CLIPVisionModel.from_pretrained({str(tmp_path / "clip")!r})) is CLIPVisionModel
        assert not isinstance(timm.create_model("test_vit"), vtoken.AttentiveMaskCLIP)
    """)  # fmt: skip
    assert run(path, method="attentive_clip keep_ratio=0.25 block=1") == 0, capsys.readouterr().err
    err = capsys.readouterr().err
    assert err.count("attentive_clip is applied to from_pretrained") == 1
    assert re.search(r"left as it was: timm\.create_model\('test_vit'\).*is not a CLIP that it knows", err)
    path.write_text(f"from transformers import CLIPModel\nCLIPModel.from_pretrained({str(tmp_path / 'clip')!r})")
    assert run(path, method="attentive_clip keep_ratio=0.25 block=3") == 1
    assert "block=3 does not divide the grid of 4 x 4" in capsys.readouterr().err


TRAINER = """
    import sys
    import torch
    from transformers import {cls}, Trainer, TrainingArguments

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            torch.manual_seed(index)
            return {{"pixel_values": torch.randn(3, 64, 64), {row}}}

    def collate(rows):
        return {{name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}} | {extra}

    model = {cls}.from_pretrained(sys.argv[1])
    arguments = TrainingArguments(
        output_dir=sys.argv[2], max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="steps", save_steps=2, disable_tqdm=True, remove_unused_columns={drops},
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Pictures(), data_collator=collate)
    result = trainer.train()
    trainer.save_model()
    assert result.global_step == 3 and result.training_loss > 0
"""


def test_scripts_around_a_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that classifies pictures, with merging; one that trains a CLIP, with attentive masks and a moving teacher."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=3))
    vit.save_pretrained(tmp_path / "vit")
    text = TRAINER.format(cls="ViTForImageClassification", row='"labels": index % 3', extra="{}", drops=False)
    path = program(tmp_path, text)
    assert run(path, tmp_path / "vit", tmp_path / "out", method="tome r=2") == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vtoken"]["places"][0]["methods"][0]["r"] == 2
    words = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20, "eos_token_id": 19}
    clip = transformers.CLIPModel(transformers.CLIPConfig(vision_config=sizes, text_config=words))
    clip.save_pretrained(tmp_path / "clip")
    row = '"input_ids": torch.tensor([2, index, 19]), "attention_mask": torch.ones(3), "name": index'
    text = TRAINER.format(cls="CLIPModel", row=row, extra='{"return_loss": True}', drops=True)
    path = program(tmp_path, text)
    method = "attentive_clip keep_ratio=0.5 block=1 momentum=0.5"
    assert run(path, tmp_path / "clip", tmp_path / "clips", method=method) == 0, capsys.readouterr().err
    state = load_file(tmp_path / "clips" / "model.safetensors")
    assert int(state["ema_step"]) == 3
    assert int(load_file(tmp_path / "clips" / "checkpoint-2" / "model.safetensors")["ema_step"]) == 2
    key = "vision_model.encoder.layers.0.mlp.fc1.weight"
    before, student, teacher = clip.state_dict()[key], state[f"model.{key}"], state[f"teacher.{key}"]
    assert float((student - before).abs().max()) > float((teacher - before).abs().max()) > 0
