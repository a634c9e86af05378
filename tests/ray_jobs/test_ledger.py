"""The ledger: each shard counts at most once per round, whatever happens."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from ray_jobs.data.shard_reader import equal_share
from ray_jobs.runs.ledger import Ledger, PartialMoments, combine_entries, format_numbers, parse_numbers

SHARDS = range(8)


class Fit(RuleBasedStateMachine):
    """Workers that write partial moments, are lost or late, and a driver that dies, with one ledger and its file.

    Shard s has 2 s + 1 samples.
    """

    parts = Bundle("parts")

    @initialize()
    def begin(self) -> None:
        self.ledger, self.file, self.written, self.round = Ledger(), json.dumps(Ledger().to_json()), 0, 0

    def part(self, shards: list[int]) -> PartialMoments:
        self.written += 1
        return PartialMoments(
            f"part-{self.written}", tuple(shards), sum(2 * s + 1 for s in shards), len(shards), self.round
        )

    @rule(target=parts, shards=st.lists(st.sampled_from(SHARDS), min_size=1, max_size=4, unique=True))
    def a_worker_writes_a_part(self, shards: list[int]) -> PartialMoments:
        return self.part(shards)

    @rule(part=parts)
    def the_driver_commits_a_part_or_rejects_a_late_part(self, part: PartialMoments) -> None:
        late = bool(self.ledger.counted_shards(part.round) & set(part.shards))
        early = part.round > 0 and not self.ledger.counted_shards() >= set(part.shards)
        if late or early:
            with pytest.raises(ValueError, match="count already" if late else "do not count yet"):
                self.ledger.commit(part)
        else:
            self.ledger = self.ledger.commit(part)

    @rule(part=consumes(parts))
    def a_lost_worker_loses_its_part(self, part: PartialMoments) -> None:
        pass

    @rule()
    def the_driver_writes_the_ledger(self) -> None:
        self.file = json.dumps(self.ledger.to_json())

    @rule()
    def the_driver_dies_and_another_reads_the_ledger(self) -> None:
        self.ledger = Ledger.from_json(json.loads(self.file))

    @rule(target=parts, data=st.data())
    def the_driver_merges_parts(self, data: st.DataObject) -> object:
        in_round = [part for part in self.ledger.entries if part.round == self.round]
        if len(in_round) < 2:
            return multiple()
        chosen = data.draw(st.lists(st.sampled_from(in_round), min_size=2, unique=True))
        merged = combine_entries(f"merged-{len(self.file)}-{self.written}", chosen)
        files, before = [part.file for part in chosen], self.ledger
        with pytest.raises(ValueError, match="is not the sum"):
            before.merge(files, replace(merged, samples=merged.samples + 1))
        with pytest.raises(ValueError, match="is not the sum"):
            before.merge([*files, "none"], merged)
        self.ledger = before.merge(files, merged)
        assert self.ledger.samples == before.samples
        assert self.ledger.counted_shards(self.round) == before.counted_shards(self.round)
        return multiple(*chosen)  # merged parts may come again, late

    @rule()
    def all_remaining_shards_are_done_and_rejected_samples_are_tried_again(self) -> None:
        if left := self.ledger.remaining(SHARDS, self.round):
            self.ledger = self.ledger.commit(self.part(left))
        whole = [part for part in self.ledger.entries if part.round == self.round]
        assert sorted(s for part in whole for s in part.shards) == list(SHARDS)
        assert sum(part.samples for part in whole) == sum(2 * s + 1 for s in SHARDS)
        self.the_driver_writes_the_ledger()  # before the manifest says that the round is over
        self.round += 1

    @invariant()
    def each_shard_counts_at_most_once_per_round(self) -> None:
        for round_ in range(self.round + 1):
            parts = [part for part in self.ledger.entries if part.round == round_]
            counted = [s for part in parts for s in part.shards]
            assert len(counted) == len(set(counted))
            assert self.ledger.counted_shards(round_) == set(counted)
            assert sorted([*self.ledger.remaining(SHARDS, round_), *counted]) == list(SHARDS)
            assert sum(part.samples for part in parts) == sum(2 * s + 1 for s in counted)

    @invariant()
    def the_file_holds_the_same_ledger(self) -> None:
        again = Ledger.from_json(json.loads(json.dumps(self.ledger.to_json())))
        assert again == Ledger(tuple(replace(p, shards=tuple(sorted(p.shards))) for p in self.ledger.entries))


TestFit = Fit.TestCase
TestFit.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (PartialMoments("b", (1, 1), 1), r"count already: \[1\]"),
        (PartialMoments("b", (2, 0), 1), r"count already: \[0\]"),
        (PartialMoments("b", (5,), 1, round=1), "do not count yet"),
    ],
    ids=["twice in one part", "counted before", "tried again before it counts"],
)
def test_part_that_would_count_a_shard_twice_is_rejected(wrong: PartialMoments, message: str) -> None:
    ledger = Ledger().commit(PartialMoments("a", (0, 3), 7))
    with pytest.raises(ValueError, match=message):
        ledger.commit(wrong)
    assert ledger.commit(PartialMoments("b", (1,), 1)).samples == 8


@given(st.sets(st.integers(0, 200)))
def test_numbers_are_written_as_ranges_and_read_back(chosen: set[int]) -> None:
    assert list(parse_numbers(format_numbers(chosen))) == sorted(chosen)


def test_ranges_have_inclusive_ends() -> None:
    assert format_numbers([7, 0, 1, 2, 4, 5]) == "0-2,4-5,7"


def test_ledger_of_a_hundred_thousand_shards_is_small() -> None:
    ledger = Ledger()
    for worker in range(64):
        ledger = ledger.commit(
            PartialMoments(f"part-{worker:032x}.safetensors", tuple(range(worker, 100_000, 64)), 1_000_000)
        )
    assert len(json.dumps(ledger.to_json())) < 1_000_000
    names = tuple(part.file for part in ledger.entries)
    merged = ledger.merge(names, combine_entries("part-merged.safetensors", ledger.entries))
    assert len(json.dumps(merged.to_json())) < 200


@given(st.integers(0, 1000), st.integers(1, 50))
def test_shares_of_a_limit_differ_by_at_most_one_and_add_up(total: int, items: int) -> None:
    shares = [equal_share(total, item, items) or 0 for item in range(items)]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1
