"""The command line: ``surestep train | evaluate | demo | methods | env``.

Commands import torch only when they run, so that help is instant.
"""

from surestep.cli._main import main

__all__ = ["main"]
