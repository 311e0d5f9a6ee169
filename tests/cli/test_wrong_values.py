"""Every option of every command, with values that it cannot take: one line, status 2, never a traceback."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vtoken.video.clip
from vtoken.__main__ import main
from vtoken.cli import parser as options
from vtoken.cli.parser import parser

CALLS = {
    "demo": ["--small"],
    "bench": ["--model", "test_vit", "--batch", "1", "--rounds", "1"],
    "overlay": ["chelsea", "test_vit", "tome"],
    "video": ["nowhere.mp4", "--question", "what?", "--uniform"],
    "plan": ["test_vit", "pitome"],
    "report": ["test_vit", "pitome"],
    "models": [],
    "info": [],
    "methods": [],
    "run": ["--method", "tome", "r=2"],
    "serve-check": ["nowhere", "--method", "divprune", "num_tokens=4"],
    "tune": ["test_vit", "tome", "--target", "0.5", "--data", "nowhere"],
}
# Any text is a question; a tag of weights is looked up only beside --model, a device of this machine only in a run.
TEXT = {"--question", "--pretrained"}


def commands() -> dict[str, argparse.ArgumentParser]:
    (group,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(group.choices)


def taking_values() -> list[tuple[str, str, int]]:
    return [
        (name, action.option_strings[0], 2 if action.nargs == 2 else 1)
        for name, command in commands().items()
        for action in command._actions
        if action.option_strings and action.nargs != 0 and action.option_strings[0] not in TEXT
    ]


def test_every_command_is_walked() -> None:
    assert set(commands()) == set(CALLS)
    assert len(taking_values()) > 30


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    capsys.readouterr()
    assert main(list(command)) == 2, command
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    return err


@pytest.mark.parametrize(("command", "option", "count"), taking_values(), ids=lambda v: str(v))
@pytest.mark.parametrize("value", ["", "file.txt/below", "\0"])
def test_values_that_no_option_takes(
    command: str, option: str, count: int, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("words")
    refused(capsys, command, *CALLS[command], option, *[value] * count)


@pytest.mark.parametrize(
    "call",
    [
        "report test_vit pitome --img-size -16",
        "report test_vit pitome --img-size 0",
        "plan test_vit pitome ratio=NaN",
        "plan no_such_model pitome",
        "plan test_vit.no_such_tag pitome",
        "plan test_vit pitom",
        "plan test_vit pitome a=1",
        "bench --model test_vit --batch -1",
        "bench --model test_vit --batch 0",
        "bench --model test_vit --rounds 0",
        "bench --model test_vit --threads 0",
        "bench --model test_vit --device cuda:99",
        "bench --model test_vit --ratio inf",
        "bench --model test_vit --data empty",
        "bench --model test_vit --data missing",
        "bench --model test_vit --out a.txt",
        "bench --model test_vit --checkpoint a.txt",
        "bench --model test_vit --checkpoint list.pth",
        "bench --model test_vit --checkpoint a.safetensors",
        "bench --model test_vit --img-size 2147483647",
        "tune test_vit tome --data empty",
        "tune test_vit tome --data empty --target 0.5",
        "tune test_vit tome --data empty --target 1.5",
        "tune test_vit tome --data empty --target 0.5 --milliseconds 3",
        "tune test_vit vtc_cls num_tokens=4 --data missing --target 0.5",
        "overlay chelsea test_vit tome --out empty",
        "overlay chelsea test_vit tome --out a.txt/b.png",
        "overlay chelsea test_vit tome --out b.words",
        "overlay empty test_vit tome",
        "overlay a.txt test_vit tome",
        "demo --ratios nan",
        "demo --photos 0",
        "models --no-such-option",
        "video a.mp4 --question q --uniform",
        "video a.mp4 --question q --uniform --power inf",
        "no_such_command",
    ],
)
def test_wrong_calls(
    call: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("a.txt").write_text("words")
    Path("a.safetensors").write_bytes(b"words")
    torch.save([1, 2], "list.pth")
    refused(capsys, *call.split())


def test_choices_are_those_of_the_library() -> None:
    assert options.REDUCES == vtoken.video.clip.REDUCES
    assert options.SCALES == vtoken.video.clip.SCALES


def test_an_interrupt_ends_cleanly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("vtoken.cli.inspect.show_info", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_pipe_that_closes_ends_cleanly() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "vtoken", "methods"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_needs_no_torch() -> None:
    code = "import sys\nfrom vtoken.__main__ import parser\nprint(parser().format_help(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")
