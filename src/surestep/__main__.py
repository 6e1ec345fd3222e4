"""``python -m surestep``, which torchrun can start."""

from surestep.cli import main

if __name__ == "__main__":
    main()
