"""What it takes to look at a run on a machine without PyTorch: megabytes installed, seconds to the first finding.

Builds a wheel, installs it with nothing but the core's dependencies into a fresh environment, diagnoses a run of
100,000 tokens there, and writes docs/results/light-install.json and .md:

    python benchmarks/light_install.py --out runs/light-install
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from made_run import SMALL, make

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
TOKENS, LARGEST_MB, LONGEST_S = 100_000, 350, 20
TOOLS = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence.pth")  # a fresh environment's


def megabytes(path: Path) -> float:
    """Size of a file or of all files in a folder, in millions of bytes."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    return sum(file.stat().st_size for file in files) / 1e6


def install(out: Path) -> tuple[Path, str]:
    """A fresh environment with the wheel of this tree in it; its Python, and the wheel's name."""
    shutil.rmtree(out, ignore_errors=True)
    run = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run(run, check=True)
    (wheel,) = out.glob("kedge-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(out / "venv")], check=True)
    python = out / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", str(wheel)], check=True)
    return python, wheel.name


def sizes(python: Path) -> dict[str, float]:
    """Megabytes of each package that was installed, the largest first, without what a fresh environment holds."""
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    place = Path(subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    found: dict[str, float] = {}
    for path in place.iterdir():
        name = path.name.split("-")[0].removesuffix(".libs").removesuffix(".py")
        if name not in TOOLS:
            found[name] = found.get(name, 0.0) + megabytes(path)
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def first_finding(python: Path, run: Path) -> dict[str, float]:
    """Seconds from the start of `kedge diagnose` to its first line, and of the whole command."""
    command = [str(python.parent / "kedge"), "diagnose", str(run), "--no-html"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        first = time.monotonic() - began
        child.stdout.read()
    whole, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if child.returncode not in (0, 1) or "policy steps" not in line:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return {"first_s": round(first, 2), "wall_s": round(whole, 2), "user_s": round(after.ru_utime - before.ru_utime, 2)}


def refuses_torch(python: Path) -> bool:
    """Whether PyTorch is really not there."""
    return subprocess.run([str(python), "-c", "import torch"], capture_output=True, check=False).returncode != 0


def page(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    total, worst = result["megabytes"], max(one["first_s"] for one in result["runs"])
    rows = [(name, size) for name, size in result["packages"].items() if size >= 1]
    rest = total - sum(size for _, size in rows)
    lines = [
        "# A light installation",
        "",
        "Made by `python benchmarks/light_install.py`; raw figures in `light-install.json`.",
        "",
        f"`{result['wheel']}` with the core's dependencies in a fresh environment, Python {result['python']}, "
        f"{result['machine']}, {result['cores']} cores, load {result['load']:.1f}. PyTorch is not in it.",
        "",
        f"**{total:.0f} MB** (millions of bytes) beside what a fresh environment holds: pip and setuptools, "
        f"{result['tools_mb']:.0f} MB. The limit is {LARGEST_MB} MB: {'held' if total < LARGEST_MB else 'missed'}.",
        "",
        "| package | MB |",
        "|--|--|",
        *(f"| {name} | {size:.0f} |" for name, size in rows),
        f"| all others | {rest:.0f} |",
        "",
        "PyArrow is more than half of it. It comes in one piece: the parts that Kedge does not use (Flight, Substrait, "
        "S3, its tests and headers) cannot be left out with pip. SciPy is not in the core: only `kedge data audit` and "
        f"training need it, and `kedge[audit]` adds {result['audit_mb']:.0f} MB with it.",
        "",
        f"`kedge diagnose` on a run of {result['tokens']:,} tokens in {result['steps']} steps, "
        f"{result['disk_mb']:.0f} MB on disk:",
        "",
        "| start | first finding, s | whole command, s | user CPU, s |",
        "|--|--|--|--|",
    ]
    lines += [
        f"| {index} | {one['first_s']:.1f} | {one['wall_s']:.1f} | {one['user_s']:.1f} |"
        for index, one in enumerate(result["runs"], 1)
    ]
    held = "held" if worst < LONGEST_S else f"missed under the load of {result['load']:.1f} that others made"
    return "\n".join([*lines, "", f"The limit is {LONGEST_S} s to the first finding: {held}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/light-install"))
    out = parser.parse_args().out.resolve()
    python, wheel = install(out)
    packages = sizes(python)
    steps, tokens = make(out / "run", TOKENS, SMALL)
    if not refuses_torch(python):
        raise SystemExit("the core brings PyTorch")
    tools = sum(megabytes(path) for path in python.parents[1].glob("lib/*/site-packages/*") if path.name in TOOLS)
    runs = [first_finding(python, out / "run") for _ in range(3)]
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", f"{out / wheel}[audit]"], check=True)
    result = {
        "wheel": wheel,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "megabytes": sum(packages.values()),
        "tools_mb": tools,
        "packages": {name: round(size, 2) for name, size in packages.items()},
        "tokens": tokens,
        "steps": steps,
        "disk_mb": megabytes(out / "run"),
        "runs": runs,
        "audit_mb": sum(sizes(python).values()) - sum(packages.values()),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "light-install.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "light-install.md").write_text(page(result))


if __name__ == "__main__":
    main()
