"""``python -m specmoe``."""

from specmoe.cli import main

if __name__ == "__main__":
    main()
