"""Fixtures: every test that takes `isa` runs on each instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import attncore


@pytest.fixture(params=attncore.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    name = str(request.param)
    with attncore.use_isa(name):
        assert attncore.isa() == name
        yield name


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240607)
