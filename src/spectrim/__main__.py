"""`python -m spectrim` is the same program as `spectrim`."""

from spectrim.cli.main import main

if __name__ == "__main__":
    main()
