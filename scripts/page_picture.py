"""Make docs/page.png: the page in a browser while a real server works for a crowd.

Needs playwright and a Chromium (or CHROMIUM=path of one). Every figure and answer in the picture is
from the run itself.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

PORT = 8766
URL = f"http://127.0.0.1:{PORT}"
MODEL = "smollm2-135m"
FLAGS = ["--num-pages", "481", "--max-model-len", "2048", "--max-num-seqs", "24"]
FLAGS += ["--shutdown-timeout", "1"]
QUESTION = "What is the capital of France?"
FOLLOW_UP = "Write a letter to a friend about a long walk through the city."
OPENINGS = (
    "You are a patient teacher of history, and you answer with stories and dates. ",
    "You are the editor of a small newspaper who likes short sentences and long breakfasts. ",
    "You write letters from a ship that sails around the world with a crew of seven. ",
)
TOPICS = ("the sea", "a lost key", "printing", "winter", "a bridge", "bread", "the moon", "a map")


def ask(rng: random.Random, stop: threading.Event) -> None:
    """One of the crowd: requests that begin like those of others, one after the other."""
    while not stop.is_set():
        opening = rng.choice(OPENINGS) * rng.randint(2, 9)
        text = f"{opening}Write about {rng.choice(TOPICS)}, in chapter {rng.randint(1, 40)}."
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": rng.randint(60, 420),
            "temperature": 0.9,
            "ignore_eos": True,
        }
        request = urllib.request.Request(f"{URL}/v1/chat/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        try:
            urllib.request.urlopen(request, timeout=600).read()
        except OSError:
            return


def wait_until_ready() -> None:
    """Until /ready says so; five minutes at most."""
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{URL}/ready", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("error: the server is not ready")


def draw(page: Any, path: Path) -> None:
    """Two turns of a chat while the crowd works; the picture is of the second."""
    page.goto(URL)
    page.fill("#input", QUESTION)
    page.click("text=Settings")
    page.fill("#temperature", "0")
    page.click("text=Settings")
    page.press("#input", "Enter")
    page.wait_for_selector(".answer:not(.waiting):not(.writing)", timeout=120_000)
    page.wait_for_timeout(35_000)  # a minute's curve begins to show
    page.fill("#input", FOLLOW_UP)
    page.press("#input", "Enter")
    page.mouse.move(300, 500)
    for _ in range(100):  # until there is something to read, 50 seconds at most
        page.wait_for_timeout(500)
        if len(page.inner_text(".answer:last-child .text")) > 420:
            break
    page.screenshot(path=str(path))


def main() -> int:
    """Serve, gather the crowd, chat, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/page.png"))
    parser.add_argument("--dark", action="store_true", help="the dark looks")
    parser.add_argument("--crowd", type=int, default=22, help="requests at a time")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    browser_path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    command = [sys.executable, "-m", "octavo", "serve", MODEL, "--port", str(PORT), *FLAGS]
    stop = threading.Event()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until_ready()
        for seed in range(args.crowd):
            rng = random.Random(seed)
            threading.Thread(target=ask, args=(rng, stop), daemon=True).start()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=browser_path, args=["--no-sandbox"]
            )
            looks: Any = "dark" if args.dark else "light"
            page = browser.new_page(viewport={"width": 1440, "height": 900}, color_scheme=looks)
            draw(page, args.output)
            browser.close()
    finally:
        stop.set()
        server.terminate()
        server.wait(60)
    print(f"{args.output}: {args.output.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
