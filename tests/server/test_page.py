"""The page in a real browser, over an engine that repeats the prompt, breaks and goes away."""

import signal

import pytest

from tests.browser import browser, opened


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


def test_the_page_opens_without_an_error_and_an_answer_is_streamed(chromium, server):
    with opened(chromium, server.url) as page:
        page.until(lambda: page.live("views") > 1, "no views come")
        assert page.text("#status") == "ready" and page.text("#model") == "tiny"
        page.page.click("text=Settings")
        page.page.fill("#max-tokens", "200")
        page.say("Hello there")
        page.until(lambda: page.page.locator("#slots li").count() == 1, "no slot is shown")
        page.until(lambda: page.answered(1), "no answer")
        assert "Hello there" in page.text(".answer .text")
        facts = page.text(".answer .facts")
        assert "200 tokens" in facts and "tokens/s" in facts and "first after" in facts
        assert "cut at the most tokens" in facts
        page.until(lambda: page.page.locator("#slots li").count() == 0, "the slot stays")
        assert page.errors == []


def test_what_a_model_writes_is_text_and_never_markup(chromium, server):
    with opened(chromium, server.url) as page:
        page.page.click("text=Settings")
        page.page.fill("#max-tokens", "200")
        page.say("<img src=x onerror=alert(1)><b>bold</b>")
        page.until(lambda: page.answered(1), "no answer")
        assert "<img src=x onerror" in page.text(".answer .text")
        assert page.page.locator(".message img, .message b").count() == 0
        assert page.errors == []


def test_an_answer_can_be_stopped_and_a_new_chat_begins_empty(chromium, launch):
    server = launch(step=0.02)
    with opened(chromium, server.url) as page:
        page.page.press("#input", "Shift+Enter")
        assert page.page.locator(".message").count() == 0
        page.say("Count to a million")
        page.until(lambda: len(page.text(".answer .text")) > 5, "nothing comes")
        page.page.click("#stop")
        page.until(lambda: page.answered(1), "it goes on")
        assert "stopped" in page.text(".answer .facts")
        server.until(lambda: server.metric("vllm:num_requests_running") == 0, "the engine goes on")
        page.page.click("#new-chat")
        assert page.page.locator(".message").count() == 0
        assert page.page.is_visible("#welcome") and page.errors == []


def test_the_page_asks_for_the_key_and_uses_it_for_both_parts(chromium, launch):
    server = launch("--api-key", "secret", step=0.001)
    with opened(chromium, server.url) as page:
        page.page.wait_for_selector("#key-dialog[open]")
        page.page.fill("#key", "wrong")
        page.page.press("#key", "Enter")
        page.page.wait_for_selector("#key-dialog[open]")
        page.page.fill("#key", "secret")
        page.page.press("#key", "Enter")
        page.until(lambda: page.live("views") > 1, "the key is not used for the live part")
        page.say("Hi")
        page.until(lambda: page.answered(1), "the key is not used for the chat")
        assert page.page.locator(".failed").count() == 0
        assert all("401" in error for error in page.errors), page.errors


def test_the_end_of_the_engine_is_shown_with_its_last_words(chromium, launch):
    server = launch()
    with opened(chromium, server.url) as page:
        page.until(lambda: page.live("views") > 1, "no views come")
        body = {"messages": [{"role": "user", "content": "Hi"}], "cache_salt": "die"}
        server.post("/v1/chat/completions", body)
        page.until(lambda: page.text("#status") == "stopped", "the page does not notice")
        assert "the device fell off the bus" in page.text("#banner")
        page.say("Are you there?")
        page.until(lambda: page.answered(1), "the failure is not shown")
        assert "the device fell off the bus" in page.text(".failed .failure")
        assert page.page.is_visible("text=Try again")


def test_a_lost_server_is_shown_and_found_again(chromium, launch):
    server = launch()
    with opened(chromium, server.url) as page:
        page.until(lambda: page.live("views") > 1, "no views come")
        server.process.send_signal(signal.SIGTERM)
        page.until(lambda: page.text("#status") == "no connection", "the page does not notice")
        assert "Trying again" in page.text("#banner")
        server.process.wait(20)
        launch("--port", server.url.rsplit(":", 1)[1], wait=False)
        page.until(lambda: page.text("#status") == "ready", "the page does not come back")
        assert not page.page.is_visible("#banner")


def test_on_a_phone_one_part_is_shown_at_a_time(chromium, server):
    with opened(chromium, server.url, viewport={"width": 390, "height": 780}) as page:
        page.until(lambda: page.live("views") > 1, "no views come")
        assert page.page.is_visible("#input") and not page.page.is_visible("#rate")
        page.page.click("#tab-live")
        assert page.page.is_visible("#rate") and not page.page.is_visible("#input")
        box = page.page.locator(".map canvas").bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 390
        wide = "document.documentElement.scrollWidth"
        assert page.page.evaluate(wide) == 390 and page.errors == []
