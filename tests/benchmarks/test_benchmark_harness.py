"""The benchmarks' own machinery: turns, failures of a contender, the check that both sides compute the same."""

import os

import click
import pytest

from benchmarks.harness import Call, Contender, Spread, ratio, take_turns
from benchmarks.step import check_agreement


def make_counter(start):
    count = start

    def step():
        nonlocal count
        count += 1
        return count

    return step


def make_failure():
    return lambda: 1 / 0


def make_exit():
    return lambda: os._exit(7)


def test_turns_alternate_and_leave_out_their_first_call():
    with Contender("a", make_counter, 0) as a, Contender("b", make_counter, 100) as b:
        results = take_turns([a, b], turns=2, calls=2)
    assert [[[call.value for call in turn] for turn in turns] for turns in results] == [
        [[2, 3], [5, 6]], [[102, 103], [105, 106]],
    ]  # fmt: skip
    assert all(call.seconds > 0 for turns in results for turn in turns for call in turn)


def test_a_failure_is_reported_with_its_cause():
    with Contender("a", make_failure) as a, pytest.raises(RuntimeError, match=r"(?s)^a:.*ZeroDivisionError"):
        a.call(1)


def test_an_end_is_reported_with_its_code():
    with Contender("a", make_exit) as a, pytest.raises(RuntimeError, match=r"^a: its process ended with code 7"):
        a.call(1)


def test_ratio_compares_neighbouring_turns():
    # The machine is ten times slower in the second turn, for both.
    slower, faster = ([[Call(s, 0.0, None)] for s in seconds] for seconds in ([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]))
    assert ratio(slower, faster) == Spread(2.0, 2.0, 2.0)


@pytest.mark.parametrize("losses", [[2.0], [2.0, 2.0001]])
def test_agreement(losses):
    check_agreement(losses)


@pytest.mark.parametrize("losses", [[2.0, 2.001], [float("nan")], [2.0, float("nan")], [float("nan"), float("nan")]])
def test_disagreement_stops_the_benchmark(losses):
    with pytest.raises(click.ClickException, match="losses of the first step differ"):
        check_agreement(losses)
