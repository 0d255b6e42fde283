"""axe-core, which finds faults for users of a screen reader or a keyboard: `python -m tests.axe` fetches it.

It comes from npm into a cache folder, for tests alone. The product has no part of it. Its licence is MPL-2.0.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "4.10.2"
SHA256 = "9ea2d2d6917da998122bdacfd3b473e31ead53f4b87146c716a12edf89158100"
FILE = "axe.min.js"
FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kling-receiver-tests"
MISSING = "accessibility tests need axe-core: python -m tests.axe fetches it with npm"


def script() -> Path:
    """The path of the script, which may not exist."""
    return FOLDER / f"axe-{VERSION}.js"


def fetch() -> None:
    """Fetch the script with npm. Raises SystemExit for a package with other bytes."""
    with tempfile.TemporaryDirectory() as folder:
        npm = shutil.which("npm")
        if npm is None:
            raise SystemExit("npm is not installed: apt-get install npm")
        subprocess.run([npm, "pack", f"axe-core@{VERSION}", "--silent"], cwd=folder, check=True, timeout=300)
        package = Path(folder) / f"axe-core-{VERSION}.tgz"
        if hashlib.sha256(package.read_bytes()).hexdigest() != SHA256:
            raise SystemExit(f"axe-core {VERSION} is not the package that was looked at")
        with tarfile.open(package) as found:
            file = found.extractfile(f"package/{FILE}")
            assert file is not None
            FOLDER.mkdir(parents=True, exist_ok=True)
            script().write_bytes(file.read())


if __name__ == "__main__":
    if not script().exists():
        fetch()
    sys.stdout.write(f"{script()}\n")
