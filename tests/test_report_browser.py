"""The report in a real browser: nothing runs, nothing is fetched, everything is drawn."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from made_run import EVIL, made_run

from reat_fast.reporting.compared import compared_report
from reat_fast.reporting.markup import POLICY
from reat_fast.reporting.pages import run_report
from reat_fast.reporting.probe import Probe
from reat_fast.reporting.run_record import read_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="needs chromium (Debian, Ubuntu: apt-get install chromium)"
)

FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    # The browser's own requests, which no flag stops, end here.
    "--proxy-server=127.0.0.1:9",
    "--enable-logging=stderr",
)

# Runs in a copy of the page without its policy, so that escaping alone must keep scripts out.
INSPECTION = """<script>
const pictures = [...document.querySelectorAll("svg image, img")];
// Images made here are loaded before the load event comes.
const copies = pictures.map(picture => {
  const copy = document.body.appendChild(new Image(1, 1));
  copy.src = picture.getAttribute("xlink:href") || picture.getAttribute("src");
  return copy;
});
addEventListener("load", () => {
  const broken = copies.filter(copy => !copy.naturalWidth).map(copy => copy.src.slice(0, 40));
  for (const copy of copies) copy.remove();
  const drawings = [...document.querySelectorAll("svg")];
  const fetched = performance.getEntriesByType("resource").map(entry => entry.name);
  const found = document.createElement("pre");
  found.id = "found";
  found.textContent = JSON.stringify({
    title: document.title,
    scripts: document.scripts.length,
    pictures: pictures.length,
    broken,
    drawings: drawings.length,
    empty: drawings.filter(d => d.getBoundingClientRect().height < 50).length,
    unnamed: drawings.filter(d => !d.getAttribute("aria-label")).length,
    fetched: fetched.filter(name => !name.startsWith("data:")),
    overflow: document.documentElement.scrollWidth - innerWidth,
    colour: getComputedStyle(document.body).backgroundColor,
    text: document.body.innerText,
  });
  document.body.append(found);
});
</script>"""


def browse(page: Path, *flags: str) -> tuple[str, list[str]]:
    """Open a page; return the document as it then stands, and the lines of its console."""
    assert BROWSER is not None
    own = (f"--user-data-dir={page.parent / 'browser'}", "--virtual-time-budget=5000")
    sandbox = ("--no-sandbox",) if os.geteuid() == 0 else ()
    done = subprocess.run(
        [BROWSER, *FLAGS, *own, *sandbox, *flags, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console


def inspect(page: str, folder: Path, *flags: str) -> dict[str, Any]:
    """Let a script look at a page from inside, its policy taken away."""
    file = folder / "inspected.html"
    open_page = page.replace(POLICY, "").replace("</body>", INSPECTION + "</body>")
    file.write_text(open_page, encoding="utf-8")
    document, console = browse(file, *flags)
    assert console == []
    match = re.search(r'<pre id="found">(.*?)</pre>', document, re.DOTALL)
    assert match is not None
    found: dict[str, Any] = json.loads(html.unescape(match[1]))
    return found


def made_probe() -> Probe:
    numbers = np.random.RandomState(0)

    def draw(*shape: int) -> npt.NDArray[np.float32]:
        return numbers.rand(*shape).astype(np.float32)

    labels = np.arange(20) % len(EVIL)
    return Probe(
        labels=labels,
        clean_predictions=labels,
        predictions=np.roll(labels, 1),
        points=draw(20, 2),
        attacked_points=draw(20, 2),
        explained=(0.5, 0.25),
        examples=[0, 3, 4],
        clean=draw(3, 8, 8, 3),
        attacked=draw(3, 8, 8, 3),
        eps=8 / 255,
        conditions="PGD-20, 20 test images, <i>made</i>",
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = made_run(tmp_path_factory.mktemp("page") / "<b onclick=alert(1)>")
    return run_report(read_run(folder), made_probe()).page


def check(found: dict[str, Any]) -> None:
    assert found["scripts"] == 1  # the inspection itself
    assert found["fetched"] == [] and found["broken"] == []
    assert found["drawings"] > 0 and found["empty"] == found["unnamed"] == 0
    assert found["overflow"] <= 0


def test_a_report_runs_nothing_fetches_nothing_and_shows_everything(
    page: str, tmp_path: Path
) -> None:
    found = inspect(page, tmp_path, "--window-size=1200,2000")
    check(found)
    assert found["title"] == "<b onclick=alert(1)>"
    # Bitmaps: nine images of the grid, two matrices of confusion, two colour scales, the heat map.
    assert found["drawings"] == 9 and found["pictures"] >= 9 + 2 + 1
    assert found["colour"] == "rgb(247, 247, 245)"
    assert "<i>made</i>" in found["text"]


def test_a_report_fits_a_narrow_screen_in_the_dark(page: str, tmp_path: Path) -> None:
    dark = "--blink-settings=preferredColorScheme=0"
    found = inspect(page, tmp_path, "--window-size=500,900", dark)
    check(found)
    assert found["colour"] == "rgb(17, 20, 24)"


def test_several_runs_side_by_side_are_drawn_too(tmp_path: Path) -> None:
    folders = [made_run(tmp_path / f"r{k}", 40.0 + k, seed=k) for k in range(2)]
    report = compared_report([read_run(folder) for folder in folders])
    found = inspect(report.page, tmp_path, "--window-size=1000,2000")
    check(found)
    assert found["drawings"] == len(report.pictures) and "40.50 ± 0.71" in found["text"]


def test_the_page_as_written_has_a_quiet_console(page: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    document, console = browse(file)
    assert console == []
    assert "<title>&lt;b onclick=alert(1)&gt;</title>" in document


def test_the_inspection_sees_what_it_looks_for_and_the_policy_forbids_it(tmp_path: Path) -> None:
    bad = (
        f'<html><head><meta http-equiv="Content-Security-Policy" content="{POLICY}"></head><body>'
        "<script>document.title='executed'</script>"
        '<img src="http://report.invalid/absent.png"><div style="width: 5000px">wide</div>'
        "</body></html>"
    )
    file = tmp_path / "bad.html"
    file.write_text(bad, encoding="utf-8")
    document, console = browse(file)
    assert "<title>executed</title>" not in document
    assert sum("Content Security Policy" in line for line in console) == 2  # script and picture
    found = inspect(bad, tmp_path)
    assert found["title"] == "executed" and found["scripts"] == 2
    assert len(set(found["fetched"])) == 1  # a picture may be tried twice
    assert len(found["broken"]) == 1 and found["overflow"] > 0
