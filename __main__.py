"""`python -m vit_export` is `vit-export`."""

from vit_export.cli import main

if __name__ == "__main__":
    main()
