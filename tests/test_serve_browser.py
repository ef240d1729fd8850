"""The page in a real browser: headless Chromium, driven by chromedriver's own protocol."""

import contextlib
import http.client
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import BOUND, Running

_DRIVER = shutil.which("chromedriver")
_BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (_DRIVER and _BROWSER), reason="needs chromium and chromedriver, which are not there"),
]
_ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


class Browser:
    """A browser on one page."""

    def __init__(self, port: int, profile: Path) -> None:
        self._port = port
        options = {"binary": _BROWSER, "args": [*_ARGUMENTS, f"--user-data-dir={profile}"]}
        asked = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self._session = f"/session/{self._call('POST', '/session', asked)['sessionId']}"

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=BOUND)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            found = json.loads(response.read())["value"]
        assert response.status == 200, found
        return found

    def open(self, url: str, width: int) -> None:
        """Open an address on a screen of this width."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": size}
        self._call("POST", f"{self._session}/goog/cdp/execute", command)
        self._call("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str) -> Any:
        """Return what a script returns; `at`, `press` and `text` find elements, press buttons, and read the page."""
        helpers = (
            "const at = (id) => document.getElementById(id);"
            "const press = (label) => [...document.querySelectorAll('button')]"
            ".find((each) => each.textContent === label).click();"
            "const text = () => document.body.innerText;"
        )
        return self._call("POST", f"{self._session}/execute/sync", {"script": helpers + script, "args": []})

    def until(self, condition: str) -> None:
        """Return once a condition holds."""
        end = time.monotonic() + BOUND
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, self.run("return text()")

    def ask(self, question: str) -> None:
        """Send a message."""
        self.run(f"at('question').value = {json.dumps(question)}; at('ask').requestSubmit()")

    def end(self) -> None:
        """End it."""
        self._call("DELETE", self._session)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert _DRIVER is not None
    command = [_DRIVER, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        try:
            assert driver.stdout is not None
            port = next(int(found[1]) for line in driver.stdout if (found := re.search(r"on port (\d+)\.", line)))
            made = Browser(port, tmp_path_factory.mktemp("profile"))
            yield made
            made.end()
        finally:
            driver.terminate()


def opened(browser: Browser, server: Running, width: int = 1200) -> None:
    browser.open(f"http://127.0.0.1:{server.port}/", width)
    browser.until("at('name').textContent === 'tiny'")


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_cut_off_or_wrapped(browser: Browser, server: Running, width: int) -> None:
    opened(browser, server, width)
    assert browser.run("return [innerWidth, document.documentElement.scrollWidth]") == [width, width]
    heights = browser.run(
        "return [...document.querySelectorAll('button')].filter((each) => each.offsetParent)"
        ".map((each) => each.offsetHeight / parseFloat(getComputedStyle(each).lineHeight))"
    )
    assert len(heights) == 3
    assert max(heights) < 2  # each label is on one line
    assert browser.run("return at('question').scrollHeight <= at('question').clientHeight")


def test_an_answer_is_written_stopped_retried_and_its_question_edited(browser: Browser, server: Running) -> None:
    opened(browser, server)
    browser.run("at('max_tokens').value = 8; at('temperature').value = 0")
    browser.ask("What is a page?")
    browser.until("text().includes('tokens/s')")
    first = browser.run("return document.querySelector('.assistant .text').textContent")
    assert first
    assert "Cut off at the most tokens. 8 tokens" in browser.run("return text()")
    browser.run("press('Retry')")
    browser.until("at('stop').hidden && text().includes('tokens/s')")
    assert browser.run("return document.querySelector('.assistant .text').textContent") == first
    browser.run(
        "at('max_tokens').value = ''; press('Edit'); document.querySelector('article textarea').value = 'More';"
    )
    # In one script with what begins it, so that the answer cannot end before it is stopped.
    browser.run("press('Send again'); at('stop').click()")
    browser.until("text().includes('Stopped.')")
    assert browser.run("return document.querySelector('.user .text').textContent") == "More"
    assert browser.run("return [at('stop').hidden, at('send').hidden, at('new').disabled]") == [True, False, False]


def test_a_refusal_is_shown_and_is_no_part_of_the_conversation(browser: Browser, server: Running) -> None:
    opened(browser, server)
    browser.run("at('max_tokens').value = 4; at('temperature').value = 900")
    browser.ask("One")
    browser.until("document.querySelector('.fault')")
    assert "temperature: expected 0.0 to 100.0" in browser.run("return document.querySelector('.fault').textContent")
    browser.run(
        "at('temperature').value = 0; window.sent = []; const real = fetch;"
        "window.fetch = (url, given) => { window.sent.push(JSON.parse(given.body).messages); return real(url, given); }"
    )
    browser.ask("Two")
    browser.until("text().includes('tokens/s')")
    assert [each["role"] for each in browser.run("return window.sent[0]")] == ["user", "user"]


def test_an_answer_that_breaks_off_is_not_shown_as_a_whole_one(browser: Browser, server: Running) -> None:
    opened(browser, server)
    browser.run(
        "const chunk = {choices: [{delta: {content: 'Half'}, finish_reason: null}]};"
        "window.fetch = async () => new Response('data: ' + JSON.stringify(chunk) + '\\n\\n')"
    )
    browser.ask("One")
    browser.until("text().includes('The connection ended before the answer did.')")
    assert browser.run("return document.querySelector('.assistant .text').textContent") == "Half"


def test_colours_follow_the_choice(browser: Browser, server: Running) -> None:
    opened(browser, server)
    colours = [
        browser.run(
            f"at('theme').value = '{theme}'; at('theme').dispatchEvent(new Event('change'));"
            "return getComputedStyle(document.body).backgroundColor"
        )
        for theme in ("light", "dark")
    ]
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]
