"""Importing vtoken is light, and its parts depend on each other in one direction only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "vtoken"
GROUND = {"errors", "checks"}
#: What each part, a folder or a file of vtoken/, may import of the others. CONTRIBUTING.md says what lies where.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "checks": {"errors"},
    "ops": GROUND,
    "core": GROUND | {"ops"},
    "methods": GROUND | {"core", "ops"},
    "prompts": GROUND | {"core", "ops"},
    "hosts": GROUND | {"core", "ops", "prompts"},
    "nn": GROUND | {"core", "ops", "methods"},
    "accounting": GROUND | {"core", "ops", "methods"},
    "tuning": GROUND | {"core", "methods", "accounting"},
    "visualize": GROUND | {"core", "ops", "accounting"},
    "demo": GROUND | {"core", "ops"},
    "video": GROUND | {"core", "ops", "methods", "prompts", "accounting"},
    "train": {"methods"},
    "hosting": {"core", "hosts"},
    "testing": GROUND | {"core", "ops", "methods", "accounting", "prompts"},
    "harness": GROUND | {"core"},
    "serving": GROUND | {"core", "ops", "hosts", "prompts", "accounting"},
    "cli": GROUND
    | {"core", "ops", "methods", "hosts", "accounting", "tuning", "visualize", "demo", "nn", "video", "serving"},
    "__main__": {"errors", "cli"},
}
#: The same inside hosts/: a family sees what lies in hosts/ itself, which sees no family, and of the others these.
FAMILIES: dict[str, set[str]] = {
    "timm": set(),
    "open_clip": {"timm"},  # whose models it takes as trunks
    "transformers": set(),
    "llava": {"transformers"},
    "internvl": set(),
    "idefics": set(),
    "gemma": {"qwen"},
    "cohere": set(),
    "pixtral": set(),
    "qwen": set(),
    "video_llama": set(),
}
#: Files in hosts/ that stand above the families: what is asked last names all that are served.
ABOVE = {"unserved"}
#: Hands out the names of all parts, so that no part may import it.
_FRONT = ("__init__", "_public")


def name_of(path: Path) -> str:
    """vtoken.ops.rows; of the file of a package vtoken.ops."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(text: str) -> set[str]:
    """Files of vtoken that a file imports: at its top, inside a function, or where nothing but annotations needs it.

    The last is no import to a running program; it is left out if the file says why: `if TYPE_CHECKING:  # reason`.
    """
    lines, names = text.splitlines(), set()
    waiting: list[ast.AST] = [ast.parse(text)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and "#" in lines[node.lineno - 1]:
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "vtoken":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in FILES else node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "vtoken"}
    return names


GRAPH = {name: imported(path.read_text()) - {name} for name, path in FILES.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files each of which reaches all others of its group."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            new = graph.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        reached[start] = seen
    groups = {tuple(sorted(b for b in reached[a] if a in reached.get(b, ()))) for a in graph if a in reached[a]}
    return [list(group) for group in sorted(groups)]


def test_parts_import_in_one_direction() -> None:
    seen = 0
    for name, targets in GRAPH.items():
        part = [*name.split("."), "__init__"][1]
        for target in targets if part not in _FRONT else ():
            seen += 1
            other = [*target.split("."), "__init__"][1]
            assert other == part or other in ALLOWED[part], f"{name} imports {target}"
    assert seen > 500


def test_families_of_hosts_import_in_one_direction() -> None:
    folders = {path.name for path in (ROOT / "hosts").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(FAMILIES)
    seen = 0
    for name, targets in GRAPH.items():
        family = (name.removeprefix("vtoken.hosts.")).partition(".")[0] if name.startswith("vtoken.hosts.") else ""
        for target in targets if family else ():
            other = target.removeprefix("vtoken.hosts.").partition(".")[0]
            if target.startswith("vtoken.hosts.") and other in FAMILIES:
                seen += 1
                fine = other == family or family in ABOVE or other in FAMILIES.get(family, ())
                assert fine, f"{name} imports {target}"
    assert seen > 10


def test_no_import_climbs() -> None:
    """The tables themselves have no circle, so that every part stands on those that it may import."""
    assert circles(ALLOWED) == circles(FAMILIES) == []


def test_files_import_each_other_in_no_circle() -> None:
    assert (
        circles({name: targets for name, targets in GRAPH.items() if name.split(".")[1:] not in ([], ["_public"])})
        == []
    )


def test_a_circle_is_seen_and_annotations_count_unless_the_file_says_why() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    text = (
        "if TYPE_CHECKING:{}\n    from vtoken.core import host\ndef f():\n    from vtoken.ops.rows import take_rows\n"
    )
    assert imported(text.format("")) == {"vtoken.core.host", "vtoken.ops.rows"}
    assert imported(text.format("  # annotations only")) == {"vtoken.ops.rows"}


def test_nobody_imports_the_plugin() -> None:
    """Its files need vLLM; they are named to vLLM by strings, and imported when a model asks for one."""
    inside = {name for name in FILES if name.startswith("vtoken.serving.vllm.")}
    assert len(inside) > 3
    others = set().union(*(targets for name, targets in GRAPH.items() if name not in inside))
    assert not others & inside


def test_every_part_is_in_the_table() -> None:
    parts = {name.split(".")[1] for name in FILES if "." in name}
    assert parts - set(_FRONT) == set(ALLOWED)


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
