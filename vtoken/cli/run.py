"""`python -m vtoken run`: a program as it is, with a method applied to the models that it gets from its libraries."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vtoken.cli.factories import FACTORIES, watched
from vtoken.cli.settings import key_values
from vtoken.core.apply import apply
from vtoken.core.config import MethodConfig, make_config
from vtoken.errors import ConfigError, UnsupportedModelError, VTokenError
from vtoken.methods.attentive_clip import AttentiveMaskCLIP, AttentiveMasks

SCHEMA = 1


@dataclass(frozen=True)
class Made:
    """A model that the program got.

    Args:
        by: the library's function.
        name: its first argument.
        model: the class.
        patched: whether the method was applied.
        why: if not, why.
        refused: the model could carry it, but not with these settings; the program was told by an exception.
    """

    by: str
    name: str
    model: str
    patched: bool
    why: str = ""
    refused: bool = False


def run(args: argparse.Namespace) -> int:
    """Run the program, say what was patched, write the manifest; returns the program's status.

    An exception of the program is shown as Python shows it, with status 1.

    Raises:
        ConfigError: if there is no program, or the method or its settings are wrong.
        VTokenError: if the program went well, but nothing was patched, or it swallowed that settings do not fit.
    """
    if not args.script or (args.script[0] == "-m" and len(args.script) < 2):
        raise ConfigError(f"the program to run, or -m and a module, goes behind --: {_CALL}")
    config = make_config(args.method[0], key_values(args.method[1:]))
    if args.script[0] != "-m" and not Path(args.script[0]).is_file():
        raise ConfigError(f"{args.script[0]}: no such file; {_CALL}")
    made: list[Made] = []

    def told(by: str, source: Any, model: Any) -> Any:
        return _take(made, model, config, by, str(source)[:200]) if isinstance(model, nn.Module) else model

    with watched(told), _as_program(args.script) as program:
        code = _status(program)
    if args.manifest is not None:
        _write(args.manifest, made, {"method": config.to_dict(), "program": args.script, "status": code})
    lacking = [_line(m, config) for m in made if m.refused or not any(other.patched for other in made)]
    if lacking or not made:
        why = "; ".join(lacking) or f"it got none from {', '.join(shown for *_, shown in FACTORIES)}"
        error = VTokenError(f"{config.method} was not applied to a model of this program: {why}")
        if code == 0:
            raise error
        print(f"vtoken: {error}", file=sys.stderr)
    return code


_CALL = "python -m vtoken run --method pitome ratio=0.9 -- program.py arguments"


def _take(made: list[Made], model: nn.Module, config: MethodConfig, by: str, name: str) -> nn.Module:
    """Apply the method to a model where that can be, and note it; returns what the program gets.

    Settings that do not fit raise: the program would go on without them.
    """
    kind = type(model).__name__
    try:
        if isinstance(config, AttentiveMasks):
            model = AttentiveMaskCLIP(model, config).train(model.training)
        else:
            apply(model, config)
        made.append(Made(by, name, kind, patched=True))
    except UnsupportedModelError as error:
        made.append(Made(by, name, kind, patched=False, why=str(error)))
    except VTokenError as error:
        made.append(Made(by, name, kind, patched=False, why=str(error), refused=True))
        raise
    print(f"vtoken: {_line(made[-1], config)}", file=sys.stderr)
    return model


def _write(path: Path, made: list[Made], about: dict[str, Any]) -> None:
    values = {"schema": SCHEMA, "command": "run", **about, "models": [asdict(m) for m in made]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n")


def _line(made: Made, config: MethodConfig) -> str:
    what = f"{made.by}({made.name!r}), a {made.model}"
    return f"{config.method} is applied to {what}" if made.patched else f"left as it was: {what}: {made.why}"


@contextlib.contextmanager
def _as_program(words: list[str]) -> Iterator[Any]:
    """A function that runs a file, or with -m a module, as Python would; arguments and path are put back behind it."""
    argv, path = sys.argv, list(sys.path)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, os.getcwd())
            yield lambda: runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            yield lambda: runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path


def _status(program: Any) -> int:
    """The status with which Python would end the program."""
    try:
        program()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except Exception as error:
        # As Python shows it: from the program's own first line.
        frames = error.__traceback__
        ours = (__file__, runpy.__file__, "<frozen runpy>")
        while frames is not None and frames.tb_frame.f_code.co_filename in ours:
            frames = frames.tb_next
        traceback.print_exception(error.with_traceback(frames or error.__traceback__))
        return 1
    return 0
