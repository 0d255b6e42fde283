"""axe-core on every page: no serious or critical fault, contrast included, in both themes and both languages.

Outside CI `test_browser` alone runs it, on pages that it has open anyway.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from receiver.app.wiring import Parts
from tests import axe, webdriver
from tests.archived_tasks import archive
from tests.console_reader import ACT_KEY, PAGES
from tests.pipeline import Web
from tests.receiver.console.test_full_pages import fill
from tests.receiver.console.test_needs import everything
from tests.webdriver import Browser

pytestmark = [
    pytest.mark.skipif(not webdriver.is_installed(), reason=webdriver.MISSING),
    pytest.mark.skipif(not axe.script().exists(), reason=axe.MISSING),
    pytest.mark.skipif(
        "CI" not in os.environ, reason="full pages run in CI; test_browser looks at pages with few rows"
    ),
]
# Opens elements that are closed at first.
OPEN = """for (const each of document.querySelectorAll("details")) each.open = true;
const tile = document.querySelector(".tile > a"); if (arguments[0] && tile) tile.click();"""
# Keeps two of neighbours that differ only in texts and values, as the rows of a full page do: axe takes 1.1 s of CPU
# for 1,000 elements, and 0.3 s for the 150 that are left. The page may not renew itself, which would restore them.
TRIM = """window.renew = () => {};
const written = (it) => it.name + (["class", "type"].includes(it.name) ? it.value : !it.value.trim());
const shape = (each) => each.nodeType !== 1 ? /\\S/.test(each.data)
  : [each.tagName, ...[...each.attributes].map(written), "(", ...[...each.childNodes].map(shape), ")"].join(" ");
for (const parent of document.querySelectorAll("body *")) {
  const seen = {};
  for (const each of [...parent.children]) {
    const kind = shape(each);
    seen[kind] = (seen[kind] || 0) + 1;
    if (seen[kind] > 2) each.remove();
  }
}"""
RUN = """const [options, done] = arguments;
axe.run({ resultTypes: ["violations"], ...options }).then((found) => done(found.violations
  .filter((each) => ["serious", "critical"].includes(each.impact))
  .map((each) => `${each.id}: ${each.nodes.slice(0, 2).map((node) => node.html.slice(0, 120)).join(" | ")}`)));"""

# The menus alone, each of which lies over its page. The axe of a whole page does not see through one to the other.
MENUS = """for (const each of document.querySelectorAll("details.menu")) each.open = true;
document.getElementById("menu").showPopover();"""
OF_MENUS = RUN.replace("axe.run(", 'axe.run("details.menu[open], #menu", ')

# The rules that look at colours. A theme changes nothing else on a page, and a language changes everything else. They
# take as long as all others.
RULES_OF_COLOURS = ["color-contrast", "link-in-text-block"]
COLOURS = {"runOnly": RULES_OF_COLOURS}
ALL_BUT_COLOURS = {"rules": {rule: {"enabled": False} for rule in RULES_OF_COLOURS}}
THEMES = ("light", "dark")
UNUSABLE = ("/deliveries/replay?state=refused", "/tasks?state=nope&since=x&q=%00&stat=1&before=x")


@pytest.fixture(params=["sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "chromium")
    yield browser
    browser.close()


def seen_by_axe(browser: Browser, rules: dict[str, Any], *, lightbox: bool = False) -> list[str]:
    """The faults of the open page, which loses most rows."""
    browser.run(OPEN + TRIM, lightbox)
    return list(browser.run_async(RUN, rules))


def faults(browser: Browser, url: str, *, lightbox: bool = False) -> list[str]:
    browser.open(url)
    browser.run(OPEN + TRIM, lightbox)
    return in_both_themes(browser, RUN)


def faults_of_menus(browser: Browser, url: str) -> list[str]:
    browser.open(url)
    browser.run(TRIM + MENUS)
    return in_both_themes(browser, OF_MENUS)


def in_both_themes(browser: Browser, script: str) -> list[str]:
    """All rules in the first theme, those of colours in the next."""
    found = []
    for theme, rules in zip(THEMES, ({}, COLOURS), strict=True):
        browser.scheme(theme)
        found += [f"{theme}: {each}" for each in browser.run_async(script, rules)]
    return found


def test_no_page_has_a_serious_fault(parts: Parts, browser: Browser, web: Web) -> None:
    task, callback, batch = fill(parts)
    everything(parts)
    real = archive(parts, 1, n=2)[0]
    own = (
        f"/tasks/{task.id}",
        f"/tasks/{real.id}",
        f"/deliveries/{callback.id}",
        f"/batches/{batch.id}",
        "/tasks/none",
        *UNUSABLE,
    )
    console = f"{web.url}/console"
    found: dict[str, list[str]] = {}
    with browser.before_pages(axe.script().read_text()):  # sent once instead of for each page
        for language in ("en", "zh"):
            browser.resize(1440, 900)
            browser.open(f"{console}/language/{language}?next=/console/login")
            found[f"{language} /login"] = faults(browser, f"{console}/login")
            browser.type("input[name=key]", ACT_KEY)
            browser.press("Enter")
            browser.waits_for("ann")
            found |= {f"{language} {path}": faults(browser, console + path) for path in (*PAGES, *own)}
            found[f"{language} lightbox"] = faults(browser, f"{console}/gallery", lightbox=True)
            browser.resize(390, 800)
            found |= {f"{language} 390 {path}": faults(browser, console + path) for path in ("", "/tasks")}
            if language == "en":
                menus = (own[0], "/events", "/deliveries?state=unmatched")
                found |= {f"menus {path}": faults_of_menus(browser, console + path) for path in menus}
    assert {path: each for path, each in found.items() if each} == {}
