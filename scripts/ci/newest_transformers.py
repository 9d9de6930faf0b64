"""Print the newest version of transformers that pip finds for this interpreter, without installing anything."""

import json
import subprocess
import sys

ASK = ("install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-", "transformers")


def main() -> None:
    asked = subprocess.run([sys.executable, "-m", "pip", *ASK], stdout=subprocess.PIPE, text=True)
    if asked.returncode:
        sys.exit(asked.returncode)
    (found,) = json.loads(asked.stdout)["install"]
    print(found["metadata"]["version"])


if __name__ == "__main__":
    main()
