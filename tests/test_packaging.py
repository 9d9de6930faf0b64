"""The distribution: what the wheel holds and says, and that the name `kernels` stays Hugging Face's own."""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers.utils.import_utils import KERNELS_MIN_VERSION

from flash_dmattn_hf.versions import TESTED

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = Version("77")


def modules(package: str, folder: Path) -> set[str]:
    """Archive names of every Python file below `folder`, as if it were installed as `package`."""
    return {f"{package}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}


def python(*arguments: str, cwd: Path, path: tuple[Path, ...] = ()) -> str:
    """Standard output of a fresh interpreter started in `cwd`, with `path` in front of its site-packages."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, path), os.environ.get("PYTHONPATH", "")]),
        "FLASH_DMATTN_SKIP_CUDA_BUILD": "1",  # tests/test_build.py has the wheels with a library
    }
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder to build in that looks like the repository."""
    installed = Version(importlib.metadata.version("setuptools"))
    if installed < SETUPTOOLS:
        pytest.skip(f"building without isolation needs setuptools >= {SETUPTOOLS}, got {installed}")
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "kernels", "flash_dmattn_hf"):
        (source / name).symlink_to(ROOT / name)
    return source


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out), ".", cwd=source)
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


@pytest.mark.parametrize(
    ("package", "folder"),
    [
        ("flash_dma_cuda", "kernels/flash_dma_cuda"),
        ("flash_dmattn", "kernels/flash_dmattn"),
        ("flash_dmattn_hf", "flash_dmattn_hf"),
    ],
)
def test_the_wheel_holds_every_module(wheel, package, folder):
    held = {name for name in wheel.namelist() if name.startswith(f"{package}/") and name.endswith(".py")}
    assert held == modules(package, ROOT / folder)
    assert f"{package}/__init__.py" in held


def test_the_wheel_installs_only_our_packages(wheel):
    top_level = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert top_level == {"flash_dma_cuda", "flash_dmattn", "flash_dmattn_hf"}


def test_the_wheel_carries_the_license(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("LICENSE"))
    assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()


def test_the_source_distribution_builds_the_library(source, tmp_path):
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    python("-c", build, cwd=source)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    needed = [*(ROOT / "kernels/csrc").rglob("*"), *(ROOT / "kernels/cuda_build").glob("*.py")]
    needed = {path.relative_to(ROOT).as_posix() for path in needed if path.is_file()}
    assert needed | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= held
    assert not [name for name in held if name.endswith((".so", ".o", ".pyc"))]


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_every_supported_python_may_install_it(metadata, version):
    assert SpecifierSet(metadata["Requires-Python"]).contains(version)
    assert f"Programming Language :: Python :: {version}" in metadata.get_all("Classifier")


def test_python_3_9_may_not_install_it(metadata):
    assert not SpecifierSet(metadata["Requires-Python"]).contains("3.9.19")


@pytest.mark.parametrize("name", ["torch", "transformers", "accelerate", "safetensors"])
def test_a_plain_install_brings(metadata, name):
    required = {r.name for r in map(Requirement, metadata.get_all("Requires-Dist")) if not r.marker}
    assert name in required


@pytest.mark.parametrize(
    ("version", "accepted"),
    [("5.16.9", False), *((version, True) for version in TESTED), ("5.24.9", True), ("5.25.0", False)],
)
def test_the_range_of_transformers(metadata, version, accepted):
    (specifier,) = (
        r.specifier
        for r in map(Requirement, metadata.get_all("Requires-Dist"))
        if r.name == "transformers" and not r.marker
    )
    assert specifier.contains(version) is accepted


@pytest.mark.parametrize("extra", ["dev", "demo", "train"])
def test_the_extra_exists(metadata, extra):
    assert extra in metadata.get_all("Provides-Extra")


def test_the_console_command(wheel, metadata):
    assert metadata["Name"] == "flash-dmattn-hf"
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "flash-dmattn = flash_dmattn_hf.cli:main" in wheel.read(name).decode()


FIND_KERNELS = """
import importlib.util
spec = importlib.util.find_spec("kernels")
print(spec.origin if spec else None)
"""
ASK_TRANSFORMERS = """
from transformers.utils.import_utils import _is_package_available, is_kernels_available
print(is_kernels_available(), *_is_package_available("kernels", return_version=True))
"""


@pytest.fixture(scope="module")
def kernels_package(tmp_path_factory) -> Path:
    """A folder with a package of the name and look of Hugging Face's `kernels`, new enough for transformers."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(f'__version__ = "{KERNELS_MIN_VERSION}"\n')
    info = folder / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    return folder


def test_the_repository_offers_no_module_called_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    installed = importlib.metadata.packages_distributions().get("kernels", [])
    origin = python("-c", FIND_KERNELS, cwd=ROOT)
    assert "flash-dmattn-hf" not in installed
    assert origin == "None" or not Path(origin).resolve().is_relative_to(ROOT / "kernels")


def test_the_kernels_of_hugging_face_win_over_the_folder(kernels_package):
    origin = python("-c", FIND_KERNELS, cwd=ROOT, path=(ROOT, kernels_package))
    assert Path(origin) == kernels_package / "kernels" / "__init__.py"


def test_transformers_sees_no_kernels_in_the_repository(tmp_path):
    ask = "import flash_dmattn_hf\n" + ASK_TRANSFORMERS
    assert python("-c", ask, cwd=ROOT) == python("-c", ask, cwd=tmp_path)


@pytest.mark.parametrize("where", ["in the repository", "elsewhere"])
def test_transformers_looks_up_the_kernels_of_hugging_face(kernels_package, tmp_path, where):
    cwd = ROOT if where == "in the repository" else tmp_path
    assert python("-c", ASK_TRANSFORMERS, cwd=cwd, path=(kernels_package,)) == f"True True {KERNELS_MIN_VERSION}"
