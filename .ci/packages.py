"""Build the sdist and the wheel; import both packages and run the program from each, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECK = "import vtoken, vtoken_kernels, pathlib; assert pathlib.Path(vtoken.__file__).with_name('py.typed').exists()"
CHECK += "; assert str(pathlib.Path(vtoken.__file__)).startswith({target!r}), vtoken.__file__"
CHECK += "; assert str(pathlib.Path(vtoken_kernels.__file__)).startswith({target!r}); print(vtoken.methods())"


def main() -> None:
    """Raise if a package does not build, import or run."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "build", "--outdir", folder, str(ROOT)], check=True, stdout=subprocess.DEVNULL
        )
        for package in sorted(Path(folder).glob("vtoken-*")):
            target = str(Path(folder).resolve() / f"site-{package.suffix[1:]}")
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, str(package)]
            subprocess.run(install, check=True)
            code = f"import sys; sys.path.insert(0, {target!r}); " + CHECK.format(target=target)
            subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
            program = [str(Path(target) / "bin" / "vtoken"), "plan", "test_vit", "pitome", "ratio=0.9"]
            for command in (program, [sys.executable, "-m", "vtoken", *program[1:]]):
                environment = os.environ | {"PYTHONPATH": target}
                subprocess.run(command, check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
            print(f"{package.name}: builds, installs, imports and runs")


if __name__ == "__main__":
    main()
