"""`python -m danceopd` is the `danceopd` program."""

from danceopd.cli import main

if __name__ == "__main__":
    main()
