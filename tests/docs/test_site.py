"""The site is built without a warning, and a browser finds nothing missing in it."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest

from tests.helpers.places import ROOT, environment

LOADED = {("link", "href"), ("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src")}


class Page(HTMLParser):
    """The links, the anchors and what is loaded, of a page as the browser has made it."""

    def __init__(self, document):
        super().__init__()
        self.links, self.anchors, self.loaded, self.formulas, self.found = [], set(), [], 0, 0
        self.feed(document)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.found += given.get("class") == "md-search-result__item"
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.formulas += tag == "math"
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        self.loaded += [given[name] for of, name in LOADED if of == tag and given.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", ROOT / "mkdocs.yml", "--site-dir", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: links and the console of the site were not looked at")
    return found


def opened(browser, address, profile):
    """A page as the browser has made it, and what its console says."""
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=2000",
    ]
    command = [browser, *options, "--enable-logging=stderr", "--v=0", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return Page(done.stdout), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_browser_finds_every_page_and_anchor_and_its_console_is_silent(site, browser, tmp_path):
    start = (site / "index.html").as_uri()
    pages, said, to_open = {}, {}, [start]
    while to_open:
        address = to_open.pop()
        if address not in pages:
            pages[address], said[address] = opened(browser, address, tmp_path)
            links = (urldefrag(urljoin(address, link)).url for link in pages[address].links)
            to_open += {link for link in links if link.startswith("file:") and link.endswith(".html")}
    assert {unquote(address) for address in pages} == {
        unquote(path.as_uri()) for path in site.rglob("*.html") if path.name != "404.html"
    }
    assert {address: lines for address, lines in said.items() if lines} == {}
    for address, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(urljoin(address, link))
            if target in pages:
                assert not anchor or unquote(anchor) in pages[target].anchors, f"{address}: {link}"
            else:
                assert re.match("https://arxiv.org/", target), f"{address}: {link}"
        for loaded in page.loaded:
            found = urlsplit(urljoin(address, loaded))
            assert found.scheme == "file", f"{address}: {loaded}"  # nothing from the net
            assert Path(unquote(found.path)).is_file(), f"{address}: {loaded}"
    assert pages[start].formulas == 3


@pytest.mark.slow
def test_the_search_works_from_a_disk(site, browser, tmp_path):
    page, said = opened(browser, (site / "index.html").as_uri() + "?q=pullback", tmp_path)
    assert page.found > 1
    assert said == []
