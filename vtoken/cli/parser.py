"""Every command with its options. Needs no torch: what a command runs is imported when it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from vtoken.cli.settings import add_sweep
from vtoken.cli.values import new_file, new_folder, new_picture, number, path, share, whole, word
from vtoken.errors import ConfigError

#: As vtoken.video has them, which needs torch; the tests compare.
REDUCES = ("max", "mean")
SCALES = ("minmax", "softmax", "sigmoid")
SALIENCY = "saliency-vit"
_THREADS = "CPU threads; with 1, CPU time is measured, else wall time"
_MOST_THREADS = 1024


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line like every other error, without the list of options that argparse puts above it.
        raise ConfigError(f"{message}; see {self.prog} --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """What stands behind -- of `run` is another program's, options included."""
        words, behind = list(sys.argv[1:] if args is None else args), []
        if words[:1] == ["run"] and "--" in words:
            at = words.index("--")
            words, behind = words[:at], words[at + 1 :]
        found = super().parse_args(words, namespace)
        if found.command == "run":
            found.script = behind
        return found


def parser() -> argparse.ArgumentParser:
    """The command line; a wrong one raises ConfigError. `run` of what it reads is "module:function" of vtoken.cli."""
    top = _Parser(prog=_called(), description="Vision transformers that spend fewer tokens.")
    commands = top.add_subparsers(dest="command", required=True)

    def add(name: str, run: str, about: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
        command.set_defaults(run=run)
        return command

    _demo(add("demo", "demo:run", "a real pretrained ViT on real photographs, every method at several ratios, offline"))
    _bench(add("bench", "bench:run", "any supported timm model, any methods and amounts, on random or real images"))
    about = "settings of a merging method for a target cost, chosen on a folder of images"
    _tune(add("tune", "tune:run", about))
    about = "one image beside its merged groups, or beside its kept and pruned patches"
    _overlay(add("overlay", "overlay:run", about))
    _video(add("video", "video:run", "score the frames of a clip for a question, spread a token budget, draw both"))
    _json(add("info", "inspect:show_info", "versions and devices"))
    about = "every method that commands take, with its settings and their defaults"
    listed = add("methods", "inspect:show_methods", about)
    _load(listed)
    _json(listed)
    about = "supported timm names; with --why, the refused ones among the pattern and their reasons"
    models = add("models", "inspect:show_models", about)
    models.add_argument("pattern", nargs="?", default="*", type=word, help="e.g. 'deit3_*'")
    models.add_argument("--why", action="store_true", help="list the refused names and why")
    _load(models)
    _json(models)
    for name, run, about in (
        ("plan", "inspect:show_plan", "token counts per layer"),
        ("report", "inspect:show_report", "cost before and after"),
    ):
        command = add(name, run, about)
        command.add_argument("model", type=word, help="timm architecture")
        _method(command)
        command.add_argument("--img-size", type=whole(1), help="side of the input in pixels")
        _json(command)
    about = "a program as it is, with a method applied to the models that it gets from timm, open_clip or transformers"
    _run(add("run", "run:run", about))
    about = "vLLM's engine on a model's folder, with and without a method in its images: counts, memory, speed"
    _serve(add("serve-check", "serve:run", about))
    return top


def _called() -> str:
    """How this program was called: `vtoken`, or `python -m vtoken`."""
    return "vtoken" if Path(sys.argv[0]).stem in ("vtoken", "vtoken-script") else "python -m vtoken"


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="for machines")


def _load(command: argparse.ArgumentParser) -> None:
    about = "a Python file of your own, which is run first: methods and adapters that it registers are found by name"
    command.add_argument("--load", type=path, action="append", default=[], metavar="FILE.py", help=about)


def _method(command: argparse.ArgumentParser) -> None:
    _load(command)
    command.add_argument("method", type=word, help="see `methods`")
    command.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="e.g. ratio=0.9")


def _weights(command: argparse.ArgumentParser) -> None:
    weights = command.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="timm's pretrained weights (needs a hub)")
    weights.add_argument("--checkpoint", type=path, help="weights from a .safetensors or .pth file")
    command.add_argument("--img-size", type=whole(1), help="side of the input in pixels")
    command.add_argument("--num-classes", type=whole(0), help="classes of the head, if not the model's own")


def _timing(command: argparse.ArgumentParser) -> None:
    command.add_argument("--rounds", type=whole(1), default=9, help="timing samples per setting")
    command.add_argument("--threads", type=whole(1, _MOST_THREADS), default=1, help=_THREADS)


def _demo(command: argparse.ArgumentParser) -> None:
    out = Path("out/demo")
    command.add_argument("--out", type=new_folder, default=out, help="folder for results and pictures")
    ratios = [0.97, 0.95, 0.93, 0.9]
    command.add_argument("--ratios", type=share, nargs="+", default=ratios, help="share kept per layer")
    command.add_argument("--photos", type=whole(1), default=9, help="how many photographs (quality)")
    command.add_argument("--batch", type=whole(1), default=4, help="how many of them are timed as one batch")
    _timing(command)
    about = "a minute at most: one ratio, three photographs, two rounds"
    command.add_argument("--small", action="store_true", help=about)


def _bench(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, type=word, help="timm architecture, e.g. vit_base_patch16_224")
    _load(command)
    add_sweep(command, ["pitome"], [0.925])
    _weights(command)
    about = "an ImageFolder (one folder per class) instead of random images"
    command.add_argument("--data", type=path, help=about)
    about = "images of --data that are used, spread over the classes"
    command.add_argument("--limit", type=whole(1), default=256, help=about)
    command.add_argument("--batch", type=whole(1), default=8, help="timed batch")
    _timing(command)
    command.add_argument("--device", type=word, default="cpu", help="cpu or cuda")
    about = "folder for results and the plot"
    command.add_argument("--out", type=new_folder, default=Path("out/bench"), help=about)


def _tune(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=word, help="timm architecture")
    _method(command)
    target = command.add_mutually_exclusive_group(required=True)
    about = "share of the model's FLOPs to spend, e.g. 0.6"
    target.add_argument("--target", type=number(0, 1, above=True), help=about)
    about = "instead: what one batch may take here"
    target.add_argument("--milliseconds", type=number(0, above=True), help=about)
    about = "an ImageFolder (one folder per class); labels are not used"
    command.add_argument("--data", type=path, required=True, help=about)
    about = "images of --data that are used, spread over the classes (256)"
    command.add_argument("--limit", type=whole(1), default=256, help=about)
    command.add_argument("--batch", type=whole(1), default=16, help="images that run at once (16)")
    about = "how often blocks are tried one by one; with 0 only constant schedules are tried (2)"
    command.add_argument("--rounds", type=whole(0), default=2, help=about)
    command.add_argument("--seed", type=whole(0), default=0, help="of the images on which that is done (0)")
    command.add_argument("--threads", type=whole(1, _MOST_THREADS), default=1, help=_THREADS)
    command.add_argument("--out", type=new_file, metavar="FILE.json", help="settings, for vtoken.config_from_dict")
    _weights(command)
    command.set_defaults(device="cpu")
    _json(command)


def _overlay(command: argparse.ArgumentParser) -> None:
    command.add_argument("image", type=path, help="image file, or one of the demo's photographs, e.g. chelsea")
    about = f"timm architecture, or {SALIENCY}: the demo's pretrained ViT, or a folder with a multimodal model"
    command.add_argument("model", type=word, help=about)
    _method(command)
    _weights(command)
    about = "what a multimodal model is asked about the image"
    command.add_argument("--question", type=word, default="What is shown here?", help=about)
    about = "tokens after this block, counted from 0 (default: after the last)"
    command.add_argument("--layer", type=whole(), help=about)
    command.add_argument("--out", type=new_picture(".gif", ".bmp"), default=Path("out/overlay.png"), help="the picture")


def _run(command: argparse.ArgumentParser) -> None:
    command.usage = (
        "%(prog)s [options] --method NAME [KEY=VALUE ...] -- PROGRAM.py [ARGUMENT ...] (or -- -m MODULE ...)"
    )
    about = "a method and its settings, e.g. pitome ratio=0.9; see `methods`"
    command.add_argument("--method", type=word, nargs="+", required=True, metavar="WORD", help=about)
    _load(command)
    about = "a JSON file to write: every model that the program got, patched or why not"
    command.add_argument("--manifest", type=new_file, metavar="FILE.json", help=about)


def _serve(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=path, help="model with tokenizer and processor, as save_pretrained writes it")
    about = "a method and its settings, e.g. vtc_cls num_tokens=64; see `methods`"
    command.add_argument("--method", type=word, nargs="+", required=True, metavar="WORD", help=about)
    _load(command)
    picture = command.add_mutually_exclusive_group()
    picture.add_argument("--image", type=path, help="image file")
    size: dict[str, Any] = {"nargs": 2, "default": [336, 336], "metavar": ("H", "W"), "type": whole(1)}
    picture.add_argument("--size", **size, help="instead: pixels of random images (336 336)")
    command.add_argument("--requests", type=whole(1), default=8, help="prompts that are answered at once (8)")
    command.add_argument("--new", type=whole(1), default=32, help="tokens that each is answered with (32)")
    command.add_argument("--limit", type=number(0, above=True), default=1200.0, help="seconds for an engine (1200)")
    about = "arguments of vllm.LLM, e.g. max_model_len=4096 dtype=bfloat16"
    command.add_argument("--engine", nargs="*", default=[], metavar="KEY=VALUE", help=about)
    _json(command)


def _video(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=path, help="video file")
    command.add_argument("--question", type=word, required=True, help="what is asked about the video")
    about = "tokens of the video, or a share of the default ones, such as 0.5 (12544)"
    command.add_argument("--budget", default="12544", help=about)
    command.add_argument("--frames", type=whole(), help="how many are sampled (default 96 to 160, by duration)")
    about = "sample at most so many frames per second"
    command.add_argument("--max-fps", type=number(0, above=True), help=about)
    grid: dict[str, Any] = {"nargs": 2, "default": [27, 27], "metavar": ("H", "W"), "help": "of features (27 27)"}
    command.add_argument("--grid", type=whole(1, 4096), **grid)
    about = "of a frame in the unmodified model (196)"
    command.add_argument("--default-tokens", type=whole(1), default=196, help=about)
    command.add_argument("--min-tokens", type=whole(0), default=0, help="per frame (0)")
    command.add_argument("--max-tokens", type=whole(0), help="per frame (default: all of the grid)")
    command.add_argument("--power", type=number(0), default=2.0, help="of the scores (2)")
    scorer = command.add_argument_group("scorer")
    scorer.add_argument("--model", type=word, help="open_clip architecture, local-dir:FOLDER or hf-hub:NAME")
    scorer.add_argument("--pretrained", type=word, help="open_clip tag, or a checkpoint file")
    scorer.add_argument("--scores", type=path, help="file of scores, one per sampled frame")
    scorer.add_argument("--uniform", action="store_true", help="spread the budget evenly")
    about = "how the clue is found (rule)"
    scorer.add_argument("--decoupler", choices=("rule", "none"), default="rule", help=about)
    scorer.add_argument("--reduce", choices=REDUCES, default="max", help="over several things looked for (max)")
    scorer.add_argument("--scale", choices=SCALES, default="minmax", help="from cosines to scores (minmax)")
    about = "picture to write: thumbnails, scores and tokens along time"
    command.add_argument("--out", type=new_picture(".svg"), help=about)
    _json(command)
