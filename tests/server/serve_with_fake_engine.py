"""`octavo serve` with FakeCore behind it; takes the flags of `octavo serve`."""

import argparse
import sys

from octavo.cli import serve
from octavo.engine.config import ConfigError

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    serve.register(parser.add_subparsers())
    try:
        code = serve.run(parser.parse_args(["serve", *sys.argv[1:]]), core="fake_engine:FakeCore")
    except ConfigError as error:  # as octavo.cli.main does
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)
