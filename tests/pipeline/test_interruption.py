"""Work on a second thread beside an export's: it is waited for, and ends when the export does."""

import threading

import pytest

from model_export.interruption import beside


def test_work_beside_runs_on_another_thread_and_is_waited_for():
    told, release = [], threading.Event()

    def work(progress):
        release.wait()
        progress("halfway", 0.5)
        return threading.current_thread()

    with beside(lambda *stage: told.append(stage)) as start:
        future = start(work)
        assert not future.done()
        release.set()
    assert future.done()
    assert future.result() is not threading.current_thread()
    assert told == [("halfway", 0.5)]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_work_ends_at_its_next_word_when_the_caller_fails(failure):
    reached, steps, told = threading.Event(), [], []

    def work(progress):
        reached.set()
        for step in range(10_000):
            threading.Event().wait(0.001)
            progress("work", step / 10_000)
            steps.append(step)

    futures = []

    def fail():
        with beside(lambda *stage: told.append(stage)) as start:
            futures.append(start(work))
            reached.wait()
            raise failure

    with pytest.raises(failure):
        fail()
    assert futures[0].done()
    assert len(steps) == len(told) < 10_000


def test_an_error_of_the_work_is_its_futures():
    def work(progress):
        raise OSError("full")

    with beside(lambda name, done: None) as start:
        future = start(work)
    with pytest.raises(OSError, match="full"):
        future.result()
