from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.entrypoints.served import Served, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """One server for the tests of a module that leave it as they found it."""
    with serving() as it:
        yield it
