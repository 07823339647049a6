"""One server for the tests of this folder, and the official client of the API that it speaks."""

import pytest
from serving import client_of, serving

import fastvlm_mlx


@pytest.fixture(scope="session")
def model(mlx_bundle):
    return fastvlm_mlx.load(mlx_bundle, max_pixels=4_000_000)


@pytest.fixture(scope="session")
def running(model):
    with serving(model, client_timeout=1.0, max_body=2_000_000) as running:
        yield running


@pytest.fixture(scope="session")
def client(running):
    return client_of(running)
