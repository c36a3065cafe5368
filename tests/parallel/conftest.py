"""The ranks that all tests of this folder share."""

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """Four processes in one group; tasks may ask for the first two or three."""
    four = Ranks(4)
    yield four
    four.close()
