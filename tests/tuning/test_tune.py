"""`vtoken.tune`: what it measures is what a plain loop measures, the target is met, and the model is not touched."""

from __future__ import annotations

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vtoken
from tests.helpers import assert_same, images, randomise_
from vtoken.__main__ import main
from vtoken.tuning import tune as verb
from vtoken.tuning.change import OutputChange
from vtoken.tuning.cost import Costs
from vtoken.tuning.images import gathered
from vtoken.tuning.search import shares

SIZE = (3, 48, 48)


def small(**options: Any) -> Any:
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    return randomise_(timm.models.VisionTransformer(**sizes | options), 0).eval()


def clip_tower() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    return randomise_(CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=48, patch_size=8)), 0).eval()


def tuned(model: nn.Module, pixels: Any, target: float | None = 0.7, method: Any = "tome", **options: Any) -> Any:
    return vtoken.tune(model, pixels, target, method, **{"rounds": 1, "batch": 3, "progress": False} | options)


def change_by_hand(model: nn.Module, config: Any, batch: Tensor, pick: Any = lambda out: out) -> list[float]:
    """Image by image, the model itself patched and given back."""
    found = []
    for image in batch:
        with torch.no_grad():
            before = pick(model(image[None])).double()
            vtoken.apply(model, config)
            after = pick(model(image[None])).double()
        vtoken.remove(model)
        found.append(float(((after - before) ** 2).sum() / (before**2).sum()))
    return found


@pytest.mark.parametrize("make", [small, clip_tower], ids=["timm", "transformers"])
def test_changes_are_those_of_a_plain_loop(make: Any) -> None:
    model, batch, config = make(), images(SIZE, 5), vtoken.PiToMe(r=[9, 0, 4, 2])
    measured = OutputChange(model, batch, 2, vtoken.PiToMe(ratio=0.5))
    pick = (lambda out: out.pooler_output) if make is clip_tower else (lambda out: out)
    expected = change_by_hand(model, config, batch, pick)
    assert min(expected) > 1e-5
    assert measured(config).tolist() == pytest.approx(expected, rel=1e-3)
    rows = torch.tensor([1, 4])
    assert measured(config, rows).tolist() == pytest.approx([expected[1], expected[4]], rel=1e-3)


def test_blocks_are_measured_one_by_one_in_the_schedule() -> None:
    """Curves of every block: the mean of the paired differences and one standard error, by a plain loop."""
    model, batch, config = small(), images(SIZE, 6), vtoken.ToMe(layers=(0, 1, 3))
    costs = Costs(model, config, SIZE)
    search = verb._Search(
        costs, OutputChange(model, batch, 3, config.replace(ratio=0.5)), torch.arange(6), lambda: None
    )
    removed = [6, 4, 0, 3]
    curves, centre = search._curves(removed, 0.1), shares(costs, removed)
    assert curves[2] == ([0.0], [0.0]), "no block that the settings leave alone is tried"
    still = torch.tensor(change_by_hand(model, config.replace(ratio=[1 - s for s in centre]), batch))
    for layer in (0, 1, 3):
        assert sorted(curves[layer].shares) == pytest.approx([centre[layer] - 0.1, centre[layer], centre[layer] + 0.1])
        for share, found in zip(*curves[layer], strict=True):
            ratios = [1 - (share if i == layer else other) for i, other in enumerate(centre)]
            gap = torch.tensor(change_by_hand(model, config.replace(ratio=ratios), batch)) - still
            expected = float(gap.mean() + gap.std() / 6**0.5) if share != centre[layer] else 0.0
            assert found == pytest.approx(expected, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize(("target", "method"), [(0.8, "tome"), (0.55, "pitome"), (0.7, vtoken.ToMe(layers=(1, 2)))])
def test_the_target_is_met_as_reports_count(target: float, method: Any) -> None:
    model = small()
    found = tuned(model, images(SIZE, 6), target, method, rounds=2)
    for row in found.table:
        cost = vtoken.report(model, row.config)
        assert cost.flops_after <= target * cost.flops_before
        assert row.flops == cost.flops_after / cost.flops_before
        removed = [a - b for a, b in itertools.pairwise(cost.tokens)]
        if row.name.startswith("per block"):
            for layer in range(4):  # one token less anywhere is too much
                if removed[layer]:
                    more = row.config.replace(r=[r - (i == layer) for i, r in enumerate(removed)])
                    assert vtoken.report(model, more).flops_after > target * cost.flops_before
        if isinstance(method, vtoken.ToMe):
            assert removed[0] == removed[3] == 0
    assert [row.name for row in found.table][:2] == ["constant ratio", "constant r"]
    assert found.report == vtoken.report(model, found.config)


def test_the_best_of_what_was_tried_is_returned() -> None:
    model, batch = small(), images(SIZE, 8)
    found = tuned(model, batch, 0.6, rounds=3)
    assert found.best.change == min(row.change for row in found.table)
    assert any(row.name.startswith("per block") for row in found.table)
    for row in found.table:
        changes = torch.tensor(change_by_hand(model, row.config, batch))
        assert row.change == pytest.approx(float(changes.mean()), rel=1e-3)
        assert row.error == pytest.approx(float(changes.std() / 8**0.5), rel=2e-3)
    assert str(found).count("*") == 1
    assert vtoken.config_from_dict(json.loads(json.dumps(found.to_dict()))["config"]) == found.config


def test_the_same_seed_gives_the_same_and_nothing_is_touched() -> None:
    model, batch = small(drop_path_rate=0.5).train(), images(SIZE, 6)
    model.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    state, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    random = torch.random.get_rng_state()
    first, again = tuned(model, batch, seed=3), tuned(model, batch, seed=3)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert first.to_dict() == again.to_dict()
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == classes
    assert_same("state", state, model.state_dict())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not vtoken.is_applied(model)


def test_a_patched_model_is_refused_and_stays_patched() -> None:
    model, batch = vtoken.apply(small(), "tome", r=3), images(SIZE, 2)
    with torch.no_grad():
        before = model(batch)
    with pytest.raises(vtoken.AlreadyAppliedError, match=r"vtoken\.remove"):
        tuned(model, batch)
    with torch.no_grad():
        assert_same("outputs", before, model(batch))


def test_images_come_in_many_forms() -> None:
    batch = images(SIZE, 5)
    pairs = DataLoader(TensorDataset(batch, torch.arange(5)), batch_size=2)
    mappings = ({"pixel_values": part, "labels": None} for part in batch.split(2))
    for given in (batch, list(batch.split(3)), tuple(batch.split(3)), pairs, mappings):
        assert torch.equal(gathered(given, 4), batch[:4])
    asked = []

    def endless() -> Any:
        while True:
            asked.append(1)
            yield batch

    assert len(gathered(endless(), 7)) == 7
    assert len(asked) == 2


def test_a_function_scores() -> None:
    """The score is of the first logit, so that settings are ranked by it and by nothing else."""
    model, batch = small(), images(SIZE, 4)
    with torch.no_grad():
        full = model(batch)

    def score(patched: Any) -> float:
        with torch.no_grad():
            return 2.0 - float((patched(batch) - full)[:, 0].abs().mean())

    found = tuned(model, score)
    for row in found.table:
        assert row.error is None
        with vtoken.applied(model, row.config):
            assert row.change == pytest.approx(2.0 - score(model), rel=1e-3)
    assert found.best.change == min(row.change for row in found.table)


@pytest.mark.parametrize(
    ("score", "error", "words"),
    [
        (lambda own: lambda model: float(own(images(SIZE, 1)).sum()), vtoken.VTokenError, "did not run the model"),
        (lambda own: lambda model: None, vtoken.InputError, "must return one number"),
        (lambda own: lambda model: float("nan"), vtoken.InputError, "finite"),
        (lambda own: lambda model: torch.ones(2), vtoken.InputError, "must return one number"),
    ],
    ids=["another model", "nothing", "nan", "several"],
)
def test_functions_that_cannot_tell(score: Any, error: Any, words: str) -> None:
    own = small()
    with pytest.raises(error, match=words):
        tuned(own, score(own))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target": 1.0}, vtoken.ConfigError, r"target=1\.0.*share of the model's FLOPs.*\(0, 1\)"),
        ({"target": "0.5"}, vtoken.ConfigError, "share of the model's FLOPs"),
        ({"target": True}, vtoken.ConfigError, "share of the model's FLOPs"),
        ({"target": None}, vtoken.ConfigError, r"target=0\.6.*or milliseconds"),
        ({"milliseconds": 3.0}, vtoken.ConfigError, "one of them"),
        ({"target": None, "milliseconds": 0}, vtoken.ConfigError, "milliseconds=0"),
        ({"target": None, "milliseconds": 1e6}, vtoken.ConfigError, "nothing to remove"),
        ({"target": 0.05}, vtoken.ConfigError, r"cannot cost less than 0\.\d+ of its FLOPs"),
        ({"method": vtoken.VTCCLS(num_tokens=4)}, vtoken.ConfigError, "acts on a prompt"),
        ({"method": "sparsifiner"}, vtoken.ConfigError, "has neither"),
        ({"method": "stride"}, vtoken.ConfigError, "has neither"),
        ({"method": "threshold_merge"}, vtoken.ConfigError, "the images decide"),
        ({"method": "pitom"}, vtoken.ConfigError, "did you mean 'pitome'"),
        ({"method": [vtoken.ToMe(), vtoken.Sparsifiner()]}, vtoken.ConfigError, "one method"),
        ({"r": 8}, vtoken.ConfigError, "tune finds r"),
        ({"batch": 0}, vtoken.ConfigError, "batch=0"),
        ({"limit": 0}, vtoken.ConfigError, "limit=0"),
        ({"rounds": -1}, vtoken.ConfigError, "rounds=-1"),
        ({"seed": 0.5}, vtoken.ConfigError, "seed=0.5"),
        ({"progress": "no"}, vtoken.ConfigError, "progress='no'"),
        ({"images": "photos"}, vtoken.InputError, "DataLoader.*got str"),
        ({"images": 3}, vtoken.InputError, "got int"),
        ({"images": []}, vtoken.InputError, "no batch"),
        ({"images": [{"image": 1}]}, vtoken.InputError, "NoneType"),
        (
            {"images": torch.zeros(2, 3, 48, 48, dtype=torch.uint8)},
            vtoken.InputError,
            "floating point; got torch.uint8",
        ),
        ({"images": torch.zeros(3, 48, 48)}, vtoken.ShapeError, r"got shape \(3, 48, 48\)"),
        ({"images": torch.zeros(0, 3, 48, 48)}, vtoken.ShapeError, r"got shape \(0, 3, 48, 48\)"),
        ({"images": [torch.zeros(1, 3, 48, 48), torch.zeros(1, 3, 40, 40)]}, vtoken.ShapeError, "one size"),
        ({"images": torch.zeros(1, 3, 64, 64)}, vtoken.ShapeError, "64"),
        ({"images": torch.full((1, 3, 48, 48), float("nan"))}, vtoken.InputError, "not finite"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_calls_say_why(options: dict[str, Any], error: Any, words: str) -> None:
    options = dict(options)
    model, batch = small(), options.pop("images", images(SIZE, 2))
    with pytest.raises(error, match=words):
        tuned(model, batch, **options)
    assert not vtoken.is_applied(model)


def test_models_that_cannot_be_tuned() -> None:
    with pytest.raises(vtoken.UnsupportedModelError, match="Linear"):
        tuned(nn.Linear(2, 2), images(SIZE, 2))
    with pytest.raises(vtoken.ConfigError, match=r"follow the tokens.*Give a function"):
        tuned(small(global_pool="", num_classes=0), images(SIZE, 2))
    with pytest.raises(vtoken.ConfigError, match="no weights"):
        tuned(small().to("meta"), images(SIZE, 2))


def test_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts multiply-adds, so that nothing here depends on the machine."""
    model, scale = small(), []

    def measured(clock: Any, configs: Any) -> list[float]:
        reports = [vtoken.report(clock._model, "tome" if c is None else c) for c in configs]
        spent = [r.macs_before if c is None else r.macs_after for r, c in zip(reports, configs, strict=True)]
        scale.append(reports[0].macs_before)
        # A per block schedule is slower here than its FLOPs tell.
        slow = [1.5 if c is not None and isinstance(c.r, tuple) else 1.0 for c in configs]
        return [10 * s * w / scale[0] for s, w in zip(spent, slow, strict=True)]

    monkeypatch.setattr(verb._Clock, "_measured", measured)
    found = tuned(model, images(SIZE, 4), None, milliseconds=7.0)
    assert found.best.milliseconds is not None
    assert 6.0 < found.best.milliseconds <= 7.0
    assert not isinstance(found.config.r, tuple), "what is too slow is not returned, whatever it changes"
    assert any((row.milliseconds or 0) > 7.0 for row in found.table)
    assert " ms " in str(found)
    with pytest.raises(vtoken.ConfigError, match=r"takes [\d.]+ where every block removes half.*10\.00 as it is"):
        tuned(model, images(SIZE, 4), None, milliseconds=0.5)
    with pytest.raises(vtoken.ConfigError, match="nothing to remove"):
        tuned(model, images(SIZE, 4), None, milliseconds=10.0)


def test_milliseconds_are_measured() -> None:
    """The real clock: times are there, the chosen one meets a target that every schedule can meet."""
    model, batch = small(), images(SIZE, 2)
    clock = verb._Clock(model, batch, 1e-9)
    assert clock._full > 0
    assert all(spent > 0 for spent in clock._measured([vtoken.ToMe(r=4), None]))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = pytest.importorskip("PIL.Image")
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        noise = (torch.rand(40, 40, 3) * 255).to(torch.uint8).numpy()
        picture.fromarray(noise).save(tmp_path / "data" / label / "0.png")
    out = tmp_path / "new" / "settings.json"
    words = ["tune", "test_vit", "tome", "metric=hidden", "--target", "0.7", "--rounds", "0", "--out", str(out)]
    assert main([*words, "--data", str(tmp_path / "data"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found: Any = vtoken.config_from_dict(json.loads(out.read_text()))
    assert found == vtoken.config_from_dict(told["config"])
    assert found.metric == "hidden"
    cost = vtoken.report(timm.create_model("test_vit"), found)
    assert cost.flops_after <= 0.7 * cost.flops_before
    assert [row["name"] for row in told["table"]] == ["constant ratio", "constant r", "falling", "rising"]


def test_the_page_on_choosing_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).resolve().parents[2] / "docs/choosing.md"
    (snippet,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(snippet, "docs/choosing.md", "exec"), names)
    assert vtoken.config_of(names["model"]) == names["found"].config
    assert "constant ratio" in capsys.readouterr().out
