"""The public contract, compared with the release before: `python -m tests.contract`.

Settings, commands and options, HTTP paths, event names, manifest fields, object keys, metrics. `contract.json` has
those of release 0.1.0. Additions are welcome; a missing or different entry is a breach. `--write` writes a new file,
for the commit of a release.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from typer.main import get_command

from receiver.base import config
from receiver.cli.main import app
from storage import keys
from storage.rows.events import EventName
from tests.test_pages import metrics, options_of

ROOT = Path(__file__).parent.parent
RELEASED = Path(__file__).with_name("contract.json")
PATHS = re.compile(r"/(?:healthz|readyz|metrics|events|(?:assets|kling|v1|callbacks)(?:/[\w{}:./-]+)?)/?")
A_DAY = datetime(2026, 1, 2, tzinfo=UTC)
Contract = dict[str, dict[str, Any]]


def contract() -> Contract:
    """Each kind of the contract: its entries by name, with the parts of each that must stay the same."""
    return {
        "settings": {name: _default(field) for name, field in config.Settings.model_fields.items()},
        "options": {verb: sorted(options) for verb, options in options_of(get_command(app)).items()},
        "paths": dict.fromkeys(sorted(_paths()), ""),
        "events": dict.fromkeys(sorted(map(str, EventName)), ""),
        "manifest": dict(_fields(json.loads((ROOT / "storage/archive/manifest.schema.json").read_text()))),
        "keys": {
            "asset": keys.object_key("p/", A_DAY, "an id/ü", "image", 2, "ab" * 32, "png"),
            "manifests": [keys.manifest_key("p/", A_DAY, "..", number) for number in (1, 2)],
        },
        "metrics": {name: [kind, *labels] for name, (kind, labels) in metrics().items()},
    }


def breaches(released: Contract, now: Contract) -> list[str]:
    """One line for each name that is missing or has another meaning."""
    return [
        f"{kind}: {name} {'is gone' if name not in now[kind] else f'was {value}, is {now[kind][name]}'}"
        for kind, names in released.items()
        for name, value in names.items()
        if name not in now[kind] or not _keeps(value, now[kind][name])
    ]


def _keeps(value: Any, now: Any) -> bool:
    """Whether a value is the same, or a list that has all previous entries."""
    return set(value) <= set(now) if isinstance(value, list) else bool(value == now)


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default
    return str(value.get_secret_value() if hasattr(value, "get_secret_value") else value)


def _paths() -> Iterator[str]:
    for path in sorted((ROOT / "receiver").rglob("*.py")):
        if "sandbox" not in path.parts and "console" not in path.parts:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and PATHS.fullmatch(node.value):
                    yield node.value


def _fields(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every field of the manifest with its type, by the name of the object that holds it."""
    for holder, described in {"manifest": schema, **schema["$defs"]}.items():
        for name, field in described.get("properties", {}).items():
            yield f"{holder}.{name}", json.dumps({key: field[key] for key in sorted(field) if key != "description"})


def main() -> None:
    now = contract()
    if "--write" in sys.argv:
        RELEASED.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    released = json.loads(RELEASED.read_text())
    for kind, names in released.items():
        sys.stdout.write(f"{kind:9} {len(names):4} released, {len(now[kind].keys() - names.keys()):3} new\n")
    found = breaches(released, now)
    sys.stdout.write("\n".join([*found, f"{len(found)} are gone or differ"]) + "\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
