"""The build of the CUDA library: its settings, what it does without tools, what is rebuilt, and what wheels hold."""

import ctypes
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

from flash_dmattn.backends.cuda import library, lists, parameters, selection

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "kernels"))
from cuda_build import terminal  # noqa: E402
from cuda_build.library import LIBRARY_NAME, build_library  # noqa: E402
from cuda_build.resources import (  # noqa: E402
    ALLOWED_SPILLS,
    find_spill_regressions,
    format_table,
    parse_compiler_output,
)
from cuda_build.settings import ARCHITECTURES, HEAD_DIMS, Settings, read_settings  # noqa: E402
from cuda_build.setuptools_command import plan_build  # noqa: E402
from cuda_build.toolkit import MissingTool, Toolkit, find_toolkit, keep_supported  # noqa: E402
from cuda_build.units import SOURCES, list_units  # noqa: E402

VARIABLES = (
    "FLASH_DMATTN_CUDA_ARCHS",
    "FLASH_DMATTN_SKIP_CUDA_BUILD",
    "FLASH_DMATTN_FORCE_BUILD",
    "CUDA_HOME",
    "CUDA_PATH",
)

ONE_VARIANT = {"head_dims": ("128",), "dtypes": ("bf16",)}

FAKE_NVCC = """\
#!{python}
import pathlib, sys
arguments = sys.argv[1:]
if "--version" in arguments:
    print("Cuda compilation tools, release 12.4, V12.4.99")
    sys.exit()
if "--list-gpu-code" in arguments:
    print("sm_80\\nsm_86\\nsm_90\\nsm_100")
    sys.exit()
out = pathlib.Path(arguments[arguments.index("-o") + 1])
with open("{calls}", "a") as calls:
    print(" ".join(arguments), file=calls)
if "-c" in arguments:
    source = pathlib.Path(arguments[arguments.index("-c") + 1])
    if "broken" in source.read_text():
        sys.exit("fake nvcc: broken source")
    needed = [str(path).replace("$", "$$").replace(" ", r"\\ ") for path in (source, *source.parent.glob("*.h"))]
    pathlib.Path(arguments[arguments.index("-MF") + 1]).write_text(f"{{out}}: {{' '.join(needed)}}\\n")
out.write_text("fake")
"""


@pytest.fixture
def fake(tmp_path):
    """A folder that is a CUDA toolkit as far as a build can see, without sm_120; `calls` reads what was compiled."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    log = tmp_path / "calls.txt"
    log.touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(FAKE_NVCC.format(python=sys.executable, calls=log))
    nvcc.chmod(0o755)
    return home


def commands(fake: Path) -> dict[str, str]:
    """The arguments that the fake compiler was given since it was last asked, by the name of what it made."""
    log = fake.parent / "calls.txt"
    lines = log.read_text().splitlines()
    log.write_text("")
    return {Path(re.search(r"-o (\S+)", line)[1]).name: line for line in lines}


def calls(fake: Path) -> list[str]:
    """The objects, or the library, that the fake compiler made since it was last asked."""
    return sorted(commands(fake))


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "csrc"
    for kernel in ("sm80/backward", "sm90/forward"):
        (folder / kernel).mkdir(parents=True)
    for name in ("library", "selection", "sm80/backward/instance", "sm90/forward/instance"):
        (folder / f"{name}.cu").write_text("// a source")
    (folder / "api.h").write_text("// a header")
    return folder


def toolkit_of(fake: Path) -> Toolkit:
    return find_toolkit({"CUDA_HOME": str(fake), "PATH": os.environ["PATH"]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ARCHITECTURES),
        ("all", ARCHITECTURES),
        ("90", ("90",)),
        ("120;80", ("80", "120")),
        ("80, 90", ("80", "90")),
        ("90;;90;", ("90",)),
    ],
)
def test_architectures_are_a_list(text, expected):
    assert read_settings({"FLASH_DMATTN_CUDA_ARCHS": text}).architectures == expected


@pytest.fixture
def smi(tmp_path):
    """Makes a PATH with an nvidia-smi that prints these lines and ends with this code."""

    def make(lines: str, code: int = 0) -> dict[str, str]:
        (tmp_path / "smi").mkdir()
        program = tmp_path / "smi" / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '{lines}'\nexit {code}\n")
        program.chmod(0o755)
        return {"PATH": str(program.parent)}

    return make


@pytest.mark.parametrize(
    ("lines", "architectures"),
    [
        ("9.0\\n9.0\\n", ("90",)),
        ("12.0\\n8.6\\n", ("80", "120")),
        ("10.3\\n", ("100",)),
        ("7.5\\n9.0\\n", ("90",)),
        ("7.5\\n", ()),
        ("", ARCHITECTURES),
        ("No devices were found\\n", ARCHITECTURES),
    ],
)
def test_without_a_choice_the_gpus_here_decide(smi, lines, architectures):
    settings = read_settings(smi(lines))
    assert settings.architectures == architectures
    assert settings.why.startswith("for the GPUs here" if architectures != ARCHITECTURES else "because nvidia-smi")


@pytest.mark.parametrize(
    ("lines", "words"), [("Driver mismatch\\nNVML 1\\n", "Driver mismatch"), ("", "exit status 9")]
)
def test_an_nvidia_smi_that_fails_could_not_be_asked(smi, lines, words):
    settings = read_settings(smi(lines, code=9))
    assert settings.architectures == ARCHITECTURES
    assert settings.why == f"because nvidia-smi could not be asked: {words}"


def test_nobody_is_asked_for_a_build_that_is_skipped(monkeypatch):
    monkeypatch.setattr("cuda_build.settings.list_capabilities", None)
    assert read_settings({"FLASH_DMATTN_SKIP_CUDA_BUILD": "1"}).skip


def test_a_choice_counts_more_than_the_gpus_here(smi):
    environment = smi("9.0\\n")
    assert read_settings({**environment, "FLASH_DMATTN_CUDA_ARCHS": "80"}).architectures == ("80",)
    assert read_settings({**environment, "FLASH_DMATTN_CUDA_ARCHS": "all"}).architectures == ARCHITECTURES


@pytest.mark.parametrize("capability", ["7.5", "9.1", "12.0"])
def test_nothing_is_built_for_gpus_that_nvcc_cannot_compile_for(smi, fake, monkeypatch, capsys, capability):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(fake))
    monkeypatch.setenv("PATH", os.pathsep.join([smi(f"{capability}\\n")["PATH"], os.environ["PATH"]]))
    assert plan_build("flash_dmattn") == {}
    words = f"nvcc cannot compile kernels for the GPUs here, of compute capability {capability}; FLASH"
    assert words in capsys.readouterr().err
    monkeypatch.setenv("FLASH_DMATTN_FORCE_BUILD", "1")
    with pytest.raises(ValueError, match="FLASH_DMATTN_CUDA_ARCHS must be set to force a build"):
        plan_build("flash_dmattn")


def test_a_build_of_pip_shows_its_progress_on_the_terminal(tmp_path, monkeypatch, capsys):
    screen = tmp_path / "screen"
    screen.touch()
    monkeypatch.setattr(terminal, "open_terminal", lambda: open(screen, "a"))
    terminal.say("3 compilations")
    terminal.show_progress(["[1/3] nvcc a.o\n", "[2/3] nvcc b.o\n"])
    shown = ["", "flash_dmattn: 3 compilations\n", "[1/3] nvcc a.o", "[2/3] nvcc b.o", ""]
    assert screen.read_bytes().decode().split("\r\033[K") == shown
    assert capsys.readouterr().err == "flash_dmattn: 3 compilations\n[1/3] nvcc a.o\n[2/3] nvcc b.o\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that cannot be written to")
def test_a_lost_terminal_does_not_stop_the_build(monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(terminal, "open_terminal", lambda: opened.append(open("/dev/full", "w")) or opened[-1])
    terminal.say("3 compilations")
    terminal.show_progress(["[1/3] nvcc a.o\n", "[2/3] nvcc b.o\n"])
    assert capsys.readouterr().err == "flash_dmattn: 3 compilations\n[1/3] nvcc a.o\n[2/3] nvcc b.o\n"
    assert [stream.closed for stream in opened] == [True, True]


def test_the_terminal_is_written_to_inside_pip_alone(tmp_path):
    assert terminal.open_terminal({}, str(tmp_path / "screen")) is None
    assert terminal.open_terminal({terminal.IN_PIP: "setuptools"}, str(tmp_path / "none" / "screen")) is None
    terminal.open_terminal({terminal.IN_PIP: "setuptools"}, str(tmp_path / "screen")).close()


def test_the_package_knows_every_architecture():
    assert tuple(library.GPUS) == ARCHITECTURES


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FLASH_DMATTN_CUDA_ARCHS", "75"),
        ("FLASH_DMATTN_CUDA_ARCHS", "sm_90"),
        ("FLASH_DMATTN_HEAD_DIMS", "100"),
        ("FLASH_DMATTN_SKIP_CUDA_BUILD", "yes"),
        ("FLASH_DMATTN_FORCE_BUILD", "2"),
        ("MAX_JOBS", "0"),
        ("NVCC_THREADS", "-1"),
    ],
)
def test_a_value_without_meaning_is_refused_by_name(variable, value):
    with pytest.raises(ValueError, match=f"{variable} must be .*{re.escape(value)}"):
        read_settings({variable: value})


def test_skip_and_force_exclude_each_other():
    with pytest.raises(ValueError, match="must not both"):
        read_settings({"FLASH_DMATTN_SKIP_CUDA_BUILD": "1", "FLASH_DMATTN_FORCE_BUILD": "1"})


def test_jobs_and_threads_come_from_the_environment():
    settings = read_settings({"MAX_JOBS": "3", "NVCC_THREADS": "4"})
    assert (settings.max_jobs, settings.nvcc_threads) == (3, 4)
    assert read_settings({}).max_jobs >= 1 and read_settings({}).nvcc_threads == 1


def test_a_missing_nvcc_is_named(tmp_path):
    with pytest.raises(MissingTool, match="nvcc was not found"):
        find_toolkit({"PATH": str(tmp_path)})
    with pytest.raises(MissingTool, match=f"CUDA_HOME is {tmp_path}"):
        find_toolkit({"CUDA_HOME": str(tmp_path), "PATH": os.environ["PATH"]})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('print("Cuda compilation tools, release 11.8, V11.8.89")', "is older than CUDA 12.0, which the kernels need"),
        ('sys.exit("libfoo.so: cannot open")', "nvcc --version failed: libfoo.so: cannot open"),
    ],
)
def test_an_nvcc_that_cannot_serve_is_named(fake, line, words):
    nvcc = fake / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace('print("Cuda compilation tools, release 12.4, V12.4.99")', line))
    with pytest.raises(MissingTool, match=words):
        toolkit_of(fake)


def test_architectures_that_nvcc_lacks_are_dropped_and_named(fake, sources, tmp_path, capfd):
    toolkit = toolkit_of(fake)
    assert keep_supported(Settings(), toolkit) == (("80", "90", "100"), ("120",))
    build = build_library(Settings(), toolkit, tmp_path / "out", sources)
    assert build.architectures == ("80", "90", "100")
    assert "does not know sm_120; left out" in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="none of the wanted architectures sm_120"):
        build_library(Settings(architectures=("120",)), toolkit, tmp_path / "out", sources)


def test_code_for_hopper_goes_to_sm_90a_alone(fake, sources, tmp_path):
    build_library(Settings(**ONE_VARIANT), toolkit_of(fake), tmp_path / "out", sources)
    codes = {name: re.findall(r"code=(\w+)", line) for name, line in commands(fake).items()}
    assert codes["selection.o"] == codes["sm80_backward_d128_bf16.o"] == ["sm_80", "sm_90a", "sm_100"]
    assert codes["sm90_forward_d128_bf16.o"] == ["sm_90a"]
    units = list_units(Settings(**ONE_VARIANT), ("80", "100"), sources)
    assert [unit.name for unit in units] == ["library", "selection", "sm80_backward_d128_bf16"]


def test_an_instance_is_told_its_head_dim_and_dtype(fake, sources, tmp_path):
    settings = Settings(head_dims=("64", "128"), dtypes=("fp16",))
    build_library(settings, toolkit_of(fake), tmp_path / "out", sources)
    definitions = {name: re.findall(r"-D(\S+)", line) for name, line in commands(fake).items()}
    assert definitions["sm90_forward_d64_fp16.o"] == ["HEAD_DIM=64", "DTYPE=__half"]
    assert definitions["sm80_backward_d128_fp16.o"] == ["HEAD_DIM=128", "DTYPE=__half"]
    assert definitions["selection.o"] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_kernels_of_every_head_dim(architecture):
    names = {unit.name for unit in list_units(Settings(), (architecture,))}
    kernels = ["sm80_forward", "sm80_backward"] + ["sm90_forward", "sm90_backward"] * (architecture == "90")
    wanted = {f"{kernel}_d{d}_{t}" for kernel in kernels for d in HEAD_DIMS for t in Settings().dtypes}
    assert {name for name in names if name.startswith("sm")} == wanted


def test_the_library_finds_the_kernels_of_every_head_dim_that_is_built():
    cases = re.findall(r"case (\d+): return use\(Variant<Element, (\d+)>", (SOURCES / "common/variants.h").read_text())
    assert cases == [(head_dim, head_dim) for head_dim in HEAD_DIMS]


def test_variants_can_be_chosen(sources):
    names = [unit.name for unit in list_units(Settings(**ONE_VARIANT), ("90",), sources)]
    assert names == ["library", "selection", "sm80_backward_d128_bf16", "sm90_forward_d128_bf16"]


def test_only_what_changed_is_compiled_again(fake, sources, tmp_path):
    def build(**variants):
        build_library(Settings(**variants), toolkit_of(fake), tmp_path / "out", sources)
        return calls(fake)

    assert len(build(head_dims=("128",))) == 7
    assert build(head_dims=("128",)) == []
    (sources / "selection.cu").write_text("// another source")
    assert build(head_dims=("128",)) == [LIBRARY_NAME, "selection.o"]
    (sources / "api.h").write_text("// another header")
    assert build(head_dims=("128",)) == [LIBRARY_NAME, "library.o", "selection.o"]
    (sources / "sm90/forward/instance.cu").write_text("// another source")
    assert build(**ONE_VARIANT) == [LIBRARY_NAME, "sm90_forward_d128_bf16.o"]
    instances = ["sm80_backward_d64_bf16.o", "sm90_forward_d64_bf16.o"]
    assert build(head_dims=("64",), dtypes=("bf16",)) == [LIBRARY_NAME, "library.o", *instances]


def test_folders_may_have_names_that_a_shell_takes_apart(fake, sources, tmp_path, monkeypatch):
    folder = tmp_path / "it's $HOME"
    shutil.copytree(fake, folder / "cuda")
    shutil.copytree(sources, folder / "csrc")
    exports = folder / "exports.map"
    exports.write_text("{};")
    monkeypatch.setattr("cuda_build.library.EXPORTS", exports)
    build = build_library(Settings(), toolkit_of(folder / "cuda"), folder / "out", folder / "csrc")
    assert build.library.read_text() == "fake"
    assert f"--version-script={exports}" in (tmp_path / "calls.txt").read_text()
    calls(fake)
    build_library(Settings(), toolkit_of(folder / "cuda"), folder / "out", folder / "csrc")
    assert calls(fake) == []


def test_a_source_that_does_not_compile_fails_the_build(fake, sources, tmp_path, capfd):
    (sources / "selection.cu").write_text("broken")
    with pytest.raises(RuntimeError, match="could not be compiled"):
        build_library(Settings(), toolkit_of(fake), tmp_path / "out", sources)
    assert "fake nvcc: broken source" in capfd.readouterr().err


def pip_wheel(tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess, list[Path]]:
    """What building a wheel of the repository says and yields."""
    if Version(importlib.metadata.version("setuptools")) < Version("77"):
        pytest.skip("building without isolation needs setuptools >= 77")
    source, out = tmp_path / "source", tmp_path / "wheels"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "flash_dmattn_hf"):
        (source / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "kernels", source / "kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    done = subprocess.run(command, cwd=source, env={**clean, **environment}, capture_output=True, text=True)
    return done, list(out.glob("*.whl"))


def path_without_nvcc() -> str:
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not (Path(folder) / "nvcc").exists())


def test_a_wheel_with_the_library_is_for_one_platform_and_every_python(fake, tmp_path):
    done, (wheel,) = pip_wheel(tmp_path, CUDA_HOME=str(fake))
    assert done.returncode == 0
    assert re.fullmatch(r"flash_dmattn_hf-[\d.]+-py3-none-(?!any)\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.read(f"flash_dmattn/{LIBRARY_NAME}") == b"fake"
    assert not [name for name in names if name.endswith((".cu", ".h", ".o")) or "cuda_build" in name]
    assert re.search(r"\d+ compilations for sm_80, sm_90, sm_100 with \S+/nvcc", done.stdout + done.stderr)


@pytest.mark.parametrize("reason", ["no nvcc", "skip"])
def test_without_the_library_the_wheel_is_for_every_platform(fake, tmp_path, reason):
    if reason == "skip":
        done, (wheel,) = pip_wheel(tmp_path, CUDA_HOME=str(fake), FLASH_DMATTN_SKIP_CUDA_BUILD="1")
        assert "as asked by FLASH_DMATTN_SKIP_CUDA_BUILD" in done.stdout + done.stderr
    else:
        done, (wheel,) = pip_wheel(tmp_path, PATH=path_without_nvcc())
        assert "no CUDA library, nvcc was not found" in done.stdout + done.stderr
    assert done.returncode == 0 and wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


def test_a_forced_build_fails_without_nvcc(tmp_path):
    done, wheels = pip_wheel(tmp_path, PATH=path_without_nvcc(), FLASH_DMATTN_FORCE_BUILD="1")
    assert done.returncode != 0 and not wheels
    assert "nvcc was not found" in done.stdout + done.stderr


@pytest.mark.parametrize(("variable", "value"), [("FLASH_DMATTN_HEAD_DIMS", "128"), ("FLASH_DMATTN_DTYPES", "bf16")])
def test_a_package_is_not_built_with_some_of_the_kernels(monkeypatch, variable, value):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable}.* must not be set to install.*{value}"):
        plan_build("flash_dmattn")


def test_the_package_and_its_sources_agree_on_the_version():
    (version,) = re.findall(r"#define FLASH_DMATTN_ABI_VERSION (\d+)", (SOURCES / "api.h").read_text())
    assert int(version) == library.ABI_VERSION
    assert library.PATH.name == LIBRARY_NAME and library.PATH.parent == ROOT / "kernels" / "flash_dmattn"


@pytest.mark.parametrize(
    ("mirror", "header", "struct"),
    [
        (selection.SelectParameters, "selection.h", "flash_dmattn_select_params"),
        (lists.ListsParameters, "lists.h", "flash_dmattn_lists_params"),
        (parameters.ForwardParameters, "params.h", "flash_dmattn_forward_params"),
        (parameters.Sm90BackwardParameters, "params.h", "flash_dmattn_sm90_backward_params"),
        (parameters.Sm80BackwardParameters, "params.h", "flash_dmattn_sm80_backward_params"),
        (parameters.ForwardPlanParameters, "passes.h", "flash_dmattn_forward_plan"),
        (parameters.BackwardPlanParameters, "passes.h", "flash_dmattn_backward_plan"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parameters_are_laid_out_as_the_header_says(mirror, header, struct):
    assert list(mirror._fields_) == fields_of(header, struct)


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_addresses_are_packed_in_the_order_of_the_header(kind):
    packed = {"forward": parameters.FORWARD_TENSORS, "backward": parameters.BACKWARD_TENSORS}[kind]
    assert fields_of("passes.h", f"flash_dmattn_{kind}_tensors") == [(name, ctypes.c_void_p) for name in packed]


def fields_of(header: str, struct: str) -> list[tuple[str, type]]:
    """Returns the fields that a header gives a struct, as ctypes names them."""
    types = {
        "int32_t": ctypes.c_int32,
        "int64_t": ctypes.c_int64,
        "float": ctypes.c_float,
        "flash_dmattn_select_params": selection.SelectParameters,
        "flash_dmattn_lists_params": lists.ListsParameters,
        "flash_dmattn_forward_params": parameters.ForwardParameters,
        "flash_dmattn_sm90_backward_params": parameters.Sm90BackwardParameters,
        "flash_dmattn_sm80_backward_params": parameters.Sm80BackwardParameters,
    }
    text = re.sub(r"//.*", "", (SOURCES / header).read_text())
    (body,) = re.findall(rf"struct {struct} \{{(.*?)\}};", text, re.DOTALL)
    expected = []
    for declaration in body.split(";")[:-1]:
        kind, declared = re.fullmatch(r"\s*(?:const )?(\w+)\b(.*)", declaration, re.DOTALL).groups()
        for declarator in declared.split(","):
            star, name, count = re.fullmatch(r"\s*(\*?)\s*(\w+)(?:\[(\d)\])?", declarator).groups()
            field = ctypes.c_void_p if star else types[kind]
            expected.append((name, field * int(count) if count else field))
    return expected


def shared_library(folder: Path, code: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make a library with")
    (folder / "library.c").write_text(code)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "lib.so", folder / "library.c"], check=True)
    return folder / "lib.so"


@pytest.mark.parametrize(
    ("code", "version"),
    [("int flash_dmattn_abi_version(void) { return 999; }", "999"), ("int something_else;", "None")],
)
def test_a_library_of_another_version_is_refused(tmp_path, code, version):
    with pytest.raises(library.LibraryUnavailable, match=f"ABI version {version}, this package needs"):
        library._open(shared_library(tmp_path, code))


def test_a_missing_or_broken_library_is_explained(tmp_path):
    with pytest.raises(library.LibraryUnavailable, match="CUDA toolkit"):
        library._open(tmp_path / LIBRARY_NAME)
    (tmp_path / LIBRARY_NAME).write_text("no library")
    with pytest.raises(library.LibraryUnavailable, match="cannot be loaded"):
        library._open(tmp_path / LIBRARY_NAME)


COMPILER_OUTPUT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4scanPi' for 'sm_80'
ptxas info    : Function properties for _Z4scanPi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 364 bytes cmem[0]
ptxas info    : Compiling entry function '_Z4scanPi' for 'sm_90a'
ptxas info    : Function properties for _Z4scanPi
    16 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 2048 bytes smem
"""


def test_registers_and_spills_are_read_from_the_compiler():
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt to read symbols with")
    kernels = parse_compiler_output("selection", COMPILER_OUTPUT)
    assert [(k.name, k.architecture, k.registers, k.shared, k.spills) for k in kernels] == [
        ("scan", "80", 8, 0, 0),
        ("scan", "90a", 255, 2048, 24),
    ]
    assert "scan" in format_table(kernels, {"selection": 1.5})
    (regression,) = find_spill_regressions(kernels, "")
    assert "scan of selection for sm_90a spills 24 bytes, 0 are allowed" == regression
    assert find_spill_regressions(kernels, "selection 90a scan 24") == []
    assert find_spill_regressions(kernels, "selection 90a scan 23") != []


def test_allowed_spills_can_be_read():
    assert find_spill_regressions([], ALLOWED_SPILLS.read_text()) == []


def test_a_real_library_is_compiled_and_loads_and_says_what_it_lacks(tmp_path, monkeypatch):
    try:
        toolkit = find_toolkit()
    except MissingTool as error:
        pytest.skip(str(error))
    sources = tmp_path / "csrc"
    shutil.copytree(
        SOURCES, sources, ignore=shutil.ignore_patterns("selection.cu", "lists.cu", "passes.cu", "instance.cu")
    )
    settings = Settings(architectures=("80", "90"), **ONE_VARIANT)
    build = build_library(settings, toolkit, tmp_path / "out", sources)
    loaded = library._open(build.library)
    assert loaded.flash_dmattn_abi_version() == library.ABI_VERSION
    monkeypatch.setattr(library, "load", lambda: loaded)
    assert library.architectures.__wrapped__() == ("80", "90") and library.head_dims.__wrapped__() == (128,)
    for is_for_sm90a in (0, 1):
        assert loaded.flash_dmattn_forward_tile_rows(128, 1, is_for_sm90a) == 0, "no instance was compiled"
    assert loaded.flash_dmattn_sm80_backward_tile_rows(128, 1, 2**20) == 0
    needed = subprocess.run(["readelf", "-d", build.library], capture_output=True, text=True, check=True).stdout
    assert "cudart" not in needed and "torch" not in needed and "python" not in needed
