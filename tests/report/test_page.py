"""The page: one file, no script, nothing fetched; and what a browser makes of it."""

import html
import json
import re
import shutil
import subprocess
from xml.etree import ElementTree

import pytest

from helpers.compared import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def page():
    return report().to_html()


def test_the_page_needs_nothing_else(page):
    assert "<script" not in page
    assert not re.search(r"https?://|url\([^#)]*[^#)]|@import|<link|<img|<iframe", page)
    assert all(link.startswith("#") for link in re.findall(r'(?:href|src)="([^"]*)"', page))


def test_what_is_given_is_escaped(page):
    assert "half &lt;b&gt;" in page
    assert "<b>" not in page
    assert "one &amp; only" in page


def test_figures_are_text_in_the_colours_of_the_page(page):
    figures = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    assert len(figures) == 6
    for figure in figures:
        ElementTree.fromstring(figure)
        assert "var(--font)" in figure
        assert 'role="img"' in figure
        assert not set(re.findall(r"#[0-9a-f]{6}", figure)) - {"#000000"}
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:href=\"|url\()#([^\")]*)", page)) <= set(ids)


def test_a_backslash_in_a_name_is_only_a_letter(tmp_path):
    found = report()
    for line in found.rows[:2]:
        line["name"] = f"runs\\dense\\{line['name']}"
    found.reference, found.histories = found.rows[0]["name"], {}
    found.layers = {f"runs\\dense\\{name}": facts for name, facts in found.layers.items() if name != "scratch"}
    text = found.write(tmp_path).read_text(encoding="utf-8")
    assert 'aria-label="runs\\dense\\half &lt;b&gt;, against runs\\dense\\dense' in text


def test_the_page_is_written_where_asked(tmp_path, page):
    assert report().to_html(tmp_path / "page.html") == page
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page


FRAME = """<!doctype html><meta charset="utf-8"><body><iframe id="frame" style="width:{width}px;height:4000px;border:0"
srcdoc="{page}"></iframe><pre id="facts"></pre><script>
document.getElementById("frame").addEventListener("load", event => {{
  const inner = event.target.contentDocument, root = inner.documentElement;
  const boxes = [...inner.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect());
  const wide = [...inner.querySelectorAll("body *")].filter(each => !each.closest(".scroll, svg"))
    .filter(each => each.getBoundingClientRect().right > root.clientWidth + 1).map(each => each.tagName);
  document.getElementById("facts").textContent = JSON.stringify({{
    width: root.clientWidth, scroll: root.scrollWidth, wide,
    figures: boxes.filter(box => box.width > 200 && box.height > 60).length,
    rows: inner.querySelectorAll("tbody tr").length, title: inner.querySelector("h1").textContent }});
}});</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("width", [400, 1600])
def test_a_browser_shows_all_of_it_without_scrolling_sideways(tmp_path, page, width):
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(page)), encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1800,1000"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    done = subprocess.run([BROWSER, *words], capture_output=True, text=True, timeout=120, check=True)
    facts = json.loads(html.unescape(re.search(r'<pre id="facts">(.*?)</pre>', done.stdout)[1]))
    assert facts["width"] == width
    assert facts["scroll"] == width
    assert facts["wide"] == []
    assert facts["figures"] == page.count("<figure>") == 6
    assert facts["title"] == "Models compared"
    assert facts["rows"] > 10
    assert "CONSOLE" not in done.stderr
