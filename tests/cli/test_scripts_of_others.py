"""`python -m vtoken run` with what other people's scripts do, written down here with the calls that they make.

timm's validate, benchmark and train are no part of its package, and clip_benchmark may be missing: these stand-ins
load, wrap, save and measure as those do. What they print is compared with the same model patched by hand.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

import vtoken
from tests.helpers import images, randomise_
from vtoken.__main__ import main

NAME, SIDE, CLASSES = "test_vit", 160, 3


def run(path: Path, *words: object, method: str = "tome r=12") -> int:
    return main(["run", "--method", *method.split(), "--", str(path), *map(str, words)])


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    return path


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures a class, as image-folder data sets have them, and a checkpoint."""
    folder = tmp_path_factory.mktemp("data")
    for number, picture in enumerate(images((3, SIDE, SIDE), 2 * CLASSES, 0, torch.float32)):
        label = folder / "val" / f"class{number % CLASSES}"
        label.mkdir(parents=True, exist_ok=True)
        pixels = (picture.clamp(-2, 2) * 60 + 128).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(label / f"{number}.png")
    model = randomise_(timm.create_model(NAME, num_classes=CLASSES), 0)
    torch.save({"state_dict": model.state_dict()}, folder / "model.pth.tar")
    return folder


VALIDATE = """
    import argparse, torch
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.models import create_model, load_checkpoint
    from timm.utils import AverageMeter, accuracy, reparameterize_model

    parser = argparse.ArgumentParser()
    parser.add_argument("data_dir"); parser.add_argument("--model"); parser.add_argument("--checkpoint")
    parser.add_argument("--num-classes", type=int); parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--torchcompile"); parser.add_argument("--reparam", action="store_true")
    args = parser.parse_args()
    model = create_model(args.model, pretrained=False, num_classes=args.num_classes, in_chans=3, global_pool=None,
                         scriptable=False)
    load_checkpoint(model, args.checkpoint, False)
    if args.reparam:
        model = reparameterize_model(model)
    param_count = sum(m.numel() for m in model.parameters())
    data_config = resolve_data_config(vars(args), model=model, use_test_size=True, verbose=False)
    model = model.to(device="cpu")
    if args.torchcompile:
        torch._dynamo.reset()
        model = torch.compile(model, backend=args.torchcompile)
    criterion = torch.nn.CrossEntropyLoss()
    loader = create_loader(create_dataset("", root=args.data_dir, split="val"), input_size=data_config["input_size"],
                           batch_size=args.batch_size, use_prefetcher=False, num_workers=0, crop_pct=1.0,
                           interpolation=data_config["interpolation"], mean=data_config["mean"], std=data_config["std"])
    losses, top1 = AverageMeter(), AverageMeter()
    model.eval()
    with torch.inference_mode():
        for input, target in loader:
            output = model(input)
            acc1, _ = accuracy(output.detach(), target, topk=(1, 2))
            losses.update(criterion(output, target).item(), input.size(0)); top1.update(acc1.item(), input.size(0))
    print("--result", losses.avg, param_count)
"""


def loss_by_hand(folder: Path, model: Any) -> float:
    """The mean loss over the pictures, read without timm's loader."""
    files = sorted((folder / "val").glob("*/*.png"))
    mean, std = (torch.tensor(model.default_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))

    def read(file: Path) -> Tensor:
        pixels = torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8)
        return (pixels.view(SIDE, SIDE, 3).permute(2, 0, 1) / 255 - mean) / std

    labels = torch.tensor([int(file.parent.name[-1]) for file in files])
    with torch.no_grad():
        logits = model.eval()(torch.stack([read(file) for file in files]))
    return float(torch.nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], id="plain"),
        pytest.param(["--reparam"], id="reparam"),
        pytest.param(["--torchcompile", "eager"], id="compiled", marks=pytest.mark.slow),
    ],
)
def test_timms_validate(folder: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(tmp_path, VALIDATE)
    checkpoint = folder / "model.pth.tar"
    given = [folder, "--model", NAME, "--checkpoint", checkpoint, "--num-classes", CLASSES, *words]
    assert run(path, *given) == 0, capsys.readouterr().err
    _, loss, count = capsys.readouterr().out.strip().splitlines()[-1].split()
    plain = timm.create_model(NAME, num_classes=CLASSES)
    timm.models.load_checkpoint(plain, str(checkpoint))
    expected = loss_by_hand(folder, plain)
    assert int(count) == sum(p.numel() for p in plain.parameters())
    merged = loss_by_hand(folder, vtoken.apply(plain, "tome", r=12))
    assert abs(float(loss) - merged) < 2e-5 * merged
    assert abs(expected - merged) > 1e-3 * expected, "the method was to matter"


BENCHMARK = """
    import sys, time, torch
    from timm.data import resolve_data_config
    from timm.models import create_model
    from timm.optim import create_optimizer_v2

    def benchmark(name, train):
        model = create_model(name, num_classes=None, in_chans=3, global_pool=None, scriptable=False, drop_rate=0.0)
        model = model.to(device="cpu", dtype=torch.float32).train(train)
        num_classes = model.num_classes
        model = model.to(memory_format=torch.channels_last)
        size = resolve_data_config({}, model=model, use_test_size=not train)["input_size"]
        example = torch.randn((2,) + size).contiguous(memory_format=torch.channels_last)
        started = time.perf_counter()
        if train:
            if hasattr(model, "set_grad_checkpointing"):
                model.set_grad_checkpointing(True)
            optimizer = create_optimizer_v2(model, opt="sgd", lr=1e-4)
            optimizer.zero_grad(); output = model(example)
            output = output[0] if isinstance(output, tuple) else output
            torch.nn.functional.cross_entropy(output, torch.zeros(2, dtype=torch.long)).backward(); optimizer.step()
        else:
            with torch.no_grad():
                output = model(example)
        assert output.shape == (2, num_classes)
        return {"samples_per_sec": 2 / (time.perf_counter() - started)}

    for name in sys.argv[1:]:                        # as its bulk mode: an error becomes a row
        for train in (False, True):
            try:
                print(name, "ok", benchmark(name, train)["samples_per_sec"] > 0)
            except RuntimeError as error:
                print(name, "error", error)
"""


def test_timms_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script(tmp_path, BENCHMARK), "test_vit", "test_resnet") == 0
    out, err = capsys.readouterr()
    assert out.split("\n")[:4] == ["test_vit ok True"] * 2 + ["test_resnet ok True"] * 2
    assert err.count("is applied to timm.create_model('test_vit')") == 2
    assert err.count("left as it was: timm.create_model('test_resnet')") == 2


TRAIN = """
    import sys, torch, yaml, argparse
    from timm.data import create_dataset, create_loader, Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.models import create_model, safe_model_name, model_parameters, resume_checkpoint
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler, dispatch_clip_grad, random_seed

    random_seed(42, 0)
    args = argparse.Namespace(model=sys.argv[2], num_classes=3)
    model = create_model(args.model, pretrained=False, num_classes=3, drop_rate=0.0, drop_path_rate=0.1)
    model.set_grad_checkpointing(enable=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    model_ema = ModelEmaV3(model, decay=0.9)
    loader = create_loader(create_dataset("", root=sys.argv[1], split="val"), input_size=(3, 160, 160), batch_size=6,
                           is_training=True, use_prefetcher=False, num_workers=0)
    mixup_fn = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=3)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=2, updates_per_epoch=1)
    saver = CheckpointSaver(model=model, optimizer=optimizer, args=args, model_ema=model_ema,
                            checkpoint_dir=sys.argv[3], recovery_dir=sys.argv[3], decreasing=True, max_history=1)
    before = [p.detach().clone() for p in model.parameters()]
    for epoch in range(2):
        model.train()
        for input, target in loader:
            input, target = mixup_fn(input, target)
            loss = SoftTargetCrossEntropy()(model(input), target)
            optimizer.zero_grad()
            loss.backward(create_graph=False)
            dispatch_clip_grad(model_parameters(model, exclude_head=False), value=1.0, mode="norm")
            optimizer.step()
            model_ema.update(model, step=epoch)
        scheduler.step(epoch + 1, float(loss))
        saver.save_checkpoint(epoch, metric=float(loss))
    resume_checkpoint(model, sys.argv[3] + "/last.pth.tar", optimizer=optimizer, log_info=False)
    print("--result", sum(float((a - b).abs().sum()) > 0 for a, b in zip(before, model.parameters())), len(before))
"""


def test_timms_train(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script(tmp_path, TRAIN), folder, NAME, tmp_path) == 0, capsys.readouterr().err
    _, moved, count = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert moved == count, "every parameter was trained"
    plain = timm.create_model(NAME, num_classes=CLASSES)
    timm.models.load_checkpoint(plain, str(tmp_path / "last.pth.tar"), use_ema=True)  # strict: the plain model's keys


PIPELINES = """
    import sys, torch
    from PIL import Image
    from transformers import pipeline, ViTImageProcessor
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    classify = pipeline("image-classification", model=sys.argv[1], image_processor=processor)
    print("--scores", [round(row["score"], 6) for row in classify(Image.open(sys.argv[2]), top_k=3)])
    features = pipeline("image-feature-extraction", model=sys.argv[1], image_processor=processor)
    print("--rows", len(features(Image.open(sys.argv[2]))[0]))
"""


def test_pipelines_of_transformers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 4}
    model = randomise_(hf.ViTForImageClassification(hf.ViTConfig(**sizes, num_labels=3)), 0).eval()
    model.save_pretrained(tmp_path / "vit")
    picture = next((folder / "val" / "class0").glob("*.png"))
    assert run(script(tmp_path, PIPELINES), tmp_path / "vit", picture) == 0, capsys.readouterr().err
    told = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines() if line.startswith("--"))
    pixels = hf.ViTImageProcessor(size={"height": 32, "width": 32})(Image.open(picture), return_tensors="pt")
    with torch.no_grad(), vtoken.applied(model, "tome", r=12):
        scores = model(**pixels).logits[0].softmax(0).sort(descending=True).values
    assert torch.allclose(torch.tensor(json.loads(told["--scores"])), scores, atol=2e-6)
    assert json.loads(told["--rows"]) == 1 + 64 - 36


TRAINER = """
    import sys, torch
    from transformers import AutoModelForImageClassification, Trainer, TrainingArguments
    model = AutoModelForImageClassification.from_pretrained(sys.argv[1], num_labels=3, ignore_mismatched_sizes=True)
    torch.manual_seed(0)
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.tensor(i % 3)} for i in range(8)]
    args = TrainingArguments(sys.argv[2], max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
                             save_steps=2, remove_unused_columns=False, disable_tqdm=True)
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    print("--loss", trainer.evaluate()["eval_loss"])
"""


def test_a_run_of_the_trainer_saves_what_it_carried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 4}
    randomise_(hf.ViTForImageClassification(hf.ViTConfig(**sizes, num_labels=3)), 0).save_pretrained(tmp_path / "vit")
    assert run(script(tmp_path, TRAINER), tmp_path / "vit", tmp_path / "out") == 0, capsys.readouterr().err
    loss = next(float(x.split()[1]) for x in capsys.readouterr().out.splitlines() if x.startswith("--loss"))
    again = vtoken.restore(hf.ViTForImageClassification.from_pretrained(tmp_path / "out" / "checkpoint-2")).eval()
    assert vtoken.config_of(again) == vtoken.ToMe(r=12)
    torch.manual_seed(0)
    data = torch.stack([torch.randn(3, 32, 32) for _ in range(8)])
    with torch.no_grad():
        by_hand = again(data, labels=torch.arange(8) % 3).loss
    assert abs(loss - float(by_hand)) < 1e-4 * loss


CLIP = """
    import sys, torch
    import open_clip
    try:
        from clip_benchmark.metrics.zeroshot_classification import run_classification, zero_shot_classifier
    except ImportError:                                # the same two functions, as short as they can be
        def zero_shot_classifier(model, tokenizer, classnames, templates, device, amp=True):
            with torch.no_grad():
                rows = []
                for name in classnames:
                    texts = tokenizer([template.format(c=name) for template in templates]).to(device)
                    mean = torch.nn.functional.normalize(model.encode_text(texts), dim=-1).mean(dim=0)
                    rows.append(mean / mean.norm())
                return torch.stack(rows, dim=1)

        def run_classification(model, classifier, dataloader, device, amp=True):
            with torch.no_grad():
                pairs = [(100.0 * torch.nn.functional.normalize(model.encode_image(x), dim=-1) @ classifier, y)
                         for x, y in dataloader]
            return torch.cat([p for p, _ in pairs]), torch.cat([y for _, y in pairs])

    open_clip.add_model_config(sys.argv[1])
    model, _, _ = open_clip.create_model_and_transforms("tiny")
    model.load_state_dict(torch.load(sys.argv[1] + "/clip.pt", weights_only=True))
    model.eval()
    tokenizer = open_clip.get_tokenizer("tiny")
    classifier = zero_shot_classifier(model, tokenizer, ["a", "b"], ["{c}", "x {c}"], "cpu", amp=False)
    torch.manual_seed(0)
    loader = [(torch.randn(2, 3, 64, 64), torch.tensor([0, 1])) for _ in range(2)]
    logits, target = run_classification(model, classifier, loader, "cpu", amp=False)
    torch.save((classifier, logits, target), sys.argv[1] + "/out.pt")
"""


def test_clip_benchmarks_zero_shot_functions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 3, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 64}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "tiny.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    model = randomise_(open_clip.CLIP(16, vision, text), 0).eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    assert run(script(tmp_path, CLIP), tmp_path) == 0, capsys.readouterr().err
    classifier, logits, _ = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.manual_seed(0)
    x = torch.cat([torch.randn(2, 3, 64, 64) for _ in range(2)])

    def scores() -> Tensor:
        with torch.no_grad():
            return 100.0 * torch.nn.functional.normalize(model.encode_image(x), dim=-1) @ classifier

    plain = scores()
    with vtoken.applied(model, "tome", r=12):
        assert torch.allclose(scores(), logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, logits, rtol=1e-2, atol=1e-2), "the method was to matter"
