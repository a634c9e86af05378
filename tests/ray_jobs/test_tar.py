"""Tars: the same samples as webdataset where all is well, and none lost where it is not."""

import io
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from patterns import UserError
from ray_jobs.config import Preprocessing
from ray_jobs.data import samples, tar_reader
from ray_jobs.data.samples import Sample
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader, read_shard
from tests.conftest import jpeg, make_shards

PLAIN = Preprocessing(image_size=16, resize=16, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
GNU, PAX, USTAR = tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT
Entry = tuple[str | tarfile.TarInfo, bytes]


def packed(entries: list[Entry], form: int = GNU) -> bytes:
    """A tar of files by name, or of any member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, errors="surrogateescape") as archive:
        for name, data in entries:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read(data: bytes) -> list[Sample]:
    """The samples of a tar's bytes, as every reader of shards has them."""
    return list(samples.reject_duplicates(tar_reader.read_samples(io.BytesIO(data))))


def stored(folder: Path, data: bytes) -> str:
    path = folder / "shard.tar"
    path.write_bytes(data)
    return str(path)


GOOD = {
    "as packed": ["a.jpg", "a.cls", "b.jpg", "b.cls"],
    "in folders": ["train/a.jpg", "train/a.cls", "test/a.jpg", "./x/y.z/c.jpg"],
    "several dots": ["a.left.jpg", "a.right.JPG", "a.seg.png", "b.json"],
    "not ascii": ["größe.jpg", "日本語.png", "a b.jpg"],
    "long names": ["d" * 90 + "/" + "n" * 60 + ".jpg", "d" * 90 + "/" + "n" * 60 + ".cls", "e" * 99 + ".jpg"],
    "passed over": ["README", "__meta__/x.json", "__keys__", "a.jpg", "a.cls"],
}


@pytest.mark.parametrize("form", [GNU, PAX])
@pytest.mark.parametrize("names", GOOD.values(), ids=GOOD)
def test_good_tars_give_what_webdataset_gives(tmp_path: Path, names: list[str], form: int) -> None:
    rng = np.random.default_rng(0)
    path = stored(tmp_path, packed([(name, rng.bytes(rng.integers(0, 3000))) for name in names], form))
    theirs = webdataset.WebDataset(path, shardshuffle=False)
    expected = [Sample(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in theirs]
    assert list(read_shard(path)) == expected
    assert expected


def test_hidden_files_directories_and_global_headers_are_passed_over() -> None:
    comment = tarfile.TarInfo.create_pax_global_header({"comment": "0" * 40})
    data = packed([(special("a", tarfile.DIRTYPE), b""), ("a/._b.jpg", b"x"), (".DS_Store", b"x"), ("a/b.jpg", b"1")])
    assert read(comment + data) == [Sample("a/b", {"jpg": b"1"})]


REFUSED: dict[str, tuple[list[Entry], str, str]] = {
    "leads out": ([("../b.jpg", b"x")], "../b", "leads out"),
    "leads out midway": ([("a/../../b.jpg", b"x")], "a/../../b", "leads out"),
    "absolute": ([("/etc/b.jpg", b"x")], "/etc/b", "leads out"),
    "control": ([("b\n.jpg", b"x")], "b\n", "control characters"),
    "hard link": ([(special("b.jpg", tarfile.LNKTYPE, "a.jpg"), b"")], "b", "a link or a device"),
    "link": ([(special("b.jpg", tarfile.SYMTYPE, "/etc/passwd"), b"")], "b", "a link or a device"),
    "device": ([(special("b.jpg", tarfile.CHRTYPE), b"")], "b", "a link or a device"),
    "link for a label": ([("b.jpg", b"x"), (special("b.cls", tarfile.SYMTYPE, "a.cls"), b"")], "b", "cls: a link"),
    "unknown type": ([(special("b.jpg", b"Q"), b"x")], "b", "unknown type"),
    "same again": ([("a.jpg", b"x"), ("a.cls", b"1")], "a#2", "same key"),
}


@pytest.mark.parametrize(("bad", "key", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_bad_member_is_refused_and_its_neighbours_are_kept(bad: list[Entry], key: str, reason: str) -> None:
    first, odd, last = read(packed([("a.jpg", b"1"), ("a.cls", b"1"), *bad, ("c.jpg", b"3")]))
    assert first == Sample("a", {"jpg": b"1", "cls": b"1"})
    assert (odd.key, last) == (key, Sample("c", {"jpg": b"3"}))
    assert odd.rejection is not None
    assert reason in odd.rejection


def test_of_samples_with_the_same_key_the_first_counts_wherever_the_others_are() -> None:
    names = ["a.jpg", "a.jpg", "b.jpg", "a.png", "c.jpg", "b.jpg"]
    found = read(packed([(name, str(i).encode()) for i, name in enumerate(names)]))
    assert [s.key for s in found] == ["a", "a#2", "b", "a#3", "c", "b#2"]
    assert [s.files.get("jpg") for s in found if s.rejection is None] == [b"0", b"2", b"4"]


def test_names_that_are_not_utf8_are_read_under_a_key_that_is() -> None:
    (sample,) = read(packed([("caf\udce9.jpg", b"1"), ("caf\udce9.cls", b"2")]))
    assert sample == Sample("caf\\xe9", {"jpg": b"1", "cls": b"2"})


def test_a_huge_member_is_passed_over_and_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_reader, "MAX_SAMPLE_BYTES", 2000)
    entries: list[Entry] = [("a.jpg", b"1"), ("b.jpg", bytes(3000)), ("b.cls", b"2"), ("c.jpg", b"3")]
    first, huge, last = read(packed(entries))
    assert (first.files["jpg"], last.files["jpg"]) == (b"1", b"3")
    assert "more than 2000 bytes" in (huge.rejection or "")
    assert huge.files["jpg"] == b""


def test_sparse_members_are_refused_in_each_of_their_formats() -> None:
    old = bytearray(packed([("b.jpg", bytes(512))])[:1024])
    old[156:157] = tarfile.GNUTYPE_SPARSE
    old[482] = 1  # a block more of the map
    more = bytes(512)
    info = tarfile.TarInfo("GNUSparseFile.0/b.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "b.jpg"}
    new = packed([("a.jpg", b"1"), (info, bytes(1024)), ("c.jpg", b"3")], PAX)
    start, end = packed([("a.jpg", b"1")])[:1024], packed([("c.jpg", b"3")])
    for data in (start + signed(old)[:512] + more + bytes(old[512:]) + end, new):
        first, sparse, last = read(data)
        assert (first.files["jpg"], sparse.key, last.files["jpg"]) == (b"1", "b", b"3")
        assert "sparse" in (sparse.rejection or "")


def signed(block: bytearray) -> bytes:
    """A header with the checksum that it should have."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


def extended(kind: bytes, data: bytes, size: int | None = None) -> bytes:
    block = bytearray(special("x", kind).tobuf())
    block[124:136] = tarfile.itn(len(data) if size is None else size, 12, GNU)
    return signed(block) + data + bytes(-len(data) % 512)


BROKEN = {
    "pax header of absurd size": (extended(b"x", b"", 1 << 40), "extended header of 1099511627776 bytes"),
    "long name of absurd size": (extended(b"L", b"", 1 << 40), "extended header of 1099511627776 bytes"),
    "global header of absurd size": (extended(b"g", b"", 1 << 40), "extended header of 1099511627776 bytes"),
    "long name without an end": (extended(b"L", b"abc"), "damaged extended header"),
    "pax record of no length": (extended(b"x", b"0 path=a\n"), "damaged extended header"),
    "pax record beyond its header": (extended(b"x", b"999 path=a\n"), "damaged extended header"),
    "pax size that is none": (extended(b"x", b"13 size=-100\n"), "a member's size is"),
    "member of absurd size": (extended(b"0", b"", 1 << 60), "cut short"),
    "member of negative size": (extended(b"0", b"", -5), "negative size"),
    "nothing": (b"", "end-of-archive mark"),
    "half a header": (bytes(100), "damaged"),
    "noise": (bytes(range(256)) * 4, "not a tar archive"),
}


@pytest.mark.parametrize(("data", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_archive_is_told_before_memory_is_spent(tmp_path: Path, data: bytes, reason: str) -> None:
    shard = stored(tmp_path, data + packed([("a.jpg", b"1")]) if data else b"")
    if reason in ("damaged", "end-of-archive mark"):
        shard = stored(tmp_path, data)
    with pytest.raises(UserError, match=reason) as told:
        list(read_shard(shard))
    assert told.value.where == shard


def test_a_damaged_header_midway_is_not_taken_for_the_end(tmp_path: Path) -> None:
    (path,) = make_shards(tmp_path, 1, 6)
    data = bytearray(Path(path).read_bytes())
    with tarfile.open(path) as archive:
        data[archive.getmembers()[5].offset + 130] ^= 1
    with pytest.raises(UserError, match="damaged"):
        list(read_shard(stored(tmp_path, bytes(data))))


def test_archives_joined_by_cat_are_not_read_by_half(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="joined by cat"):
        list(read_shard(stored(tmp_path, packed([("a.jpg", b"1")]) + packed([("b.jpg", b"1")]))))


def test_every_cut_of_an_archive_is_found(tmp_path: Path) -> None:
    data = packed([("a.jpg", b"1" * 700), ("a.cls", b"1"), ("b.jpg", b"2")])
    end = len(data.rstrip(b"\0"))
    marked = -(-end // 512) * 512 + 512  # all members, and a first block of zeros
    for cut in range(0, marked, 64):
        with pytest.raises(UserError, match="cannot be read"):
            list(read_shard(stored(tmp_path, data[:cut])))
    for cut in (marked, marked + 512, len(data)):
        assert len(list(read_shard(stored(tmp_path, data[:cut])))) == 2


# Fuzzing: what was touched may be refused, or the whole shard told as broken; nothing else may be lost.


@pytest.fixture(scope="module")
def archive() -> tuple[bytes, list[tarfile.TarInfo]]:
    """A small shard of JPEGs with labels, and its members."""
    rng = np.random.default_rng(0)
    names = [(f"s{i}", jpeg(rng)) for i in range(5)]
    data = packed([entry for key, image in names for entry in ((f"{key}.jpg", image), (f"{key}.cls", b"3"))])
    data = data[: len(data.rstrip(b"\0")) // 512 * 512 + 2048]
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        return data, opened.getmembers()


def noise(rng: random.Random, most: int = 40) -> bytes:
    return rng.randbytes(rng.randint(1, most))


def flipped(rng: random.Random, data: bytes, start: int, end: int, most: int = 8) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, most)):
        changed[rng.randrange(start, end)] ^= rng.randint(1, 255)
    return bytes(changed)


def untouched_or_broken(data: bytes, expected: list[Sample]) -> bool:
    """Whether a shard is told as broken; else all expected samples are seen to be in it, in order."""
    try:
        found = [s for s in read(data) if s.rejection is None]
    except samples.ShardError:
        return True
    keys = {s.key for s in expected}
    assert [s for s in found if s.key in keys] == expected
    return False


def test_whatever_one_images_bytes_are_all_other_samples_come_through(
    archive: tuple[bytes, list[tarfile.TarInfo]], tmp_path: Path
) -> None:
    data, members = archive
    rng = random.Random(1)
    expected = {b.keys[0]: b.images[0] for b in ShardReader(stored(tmp_path, data), ReaderConfig(PLAIN, 1))}
    refusals = 0
    for trial in range(1500):
        hit = members[rng.randrange(0, len(members), 2)]
        reader = ShardReader(
            stored(tmp_path, flipped(rng, data, hit.offset_data, hit.offset_data + hit.size)), ReaderConfig(PLAIN, 1)
        )
        found = {b.keys[0]: b.images[0] for b in reader}
        key = hit.name.removesuffix(".jpg")
        assert found.keys() | {r.key for r in reader.refused} == expected.keys(), trial
        assert {r.key for r in reader.refused} <= {key}
        assert all(found[k].equal(expected[k]) for k in expected.keys() - {key})
        refusals += len(reader.refused)
    assert 0 < refusals < 1500


def test_a_flipped_header_breaks_the_shard_or_touches_its_sample_alone(
    archive: tuple[bytes, list[tarfile.TarInfo]],
) -> None:
    data, members = archive
    original = read(data)
    rng = random.Random(2)
    broken = 0
    for _ in range(4000):
        hit = rng.choice(members)
        spared = [s for s in original if s.key != hit.name.split(".")[0]]
        broken += untouched_or_broken(flipped(rng, data, hit.offset, hit.offset + 512), spared)
    assert broken > 3900


def test_a_forged_header_breaks_the_shard_or_touches_its_sample_alone(
    archive: tuple[bytes, list[tarfile.TarInfo]],
) -> None:
    data, members = archive
    original = read(data)
    rng = random.Random(3)
    broken = 0
    for _ in range(4000):
        hit = rng.choice(members)
        block = bytearray(data[hit.offset : hit.offset + 512])
        start, end = rng.choice([(0, 100), (100, 124), (136, 148), (156, 157), (157, 257), (257, 265), (345, 512)])
        if rng.random() < 0.3:
            sizes = (0, 1, hit.size - 1, hit.size + 1, hit.size + 512, 1 << 30, 1 << 50, -1)
            block[124:136] = tarfile.itn(rng.choice(sizes), 12, GNU)
        else:
            block[start:end] = flipped(rng, bytes(block), start, end, 20)[start:end]
        forged = data[: hit.offset] + signed(block) + data[hit.offset + 512 :]
        broken += untouched_or_broken(forged, [s for s in original if s.key != hit.name.split(".")[0]])
    assert 500 < broken < 3500


def test_cut_filled_and_spliced_archives_are_broken_or_lose_what_was_cut_alone(
    archive: tuple[bytes, list[tarfile.TarInfo]],
) -> None:
    data, members = archive
    original = read(data)
    rng = random.Random(4)
    broken = 0
    for trial in range(3000):
        start = rng.randrange(len(data))
        end = min(len(data), start + rng.randint(1, 3000))
        touched = (start, end)
        if trial % 3 == 0:
            mutated = data[:start] + data[end:]
        elif trial % 3 == 1:
            mutated, touched = data[:start] + noise(rng, 1500) + data[start:], (start, start + 1)
        else:
            mutated = data[:start] + rng.randbytes(end - start) + data[end:]
        lost = {m.name.split(".")[0] for m in members if overlap(touched, m)}
        broken += untouched_or_broken(mutated, [s for s in original if s.key not in lost])
    assert broken > 1000


def overlap(touched: tuple[int, int], member: tarfile.TarInfo) -> bool:
    return touched[0] < member.offset_data + -(-member.size // 512) * 512 and member.offset < touched[1]
