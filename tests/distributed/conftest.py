"""Four processes for all tests of this folder."""

import pytest
from support.ranks import RankPool


@pytest.fixture(scope="session")
def pool():
    ranks = RankPool(4)
    yield ranks
    ranks.close()
