"""Faults planted on purpose, one for each rule: what the campaign itself is tested with."""

from __future__ import annotations

import os
import shutil
import signal
import time
from typing import Any

from fastvlm_mlx.errors import ImageError
from tests.fuzz.case import Case
from tests.fuzz.stock import SECRET


def prepare(case: Case) -> None:
    case.source.mkdir()
    (case.source / "file.png").write_text("x")
    (case.source / "link").symlink_to(case.stock.outside / "secret.txt")
    case.facts = {"mutator": FAULTS[case.number % len(FAULTS)].__name__}


def run(case: Case) -> None:
    fault = {function.__name__: function for function in FAULTS}[case.facts["mutator"]]
    must_answer, must_fail = fault is refused, fault is accepted
    right = (3,) if fault is other_answer else ()
    case.step(
        "planted",
        lambda: fault(case),
        must_answer=must_answer,
        must_fail=must_fail,
        names="file.png",
        among=right,
    )


def good_error(case: Case) -> None:
    raise ImageError(f"{case.source / 'file.png'} is not an image: give one")


def good_answer(case: Case) -> int:
    return 3


def refused(case: Case) -> None:
    good_error(case)


def accepted(case: Case) -> None:
    pass


def other_answer(case: Case) -> int:
    return 4


def foreign(case: Case) -> None:
    {}["nothing"]


def panic(case: Case) -> None:
    raise BaseException("a panic is no Exception")


class RawError(ImageError):
    """One whose text is not made safe to print."""

    def __str__(self) -> str:
        return str(self.args[0])


def two_lines(case: Case) -> None:
    raise RawError("file.png is\nnot an image")


def escapes(case: Case) -> None:
    raise RawError("/file.png is \x1b[31mred")


def long(case: Case) -> None:
    raise RawError("file.png " * 1000)


def nameless(case: Case) -> None:
    raise ImageError("it did not work")


def other_name(case: Case) -> None:
    raise ImageError("/other.png is not an image")


def noise(case: Case) -> None:
    os.write(2, b"TIFFReadDirectory: Warning\n")


def source_changed(case: Case) -> None:
    (case.source / "file.png").write_text("y")


def outside_read(case: Case) -> Any:
    return (case.source / "link").stat().st_size and open(case.source / "link").close()


def secret_copied(case: Case) -> None:
    shutil.copyfile(case.source / "file.png", case.out / "copy")
    (case.out / "copy").write_text(SECRET)


def hang(case: Case) -> None:
    time.sleep(60)


def memory(case: Case) -> int:
    held = bytearray(3_000_000_000)
    # Resident only once it has been written to.
    held[::4096] = b"x" * len(held[::4096])
    return len(held)


def dies(case: Case) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


FAULTS = (
    *(good_error, good_answer, foreign, panic, two_lines, escapes, long, nameless, other_name),
    *(refused, accepted, other_answer),
    *(noise, source_changed, outside_read, secret_copied, hang, memory, dies),
)
