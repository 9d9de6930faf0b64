"""The setuptools commands that put the library in the package, for wheels and for editable installs."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from cuda_build.library import LIBRARY_NAME, build_library
from cuda_build.settings import DTYPES, HEAD_DIMS, read_settings
from cuda_build.toolkit import MissingTool, find_toolkit
from cuda_build.units import KERNELS

BUILD_FOLDER = KERNELS.parent / "build" / "cuda"


def plan_build(package: str) -> dict:
    """Returns the arguments of `setup` that make it build the library into `package`.

    Without nvcc or ninja there is nothing to build: it says so, and Triton serves; with FLASH_DMATTN_FORCE_BUILD=1
    it raises `MissingTool`. Raises ValueError for a choice of head dims or dtypes.
    """
    settings = read_settings()
    if settings.skip:
        print("flash_dmattn: no CUDA library, as asked by FLASH_DMATTN_SKIP_CUDA_BUILD", file=sys.stderr)
        return {}
    if (settings.head_dims, settings.dtypes) != (HEAD_DIMS, DTYPES):
        raise ValueError(
            "FLASH_DMATTN_HEAD_DIMS and FLASH_DMATTN_DTYPES must not be set to install: the package needs all kernels, "
            f"got {', '.join(settings.head_dims + settings.dtypes)}"
        )
    try:
        find_toolkit()
    except MissingTool as error:
        if settings.force:
            raise
        print(f"flash_dmattn: no CUDA library, {error}", file=sys.stderr)
        return {}
    return {
        "ext_modules": [Extension(f"{package}.{LIBRARY_NAME.split('.')[0]}", sources=[])],
        "cmdclass": {"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    }


class BuildLibrary(build_ext):
    """Builds the one extension, which is no Python module but a plain library."""

    def build_extension(self, ext: Extension) -> None:
        build = build_library(read_settings(), find_toolkit(), BUILD_FOLDER)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build.library, target)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], LIBRARY_NAME)


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every Python: the library uses nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]
