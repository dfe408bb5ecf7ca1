"""Runs the core of the suite and the demo in other releases of transformers, peft and torch than the pinned ones.

    python -m tests.matrix                        the oldest allowed, the pinned and the newest of each
    python -m tests.matrix transformers==5.20.2   these only
    python -m tests.matrix --short                the newest transformers and peft together, as .ci/run does
    --page docs/releases.md                       writes the table there, too

A release gets an environment under build/matrix. It holds this release and what pip changes for it; it sees all else in
the environment that runs this module, through a .pth file. The checks are tests/test_releases.py, TRL's trainer and
`onecard demo`.

A release inside the ranges of pyproject.toml reaches users: one failure there fails the run. A newer release is outside
the ranges and reaches nobody. Its failure is printed, and the run goes on; to raise the range, let its row pass first.
Without a package index the short form says so and does not fail. It leaves torch out, whose wheels have gigabytes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "matrix"
PACKAGES = ("transformers", "peft", "torch")
CHECKS = {
    "logits": "test_logits",
    "generate with a cache": "test_generate",
    "chat and server": "test_context",
    "train": "test_train",
    "TRL": "test_sft_trainer",
    "save": "test_save",
    "merge": "test_merge",
}
TESTS = ["tests/test_releases.py", "tests/hf/test_trainers.py::test_sft_trainer"]
TIME_LIMIT_SECONDS = 1500
HEAD = """# Releases

The core of the suite and `onecard demo` (share of held-out messages answered exactly) in each release:
`python -m tests.matrix --page docs/releases.md RELEASE...`. What is not named in a row is as pinned in constraints.txt.

"""


def allowed(package: str) -> Requirement:
    """The package's range in pyproject.toml."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return next(found for found in map(Requirement, lines) if found.name == package)


def pinned(package: str) -> Version:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(Version(line.partition("==")[2]) for line in lines if line.startswith(f"{package}=="))


def released(package: str) -> list[Version]:
    """The index's final releases, oldest first; none if it can't be reached."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    found = re.search(r"Available versions: (.*)", subprocess.run(command, capture_output=True, text=True).stdout)
    versions = map(Version, found[1].split(", ")) if found else []
    return sorted(version for version in versions if version.local is None)


def candidates(package: str) -> list[Version]:
    """The oldest allowed, the pinned, the newest allowed and the newest release."""
    found = released(package)
    inside = [version for version in found if version in allowed(package).specifier]
    return sorted({inside[0], pinned(package), inside[-1], found[-1]}) if inside else []


def newest_sets() -> list[list[str]]:
    """The newest allowed transformers and peft together, and the newest of all where these are others."""
    found = {package: candidates(package) for package in ("transformers", "peft")}
    if not all(found.values()):
        return []
    inside = {p: max(v for v in versions if v in allowed(p).specifier) for p, versions in found.items()}
    sets = [inside, {package: versions[-1] for package, versions in found.items()}]
    named = [[f"{package}=={version}" for package, version in chosen.items()] for chosen in sets]
    return named[:1] if named[0] == named[1] else named


def is_allowed(release: list[str]) -> bool:
    asked = map(Requirement, release)
    return all(allowed(one.name).specifier.contains(str(one.specifier).removeprefix("==")) for one in asked)


def environment(release: list[str]) -> Path:
    """The folder of an environment that has the release; made if there is none for the present pins.

    Raises:
        RuntimeError: pip did not install it; with pip's last line.
    """
    folder = FOLDER / "_".join(release).replace("==", "-")
    installed, pins = folder / "installed.txt", (ROOT / "constraints.txt").read_text()
    if installed.exists() and installed.read_text() == pins:
        return folder
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    (own / "installed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *release]
    result = subprocess.run(command, capture_output=True, text=True, env=plain_environment())
    if result.returncode:
        raise RuntimeError((result.stderr.strip() or "pip failed").splitlines()[-1])
    installed.write_text(pins)
    return folder


def plain_environment() -> dict[str, str]:
    """This process's, in which the code under test is this folder's and nothing asks a hub."""
    more = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **more}


def run_in(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    python = str(folder / "bin" / "python")
    settings = {"cwd": ROOT, "env": plain_environment(), "capture_output": True, "text": True}
    try:
        return subprocess.run([python, "-m", *command], timeout=TIME_LIMIT_SECONDS, **settings)
    except subprocess.TimeoutExpired as error:
        return subprocess.CompletedProcess(error.cmd, 1, "", f"no end within {TIME_LIMIT_SECONDS} s")


def demo_accuracy(folder: Path) -> str:
    """Its line on held-out messages, or why there is none."""
    with tempfile.TemporaryDirectory() as output:
        result = run_in(folder, "onecard.cli", "demo", "--output", output)
    found = re.search(r"([\d.]+%) before, ([\d.]+%) after", result.stdout)
    if result.returncode or not found:
        print((result.stdout + result.stderr)[-2000:])
    return f"{'FAILED ' if result.returncode or not found else ''}{found[2] if found else ''}".strip()


def test_results(folder: Path) -> dict[str, str]:
    """check -> "ok" or how many of its tests failed."""
    file = folder / "tests.xml"
    file.unlink(missing_ok=True)
    result = run_in(folder, "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={file}", *TESTS)
    cases = ElementTree.parse(file).getroot().iter("testcase") if file.exists() else ()
    outcomes: dict[str, list[bool]] = {name: [] for name in CHECKS.values()}
    for case in cases:
        bad = any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
        outcomes.setdefault(str(case.get("name")).partition("[")[0], []).append(not bad)
    if result.returncode:
        print((result.stdout + result.stderr)[-4000:])
    return {check: told(outcomes[name]) for check, name in CHECKS.items()}


def told(passed: list[bool]) -> str:
    if not passed:
        return "FAILED: not run"
    return "ok" if all(passed) else f"FAILED {passed.count(False)} of {len(passed)}"


def row(release: list[str]) -> dict[str, str]:
    """What the release gives, a cell a check."""
    start, first = time.perf_counter(), {"release": " ".join(release).replace("==", " ")}
    try:
        folder = environment(release)
    except RuntimeError as error:
        return {**first, "demo": f"FAILED to install: {error}", **dict.fromkeys(CHECKS, "-")}
    cells = {**first, "demo": demo_accuracy(folder), **test_results(folder)}
    print(f"{cells['release']}: {time.perf_counter() - start:.0f} s", flush=True)
    return cells


def table(rows: list[dict[str, str]]) -> str:
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *[list(cells.values()) for cells in rows]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", metavar="package==version")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    if options.releases:
        releases = [[release] for release in options.releases]
    elif options.short:
        releases = newest_sets()
    else:
        releases = [[f"{package}=={version}"] for package in PACKAGES for version in candidates(package)]
    if not releases:
        print("RELEASES NOT TESTED: the package index can't be reached")
        return 0 if options.short else 1
    rows = [row(release) for release in releases]
    failed = [release for release, cells in zip(releases, rows) if any("FAILED" in cell for cell in cells.values())]
    for release in failed:
        name = "allowed by pyproject.toml" if is_allowed(release) else "NEWER THAN pyproject.toml ALLOWS"
        print(f"FAILED: {' '.join(release)}, {name}")
    print(table(rows), end="")
    if options.page:
        options.page.write_text(HEAD + table(rows))
    return int(any(map(is_allowed, failed)))


if __name__ == "__main__":
    sys.exit(main())
