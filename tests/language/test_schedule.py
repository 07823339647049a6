"""Questions that come at any time: who prepares how much, who is told what, and the end."""

import threading
import time

import pytest
from serving import busy, until

import fastvlm_mlx
from fastvlm_mlx.errors import FastVLMError, OptionError
from fastvlm_mlx.language.batch import Asked
from fastvlm_mlx.language.sampling import SamplingOptions

OPTIONS = SamplingOptions(max_tokens=12)


@pytest.fixture(scope="module")
def model(mlx_bundle):
    return fastvlm_mlx.load(mlx_bundle)


@pytest.fixture
def schedule(model):
    schedule = model.schedule(batch_size=2)
    yield schedule
    schedule.close()


def messages(text):
    return [{"role": "user", "content": text}]


def told_all(schedule, asked):
    """What each of several is told, once all have come to their end."""
    told = [[] for _ in asked]
    for each, to in zip(asked, told, strict=True):
        schedule.add(each, to.append)
    until(lambda: all(to and not isinstance(to[-1], str) for to in told))
    return told


def test_pieces_and_result_are_those_of_one_at_a_time(schedule, model):
    texts = [f"Count to {number}." for number in range(9)]
    told = told_all(schedule, [model.asked(messages(text), OPTIONS) for text in texts])
    for text, (*pieces, result) in zip(texts, told, strict=True):
        expected = model.generate(None, text, OPTIONS)
        assert "".join(pieces) == result.text == expected.text
        assert result.tokens == expected.tokens


def test_no_more_is_made_ready_than_there_will_soon_be_room_for(schedule, model):
    prepared, lock = [], threading.Lock()

    def counted(number):
        asked = model.asked(messages("Well?"), OPTIONS)

        def prepare():
            with lock:
                prepared.append(number)
            return asked.prepare()

        return Asked(prepare, asked.begin)

    with busy(model):
        tickets = [schedule.add(counted(number), lambda told: None) for number in range(30)]
        until(lambda: len(prepared) >= 4)
        time.sleep(0.2)
        assert len(prepared) <= 4
        for ticket in tickets[:20]:
            ticket.cancel()
    until(lambda: 29 in prepared)
    assert set(prepared[4:]) == set(range(20, 30))


def test_a_mistake_is_told_to_who_made_it(schedule, model):
    asked = [messages("Well?"), messages(" "), [], messages("Well?")]
    told = told_all(schedule, [model.asked(each, OPTIONS) for each in asked])
    assert [isinstance(to[-1], FastVLMError) for to in told] == [False, True, True, False]
    with pytest.raises(OptionError):
        model.schedule(batch_size=0)


def test_the_end_is_told_to_all_who_wait(model):
    schedule, told = model.schedule(1), []
    with busy(model):
        for _ in range(9):
            schedule.add(model.asked(messages("Well?"), OPTIONS), told.append)
        schedule.close()
    until(lambda: len(told) == 9)
    assert all(isinstance(each, FastVLMError) for each in told)
    with pytest.raises(FastVLMError, match="no more questions"):
        schedule.add(model.asked(messages("Well?"), OPTIONS), told.append)
    assert model.generate(None, "Well?", OPTIONS).text
