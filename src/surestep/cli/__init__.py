"""The command line: ``surestep train``, ``evaluate``, ``audit`` and the others.

Commands import torch only when they run, so that help is instant.
"""

from surestep.cli._main import main

__all__ = ["main"]
