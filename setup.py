"""Packages live in two folders: vtoken/ and kernels/vtoken_kernels/ (kernels/ itself is no package). The rest of the
metadata is in pyproject.toml."""

import sysconfig

from setuptools import Extension, find_packages, setup

#: One wheel serves all later versions of Python, but those without a GIL know no such interface.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")

#: Compiled where there is a C compiler, gcc's or clang's; without it `vtoken.ops` does the same by torch.
NATIVE = Extension(
    "vtoken_kernels.native",
    ["kernels/native/merging.c"],
    depends=["kernels/native/lanes.h"],
    define_macros=[("Py_LIMITED_API", "0x030B0000")] if ABI3 else [],
    extra_compile_args=["-O3"],
    py_limited_api=ABI3,
    optional=True,
)

setup(
    packages=[*find_packages(include=["vtoken", "vtoken.*"]), *find_packages("kernels")],
    package_dir={"vtoken_kernels": "kernels/vtoken_kernels"},
    package_data={"vtoken": ["py.typed", "visualize/page.html"], "vtoken_kernels": ["py.typed", "native.pyi"]},
    ext_modules=[NATIVE],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ABI3 else {},
)
