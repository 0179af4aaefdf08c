"""`python -m sdcompress`, and what the command `sdcompress` runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit. Ctrl-C during the imports ends it too."""
    try:
        from sdcompress.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the working folder: a `json.py` that lies there is not ours to import
    main()
