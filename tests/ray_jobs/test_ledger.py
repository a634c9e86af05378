"""The ledger: each shard counts at most once, whatever happens."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_jobs.config import equal_share
from ray_jobs.ledger import Ledger, Part, Refused

SHARDS = [f"{i}.tar" for i in range(6)]
parts = st.lists(st.lists(st.sampled_from(SHARDS), min_size=1, max_size=4), max_size=12)


@given(parts)
def test_a_shard_counts_at_most_once_whatever_parts_come(offered: list[list[str]]) -> None:
    ledger, expected = Ledger(), set[str]()
    for number, shards in enumerate(offered):
        part = Part(f"part-{number}", tuple(shards), samples=len(shards))
        if len(set(shards)) == len(shards) and not expected & set(shards):
            ledger = ledger.commit(part)
            expected |= set(shards)
        else:
            with pytest.raises(ValueError, match="count already"):
                ledger.commit(part)
    counted = [s for part in ledger.parts for s in part.shards]
    assert sorted(counted) == sorted(expected)
    assert ledger.samples == len(counted)
    assert sorted([*ledger.left(SHARDS), *counted]) == SHARDS


def test_the_file_of_a_ledger_gives_it_back() -> None:
    ledger = Ledger().commit(Part("a", ("1.tar", "2.tar"), 7, (Refused("1.tar", "k", "decode", "truncated"),)))
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger


@given(st.integers(0, 1000), st.integers(1, 50))
def test_shares_of_a_limit_are_even_and_add_up(total: int, items: int) -> None:
    shares = [equal_share(total, item, items) or 0 for item in range(items)]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1
