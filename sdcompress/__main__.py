"""`python -m sdcompress`"""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the working folder: a `json.py` that lies there is not ours to import
    from sdcompress.cli import main

    main()
