"""The pictures of a search, one a file: data first, drawing apart."""

from metahpo.report.search_figures.front import draw_front as draw_front
from metahpo.report.search_figures.front import front as front
from metahpo.report.search_figures.history import draw_history as draw_history
from metahpo.report.search_figures.history import history as history
from metahpo.report.search_figures.importance import draw_importance as draw_importance
from metahpo.report.search_figures.importance import importance as importance
from metahpo.report.search_figures.looks import Words as Words
from metahpo.report.search_figures.parallel import draw_parallel as draw_parallel
from metahpo.report.search_figures.parallel import parallel as parallel
from metahpo.report.search_figures.rungs import draw_rungs as draw_rungs
from metahpo.report.search_figures.rungs import rungs as rungs
from metahpo.report.search_figures.slices import draw_slices as draw_slices
from metahpo.report.search_figures.slices import slices as slices
