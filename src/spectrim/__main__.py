"""`python -m spectrim` is the same program as `spectrim`."""

from spectrim.cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
