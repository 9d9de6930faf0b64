"""The setuptools commands that put the library in the package, for wheels and for editable installs."""

import os
import shutil
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from cuda_build.library import LIBRARY_NAME, build_library
from cuda_build.settings import DTYPES, HEAD_DIMS, read_settings
from cuda_build.terminal import say
from cuda_build.toolkit import MissingTool, find_toolkit, keep_supported
from cuda_build.units import KERNELS

BUILD_FOLDER = KERNELS.parent / "build" / "cuda"


def plan_build(package: str) -> dict:
    """Returns the arguments of `setup` that make it build the library into `package`.

    There is nothing to build without nvcc and ninja, or where nvcc cannot compile for any GPU here. It says so, and
    Triton serves. With FLASH_DMATTN_FORCE_BUILD=1 it raises `MissingTool` or ValueError instead. Raises ValueError for
    a choice of head dims or dtypes.
    """
    settings = read_settings()
    if settings.skip:
        say("no CUDA library, as asked by FLASH_DMATTN_SKIP_CUDA_BUILD")
        return {}
    if (settings.head_dims, settings.dtypes) != (HEAD_DIMS, DTYPES):
        raise ValueError(
            "FLASH_DMATTN_HEAD_DIMS and FLASH_DMATTN_DTYPES must not be set to install: the package needs all kernels, "
            f"got {', '.join(settings.head_dims + settings.dtypes)}"
        )
    try:
        toolkit = find_toolkit()
    except MissingTool as error:
        if settings.force:
            raise
        say(f"no CUDA library, {error}")
        return {}
    if not settings.is_asked and not keep_supported(settings, toolkit)[0]:
        problem = f"{toolkit.nvcc} cannot compile kernels {settings.why}"
        if settings.force:
            raise ValueError(f"FLASH_DMATTN_CUDA_ARCHS must be set to force a build, {problem}")
        say(f"no CUDA library, {problem}; FLASH_DMATTN_CUDA_ARCHS=all builds it for others")
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
