"""Every checker accepts right answers, and refuses each mistake of its table with the hint that it is there for."""

import answers_00_to_04
import answers_05_to_10
import answers_11
import answers_12
import pytest
import torch
from solutions import CHECKED, nb

from greedy_helpers.course import exercises
from greedy_helpers.course.exercises import common
from greedy_helpers.course.exercises.common import NotYet

ANSWERS = answers_00_to_04.ANSWERS | answers_05_to_10.ANSWERS | answers_11.ANSWERS | answers_12.ANSWERS
SOLVED = {checker: getattr(nb, name) for checker, name in CHECKED.items()}
RIGHT = [(name, right) for name, rows in ANSWERS.items() for right in rows if not isinstance(right, tuple)]
WRONG = [(name, *wrong) for name, rows in ANSWERS.items() for wrong in rows if isinstance(wrong, tuple)]
# a dictionary; in place
RETURN_NOTHING = {"check_purposes", "check_remove_channels", "check_remove_heads", "check_cut_units", "check_my_prune"}


def test_every_checker_has_a_solution_and_mistakes():
    assert {name for name, *_ in WRONG} == SOLVED.keys() == set(exercises.__all__) - {"NotYet"}


@pytest.mark.parametrize(("name", "right"), [*SOLVED.items(), *RIGHT])
def test_right_answers_are_accepted(name, right):
    assert getattr(exercises, name)(right).startswith("correct")


@pytest.mark.parametrize(("name", "wrong", "message"), WRONG)
def test_a_mistake_gets_its_hint(name, wrong, message):
    with pytest.raises(NotYet, match=f"(?s){message}"):
        getattr(exercises, name)(wrong)


@pytest.mark.parametrize("name", sorted(SOLVED.keys() - RETURN_NOTHING))
def test_nothing_is_no_answer(name):
    with pytest.raises(NotYet, match="found None"):
        getattr(exercises, name)(lambda *arguments: None)


def spoil(value):
    """Change what can be changed; whether something was."""
    if isinstance(value, torch.Tensor):
        value.copy_(~value if value.dtype == torch.bool else value + 1)
        return value.numel() > 0
    if isinstance(value, list | dict):
        full = bool(value)
        value.clear()
        return full
    return not callable(value) and hasattr(value, "__dict__") and any(spoil(part) for part in vars(value).values())


@pytest.mark.parametrize("name", sorted(SOLVED.keys() - RETURN_NOTHING))
def test_arguments_have_to_stay_as_they_are(name):
    for place in range(7):
        changed, message = [], ""

        def wrong(*arguments, place=place, changed=changed):
            found = SOLVED[name](*arguments)
            changed.append(place < len(arguments) and spoil(arguments[place]))
            return found

        try:
            getattr(exercises, name)(wrong)
        except NotYet as error:
            message = str(error)
        assert ("changed its arguments" in message) == any(changed)


@pytest.mark.parametrize(
    ("found", "right", "message"),
    [
        ([1.0], torch.ones(1), "expected a torch tensor, found list"),
        (torch.ones(2, 1), torch.ones(2), r"expected shape \[2\], found \[2, 1\]"),
        (torch.ones(2), torch.ones(2, dtype=torch.long), "expected dtype torch.int64, found torch.float32"),
        (torch.ones(2, dtype=torch.long), torch.ones(2), "expected dtype torch.float32, found torch.int64"),
        ("high", torch.tensor(1.0), "expected a number, found str"),
        (torch.ones(3), torch.tensor(1.0), r"expected one number, found shape \[3\]"),
        (torch.tensor(1.0), 1.0, r"expected a float \(of a tensor: .item\(\)\), found Tensor"),
        (1.0, 1, r"expected a whole number \(int\), found float"),
        (True, 1, r"expected a whole number \(int\), found bool"),
        (1, True, "expected True or False, found int"),
        ({1}, [1], "expected a list, found set"),
        ([1], {}, "expected dict, found list"),
        (torch.tensor([1.0, float("nan")]), torch.ones(2), r"what: expected \[1, 1\], found \[1, nan\]$"),
        (2.0, 1.0, "expected 1, found 2. Twice$"),
        (-1.0, 1.0, "expected 1, found -1. Negative$"),
        (3.0, 1.0, "expected 1, found 3. Whatever$"),
    ],
)
def test_compare_says_what_is_wrong(found, right, message):
    hints = ((2.0, "Twice"), (lambda x: x < 0, "Negative"), "Whatever") if isinstance(found, float) else ()
    with pytest.raises(NotYet, match=message):
        common.compare("what", found, right, *hints)


def test_compare_takes_other_floats_and_what_is_close():
    close = torch.ones(2).double() + 1e-7
    assert common.compare("what", close, torch.ones(2), (torch.ones(2), "no")).equal(close)
    assert common.compare("what", 3, torch.tensor(3.0)) == 3
    assert common.compare("what", (1, 2), [1, 2]) == [1, 2]
