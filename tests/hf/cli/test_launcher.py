"""`flash-dmattn run` runs a program as if it were called by itself; the start-up hook imports us only where needed."""

import inspect
import os
import signal
import subprocess
import sys
import sysconfig
from importlib.util import cache_from_source
from pathlib import Path

import pytest

from flash_dmattn_hf.cli import enable, main
from flash_dmattn_hf.cli.launch import launch

PROGRAM = "import sys; print(sys.argv[1:], 'flash_dmattn_hf' in sys.modules, __name__); sys.exit(7)"


@pytest.fixture(autouse=True)
def arguments(monkeypatch):
    """Puts sys.argv and sys.path back."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))


def run(*argv):
    with pytest.raises(SystemExit) as done:
        main(["run", *argv])
    return done.value.code


def test_a_file(tmp_path, capsys):
    (tmp_path / "program.py").write_text(PROGRAM)
    assert run(str(tmp_path / "program.py"), "--debug", "-h") == 7
    assert capsys.readouterr().out == "['--debug', '-h'] True __main__\n"


def test_a_module(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("program_of_launcher.py").write_text(PROGRAM)
    assert run("-m", "program_of_launcher", "a") == 7
    assert capsys.readouterr().out == "['a'] True __main__\n"


def test_a_file_may_change_its_folder(tmp_path, capsys, monkeypatch):
    (tmp_path / "sibling_of_launcher.py").write_text("")
    (tmp_path / "program.py").write_text(
        "import os; os.chdir('..'); import sibling_of_launcher; print(os.path.isabs(__file__))"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["run", "program.py"]) == 0
    assert capsys.readouterr().out == "True\n"


@pytest.mark.parametrize("program", [["program.py"], ["-m", "program"]], ids=["file", "module"])
def test_a_safe_path_stays_safe(tmp_path, program):
    (tmp_path / "program.py").write_text("import sys; print(sys.path[0])")
    file = inspect.getfile(launch)  # the package around it takes seconds to import
    command = f"import runpy, sys; sys.path.append('.'); runpy.run_path({file!r})['launch'](sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", command, *program],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    is_safe = sys.version_info >= (3, 11)
    assert (done.stdout.strip() != str(tmp_path)) == is_safe


def test_a_console_script(capsys):
    assert run("pytest", "--version") == 0
    assert "pytest" in capsys.readouterr().out


def test_a_script_without_an_entry_point(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "tool").write_text(f"#!/usr/bin/env python\n{PROGRAM}")
    (tmp_path / "binary").write_text("#!/bin/sh\n")
    assert run("tool", "b") == 7
    assert capsys.readouterr().out.startswith("['b'] True")
    assert launch(["binary"]) == 2


def test_a_program_that_ends_is_a_success(tmp_path):
    (tmp_path / "program.py").write_text("")
    assert main(["run", str(tmp_path / "program.py")]) == 0


def test_a_failure_passes_through(tmp_path):
    (tmp_path / "program.py").write_text("raise KeyError('mine')")
    with pytest.raises(KeyError, match="mine"):
        main(["run", str(tmp_path / "program.py")])


@pytest.mark.parametrize("argv", [["no-such-program"], ["nothing.py"], ["-m"]])
def test_what_is_no_program_is_refused(argv, capsys):
    assert main(["run", *argv]) == 2
    message = capsys.readouterr().err
    assert message.startswith("flash-dmattn run: error: COMMAND must be a console script of this environment, -m")
    assert message.endswith(f", got {argv[0]}\n")


def test_help(capsys):
    assert main(["run", "--help"]) == 0
    assert "usage: flash-dmattn run COMMAND" in capsys.readouterr().out
    assert main(["run"]) == 2


def test_signals_reach_the_program(tmp_path):
    lines = ["import signal, sys", "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))"]
    lines += ["print('ready', flush=True)", "signal.pause()"]
    (tmp_path / "program.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "flash_dmattn_hf.cli", "run", str(tmp_path / "program.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 9


FAKES = {
    "transformers/__init__.py": "",
    "transformers/modeling_utils.py": """
class PreTrainedModel:
    def __init__(self, x=0): self.x = x
    @classmethod
    def from_pretrained(cls, x): return cls(x)
ORIGINAL = PreTrainedModel.__init__
""",
    "transformers/model.py": """
from transformers.modeling_utils import PreTrainedModel
import sys
print("early" if "flash_dmattn_hf" in sys.modules else "waits")
class Model(PreTrainedModel):
    @classmethod
    def from_pretrained(cls, x): return super().from_pretrained(x + 1)
""",
    "other.py": "",
    "flash_dmattn_hf.py": "from transformers.model import Model; print('imported')",
}
"""Packages that import each other as the real ones do."""


@pytest.fixture
def python(tmp_path, monkeypatch, capsys):
    """Runs a program in a Python whose site-packages have the hook, and fake packages; returns what it prints."""
    site = tmp_path / "site"
    for name, text in FAKES.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(site))
    assert main(["enable"]) == 0 and enable.is_enabled()
    assert f"enabled: {site / enable.PTH}" in capsys.readouterr().out

    def run(program, code=0, **environment):
        start = f"import site, sys; site.addsitedir({str(site)!r})\n"
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, "-I", "-S", "-c", start + program]
        done = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    run.site = site
    return run


CHECK = "; print('flash_dmattn_hf' in sys.modules, [f.done for f in sys.meta_path if type(f).__name__ == 'Watch'])"


def test_the_hook_imports_us_with_the_models(python):
    assert python("import transformers.modeling_utils" + CHECK) == "early\nimported\nTrue [True]\n"


def test_the_hook_imports_nothing_without_the_models(python):
    assert python("import transformers" + CHECK) == "False [False]\n"


def test_the_hook_waits_while_a_model_is_half_imported_until_the_next_import(python):
    assert python("import transformers.model; import other" + CHECK) == "waits\nimported\nTrue [True]\n"


@pytest.mark.parametrize(("make", "x"), [("Model(3)", 3), ("Model.from_pretrained(3)", 4)])
def test_the_hook_waits_until_a_model_is_made(python, make, x):
    program = f"from transformers.model import Model; print('flash_dmattn_hf' in sys.modules); print({make}.x)\n"
    program += "import transformers.modeling_utils as m; print(m.PreTrainedModel.__init__ is m.ORIGINAL)"
    assert python(program) == f"waits\nFalse\nimported\n{x}\nTrue\n"


@pytest.mark.parametrize("first", ["from transformers.model import Model", "import transformers.modeling_utils"])
def test_the_hook_hides_no_finder(python, first):
    finder = "class Finder:\n    def find_spec(*args): names.append(args[1])\n"
    program = f"names = []\n{finder}sys.meta_path.insert(1, Finder())\n{first}\nimport other\n"
    program += "print({'transformers.modeling_utils', 'other'} <= set(names))"
    assert python(program).endswith("True\n")


FINDER = """
from importlib.machinery import PathFinder
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "transformers.modeling_utils":
            print("asked")
            return PathFinder.find_spec(name, path)
sys.meta_path.insert(1, Finder())
"""


def test_the_hook_asks_other_finders_for_the_models(python):
    assert python(FINDER + "import transformers.modeling_utils" + CHECK) == "asked\nearly\nimported\nTrue [True]\n"


PATCHES = ["patched = Class.__init__", "patched = wrap(Class.__init__); Class.__init__ = patched"]


@pytest.mark.parametrize("patch", PATCHES, ids=["of nothing", "around ours"])
def test_the_hook_survives_patches_that_are_put_back(python, patch):
    program = "from transformers.model import Model, PreTrainedModel as Class\n"
    program += "def wrap(f): return lambda self, x: f(self, x + 10)\n"
    program += f"{patch}\nimport other\nprint(Class.__init__ is patched)\nClass.__init__ = patched\nprint(Model(3).x)"
    expected = "True\n13\n" if "wrap" in patch else "False\n3\n"
    assert python(program) == "waits\nimported\n" + expected


def test_a_model_made_through_a_wrap_of_the_hook_activates(python):
    program = "from transformers.model import Model, PreTrainedModel as Class\nours = Class.__init__\n"
    program += "Class.__init__ = lambda self, x: ours(self, x + 10)\nprint(Model(3).x, Model(4).x)"
    assert python(program) == "waits\nimported\n13 14\n"


SLOW = """
import time
from transformers.model import PreTrainedModel as Class
time.sleep(0.5)
make = Class.__init__
def __init__(self, x=0):
    make(self, x)
    self.is_ours = True
Class.__init__ = __init__
"""


def test_a_model_of_another_thread_waits_until_we_are_imported(python):
    (python.site / "flash_dmattn_hf.py").write_text(SLOW)
    program = "import sys, threading, time\nfrom transformers.model import Model\n"
    program += "thread = threading.Thread(target=Model, args=(1,))\nthread.start()\n"
    program += "while 'flash_dmattn_hf' not in sys.modules: time.sleep(0.01)\nprint(hasattr(Model(2), 'is_ours'))"
    assert python(program) == "waits\nTrue\n"


def test_the_hook_watches_once_where_python_reads_it_twice(python):
    program = f"site.addsitedir({str(python.site)!r})\nimport transformers"
    assert python(program + CHECK) == "False [False]\n"


def test_the_hook_passes_by_finders_of_old_packages(python):
    finder = "class Old:\n    find_module = lambda *args: None\nsys.meta_path.insert(1, Old())\n"
    assert python(finder + "import transformers.modeling_utils" + CHECK) == "early\nimported\nTrue [True]\n"


def test_an_error_of_the_hook_stays_inside(python):
    (python.site / "transformers/modeling_utils.py").write_text("x = 1")
    (python.site / "transformers/model.py").write_text("from transformers.modeling_utils import x; print(x)")
    said = python("import warnings; warnings.simplefilter('error'); import transformers.model, other")
    assert said.startswith("1\nthe start-up hook of flash_dmattn could not import flash_dmattn_hf: AttributeError")


def test_the_hook_leaves_an_import_of_ours_alone(python):
    assert python("import flash_dmattn_hf" + CHECK) == "early\nimported\nTrue [True]\n"


def test_the_hook_is_off_when_told(python):
    said = python("import transformers.modeling_utils" + CHECK, FLASH_DMATTN_DISABLE_HOOK="1")
    assert said == "False []\n"


@pytest.mark.parametrize("broken", ["raise RuntimeError('no')", None], ids=["fails", "gone"])
def test_a_package_that_cannot_be_imported_is_a_warning(python, broken):
    package = python.site / "flash_dmattn_hf.py"
    package.write_text(broken) if broken else package.unlink()
    said = python("from transformers.model import Model; print(Model(3).x)")
    assert said.startswith("waits\n3\n") and "FLASH_DMATTN_DISABLE_HOOK=1 turns the hook off" in said


def test_a_closed_stderr_lets_no_failure_out(python):
    (python.site / "flash_dmattn_hf.py").unlink()
    program = "sys.stderr.close(); from transformers.model import Model; print(Model(3).x)"
    assert python(program) == "waits\n3\n"


@pytest.mark.parametrize("broken", ["this is no Python", "raise SystemError", None])
def test_a_broken_hook_does_not_stop_python(python, broken):
    hook = python.site / enable.MODULE
    hook.write_text(broken) if broken else hook.unlink()
    assert python("print('started')") == "started\n"


def test_the_hook_takes_less_than_a_millisecond(python):
    program = "import time; start = time.process_time()\nimport _flash_dmattn_hook as h; h.install()\n"
    program = program.replace("import _flash", "sys.modules.pop('_flash_dmattn_hook')\nimport _flash")
    program += "print(time.process_time() - start)"
    assert min(float(python(program)) for _ in range(3)) < 1e-3


def test_disable_removes_the_hook(python, capsys):
    assert main(["disable"]) == 0 and not enable.is_enabled()
    assert not (python.site / enable.MODULE).exists()
    assert main(["disable"]) == 0
    assert "was not enabled" in capsys.readouterr().out
    assert python("import transformers.modeling_utils" + CHECK) == "False []\n"


def test_enable_writes_whole_files(python, monkeypatch):
    (python.site / enable.MODULE).write_text("x = 1")

    def write_half(path, text, *args, **kwargs):
        path.write_bytes(text.encode()[: len(text) // 2])
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_text", write_half)
    assert main(["enable"]) == 2
    assert (python.site / enable.MODULE).read_text() == "x = 1"
    assert {path.name for path in python.site.iterdir() if "hook" in path.name} == {enable.MODULE, enable.PTH}


def test_programs_that_may_not_write_bytecode_find_it(python):
    assert Path(cache_from_source(str(python.site / enable.MODULE))).is_file()
    assert main(["disable"]) == 0
    assert not [path for path in python.site.rglob("*") if "hook" in path.name]


def test_what_info_says_of_the_hook(python, monkeypatch):
    assert enable.describe() == "enabled"
    monkeypatch.setenv(enable.DISABLING_VARIABLE, "1")
    assert enable.describe() == "enabled, but FLASH_DMATTN_DISABLE_HOOK=1 turns it off here"
    monkeypatch.delenv(enable.DISABLING_VARIABLE)
    (python.site / enable.MODULE).write_text("x = 1")
    assert "not as this version writes it" in enable.describe()
    (python.site / enable.MODULE).unlink()
    assert "_flash_dmattn_hook.py is missing" in enable.describe() and not enable.is_enabled()
    assert main(["disable"]) == 0 and enable.describe() == "not enabled"


def test_the_hook_with_transformers_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert main(["enable"]) == 0
    program = (
        f"import site, sys; site.addsitedir({str(tmp_path)!r})\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "sizes = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)\n"
        "model = LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation='flash_dmattn')\n"
        "print(type(model.model.layers[0].self_attn.dma).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ImportanceGate\n"
