"""Check that the transformers on the path is the expected one and that the environment meets its requirements.

Usage: check_transformers.py VERSION FOLDER. Exits with a sentence when it is another version, comes from another
folder, or needs a package version that is not installed. check_transformers.py --unmet prints these requirements.
"""

import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement


def unmet_requirements(package: str) -> dict[str, str]:
    """Requirements of `package`, extras left out, that the installed packages do not meet -> what is installed."""
    unmet = {}
    for requirement in map(Requirement, requires(package) or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = None
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            unmet[f"{requirement.name}{requirement.specifier}"] = installed or "none"
    return unmet


def main() -> None:
    unmet = unmet_requirements("transformers")
    if sys.argv[1:] == ["--unmet"]:
        sys.stdout.writelines(f"{requirement}\n" for requirement in unmet)
        return
    import transformers  # which raises if a requirement is not met

    expected, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    found = Path(transformers.__file__).resolve().parent.parent
    if (transformers.__version__, found) != (expected, folder) or version("transformers") != expected:
        sys.exit(f"transformers must be {expected} from {folder}, got {transformers.__version__} from {found}")
    if unmet:
        needs = "; ".join(f"{requirement}, got {installed}" for requirement, installed in unmet.items())
        sys.exit(f"transformers {expected} needs {needs}")


if __name__ == "__main__":
    main()
