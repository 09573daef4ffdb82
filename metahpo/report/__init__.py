"""Tables and pictures of a run: data first, drawing apart."""

from metahpo.report.page import write_report as write_report
