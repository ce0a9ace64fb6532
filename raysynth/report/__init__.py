"""What a person looks at: the contact sheet of real beside synthetic images, and the page that says whether they
helped.

`sheet` reads artifacts; `page` is given a `ReportData` by the stage and knows no artifact, no Ray and no network.
"""

from raysynth.report.data import ReportData
from raysynth.report.downloads import write_tables
from raysynth.report.gather import show_answer, write_report
from raysynth.report.page import render_page
from raysynth.report.sheet import contact_sheet, draw_sheet, write_contact_sheet

__all__ = [
    "ReportData", "contact_sheet", "draw_sheet", "render_page", "show_answer", "write_contact_sheet", "write_report",
    "write_tables",
]  # fmt: skip
