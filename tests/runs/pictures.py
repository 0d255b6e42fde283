"""Which pictures of a folder would be archived: `python -m tests.runs.pictures FOLDER…`.

Every file whose bytes begin like an archived type is checked like a result file, and decoded by Pillow. The table has a
line for each folder. Below it is every file that is refused although Pillow decodes the whole of it.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageSequence

from storage.errors import FetchUnusable
from storage.fetch import media_types

PICTURES = frozenset({"png", "jpg", "gif", "webp", "avif", "heic"})
HEAD = (
    "| folder | pictures | decoded by Pillow | accepted | of those with bytes behind the end or notes | refused "
    "| accepted, not decoded | refused, not decoded |\n|---|---|---|---|---|---|---|---|\n"
)


@dataclass(frozen=True)
class Verdict:
    """`refused`: our reason, "" = accepted. `undecoded`: Pillow's, "" = it decodes every frame. `odd`: what we note."""

    path: Path
    refused: str
    undecoded: str
    odd: bool


def verdicts(folder: Path) -> Iterator[Verdict]:
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        with path.open("rb") as file:
            sniffed = media_types.sniff(file.read(media_types.HEAD_BYTES))
            if sniffed is None or sniffed[1] not in PICTURES:
                continue
            file.seek(0)
            refused, odd = "", False
            try:
                media = media_types.inspect(file)
                odd = bool(media.trailing_bytes or media.notes)
            except FetchUnusable as error:
                refused = str(error)
        yield Verdict(path, refused, undecoded(path), odd)


def undecoded(path: Path) -> str:
    """Why Pillow does not decode the whole file; "" = it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path) as image:
                for frame in ImageSequence.Iterator(image):
                    frame.load()
        except Exception as error:  # noqa: BLE001 - its decoders raise many classes
            return f"{type(error).__name__}: {error}"
    return ""


def row(name: str, found: list[Verdict]) -> str:
    counts = Counter((bool(each.refused), bool(each.undecoded)) for each in found)
    odd = sum(each.odd and not each.undecoded for each in found)
    decoded = counts[False, False] + counts[True, False]
    cells = (name, len(found), decoded, counts[False, False], odd, counts[True, False], counts[False, True],
             counts[True, True])  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    chosen = parser.parse_args()
    wrong: list[str] = []
    sys.stdout.write(HEAD)
    for folder in chosen.folders:
        found = list(verdicts(folder))
        sys.stdout.write(row(folder.name, found))
        wrong += [
            f"{each.path.relative_to(folder.parent)}: {each.refused}\n"
            for each in found
            if each.refused and not each.undecoded
        ]
    sys.stdout.write("".join(["\nrefused, though Pillow decodes it:\n", *wrong]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
