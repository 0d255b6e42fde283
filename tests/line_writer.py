"""Writes the pickled messages in a file to standard output: `python -m tests.line_writer FILE TIMES`."""

import pickle
import sys
from pathlib import Path

from receiver.events.lines import Lines

if __name__ == "__main__":
    batch = pickle.loads(Path(sys.argv[1]).read_bytes())  # noqa: S301 - the test wrote it
    for _ in range(int(sys.argv[2])):
        assert Lines(None).send(batch) == [None] * len(batch)
