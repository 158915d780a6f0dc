"""`python -m mfp` is the command `mfp`."""

from mfp.cli import main

if __name__ == "__main__":
    main()
