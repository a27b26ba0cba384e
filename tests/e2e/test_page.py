"""The page in a real browser over SmolLM2: an answer, its pages on the map, a prefix hit."""

import pytest

from tests.browser import browser, opened

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


def test_a_chat_is_answered_and_its_pages_and_the_prefix_hit_are_seen(chromium, served):
    with opened(chromium, served.url) as page:
        page.until(lambda: page.live("views") > 1, "no views come")
        before = page.picture()
        page.page.click("text=Settings")
        page.page.fill("#temperature", "0")
        page.page.fill("#max-tokens", "40")
        page.say(QUESTION)
        page.until(lambda: page.used() > 0, "no page is in use")
        assert page.picture() != before, "the map does not change"
        page.until(lambda: page.answered(1), "no answer")
        answer = page.text(".answer .text")
        assert "Paris" in answer
        page.until(lambda: page.used() == 0, "pages stay in use")
        hits = page.live("hits")
        page.page.click("#new-chat")
        page.say(QUESTION)
        page.until(lambda: page.answered(1), "no second answer")
        assert page.text(".answer .text") == answer
        page.until(lambda: page.live("hits") >= hits + 16, "the prefix is not found again")
        assert "prompt tokens from cache" in page.text(".answer .facts")
        assert page.errors == []


def test_pointing_at_a_cell_tells_whose_it_is(chromium, served):
    with opened(chromium, served.url) as page:
        page.until(lambda: page.live("views") > 1, "no views come")
        page.page.hover(".map canvas", position={"x": 3, "y": 3})
        assert "the trash page" in page.text("#tip")
        page.page.hover(".map canvas", position={"x": 60, "y": 3})
        assert page.text("#tip").startswith("page ")
        page.page.hover("#rate")
        assert not page.page.is_visible("#tip")
