"""The campaign: a few hundred cases of a fixed seed, over every kind of input."""

import os

import pytest

from tests.fuzz.__main__ import causes, requests, table
from tests.fuzz.case import SHARES, Case
from tests.fuzz.pool import run_all
from tests.fuzz.stock import Stock

JOBS = 2 if (os.cpu_count() or 1) > 1 else 1


@pytest.fixture(scope="session")
def stock(demo_bundle, mlx_bundle, tmp_path_factory):
    directory = tmp_path_factory.mktemp("stock").resolve()
    return Stock.make(directory, {"app": demo_bundle, "mlx": mlx_bundle})


@pytest.mark.parametrize("seed", [1])
def test_nothing_is_found(stock, seed):
    results = list(run_all(requests(300, seed, SHARES), stock, jobs=JOBS))
    bad = [result for result in results if result.findings]
    assert not bad, f"\n{causes(bad)}\n{table(results)}"
    assert {result.request.kind for result in results} == set(SHARES)


@pytest.mark.parametrize("kind", [*SHARES])
def test_a_case_is_the_same_each_time(stock, tmp_path, kind):
    def files(name):
        case = Case(kind, 5, 3, tmp_path / name, stock)
        case.prepare()
        return {
            path.relative_to(case.directory): path.read_bytes()
            for path in sorted(case.directory.rglob("*"))
            if path.is_file() and not path.is_symlink() and path.name != "case.json"
        }, {key: value for key, value in case.facts.items() if key != "note"}

    assert files("first") == files("again")
