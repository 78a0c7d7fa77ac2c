"""The built book in a real browser: every page works, and nothing leaves the site.

    make browser

Needs the book in _build/html and Chromium with its driver (Debian: chromium and
chromium-driver). CHROMIUM and CHROMEDRIVER name others.
"""

import functools
import http.server
import json
import os
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest
from bs4 import BeautifulSoup

pytestmark = pytest.mark.browser

SITE = Path(__file__).resolve().parent.parent / "_build" / "html"
FILES = sorted(page.relative_to(SITE).as_posix() for page in SITE.rglob("*.html"))
PAGES = [page for page in FILES if not page.startswith("_")]
WIDE, PHONE = 1280, 390
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
]

each_page = pytest.mark.parametrize(
    "page", PAGES or ["the book is not built: make book"]
)


class Browser:
    """Chromium on the pages of one local server, with what it logged meanwhile."""

    def __init__(self, driver, origin):
        self.driver = driver
        self.origin = origin

    def command(self, name, **values):
        self.driver.execute_cdp_cmd(name, values)

    def look(self, width, mode):
        """Set the width of the window and the colours that the reader's system asks."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        feature = {"name": "prefers-color-scheme", "value": mode}
        self.command("Emulation.setEmulatedMedia", features=[feature])

    def open(self, page):
        """Load a page and wait until it is complete, mathematics included."""
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(f"{self.origin}/{page}")
        self.wait(
            "return document.readyState === 'complete'"
            " && (!window.MathJax || !!(MathJax.startup && MathJax.startup.promise))"
        )
        # Images are lazy on some pages: ask for all of them before waiting.
        self.driver.execute_async_script("""
            const done = arguments[0];
            for (const image of document.images) image.loading = "eager";
            const images = [...document.images].map(i => i.decode().catch(() => 0));
            const math = window.MathJax ? [MathJax.startup.promise] : [];
            Promise.all([...images, ...math]).then(() => done());
        """)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self, script, *arguments):
        """Wait until a script returns something true, and return that."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 20, 0.05).until(
            lambda driver: driver.execute_script(script, *arguments), script
        )

    def requests(self):
        """Addresses asked for since the page was opened."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                yield message["params"]["request"]["url"]
            elif message["method"] == "Network.webSocketCreated":
                yield message["params"]["url"]

    def check_silence(self):
        """No error in the console, no request to anybody else."""
        asked = [
            url for url in self.requests() if not url.startswith(("data:", "blob:"))
        ]
        assert asked, "the browser's log of requests is empty"
        assert [url for url in asked if not url.startswith(self.origin + "/")] == []
        errors = [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING")
            # The page that leads to the book names no icon: then some browsers ask.
            and not entry["message"].startswith(f"{self.origin}/favicon.ico")
        ]
        assert errors == []


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    chromium = shutil.which(os.environ.get("CHROMIUM", "chromium"))
    chromedriver = shutil.which(os.environ.get("CHROMEDRIVER", "chromedriver"))
    if not (chromium and chromedriver):
        message = "Chromium or its driver is missing: apt install chromium-driver"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability(
        "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
    )
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    driver.set_page_load_timeout(60)
    driver.set_script_timeout(60)
    yield Browser(driver, f"http://127.0.0.1:{server.server_port}")
    driver.quit()
    server.shutdown()


@functools.cache
def soup(page):
    return BeautifulSoup((SITE / page).read_text("utf-8"), "html.parser")


# Contrast of text with what lies behind it, as WCAG 2 defines it.
CONTRAST = """
    const parse = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b]
        .map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = node => {
        for (; node; node = node.parentElement) {
            const colour = parse(getComputedStyle(node).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const kinds = "h1, h2, p, li, td, th, figcaption, a.reference, pre, pre span";
    const bad = [];
    const texts = "article.bd-article :is(" + kinds + ")";
    for (const node of document.querySelectorAll(texts)) {
        if (!node.innerText.trim() || !node.offsetParent) continue;
        const [a, b] = [parse(getComputedStyle(node).color), behind(node)].map(light);
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (contrast < 4.5) bad.push(contrast.toFixed(2) + " " + node.innerText);
    }
    return bad;
"""

# Formulas in the text do not scroll: what is too wide cannot be reached.
CUT_OFF = """
    return [...document.querySelectorAll("article mjx-container:not([display])")]
        .filter(formula => !formula.closest("table"))
        .map(formula => formula.getBoundingClientRect().right)
        .filter(right => right > window.innerWidth);
"""

DARK_FIGURES = """
    return [...document.querySelectorAll(".cell_output img")]
        .map(image => getComputedStyle(image).backgroundColor)
        .filter(colour => colour !== "rgb(255, 255, 255)");
"""


@each_page
def test_page(browser, page):
    html = soup(page)
    sphinx_made = html.find("meta", {"http-equiv": "Refresh"}) is not None

    browser.look(WIDE, "light")
    browser.open(page)
    browser.check_silence()
    assert browser.run("return document.title").strip() or sphinx_made
    broken = "return [...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
    assert browser.run(broken) == []
    mathematics = len(html.select(".math"))
    if mathematics:
        rendered = "return document.querySelectorAll('.math mjx-container').length"
        assert browser.run(rendered) >= mathematics
        assert browser.run("return document.querySelectorAll('mjx-merror').length") == 0
    assert browser.run(CONTRAST) == []

    browser.look(PHONE, "dark")
    browser.open(page)
    browser.check_silence()
    if not sphinx_made:
        assert browser.run("return document.documentElement.dataset.theme") == "dark"
    assert browser.run("return document.documentElement.scrollWidth") <= PHONE
    assert browser.run(DARK_FIGURES) == []
    assert browser.run(CONTRAST) == []
    assert browser.run(CUT_OFF) == []


@each_page
def test_exercises_are_counted_from_one(page):
    """What a chapter calls `vit-ex-3` is printed as exercise 3."""
    for number, exercise in enumerate(soup(page).select("div.exercise"), 1):
        caption = exercise.select_one(".caption-number").text.strip()
        assert caption == f"Exercise {number}"
        assert exercise["id"] == f"{Path(page).stem}-ex-{number}"


@each_page
def test_links_arrive(page):
    """Each link inside the book leads to a file, and to a place in it."""
    missing = []
    for link in soup(page).select("a[href]"):
        target, place = urldefrag(urljoin(page, link["href"]))
        if urlsplit(target).scheme:
            continue
        target = unquote(target.partition("?")[0]) or page
        arrives = (SITE / target).is_file() and (
            not place or soup(target).find(id=unquote(place)) is not None
        )
        if not arrives:
            missing.append(link["href"])
    assert missing == []


def test_the_bibliography_shows_no_latex():
    text = soup("book/bibliography.html").select_one("article").text
    assert not [sign for sign in "$\\{}" if sign in text]


def test_search_finds_attention(browser):
    browser.look(WIDE, "light")
    browser.open("book/index.html")
    field = "document.querySelectorAll('input[name=q]')"
    browser.run("document.querySelector('.search-button__button').click()")
    shown = f"return [...{field}].filter(i => i.offsetParent && i.offsetWidth > 50)[0]"
    browser.wait(shown).send_keys("attention\n")
    browser.wait("return location.pathname.endsWith('/search.html')")
    first = browser.wait("return document.querySelector('#search-results li a')")
    assert browser.run("return document.querySelectorAll('#search-results li').length")
    first.click()
    browser.wait("return !location.pathname.endsWith('/search.html')")
    text = browser.wait("return document.querySelector('article')?.innerText")
    assert "attention" in text.lower()
    browser.check_silence()


@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_sidebar_toggle(browser, width):
    browser.look(width, "light")
    browser.open("book/index.html")
    left = (
        "const box = document.querySelector('.bd-sidebar-primary')"
        ".getBoundingClientRect(); return box.width > 100 && box.right > 100"
    )
    before = browser.run(left)
    assert before == (width == WIDE)
    buttons = "[...document.querySelectorAll('.primary-toggle')]"
    browser.run(f"{buttons}.filter(b => b.offsetParent)[0].click()")
    browser.wait(f"return (() => {{{left}}})() !== arguments[0]", before)
    browser.check_silence()


def test_colour_mode_button(browser):
    browser.look(WIDE, "light")
    browser.open("book/index.html")
    theme = "return document.documentElement.dataset.theme"
    seen = set()
    for _ in range(3):
        seen.add(browser.run(theme))
        browser.run("document.querySelector('.theme-switch-button').click()")
    browser.run("localStorage.clear()")
    assert seen == {"light", "dark"}


@each_page
def test_solutions_unfold(browser, page):
    solutions = len(soup(page).select(".solution.dropdown"))
    if not solutions:
        return
    browser.look(WIDE, "light")
    browser.open(page)
    hidden = "return document.querySelectorAll('.solution.toggle-hidden').length"
    assert browser.run(hidden) == solutions
    from selenium.webdriver.common.action_chains import ActionChains

    # A mouse hits the link in the title; it must not lead away.
    link = browser.run("return document.querySelector('.solution .admonition-title a')")
    ActionChains(browser.driver).move_to_element(link).click().perform()
    assert browser.run(hidden) == solutions - 1
    titles = "document.querySelectorAll('.solution.toggle-hidden .admonition-title')"
    browser.run(f"{titles}.forEach(title => title.click())")
    assert browser.run(hidden) == 0
    browser.look(PHONE, "light")
    assert browser.run(CUT_OFF) == []
