"""Compare methods in one table: several seeds each, trained, attacked and audited the same way.

Runs are trained one after another, each in its own process: training times are comparable only if
runs do not share the machine, and peak memory can be measured only for a whole process. Each result
is saved as soon as it is known, so that a stopped comparison can continue.
"""

from surestep.comparing._compare import ATTACKS, compare, compare_runs
from surestep.comparing._table import Comparison, Failure, Number, Row, need_tabulate, save
from surestep.report.columns import COLUMNS

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
