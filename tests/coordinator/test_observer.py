"""Several observers hear of everything, one after the other."""

import inspect

from coordinator.observer import Observer, Observers
from coordinator.rounds import Answer, Round, RoundObservers

ROUND = Round("attend", 0, 1, 1, 0, 1, 10, (Answer(1, 0, 5, 10, 4),), ("a:1",), b"")
HOOKS = [name for name, _ in inspect.getmembers(Observer, inspect.isfunction)]


class Recorder(Observer):
    def __init__(self, heard: list[tuple[object, ...]], number: int) -> None:
        for name in HOOKS:
            setattr(self, name, lambda *arguments, name=name: heard.append((number, name, *arguments)))


def test_each_hook_is_passed_on_to_all_in_order() -> None:
    heard: list[tuple[object, ...]] = []
    observers = Observers(Recorder(heard, number) for number in range(2))
    for name in HOOKS:
        arguments = list(range(len(inspect.signature(getattr(Observer, name)).parameters) - 1))
        getattr(observers, name)(*arguments)
        assert heard == [(0, name, *arguments), (1, name, *arguments)]
        heard.clear()
    assert len(HOOKS) == 8


def test_rounds_are_told_to_whoever_listens_at_present_and_nobody_is_false() -> None:
    observers, heard = RoundObservers(), list[Round]()
    assert not observers
    observers.append(heard.append)
    assert observers
    observers(ROUND)
    observers.remove(heard.append)
    observers(ROUND)
    assert heard == [ROUND]
    assert not observers
