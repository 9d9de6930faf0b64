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

    def find_spec(self, name, path=None, target=None):
        """Part of Python's import; finds `MODULE` alone."""
        if name == MODULE and self.pending is None:
            from importlib.machinery import PathFinder

            spec = PathFinder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = Loader(spec.loader, self)
            return spec
        if self.pending is not None and not any(spec._initializing for spec in self.pending):
            self.activate()
        return None

    def notice(self, module):
        """Activates the package, or waits while modules that it needs are being imported."""
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

    def replace_methods(self, model_class):
        """Lets the first model that is made or loaded activate the package, if no import has done so before."""
        make, load = model_class.__init__, vars(model_class)["from_pretrained"]
        self.replaced = {(model_class, "__init__"): make, (model_class, "from_pretrained"): load}

        def __init__(model, *args, **kwargs):
            self.activate()
            model_class.__init__(model, *args, **kwargs)

        def from_pretrained(cls, *args, **kwargs):
            self.activate()
            return model_class.from_pretrained.__func__(cls, *args, **kwargs)

        __init__.__wrapped__, from_pretrained.__wrapped__ = make, load.__func__
        model_class.__init__, model_class.from_pretrained = __init__, classmethod(from_pretrained)

    def stop(self):
        """Puts back everything that was changed."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for (owner, name), original in self.replaced.items():
            setattr(owner, name, original)
        self.replaced = {}

    def activate(self):
        """Imports the package; a failure is a warning, and transformers then works as without it."""
        self.stop()
        if PACKAGE in sys.modules:
            return
        try:
            __import__(PACKAGE)
        except Exception as error:
            import warnings

            warnings.warn(
                f"the start-up hook of flash_dmattn could not import {PACKAGE}: {type(error).__name__}: {error}. "
                f"FLASH_DMATTN_DISABLE_HOOK=1 turns the hook off; without the package, delete {__file__} and "
                "flash_dmattn_hook.pth beside it",
                stacklevel=2,
            )


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
    """Begins to watch this process."""
    if MODULE not in sys.modules:
        sys.meta_path.insert(0, Watch())
