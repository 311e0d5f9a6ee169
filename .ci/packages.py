"""Build the sdist and the wheel; try each in an empty environment as one who installed it, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Run by the environment's own Python, with its folder as the argument.
CHECK = """
import importlib.metadata, pathlib, sys
import vtoken, vtoken_kernels
from vtoken_kernels import native
for package, files in ((vtoken, ("py.typed", "visualize/page.html")), (vtoken_kernels, ("py.typed", "native.pyi"))):
    folder = pathlib.Path(package.__file__).parent
    assert folder.is_relative_to(sys.argv[1]), folder
    assert all((folder / name).is_file() for name in files), folder
assert pathlib.Path(native.__file__).is_relative_to(sys.argv[1]), native
assert importlib.metadata.version("vtoken") == vtoken.__version__
named = {(e.group, e.name): e for e in importlib.metadata.distribution("vtoken").entry_points}
assert named["lmms_eval.models", "vtoken"].load() and ("vllm.general_plugins", "vtoken") in named
print(vtoken.__version__, vtoken.methods())
"""


def main() -> None:
    """Raise if a package does not build, install, import or run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        line = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        packages = sorted(folder.glob("vtoken-*"))
        assert {package.suffix for package in packages} == {".gz", ".whl"}, packages
        for package in packages:
            _try(package, folder / f"environment{package.suffix}", folder)
            print(f"{package.name}: builds, installs, imports and runs")


def _try(package: Path, target: Path, elsewhere: Path) -> None:
    """Install the package alone, over the dependencies of this environment, and use it from another folder."""
    venv.create(target, with_pip=True)
    python = str(target / "bin" / "python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    [site] = target.glob("lib/python*/site-packages")
    # Dependencies come after, so that pip does not see the checkout's vtoken among them; Python does not either: a .pth
    # file of a folder that a .pth file names is not read.
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", str(package)]
    subprocess.run(install, check=True, env=environment)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-c", CHECK, str(target)], check=True, cwd=elsewhere, env=environment)
    program = [str(target / "bin" / "vtoken"), "plan", "test_vit", "pitome", "ratio=0.9"]
    for command in (program, [python, "-m", "vtoken", *program[1:]]):
        subprocess.run(command, check=True, cwd=elsewhere, env=environment, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
