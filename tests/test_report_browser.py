"""The report in a real browser: every chart is drawn, the controls work, and the console stays empty."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest

from results_fixture import bare_results, full_results, nasty_results
from specmoe.report.html import render_report
from specmoe.report.study_page import render_study
from specmoe.report.theme import DARK, LIGHT
from specmoe.results import Results
from specmoe.suite.study_results import Study
from study_fixture import EVIL, curve_study, domain_study

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

# Runs in the page once all charts are drawn, and leaves what it finds in the document.
PROBE = """
<script>
(async () => {
  const root = document.documentElement;
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  while (root.dataset.drawn !== "yes") await pause(50);
  const texts = (id) => [...document.querySelectorAll(`#${id} svg text`)].map((text) => text.textContent);
  const found = { before: texts("chart-over-ridge"), width: root.scrollWidth - window.innerWidth };
  found.share = document.getElementById("journey-share")?.textContent;
  document.querySelector('input[name="horizon"][value="3"]')?.click();
  await pause(500);
  found.after = texts("chart-over-ridge");
  found.heading = document.querySelector("#ranking [data-horizon], #panels [data-horizon]").textContent;
  found.share3 = document.getElementById("journey-share")?.textContent;
  found.cells = [...document.querySelectorAll("#journey-grid td")].map((cell) => cell.className);
  const table = document.querySelector("table.sortable");
  const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].dataset.value);
  if (table) {
    table.querySelectorAll("thead button")[2].click();
    found.bySize = names();
    table.querySelectorAll("thead button")[0].click();
    found.byName = names();
  }
  const result = document.createElement("pre");
  result.id = "probe";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
})();
</script>
"""


class Opened:
    """A page as a browser left it. console: lines that it wrote."""

    def __init__(self, results: Results | str, folder: Path, *, dark: bool = False, width: int = 1200) -> None:
        page = folder / "report.html"
        # The libraries inside the page hold the same tag in a string.
        before, end, after = (results if isinstance(results, str) else render_report(results)).rpartition("</body>")
        page.write_text(before + PROBE + end + after, encoding="utf-8")
        done = subprocess.run(
            [
                str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=30000",
                "--enable-logging=stderr", "--dump-dom", page.as_uri(),
            ],
            capture_output=True, text=True, encoding="utf-8", timeout=600, check=True,
        )  # fmt: skip
        self.dom = done.stdout
        self.console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        found = re.search(r'<pre id="probe">(.*?)</pre>', self.dom, re.DOTALL)
        assert found, done.stderr[-2000:]
        self.found = json.loads(unescape(found[1]))

    def charts(self) -> dict[str, str]:
        """Chart id → its element's content."""
        parts = re.split(r'<div class="chart[^"]*" id="', self.dom)[1:]
        return {part[: part.index('"')]: part for part in parts}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(full_results(), tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(nasty_results(), tmp_path_factory.mktemp("nasty"), dark=True, width=500)


def test_console_is_empty(full: Opened, nasty: Opened) -> None:
    assert full.console == []
    assert nasty.console == []


def test_every_chart_is_drawn(full: Opened, nasty: Opened) -> None:
    for opened in (full, nasty):
        data = re.search(r'<script id="charts"[^>]*>(.*?)</script>', opened.dom, re.DOTALL)
        assert data
        assert set(opened.charts()) == set(json.loads(data[1]))
        assert len(opened.charts()) >= 34
        for id, content in opened.charts().items():
            assert content.count('class="marks"') == 1, id
            # Axes and marks.
            assert content.count("<path") + content.count("<line") > 8, id
    ranking = full.charts()["chart-ranking-0"]
    assert 'aria-label="Recall at K of predictors that see context: HierarchicalEnsemble 88.4 ± 0.8' in ranking
    for name in ("HierarchicalEnsemble", "TransformerGatingPredictor", "sequence-activation"):
        assert ranking.count(f">{name}</text>") == 1
    # The probe has gone on to h=3.
    assert ">81.8 ± 0.8</text>" in ranking
    assert ">88.4 ± 0.8</text>" not in ranking


def test_page_is_no_wider_than_the_window(full: Opened, nasty: Opened) -> None:
    assert full.found["width"] <= 0
    assert nasty.found["width"] <= 0


def test_theme_follows_the_reader(full: Opened, nasty: Opened) -> None:
    for opened, own, other in ((full, LIGHT, DARK), (nasty, DARK, LIGHT)):
        chart = opened.charts()["chart-over-ridge"]
        assert f'fill="{own.ink}"' in chart
        assert f'fill="{other.ink}"' not in chart


def test_horizon_control_redraws(full: Opened) -> None:
    winner = next(r for r in full_results().predictors if r.name == "HierarchicalEnsemble")
    near, far = (f"+{100 * winner.over_ridge[h].value:.1f} [" for h in (1, 3))
    assert any(text.startswith(near) for text in full.found["before"])
    assert any(text.startswith(far) for text in full.found["after"])
    assert not any(text.startswith(near) for text in full.found["after"])
    assert full.found["heading"] == "3"


def test_journey_shows_the_share_that_the_results_give(full: Opened) -> None:
    journey = full_results().journey
    assert journey is not None
    for h, shown in ((1, full.found["share"]), (3, full.found["share3"])):
        kinds = [
            (set(visited), foreseen)
            for row, guess in zip(journey.actual, journey.predictions["HierarchicalEnsemble"][h], strict=True)
            for visited, foreseen in zip(row, guess, strict=True)
        ]
        hits = sum(len(visited & set(foreseen)) for visited, foreseen in kinds if foreseen is not None)
        total = sum(len(visited) for visited, foreseen in kinds if foreseen is not None)
        assert shown.startswith(f"{hits} of {total} visits foreseen")
        if h == 3:
            cells = full.found["cells"]
            assert len(cells) == len(kinds)
            assert cells.count("early") == sum(foreseen is None for _, foreseen in kinds) == 3
            assert cells.count("hit") == sum(foreseen is not None and v <= set(foreseen) for v, foreseen in kinds)


def test_table_sorts(full: Opened) -> None:
    predictors = full_results().predictors
    sizes = {r.name: r.parameters for r in predictors}
    shown = [sizes[name] for name in full.found["bySize"]]
    assert shown == sorted(shown, reverse=True)
    assert [name.lower() for name in full.found["byName"]] == sorted(name.lower() for name in sizes)


def test_an_empty_run_still_opens(tmp_path: Path) -> None:
    opened = Opened(bare_results(), tmp_path)
    assert opened.console == []
    assert "No predictor finished" in opened.dom


@pytest.mark.parametrize("dark", [False, True], ids=["light, wide", "dark, narrow"])
@pytest.mark.parametrize("make", [curve_study, domain_study])
def test_pages_of_studies(make: Callable[[], Study], dark: bool, tmp_path: Path) -> None:
    opened = Opened(render_study(make()), tmp_path, dark=dark, width=500 if dark else 1200)
    assert opened.console == []
    assert opened.found["width"] <= 0
    assert opened.found["heading"] == "3"
    charts = opened.charts()
    assert len(charts) == 4
    for id, content in charts.items():
        assert content.count('class="marks"') == 1, id
        assert content.count("<path") + content.count("<line") > 8, id
    own, other = (DARK, LIGHT) if dark else (LIGHT, DARK)
    assert all(f'fill="{own.ink}"' in content and f'fill="{other.ink}"' not in content for content in charts.values())
    assert EVIL not in opened.dom
    if make is curve_study:
        # At h=3, where the probe has gone; one label a share.
        assert all(f">{value:.1f}</text>" in charts["chart-curve-0"] for value in (64.0, 72.0, 78.0, 82.4))
        assert all(f">{documents}</text>" in charts["chart-curve-0"] for documents in (12, 24, 48, 96))
