"""Check that the transformers on the path is the expected one and that the environment meets its requirements.

Usage: check_transformers.py VERSION FOLDER. Exits with a sentence when it is another version, comes from another
folder, or needs a package version that is not installed.
"""

import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import transformers
from packaging.requirements import Requirement


def unmet_requirements(package: str) -> list[str]:
    """Requirements of `package`, extras left out, that the installed packages do not meet."""
    unmet = []
    for requirement in map(Requirement, requires(package) or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = None
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            unmet.append(f"{requirement}, got {installed or 'none'}")
    return unmet


def main() -> None:
    expected, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    found = Path(transformers.__file__).resolve().parent.parent
    if (transformers.__version__, found) != (expected, folder) or version("transformers") != expected:
        sys.exit(f"transformers must be {expected} from {folder}, got {transformers.__version__} from {found}")
    if unmet := unmet_requirements("transformers"):
        sys.exit(f"transformers {expected} needs " + "; ".join(unmet))


if __name__ == "__main__":
    main()
