"""What own extensions can be tested with."""

from metahpo.testing.checks import CHECKS as CHECKS
from metahpo.testing.learner_checks import LEARNER_CHECKS as LEARNER_CHECKS
from metahpo.testing.learners import check_learner as check_learner
from metahpo.testing.searchers import check_searcher as check_searcher
from metahpo.testing.subject import Subject as Subject
