"""Methods side by side: several seeds each, trained, attacked and audited alike, in one table.

Runs are trained one after another, each in a process of its own: seconds are only comparable
if runs do not share the machine, and peak memory can only be told of a whole process. What is
known of a run is kept as soon as it is known, so that a comparison that was stopped goes on.
"""

from surestep.comparing._compare import ATTACKS, compare, compare_runs
from surestep.comparing._table import (
    COLUMNS,
    Comparison,
    Failure,
    Number,
    Row,
    need_tabulate,
    save,
)

__all__ = [
    "ATTACKS",
    "COLUMNS",
    "Comparison",
    "Failure",
    "Number",
    "Row",
    "compare",
    "compare_runs",
    "need_tabulate",
    "save",
]
