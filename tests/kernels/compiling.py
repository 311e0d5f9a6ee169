"""Compiling every kernel for a GPU that is not there: a stub driver, and launches that stop after compilation."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Shared memory that one program may have, in bytes. The compiler does not check it; a launch would fail.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class StubDriver:
    """What the compiler asks of a driver."""

    def __init__(self, name: str) -> None:
        self.target = TARGETS[name]
        # A number per target: Triton and `launch.target` remember what they know of a device by its number.
        self.device = 100 + list(TARGETS).index(name)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled(NamedTuple):
    """One kernel as one call site specialised it."""

    kernel: str
    target: str
    shared: int
    registers: int
    spills: int
    has_dot: bool
    has_matrix_instruction: bool


@contextmanager
def compiling_for(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """Within it, launches on CPU tensors compile for the target and run nothing; yields what was compiled."""
    run, seen = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        seen.append((self.fn.__name__, compiled))
        return compiled

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        # Not set_active and reset_active: the latter looks for a real driver.
        patch.setattr(triton.runtime.driver, "_active", StubDriver(name))
        yield seen


def inspect(kernel: str, target: str, compiled: Any, folder: Path) -> Compiled:
    """Resources of a compiled kernel, from its assembly."""
    has_dot = "tt.dot" in compiled.asm["ttir"]
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1])
        spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code)[1])
        matrix = "v_mfma" in code
    else:
        code = compiled.asm["ptx"]
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([_CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True)
        text = usage.stdout + usage.stderr
        registers = int(re.search(r"REG:(\d+)", text)[1])
        spills = int(re.search(r"STACK:(\d+)", text)[1])
        matrix = "mma.sync" in code or "wgmma.mma" in code
    return Compiled(kernel, target, compiled.metadata.shared, registers, spills, has_dot, matrix)
