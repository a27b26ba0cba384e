"""Make docs/running.svg: what a terminal shows when Octavo serves SmolLM2 and answers a request.

Every answer in it comes from the commands themselves, run here and now.
"""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.text import Text

PORT = 8765
MODEL = "smollm2-135m"
QUESTION = "What is the capital of France?"


def main() -> int:
    """Serve, ask once over HTTP and once over the command line, and draw what was printed."""
    console = Console(record=True, width=110, file=Path("/dev/null").open("w"))
    command = [sys.executable, "-m", "octavo", "serve", MODEL, "--port", str(PORT)]
    prompt(console, f"octavo serve {MODEL} --port {PORT}")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        assert server.stdout is not None
        for line in server.stdout:
            console.print(Text(line.rstrip()), overflow="ellipsis", no_wrap=True)
            if line.startswith("try:"):
                break
        url = f"http://127.0.0.1:{PORT}/v1/chat/completions"
        body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        prompt(console, f"curl -s {url} -H 'Content-Type: application/json' \\")
        prompt(console, f"    -d '{json.dumps(body)}' \\", "  ")
        prompt(console, "    | jq -r '.choices[0].message.content'", "  ")
        request = urllib.request.Request(url, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        answer = json.load(urllib.request.urlopen(request, timeout=60))
        console.print(Text(answer["choices"][0]["message"]["content"]))
        server.terminate()
    generate = ["generate", MODEL, "--prompt", "Once upon a time", "--max-tokens", "24"]
    prompt(console, "octavo generate " + " ".join(generate[1:3]) + ' "Once upon a time" ...')
    run = [sys.executable, "-m", "octavo", *generate, "--temperature", "0"]
    console.print(Text(subprocess.run(run, capture_output=True, text=True).stdout.strip()))
    Path("docs/running.svg").write_text(console.export_svg(title="octavo"))
    return 0


def prompt(console: Console, command: str, before: str = "$ ") -> None:
    """A command line as somebody would type it."""
    console.print(Text(before, "green") + Text(command, "bold"), overflow="ellipsis", no_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
