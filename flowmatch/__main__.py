"""`python -m flowmatch`: the command `flowmatch`."""

from flowmatch.cli import main

if __name__ == "__main__":
    main()
