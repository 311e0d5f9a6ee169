"""Importing vtoken is light, and its parts depend on each other in one direction only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "vtoken"
# What each part may import of the others; errors and checks are open to all.
ALLOWED = {
    "ops": set(),
    "core": {"ops"},
    "methods": {"core", "ops"},
    "prompts": {"core", "ops"},
    "hosts": {"core", "ops", "prompts"},
    "nn": {"core", "ops", "methods"},
    "accounting": {"core", "ops", "methods"},
    "visualize": {"core", "ops", "accounting"},
    "demo": {"core"},
    "testing": {"core", "prompts"},
    "video": {"core", "ops", "hosts", "prompts", "accounting"},
    "cli": {"core", "ops", "methods", "hosts", "accounting", "visualize", "demo", "nn", "video"},
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vtoken."):
            names.add(node.module)
        elif isinstance(node, ast.ImportFrom) and node.module == "vtoken":
            names |= {f"vtoken.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("vtoken.")}
    return names


def test_parts_import_in_one_direction() -> None:
    seen = 0
    for part, allowed in ALLOWED.items():
        for path in (ROOT / part).rglob("*.py"):
            for name in imported(path):
                seen += 1
                target = name.split(".")[1]
                fine = target == part or target in allowed or name in ("vtoken.errors", "vtoken.checks")
                assert fine, f"{path.relative_to(ROOT)} imports {name}"
    assert seen > 50


def test_every_part_is_in_the_table() -> None:
    parts = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert parts == set(ALLOWED)


def test_import_loads_no_host_library() -> None:
    names = ("timm", "open_clip", "transformers", "triton", "matplotlib", "PIL", "skimage", "onnx", "torchvision", "av")
    code = (
        f"import sys, vtoken; loaded = [n for n in {names} if n in sys.modules]; print(loaded); sys.exit(bool(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    # torch itself imports triton lazily in some versions; only what vtoken adds counts.
    baseline = subprocess.run(
        [sys.executable, "-c", code.replace(", vtoken", ", torch")], capture_output=True, text=True, check=False
    )
    assert done.stdout == baseline.stdout, done.stdout + done.stderr


def test_public_names_exist() -> None:
    import vtoken

    for name in vtoken.__all__:
        assert getattr(vtoken, name) is not None
    wanted = "apply remove applied is_applied config_of configure plan report trace tracing supported methods"
    assert set(wanted.split()) <= set(vtoken.__all__)


def test_import_alone_loads_no_torch_and_names_come_when_used() -> None:
    code = """
import sys, vtoken
assert "torch" not in sys.modules
import vtoken.methods.merging.pitome, inspect, pickle
assert callable(vtoken.methods) and "tome" in vtoken.methods()
assert not set(vtoken.__all__) - set(dir(vtoken))
assert pickle.loads(pickle.dumps(vtoken.PiToMe(ratio=0.9))) == vtoken.PiToMe(ratio=0.9)
assert vtoken.nn.SparseAttention and inspect.signature(vtoken.apply)
assert not hasattr(vtoken, "nothing")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_methods_are_known_by_name_whatever_was_imported_first() -> None:
    code = "from vtoken.core.config import methods; assert {'pitome', 'vtc_cls', 'sparsifiner'} <= set(methods())"
    subprocess.run([sys.executable, "-c", code], check=True)
