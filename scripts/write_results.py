"""Writes the figures of speed in README.md and docs/results.md from result files, so that nobody copies them by hand.

    python scripts/write_results.py                     from docs/benchmarks, as the pages say
    python scripts/write_results.py --suite FOLDER      takes over what benchmark_suite.py left in FOLDER, first;
                                                        other benchmarks' files in it as well
    python scripts/write_results.py --check             only says whether the pages are up to date

A page holds blocks between "<!-- figures: NAME GPU -->" and "<!-- end of figures -->". results_tables.py has the NAMEs,
and docs/benchmarks/PART_GPU.json are the files that it is written from. With --suite a block changes to the suite's GPU
once all its parts were measured there. "none" stands for a block that was not measured yet.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

from benchmark_report import REPOSITORY, gpu_name, load_json, save_json
from results_tables import PARTS, WRITERS, Results

RESULTS = REPOSITORY / "docs" / "benchmarks"
PAGES = (REPOSITORY / "README.md", REPOSITORY / "docs" / "results.md")
BLOCK = re.compile(r"(<!-- figures: )(\w+) (\w+)( -->\n).*?(<!-- end of figures -->)", re.DOTALL)
NOT_MEASURED = "none"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, metavar="FOLDER", help="results to take over, all of one GPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of result files")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    arguments = parser.parse_args()

    gpu = None if arguments.suite is None else take_over(arguments.suite, arguments.results)
    outdated = []
    for page in arguments.pages:
        text = page.read_text()
        written = rewrite(text, arguments.results, "docs/" if page.name == "README.md" else "", gpu)
        if written != text:
            outdated.append(page.name)
            if not arguments.check:
                page.write_text(written)
    print(f"{'outdated' if arguments.check else 'rewritten'}: {', '.join(outdated) or 'nothing'}")
    return 1 if arguments.check and outdated else 0


def take_over(suite: Path, results: Path) -> str:
    """Copies what a suite measured to the result files of its GPU. Returns the name of that GPU.

    The paths that a benchmark was told to write to are left out of its settings: they say nothing about its figures.
    """
    reports = {path: load_json(path) for path in sorted(suite.glob("*.json"))}
    gpus = {gpu_name(report.get("environment", report)["device"]) for report in reports.values()}
    if len(gpus) != 1 or "cpu" in gpus:
        sys.exit(f"error: {suite} must hold results of one GPU, not of {', '.join(sorted(gpus)) or 'none'}")
    (gpu,) = gpus
    for path, report in reports.items():
        for option in ("json", "png"):
            report.get("settings", {}).pop(option, None)
        save_json(results / f"{path.stem}_{gpu}.json", report)
        picture = path.with_suffix(".png")
        if picture.exists():
            shutil.copyfile(picture, results / f"{path.stem}_{gpu}.png")
    return gpu


def rewrite(text: str, results: Path, prefix: str, gpu: str | None = None) -> str:
    """Returns a page with its blocks written anew.

    prefix: of links to docs/benchmarks. gpu: that the blocks change to if all their parts were measured on it.
    """

    def block(match: re.Match) -> str:
        opening, name, old_gpu, closing, end = match.groups()
        is_there = gpu is not None and all((results / f"{part}_{gpu}.json").exists() for part in PARTS[name])
        chosen = gpu if is_there else old_gpu
        body = "Not measured yet."
        if chosen != NOT_MEASURED:
            files = [Results(results, part, chosen, prefix) for part in PARTS[name]]
            body = WRITERS[name](*files)
        return f"{opening}{name} {chosen}{closing}{body}\n{end}"

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    sys.exit(main())
