"""The memory that macOS leaves alone while answers are decoded."""

import mlx.core as mx
import pytest

import fastvlm_mlx
from fastvlm_mlx.language.wired_memory import wired


@pytest.fixture
def limits(monkeypatch):
    """A machine with a limit, which stood at 7 bytes: every change of it."""
    changes = [7]

    def change(limit):
        changes.append(limit)
        return changes[-2]

    size = {"max_recommended_working_set_size": 1000}
    monkeypatch.setattr(mx, "device_info", lambda: size)
    monkeypatch.setattr(mx, "set_wired_limit", change)
    return changes


def test_of_two_at_once_the_last_lowers_it(limits):
    first, second = wired(iter("ab")), wired(iter("cd"))
    assert limits == [7]
    assert next(first) + next(second) == "ac"
    assert limits == [7, 1000]
    assert list(first) == ["b"]
    assert limits == [7, 1000]
    second.close()
    assert limits == [7, 1000, 7]


def test_an_error_lowers_it(limits):
    with pytest.raises(ZeroDivisionError):
        list(wired(1 / n for n in (1, 0)))
    assert limits == [7, 1000, 7]


def test_an_answer_raises_it(limits, demo_bundle):
    model = fastvlm_mlx.load(demo_bundle)
    assert model.generate(None, "Hello", max_tokens=2).generation_tokens
    assert limits == [7, 1000, 7]
