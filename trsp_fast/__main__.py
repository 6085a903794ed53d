"""`python -m trsp_fast`."""

from trsp_fast.cli import main

if __name__ == "__main__":
    main()
