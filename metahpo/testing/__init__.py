"""What own extensions can be tested with."""

from metahpo.testing.searchers import CHECKS as CHECKS
from metahpo.testing.searchers import Subject as Subject
from metahpo.testing.searchers import check_searcher as check_searcher
