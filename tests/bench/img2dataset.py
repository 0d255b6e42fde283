"""The second reference of row 5: img2dataset without resizing and encoding, into a local folder: no store, no record.

It needs some hundred packages, so it is no dependency: `pip install img2dataset` into a separate environment, and name
its command in IMG2DATASET. Without it the row is left out.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.bench.pictures import DRAIN_SECONDS, TRANSFERS, AgainstRclone, Source, source
from tests.bench.stage import folder
from tests.bench.table import Sample

COMMAND = os.environ.get("IMG2DATASET", "")
# At every start it searches the network for a newer version of a part of itself.
QUIET = {"NO_ALBUMENTATIONS_UPDATE": "1"}
OPTIONS = {
    "input_format": "txt",
    "output_format": "files",
    "resize_mode": "no",
    "disable_all_reencoding": "True",
    "processes_count": "1",
    "thread_count": str(TRANSFERS),
}


class AgainstImg2dataset:
    """The files of the last run against rclone, by img2dataset."""

    def __init__(self, ours: AgainstRclone) -> None:
        self._ours = ours

    def rate(self, small: bool) -> Sample:
        """Images a second: ours, and img2dataset's by its own clock, which excludes its long start."""
        count, (seconds, _), _ = self._ours.run(small)
        with folder() as place, source(place, count=min(count, 64), size=self._ours.size) as files:
            return Sample(count / seconds, count / _download(place, files, count))


def _download(place: Path, files: Source, count: int) -> float:
    urls, out = place / "urls.txt", place / "out"
    names = (files.names[number % len(files.names)] for number in range(count))
    urls.write_text("".join(f"http://{files.address}/{name}?{number}\n" for number, name in enumerate(names)))
    options = {**OPTIONS, "url_list": str(urls), "output_folder": str(out)}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    subprocess.run(
        [COMMAND, *words], env={**os.environ, **QUIET}, check=True, timeout=DRAIN_SECONDS, capture_output=True
    )
    found = [json.loads(each.read_text()) for each in out.glob("*_stats.json")]
    assert sum(each["successes"] for each in found) == count
    return sum(float(each["duration"]) for each in found)
