"""Puts into a wheel, inside the packages that use them, what lies beside them in the repository.

All else is in `pyproject.toml`.
"""

from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py

CARRIED = {"plugins": "sdcompress/plugins", "bench/scenarios": "sdcompress_bench/scenarios"}


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable installation uses the repository itself
            for source, target in CARRIED.items():
                copytree(
                    Path(__file__).parent / source,
                    Path(self.build_lib) / target,
                    ignore=ignore_patterns("__pycache__", ".*"),
                    dirs_exist_ok=True,
                )


setup(cmdclass={"build_py": BuildPy})
