"""The start-up hook: imports flash_dmattn_hf when, and only when, a process imports transformers.modeling_utils.

`flash-dmattn enable` copies this file into site-packages, with a .pth file that imports the copy whenever Python
starts. So it stands alone, imports nothing that Python has not loaded by then, and lets no exception out.
"""

import sys

MODULE = "transformers.modeling_utils"
PACKAGE = "flash_dmattn_hf"
NEEDED = ("transformers", "peft", "accelerate")
"""What the package imports: it cannot while these are half imported themselves."""


class Watch:
    """Finder that notices the import of `MODULE` and then activates the package as soon as that is possible."""

    def __init__(self):
        self.pending = None
        self.replaced = {}
        self.is_activating = False
        self.done = False

    def find_spec(self, name, path=None, target=None):
        """Part of Python's import; finds `MODULE` alone.

        The watch stays in sys.meta_path when it is done: Python walks through that list, and would skip a finder.
        """
        if self.done or self.is_activating:
            return None
        try:
            if name == MODULE and self.pending is None:
                return self.find_module(name, path, target)
            if self.pending is not None and not any(spec._initializing for spec in self.pending):
                self.activate()
        except Exception as error:
            self.give_up(error)
        return None

    def find_module(self, name, path, target):
        """Returns what the finders behind the watch find, with a loader that tells the watch."""
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = Loader(spec.loader, self)
                return spec
        return None

    def notice(self, module):
        """Activates the package, or waits while modules that it needs are being imported."""
        try:
            if PACKAGE in sys.modules:
                return self.stop()
            specs = [
                getattr(other, "__spec__", None)
                for name, other in list(sys.modules.items())
                if name.partition(".")[0] in NEEDED and name != MODULE
            ]
            self.pending = [spec for spec in specs if getattr(spec, "_initializing", False)]
            if not self.pending:
                return self.activate()
            self.replace_methods(module.PreTrainedModel)
        except Exception as error:
            self.give_up(error)

    def replace_methods(self, model_class):
        """Lets the first model that is made or loaded activate the package, if no import has done so before."""
        make, load = vars(model_class)["__init__"], vars(model_class)["from_pretrained"]

        def __init__(model, *args, **kwargs):
            self.latest(model_class, "__init__", make).__get__(model)(*args, **kwargs)

        def from_pretrained(cls, *args, **kwargs):
            return self.latest(model_class, "from_pretrained", load).__get__(None, cls)(*args, **kwargs)

        __init__.__wrapped__, from_pretrained.__wrapped__ = make, load.__func__
        __init__.__doc__, from_pretrained.__doc__ = make.__doc__, load.__doc__
        for name, ours, original in (
            ("__init__", __init__, make),
            ("from_pretrained", classmethod(from_pretrained), load),
        ):
            self.replaced[model_class, name] = ours, original
            setattr(model_class, name, ours)

    def latest(self, owner, name, original):
        """Activates the package; returns the method that a call of ours stands for.

        That is what the class has after that, unless the call came through something that wraps ours.
        """
        ours = self.replaced[owner, name][0]
        is_outermost = not self.done and vars(owner).get(name) is ours
        self.activate()
        method = vars(owner)[name]
        return method if is_outermost and method is not ours else original

    def stop(self):
        """Puts back what is still as it was changed."""
        self.done = True
        for (owner, name), (ours, original) in self.replaced.items():
            if vars(owner).get(name) is ours:
                setattr(owner, name, original)

    def activate(self):
        """Imports the package; a failure is a warning, and transformers then works as without it.

        A thread that makes a model while another one imports the package waits for that here, as Python's import does,
        so what was changed is put back last.
        """
        if self.done:
            return
        self.is_activating = True
        try:
            package = __import__(PACKAGE)
            if not getattr(package.__spec__, "_initializing", False):
                self.stop()
        except Exception as error:
            self.give_up(error)
        finally:
            self.is_activating = False

    def give_up(self, error):
        """Says why the package is not imported, as a warning; on stderr where warnings are errors."""
        self.stop()
        message = (
            f"the start-up hook of flash_dmattn could not import {PACKAGE}: {type(error).__name__}: {error}. "
            f"FLASH_DMATTN_DISABLE_HOOK=1 turns the hook off; without the package, delete {__file__} and "
            "flash_dmattn_hook.pth beside it"
        )
        for say in (warn, print_to_stderr):
            try:
                return say(message)
            except Exception:  # warnings are errors, or stderr is closed
                continue


def warn(message):
    """Warns of what the watch could not do."""
    import warnings

    warnings.warn(message, stacklevel=3)


def print_to_stderr(message):
    """Says what a warning may not say."""
    if sys.stderr is not None:
        print(message, file=sys.stderr)


class Loader:
    """The loader of `MODULE`, which tells the watch when it is done."""

    def __init__(self, loader, watch):
        self.loader, self.watch = loader, watch

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def create_module(self, spec):
        """Part of Python's import."""
        return self.loader.create_module(spec)

    def exec_module(self, module):
        """Part of Python's import."""
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.watch.notice(module)


def install():
    """Begins to watch this process, once: Python may read a .pth file twice, or find one in two folders."""
    if MODULE not in sys.modules and not any(isinstance(finder, Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, Watch())
