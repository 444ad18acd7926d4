"""``python -m difftilt`` and ``torchrun -m difftilt``: the command line."""

from difftilt.cli import main

if __name__ == "__main__":
    main()
