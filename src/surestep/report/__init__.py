"""Reports: charts for notebooks, and one page with all that is known about a model.

Charts and pages need the extra ``report`` (altair, vl-convert-python, jinja2); importing this
package does not.
"""

from surestep.report import charts
from surestep.report._gather import gather
from surestep.report._needs import require
from surestep.report._report import Report, save_plots, write_html
from surestep.report._save import save_chart

__all__ = ["Report", "charts", "gather", "require", "save_chart", "save_plots", "write_html"]
