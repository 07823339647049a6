"""The page at `/`: nothing from elsewhere, and in a browser what it is for."""

import re
import shutil
import urllib.request

import pytest
from serving import serving

from model_export.samples import scenes

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)


def fetched(running):
    with urllib.request.urlopen(f"{running.url}/") as answer:
        return answer.headers["Content-Security-Policy"], answer.read().decode()


def test_nothing_runs_but_its_own_script(running):
    policy, page = fetched(running)
    nonce = re.search(r"script-src 'nonce-([^']+)'", policy)[1]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert re.findall(r"<(?:script|style)\b([^>]*)>", page) == [f' nonce="{nonce}"'] * 2
    assert "://" not in page
    # What the policy would stop: handlers and styles in elements.
    assert not re.search(r"<[^>]+\s(on\w+|style)=", page)
    assert fetched(running)[0] != policy


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1100), ("dark", 390)])
def test_in_a_browser(model, tmp_path, scheme, width):
    browsers = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    image = scenes.held_out(1)[0][0].draw(256)
    image.save(tmp_path / "scene.png")
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with serving(model, api_key="secret") as running, browsers.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *camera])
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 800}, permissions=["camera"]
        )
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(running.url)
        page.wait_for_selector("#locked:visible")
        # That the key was missing is all that the browser remarks on.
        assert all("401" in each for each in said)
        said.clear()
        page.fill("#key", "secret")
        page.keyboard.press("Tab")
        page.wait_for_selector("#locked:not(:visible)", state="attached")
        page.set_input_files("#file", tmp_path / "scene.png")
        page.wait_for_selector("#image:visible")
        page.focus("#prompt")
        page.keyboard.press("Enter")
        page.wait_for_selector("#times tr")
        assert "Time to first token" in page.inner_text("#times")
        assert page.inner_text("#answer").startswith("A red circle at the top left")
        page.click("#camera")
        page.wait_for_selector("#video:visible")
        page.click("#live")
        page.wait_for_function("document.querySelector('#image').hidden")
        answered = running.service.places
        page.wait_for_timeout(1500)
        page.keyboard.press("Escape")
        page.wait_for_selector("#live[aria-pressed=false]")
        assert page.inner_text("#error") == ""
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(overflow) == 0
        assert said == []
        running.free()
        assert answered.taken == 0
        browser.close()
