"""`python -m tests.storage.rows.upgrading URL`: migrates the database when its input ends, and prints the revision."""

from __future__ import annotations

import sys

from storage.database.sessions import Database
from storage.rows import migrations


def main() -> None:
    database = Database(sys.argv[1])
    print("ready", flush=True)  # noqa: T201
    sys.stdin.read()
    migrations.upgrade(database)
    print(migrations.current(database))  # noqa: T201
    database.close()


if __name__ == "__main__":
    main()
