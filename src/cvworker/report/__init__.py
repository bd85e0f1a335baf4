"""Reports that people read: one HTML page that needs nothing beside it, with tables and pictures."""

from cvworker.report.charts import Bar, Line, bar_chart, line_chart, pictures_missing
from cvworker.report.page import Page

__all__ = ["Bar", "Line", "Page", "bar_chart", "line_chart", "pictures_missing"]
