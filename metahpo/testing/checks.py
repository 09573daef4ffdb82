"""What a study counts on in a searcher, one function each; AssertionError says what was found and what to do."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Sequence

import numpy as np

from metahpo.errors import SearchError
from metahpo.searchers.base import History, Searcher
from metahpo.searchers.records import TrialRecord
from metahpo.searchers.study import Study
from metahpo.testing.problems import (
    CONDITIONAL,
    CONDITIONAL_STEPPED,
    CONTINUOUS,
    FIXED,
    ONE,
    STEPPED,
    TINY,
    bowl,
    extreme,
    failing,
    flat,
    hopeless,
    two,
)
from metahpo.testing.running import ENDLESS, Order, Ordered, difference, opened_anew, run, told
from metahpo.testing.subject import Subject, all_tried

# In which order the results of trials that are at work at once may arrive.
ORDERS: dict[str, Order] = {
    "the first to begin ends first": lambda n: 0,
    "the last to begin ends first": lambda n: n - 1,
}


def has_a_name(subject: Subject) -> None:
    """Its repr tells its options, by which a study knows it again; and the options are plain values."""
    searcher, text = subject.searcher, repr(subject.searcher)
    assert " object at 0x" not in text and text == repr(subject.fresh()), (
        f"its repr {text} is not the same for an equal searcher, so no study could be resumed; make it a dataclass"
    )
    assert type(searcher).__repr__ is not Searcher.__repr__ or not vars(searcher), (
        f"its repr {text} does not tell {', '.join(vars(searcher))}, so a study would be gone on with by another "
        "searcher; make it a dataclass"
    )
    try:
        json.dumps(searcher.options())
    except (TypeError, ValueError) as error:
        raise AssertionError(f"options() should give plain values: {error}") from error


def stays_in_the_space(subject: Subject) -> None:
    """Suggests values of the right type, inside the bounds and on the steps."""
    for space in (subject.space, CONTINUOUS, STEPPED, ONE, FIXED):
        if subject.takes(space):
            # The study refuses what is outside, and takes NumPy's numbers as plain ones.
            _ = subject.reference if space is subject.space else subject.run(space, bowl(space))


def follows_conditions(subject: Subject) -> None:
    """Suggests a setting exactly where it exists, to several workers too."""
    for space, workers in ((CONDITIONAL, 4), (CONDITIONAL_STEPPED, 1)):
        if subject.takes(space):
            subject.run(space, bowl(space), workers=workers)


def follows_the_seed(subject: Subject) -> None:
    """Suggests the same trials with the same seed, others with another."""
    again = subject.run(subject.space, bowl(subject.space))
    if found := difference(subject.reference, again):
        raise AssertionError(
            f"trial {found[0]} is {found[1]} in one search and {found[2]} in another with the same seed; "
            "all randomness should come from rng"
        )
    other = subject.run(subject.space, bowl(subject.space), seed=1)
    assert subject.deterministic or difference(subject.reference, other), (
        "the trials are the same with another seed; randomness should come from rng (if there is none, as in a grid: "
        "check_searcher(..., deterministic=True))"
    )


def keeps_no_state(subject: Subject) -> None:
    """Suggests the same from the same history whatever it was asked before, and leaves the history as it is."""
    used, space = subject.fresh(), subject.space
    with Study(space, subject.fresh()) as study:
        study.optimize(bowl(space), subject.trials, max_failures=ENDLESS)
        observations = list(study.history())
    for end in (0, len(observations), len(observations) // 2, len(observations)):
        history = History(copy.deepcopy(observations[:end]))
        first = used.suggest(history, space, np.random.default_rng([0, end]))
        assert list(history) == observations[:end], "it changed the history that it was given"
        fresh = subject.fresh().suggest(History(observations[:end]), space, np.random.default_rng([0, end]))
        assert repr(first) == repr(fresh), (
            f"from the same history of {end} trials it suggests {first} after it had suggested others before, and "
            f"{fresh} when it is new; it should follow from the arguments alone (see Searcher)"
        )


def resumes(subject: Subject) -> None:
    """A study that is closed and opened anew, with a new searcher, goes on as if nothing had been."""
    objective = bowl(subject.space)
    study = Study(subject.space, subject.fresh())
    for cut in sorted({1, 4, subject.trials // 2, subject.trials - 1, subject.trials}):
        with opened_anew(study, subject.fresh()) as study:
            study.optimize(objective, cut, Ordered(), max_failures=ENDLESS)
        if found := difference(subject.reference[:cut], study.trials):
            raise AssertionError(
                f"trial {found[0]} is {found[1]} in one go and {found[2]} in a study that was closed and opened "
                "again; what the searcher needs later belongs in Proposal.notes, in plain values"
            )


def bears_failures(subject: Subject) -> None:
    """Goes on after trials that raise or give NaN, also when all do."""
    _budgets(subject, subject.run(subject.space, failing(subject.space)))
    subject.run(subject.space, hopeless)


def bears_equal_losses(subject: Subject) -> None:
    subject.run(subject.space, flat)


def bears_extreme_losses(subject: Subject) -> None:
    """Losses from -1e200 to 1e200."""
    subject.run(subject.space, extreme)


def takes_several_objectives(subject: Subject) -> None:
    """``Observation.loss`` is then a weighted one, with other weights each time."""
    subject.run(subject.space, two(subject.space), directions=("minimize", "maximize"))


def works_in_parallel(subject: Subject) -> None:
    """Suggests the same trials to four workers in whatever order their results arrive, and no two at work the same."""
    space = CONTINUOUS if subject.takes(CONTINUOUS) else subject.space
    ran = random.Random(0)
    orders = {**ORDERS, "in a random order": lambda n: ran.randrange(n)}
    runs = {name: subject.run(space, bowl(space), workers=4, order=order) for name, order in orders.items()}
    (named, reference), *others = runs.items()
    for name, records in others:
        if found := difference(reference, records):
            raise AssertionError(
                f"with four workers trial {found[0]} is {found[1]} when {named}, and {found[2]} when {name}; it should "
                "follow from the history that suggest() is given alone"
            )
    if space is CONTINUOUS:
        new = [json.dumps(record.settings) for record in reference if record.parent is None]
        twice = next((i for i, settings in enumerate(new) if settings in new[max(0, i - 3) : i]), None)
        assert twice is None, (
            f"with four workers it suggested {new[twice or 0]} twice at a time; trials at work are history.pending"
        )


def answers_before_it_is_told(subject: Subject) -> None:
    """By ``ask`` and ``tell``: several trials at the start, told last to first, some with settings of the user's."""
    space = subject.space
    objective = bowl(space)
    with Study(space, subject.fresh()) as study:
        by_hand = space.sample(np.random.default_rng(5))
        at_work = [study.ask(by_hand)]
        for _ in range(subject.trials // 3):
            for _ in range(4):
                try:
                    at_work.append(study.ask())
                except SearchError:
                    assert at_work, "it suggests nothing although no trial is at work"
                    break
            while len(at_work) > 1:
                trial = at_work.pop()
                study.tell(trial, objective(trial))


def ends_well(subject: Subject) -> None:
    """Where there are few settings it goes on, or ends when all were tried."""
    if not subject.takes(TINY):
        return
    records = run(subject.fresh(), TINY, bowl(TINY), 4 * len(list(TINY.grid())))
    assert len(records) == 24 or all_tried(TINY, records), (
        f"it ended after {len(records)} trials, when it had not tried all {len(list(TINY.grid()))} settings"
    )


def keeps_to_budgets(subject: Subject) -> None:
    """Budgets are positive and at most the largest; a trial that goes on from another has its settings, and more."""
    for workers in (1, 4):
        _budgets(subject, subject.run(subject.space, bowl(subject.space), 2 * subject.trials, workers=workers))


def _budgets(subject: Subject, records: Sequence[TrialRecord]) -> None:
    most = subject.max_budget or math.inf
    for record in records:
        what = f"trial {record.number}, {told(record)}"
        if record.budget is not None:
            assert 0 < record.budget <= most and math.isfinite(record.budget), (
                f"{what}: the budget should be above 0 and at most {most}"
            )
        if record.parent is None:
            continue
        parent = records[record.parent]
        assert parent.state == "complete", f"{what}: its parent has failed, there is nothing to go on from"
        assert json.dumps(parent.settings) == json.dumps(record.settings), f"{what}: its parent is {told(parent)}"
        assert (parent.budget or math.inf) < (record.budget or math.inf), (
            f"{what}: its parent was trained for {parent.budget}, so this adds nothing"
        )
        if parent.clock and record.clock:
            assert parent.clock[1] <= record.clock[0], f"{what}: its parent is still at work (history.pending)"


CHECKS: tuple[Callable[[Subject], None], ...] = (
    has_a_name,
    stays_in_the_space,
    follows_conditions,
    follows_the_seed,
    keeps_no_state,
    resumes,
    bears_failures,
    bears_equal_losses,
    bears_extreme_losses,
    takes_several_objectives,
    works_in_parallel,
    answers_before_it_is_told,
    ends_well,
    keeps_to_budgets,
)
