"""`python -m sdcompress`, and what the command `sdcompress` runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit. Ctrl-C during the imports, and while Python ends, ends it too."""
    try:
        from sdcompress.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        import signal  # not above: a `signal.py` may lie in the working folder

        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the working folder: a `json.py` that lies there is not ours to import
    main()
