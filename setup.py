"""Build and install zerokl.

The folders at the top of the repository are installed as ``zerokl.<folder>``; none of them becomes a top-level module.
The compiled extension is one shared library of torch.library operators (torch's stable ABI), built by CMake.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
ROOMS = ["kernels", "alignment", "weightsync", "orchestrate", "bench"]


class CMakeLibrary(Extension):
    """A shared library built by CMake; its name is where it lands inside the package."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Runs CMake for the extension; `get_ext_filename` drops the Python ABI tag (it is no Python module)."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-py{sys.version_info.major}{sys.version_info.minor}"
        build.mkdir(parents=True, exist_ok=True)
        # the environment's own CMake first: a fresh machine may have none
        cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("building zerokl needs CMake 3.22 or newer: pip install cmake")
        subprocess.run(
            [
                cmake,
                "-S", str(ROOT),
                "-B", str(build),
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DZEROKL_OUTPUT_DIR={target.parent}",
                f"-DZEROKL_OUTPUT_NAME={target.stem}",
                "-DCMAKE_BUILD_TYPE=Release",
            ],
            check=True,
        )  # fmt: skip
        subprocess.run([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)


def packages() -> tuple[list[str], dict[str, str]]:
    names, where = ["zerokl"], {"zerokl": "zerokl"}
    for room in ROOMS:
        names.append(f"zerokl.{room}")
        where[f"zerokl.{room}"] = room
        for sub in find_packages(str(ROOT / room)):
            names.append(f"zerokl.{room}.{sub}")
            where[f"zerokl.{room}.{sub}"] = f"{room}/{sub.replace('.', '/')}"
    return names, where


names, where = packages()
setup(
    packages=names,
    package_dir=where,
    ext_modules=[CMakeLibrary("zerokl.kernels._C")],
    cmdclass={"build_ext": CMakeBuild},
)
