"""The console's pictures in infra/docs: `python -m tests.runs.screenshots [--folder infra/docs] [--only gallery]`.

The web server and a worker process, the sandbox and SeaweedFS, with a day of work in the rows. Each page is shown in
Debian's chromium, light and dark, at two widths. Takes about a minute.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image, ImageDraw, ImageFilter
from sqlmodel import col, func, not_, select

from receiver.base import telemetry
from receiver.batch import batch_file
from receiver.batch.batch import Batches
from receiver.sandbox import Knobs, pictures
from storage.rows.deliveries import Delivery, store
from storage.rows.models import Asset, Batch, Callback, Event, Task
from storage.states import ArchiveState, AssetState, CallbackState, TaskState
from tests import webdriver
from tests.console_reader import ACT_KEY, KEYS
from tests.harness import wait_until
from tests.running_product import Scene
from tests.webdriver import Browser

SIZES = {1440: 900, 390: 844}
SCHEMES = ("light", "dark")
DOCS = Path("infra/docs")
# The best quality that fits into so many bytes.
QUALITIES = (88, 80, 70, 60)
SMALL_BYTES = 50_000
PIXELS = 400_000
# Longer than the run: the rest of the batch stays in progress.
WAITING_SECONDS = 600
SECRET = f"whsec_{base64.b64encode(bytes(range(32))).decode()}"
MODEL, BATCH_NAME = "kling-image-o1", "spring-campaign"
GIVEN_UP = "the file host answered with a page (text/html) instead of a picture, 9 times"
# Every visible picture is loaded.
SHOWN = """return document.readyState === "complete" &&
  [...document.images].every((e) => e.complete || e.getBoundingClientRect().top > innerHeight)"""
# Prompt, aspect ratio and number of pictures, newest first.
REQUESTS = (
    ("a lighthouse above a quiet sea at dusk", "16:9", 4), ("a northern ridge under first snow", "3:2", 2),
    ("a lone tree in the dunes, last light", "1:1", 1), ("a red kite over dunes", "2:3", 2),
    ("a valley of pines in morning fog", "16:9", 2), ("an island house, seen from the sea", "1:1", 3),
    ("a wheat field under thunderclouds", "4:3", 2), ("a green hill with a winding path", "3:4", 1),
    ("a harbour after rain", "16:9", 1), ("a desert road at noon", "3:2", 3),
    ("an autumn wood seen from above", "1:1", 1), ("a moonrise behind black mountains", "2:3", 2),
    ("a mirror lake without wind", "16:9", 2), ("a terraced field in spring", "4:3", 1),
)  # fmt: skip
BATCH = tuple(f"the first day of spring, {each}" for each in (
    "as a wide banner", "as a poster", "for a card", "for a story [fail]", "as a postcard", "for a cover",
    "as a tall banner", "for a badge", "as a stamp", "for a calendar",
))  # fmt: skip
TIMES = (
    "created_at", "submitted_at", "completed_at", "end_called_back_at", "archived_at", "received_at", "applied_at",
    "at", "sent_at", "called_back_at", "reported_at",
)  # fmt: skip


def landscape(picture: pictures.Picture) -> bytes:
    """Hills under a sky, in colours by the seed. It looks better than noise, and is small as a palette."""
    rng = random.Random(picture.noise)
    width, height = pictures.size(picture)
    hue = rng.random()
    image = Image.new("HSV", (width, height))
    draw = ImageDraw.Draw(image)
    for row in range(height):
        at = row / height
        draw.line((0, row, width, row), _hsv(hue + 0.12 * at, 0.55 - 0.4 * at, 0.72 + 0.28 * at))
    radius, across, up = min(width, height) * rng.uniform(0.06, 0.12), rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.45)
    x, y = width * across, height * up
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), _hsv(hue + 0.1, 0.15, 1.0))
    for layer in range(5):
        waves = [(rng.uniform(0.6, 3.0) * (1 + layer / 3), rng.uniform(0, 7), rng.uniform(0.02, 0.05)) for _ in "abc"]
        base = 0.5 + layer * 0.11
        line = [(x, height * (base + sum(a * math.sin(f * x / width * 6 + p) for f, p, a in waves)))
                for x in range(0, width + 8, 8)]  # fmt: skip
        draw.polygon(
            [*line, (width, height), (0, height)],
            _hsv(hue + 0.5 + layer * 0.02, 0.3 + layer * 0.1, 0.75 - layer * 0.14),
        )
    file = io.BytesIO()
    image.convert("RGB").filter(ImageFilter.GaussianBlur(0.8)).save(file, "PNG")
    return file.getvalue()


def _hsv(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    return int(hue * 255) % 256, int(max(0.0, saturation) * 255), int(min(1.0, value) * 255)


class Shot(NamedTuple):
    """A page: its name in the file's name, its path below /console."""

    name: str
    path: str


class Showroom(Scene):
    """A day of work: archived, failed and incomplete tasks, a batch half done, callbacks that were refused."""

    def _build(self) -> None:
        ours = self.stack.enter_context(pytest.MonkeyPatch.context())
        ours.setattr(pictures, "draw", landscape)
        self.start_servers(
            "sqlite", Knobs(picture_bytes=PIXELS, submitted_seconds=0, processing_seconds=0.3, webhook_secrets=[SECRET])
        )
        self.know_the_store()
        self.start_processes(
            1, RECEIVER_CONSOLE_KEYS=KEYS, RECEIVER_CONSOLE_THUMBNAIL_DIR=str(self.folder / "thumbnails"),
            RECEIVER_KLING_WEBHOOK_SECRETS=SECRET,
        )  # fmt: skip
        self.url = self.environment["RECEIVER_PUBLIC_URL"]

    def play(self) -> list[Shot]:
        """Do the day's work; returns the pages to show."""
        names = [self._submit(*request) for request in REQUESTS]
        failed = self._submit("what the provider will not draw [fail]", "1:1", 1)
        self._put_batch(BATCH[:6])
        self._wait_until_over()
        self._spread([*names[:3], failed, *names[3:]])
        self._give_up(names[5])
        self.sandbox.set(processing_seconds=WAITING_SECONDS)
        self._put_batch(BATCH)
        self._bring_callbacks()
        wait_until(lambda: self._count(Callback.state == CallbackState.UNMATCHED) == 1, seconds=60)
        with self.parts.database.read() as session:
            first = session.exec(select(Task.id).where(Task.external_task_id == names[0])).one()
            applied = select(Callback.id).where(Callback.task_id == first, Callback.source == "push")
            delivery = session.exec(applied.order_by(col(Callback.id).desc())).first()
            batch = session.exec(select(Batch.id)).one()
        return [
            Shot("overview", ""), Shot("tasks", "/tasks"), Shot("task", f"/tasks/{names[0]}"),
            Shot("gallery", "/gallery"), Shot("delivery", f"/deliveries/{delivery}"),
            Shot("batch", f"/batches/{batch}"),
        ]  # fmt: skip

    def _submit(self, prompt: str, aspect_ratio: str, n: int) -> str:
        name = "-".join(prompt.split()[1:4]).strip(",")
        fields = {"model_name": MODEL, "prompt": prompt, "aspect_ratio": aspect_ratio, "n": n}
        return self.parts.submitter.submit(fields, external_task_id=name).task.external_task_id

    def _put_batch(self, prompts: Sequence[str]) -> None:
        lines = [json.dumps({"model_name": MODEL, "prompt": prompt}) for prompt in prompts]
        batches = Batches(self.parts.database, self.parts.submitter, self.parts.schedule)
        file = io.BytesIO("\n".join(lines).encode())
        batches.put(batches.plan(BATCH_NAME, batch_file.read(file, "jsonl", BATCH_NAME, batches.check)))

    def _count(self, *conditions: Any) -> int:
        with self.parts.database.read() as session:
            return session.exec(select(func.count()).where(*conditions)).one()

    def _wait_until_over(self) -> None:
        ended = (Task.state == TaskState.FAILED) | (Task.archive == ArchiveState.ARCHIVED)
        wait_until(lambda: not self._count(not_(ended)), seconds=120, every=0.25)

    def _spread(self, names: Sequence[str]) -> None:
        """Spread the submission times of these tasks over the last day, the first one now."""
        rng = random.Random(7)
        with self.parts.database.write() as session:
            for number, name in enumerate(names):
                task = session.exec(select(Task).where(Task.external_task_id == name)).one()
                back = timedelta(hours=22.0 * number / len(names) + rng.random(), minutes=3)
                for model in (Asset, Callback, Event):
                    for row in session.exec(select(model).where(model.task_id == task.id)):  # type: ignore[var-annotated,attr-defined]
                        _move(row, back)
                _move(task, back)

    def _give_up(self, name: str) -> None:
        with self.parts.database.write() as session:
            task = session.exec(select(Task).where(Task.external_task_id == name)).one()
            asset = session.exec(select(Asset).where(Asset.task_id == task.id)).first()
            assert asset is not None
            asset.state, asset.error, asset.key = AssetState.FAILED, GIVEN_UP, None
            task.archive = ArchiveState.INCOMPLETE

    def _bring_callbacks(self) -> None:
        """Post one callback that matches no task, and one that is unreadable."""
        unknown = {"task_id": "8412907731", "task_status": "succeed", "task_result": {"images": []}}
        bodies = (json.dumps(unknown).encode(), b"<html>502 Bad Gateway</html>")
        with self.parts.database.write() as session:
            store(session, [Delivery("kling", "push", None, each, webhook_id=f"msg_{len(each)}") for each in bodies])


def _move(row: Any, back: timedelta) -> None:
    for name in TIMES:
        if (moment := getattr(row, name, None)) is not None:
            setattr(row, name, moment - back)


def photograph(showroom: Showroom, folder: Path, shots: Sequence[Shot]) -> Iterator[Path]:
    """Write a picture of each page in both schemes and at both widths."""
    browser = Browser(showroom.folder / "chromium")
    try:
        browser.open(f"{showroom.url}/console/login")
        browser.type("input[name=key]", ACT_KEY)
        browser.press("Enter")
        browser.waits_for("Needs you")
        for shot in shots:
            for width, height in SIZES.items():
                for scheme in SCHEMES:
                    browser.resize(width, height)
                    browser.scheme(scheme)
                    browser.open(f"{showroom.url}/console{shot.path}")
                    wait_until(lambda: browser.run(SHOWN), seconds=60)
                    target = folder / f"console-{shot.name}-{width}-{scheme}.webp"
                    target.write_bytes(small(browser.screenshot()))
                    yield target
    finally:
        browser.close()


def small(png: bytes) -> bytes:
    """The same picture as WebP, of the best quality that fits."""
    with Image.open(io.BytesIO(png)) as picture:
        found = picture.convert("RGB")
    for quality in QUALITIES:
        file = io.BytesIO()
        found.save(file, "WEBP", quality=quality, method=6)
        if file.tell() <= SMALL_BYTES:
            break
    return file.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DOCS)
    parser.add_argument("--only", default="", help="the name of one page")
    given = parser.parse_args()
    if not webdriver.is_installed():
        print(webdriver.MISSING)  # noqa: T201
        return 0
    telemetry.configure("error")
    given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Showroom(Path(folder)) as showroom:
        shots = [shot for shot in showroom.play() if given.only in ("", shot.name)]
        for picture in photograph(showroom, given.folder, shots):
            print(f"{picture} {picture.stat().st_size:,} bytes", flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
