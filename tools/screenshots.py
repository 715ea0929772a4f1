"""The pictures of docs/labelling.md, taken by the browser test of the site as it goes: python tools/screenshots.py"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "images"


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    environment = os.environ | {"KEDGE_SCREENSHOTS": str(FOLDER)}
    tests = ["-k", "day or phone", "tests/feedback/test_browser.py"]
    command = [sys.executable, "-m", "pytest", "-q", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
