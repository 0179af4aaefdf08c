"""`python -m sdcompress`"""

from sdcompress.cli import main

if __name__ == "__main__":
    main()
