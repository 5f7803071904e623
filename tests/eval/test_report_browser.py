"""The report in a real browser: readable on a laptop and on a phone, in light and dark, without the network and without a script.

Screenshots go to build/screenshots. Skipped where there is no Chromium (Debian: apt-get install chromium).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resafe.eval import compare_groups, render
from tests.eval.test_report import study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHOTS = Path(__file__).parents[2] / "build" / "screenshots"
SIZES = {"laptop": {"width": 1366, "height": 768}, "phone": {"width": 390, "height": 844}}
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
MEASURE = """() => {
  const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg') && e.getBoundingClientRect().right > innerWidth + 1);
  const small = [...document.querySelectorAll('td, th, p, li, summary')].map(e => parseFloat(getComputedStyle(e).fontSize));
  const seen = e => { const [a, b] = [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor].map(c => c.match(/[\\d.]+/g).slice(0, 3).map(Number));
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
    const [x, y] = [light(a), light(b)]; return (Math.max(x, y) + .05) / (Math.min(x, y) + .05); };
  return {page: document.documentElement.scrollWidth, window: innerWidth, wide: wide.map(e => e.tagName + '.' + e.className), font: Math.min(...small),
          contrast: Math.min(...[...document.querySelectorAll('p, td, .interval, .n, .delta')].map(seen)), rows: document.querySelectorAll('.main tbody tr').length,
          marks: document.querySelectorAll('svg .mark path').length, text: document.body.innerText};
}"""


def large() -> Any:
    """Everything that a report can show: variants, scores, costs, missing verdicts, an unsafe word in a name."""
    results = study()
    for name, entry in results.meta["targets"].items():
        usage = {"cpu_seconds": 12.0, "peak_rss_mb": 800.0, "tokens": 12_000}
        entry |= {"cost": {"train": usage, **({} if name.endswith("none") else {"repair": usage})}, "answers": 160, "reused": 0, "cpu_seconds": 9.0}
    results.meta["suites"]["harm+prefill"] = {**results.meta["suites"]["harm"], "name": "harm+prefill", "of": "harm", "variant": "prefill", "samples": 1}
    for target in list(results.targets):
        attack, mitigation, seed = results.labels(target)
        harm = results.items[target]["harm"]
        votes = harm.votes["harmfulness_rate|lab"]
        graded = {"harmfulness_score|qi_rubric": [4.0 if v else 1.0 for v in votes], "harmfulness_rate|a guard model": [*votes[:-3], None, None, None]}
        results.rows = [r for r in results.rows if (r["target"], r["suite"]) != (target, "harm")]
        results.agreement = [r for r in results.agreement if (r["target"], r["suite"]) != (target, "harm")]
        who = {"target": target, "attack": attack, "mitigation": mitigation, "seed": seed}
        harm.votes |= graded
        harm.scales = {"qi_rubric": (1.0, 5.0)}
        results.add({**who, "suite": "harm"}, "harmful", harm)
        results.add({**who, "suite": "harm+prefill"}, "harmful", harm)
    return results


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        made = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        made.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = large()
    compared = [*compare_groups(results), *compare_groups(results, "before fine-tuning")]
    return render(results, compared, "Report", "Harm fell; see over-refusal beside it.", tmp_path_factory.mktemp("page") / "report.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", list(SIZES))
def test_the_report_is_readable(browser: Any, page_file: Path, device: str, scheme: Any) -> None:
    viewport: Any = SIZES[device]
    context = browser.new_context(viewport=viewport, color_scheme=scheme, is_mobile=device == "phone", has_touch=device == "phone")
    page = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda r: asked.append(r.url))
    page.on("console", lambda m: said.append(m.text))
    page.goto(page_file.as_uri())
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"report-{device}-{scheme}.png", full_page=True)
    found = page.evaluate(MEASURE)
    context.close()
    assert asked == [page_file.as_uri()], "the report asked for something"
    assert said == [], "the browser complained"
    assert found["page"] <= found["window"], f"wider than the screen: {found['wide'][:3]}"
    assert found["wide"] == [] and found["font"] >= 12 and found["contrast"] >= 4.5
    assert found["rows"] >= 14 and found["marks"] > 4
    for title in ("Attacks and mitigations", "Asked in other ways", "Cost", "Harmfulness against utility", "Do the judges agree?"):
        assert title in found["text"]


def test_every_fold_opens_and_shows_its_table(browser: Any, page_file: Path) -> None:
    page = browser.new_page()
    page.goto(page_file.as_uri())
    folds = page.locator("details > summary")
    assert folds.count() >= 4
    for i in range(folds.count()):
        folds.nth(i).click()
    assert all(page.locator("details table").nth(i).is_visible() for i in range(folds.count()))
    page.close()
