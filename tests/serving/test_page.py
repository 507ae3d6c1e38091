"""The web page in a real browser (Debian's chromium, through Playwright): every feature, and that nothing gets in.

NANOCHAT_SCREENSHOTS=FOLDER keeps pictures at 1280 and 390 pixels, light and dark.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.serving.conftest import wait_until

pytestmark = pytest.mark.long
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (dev extra)")

MARKDOWN = """# Title
Some **bold**, *slanted*, `code` and [a link](https://example.org/x).

- one
- two
  1. inner

> quoted

| a | b |
|---|---|
| 1 | 2 |

```python
print("<b>hi</b>")
```
<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>
[bad](javascript:window.hacked=1) ![pic](https://evil.example/x.png)"""


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser, live):
    """Opens the page in a fresh profile; fails the test when the browser complained of anything."""
    contexts, complaints = [], []

    def opened(url=live.url, allowed=(), **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("request", lambda asked: asked.url.startswith((url, "data:")) or complaints.append(asked.url))
        page.goto(url)
        page.allowed = allowed
        return page

    yield opened
    allowed = [each for context in contexts for page in context.pages for each in page.allowed]
    for context in contexts:
        context.close()
    assert [each for each in complaints if not any(part in each for part in allowed)] == []


def say(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answered(page, count=1):
    """The answers, once there are `count` and none is in the making."""
    page.wait_for_function(
        "n => document.querySelectorAll('article.assistant').length === n && !document.querySelector('.busy')",
        arg=count,
    )
    return page.locator("article.assistant")


def test_an_answer_streams_and_tells_its_speed(open_page):
    page = open_page()
    say(page, "SLOW\nplease")
    page.wait_for_selector("article.busy .body:has-text('w3')")
    assert page.get_by_role("button", name="Stop").is_visible()
    assert not page.get_by_role("button", name="Send").is_visible()
    page.keyboard.press("Escape")
    answer = answered(page)
    assert "w3" in answer.inner_text() and "stopped" in answer.inner_text()
    assert page.locator("article.user .body").inner_text() == "SLOW\nplease"
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Most tokens").fill("12")
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="Regenerate").click()
    answer = answered(page)
    assert re.search(r"12 tokens · [\d.]+ tokens/s", answer.inner_text())
    assert page.locator("#status").inner_text().startswith("Answer: w0 w1")


def test_the_stop_button_ends_the_engines_work(open_page, live):
    page = open_page()
    say(page, "SLOW")
    page.wait_for_selector("article.busy .body:has-text('w1')")
    page.get_by_role("button", name="Stop").click()
    answered(page)
    wait_until(lambda: live.router.in_flight == 0, 3)


def test_markdown_is_shown_and_html_is_not(open_page):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    say(page, "ECHO:" + MARKDOWN)  # Enter is the end, the text has lines of its own
    body = answered(page).locator(".body")
    assert body.locator("h3").inner_text() == "Title"
    for tag, text in (("strong", "bold"), ("em", "slanted"), ("p code", "code"), ("blockquote", "quoted"), ("td", "1")):
        assert body.locator(tag).first.inner_text() == text
    assert body.locator("ul > li").count() == 2 and body.locator("ul ol li").inner_text() == "inner"
    assert body.locator("pre").inner_text() == 'print("<b>hi</b>")'
    links = body.locator("a").evaluate_all("links => links.map(a => a.href)")
    assert links == ["https://example.org/x", "https://evil.example/x.png"]
    assert body.locator("img, script").count() == 0 and "onerror" in body.inner_text()
    assert "javascript:window.hacked" in body.inner_text()
    assert page.evaluate("window.hacked") is None
    body.get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == 'print("<b>hi</b>")'


def test_the_policy_stops_scripts_that_come_in(open_page):
    page = open_page(allowed=("Content Security Policy", "violates"))
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.body.append(script);
        }"""
    )
    assert page.evaluate("window.hacked") is None


def test_calls_of_the_tool_are_shown_and_sent_back(open_page):
    page = open_page()
    say(page, "TOOL")
    answer = answered(page)
    tool = answer.locator(".tool")
    assert tool.inner_text().replace("\n", "") == "calculator6*7 → 42"
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "why?")
    sent = asked.value.post_data_json
    assert [part["type"] for part in sent["messages"][1]["content"]] == ["text", "python", "python_output", "text"]
    answered(page, 2)


def test_edit_and_resend(open_page):
    page = open_page()
    say(page, "ECHO:first")
    answered(page)
    say(page, "ECHO:second")
    answered(page, 2)
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit the message").fill("ECHO:changed")
    page.keyboard.press("Enter")
    assert "changed" in answered(page).inner_text() and page.locator("article.user").count() == 1
    page.get_by_label("Message", exact=True).press("ArrowUp")  # the last message, from an empty field
    assert page.get_by_label("Edit the message").input_value() == "ECHO:changed"
    page.keyboard.press("Escape")
    assert page.get_by_label("Edit the message").count() == 0


def test_conversations_are_kept_and_deleted(open_page):
    page = open_page()
    say(page, "ECHO:about cats")
    answered(page)
    page.get_by_role("button", name="New conversation").click()
    assert page.locator("article").count() == 0
    say(page, "ECHO:about dogs")
    answered(page)
    page.reload()
    assert "about dogs" in answered(page).inner_text()
    page.get_by_role("button", name="ECHO:about cats", exact=True).click()
    assert "about cats" in answered(page).inner_text()
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete ECHO:about cats").click()
    assert page.locator("#list li").count() == 1 and page.locator("article").count() == 0


def test_settings_reach_the_server(open_page):
    page = open_page()
    page.get_by_role("button", name="Settings").click()
    given = {
        "Temperature": "0.25", "Most tokens": "7", "Top k": "9", "Top p": "0.5", "Min p": "0.1",
        "Repetition penalty": "1.5", "Seed": "11", "System prompt": "Be brief.",
    }  # fmt: skip
    for label, value in given.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("Let the model use its calculator").uncheck()
    page.get_by_role("button", name="Done").click()
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "hello")
    sent = asked.value.post_data_json
    assert sent.pop("messages")[0] == {"role": "system", "content": "Be brief."}
    assert sent == {
        "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.25, "max_tokens": 7, "top_k": 9,
        "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.5, "seed": 11, "calculator": False,
    }  # fmt: skip
    answered(page)
    page.reload()
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("Seed").input_value() == "11"
    page.get_by_role("button", name="Defaults").click()
    assert page.get_by_label("Seed").input_value() == "" and page.get_by_label("Temperature").input_value() == "0.6"


def test_errors_are_told_and_can_be_tried_again(open_page, live):
    page = open_page(allowed=("status of 503",))
    say(page, "ODD")
    assert "gave this request up" in answered(page).inner_text()
    page.get_by_role("button", name="Try again").click()
    assert "gave this request up" in answered(page).inner_text()


def test_a_long_conversation_leaves_its_oldest_turns_out(open_page):
    page = open_page(allowed=("status of 400",))
    say(page, "ECHO:" + "a" * 900)
    answered(page)
    say(page, "ECHO:short")
    assert "short" in answered(page, 2).last.inner_text()
    say(page, "ECHO:again" + "b" * 1200)
    assert "again" in answered(page, 3).last.inner_text()
    assert "no longer fit" in page.locator("#note").inner_text()


def test_a_key_is_asked_for_and_kept_for_the_tab(open_page, strict):
    page = open_page(strict.url, allowed=("status of 401",))
    say(page, "ECHO:hello")
    page.get_by_label("API key").fill("s3cret")
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="Try again").click()
    assert "hello" in answered(page).inner_text()
    assert "s3cret" not in page.evaluate("JSON.stringify(localStorage)")


def test_the_keyboard_is_enough(open_page):
    page = open_page()
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.type("ECHO:typed")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("twice")
    page.keyboard.press("Enter")
    assert "twice" in answered(page).inner_text()
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.textContent || document.activeElement.id"))
    assert {"New conversation", "Settings", "Edit", "Copy", "Regenerate", "Send"} <= reached
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea")].filter(
            (node) => !(node.textContent || node.getAttribute("aria-label") || node.labels?.length)).length"""
    )
    assert unnamed == 0


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen(open_page, width, scheme):
    page = open_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    shots = os.environ.get("NANOCHAT_SCREENSHOTS")

    def look(name):
        if shots:
            page.screenshot(path=str(Path(shots) / f"{name}-{width}-{scheme}.png"))
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    look("empty")
    say(page, "TOOL what is six times seven?")
    answered(page)
    say(page, "ECHO:" + MARKDOWN)
    answered(page, 2)
    look("talk")
    page.get_by_role("button", name="Settings").click()
    look("settings")
    page.get_by_role("button", name="Done").click()
    if width < 720:
        assert not page.get_by_role("button", name="New conversation").is_visible()
        page.get_by_role("button", name="Conversations").click()
        page.wait_for_timeout(300)
        look("menu")
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Conversations").click()
        page.get_by_role("button", name="New conversation").click()
        assert page.locator("article").count() == 0
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
