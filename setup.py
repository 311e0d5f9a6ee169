"""Packages live in two folders: vtoken/ and kernels/vtoken_kernels/ (kernels/ itself is no package). The rest of the
metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vtoken", "vtoken.*"]), *find_packages("kernels")],
    package_dir={"vtoken_kernels": "kernels/vtoken_kernels"},
    package_data={"vtoken": ["py.typed", "visualize/page.html"], "vtoken_kernels": ["py.typed"]},
)
