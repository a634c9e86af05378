"""Tar archives: good archives give the samples of WebDataset, and damage is reported and loses no other sample."""

import gzip
import io
import random
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from patterns import UserError
from ray_jobs.config import Preprocessing
from ray_jobs.data import samples, tar_reader, verified_tar
from ray_jobs.data.samples import Sample
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader, read_shard
from tests.conftest import jpeg, make_shards

PLAIN = Preprocessing(image_size=16, resize=16, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
GNU, PAX, USTAR = tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT
Entry = tuple[str | tarfile.TarInfo, bytes]


def packed(entries: list[Entry], form: int = GNU) -> bytes:
    """Return a tar archive of files by name or of arbitrary members."""
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
    """Return the samples in the bytes of an archive."""
    return list(samples.reject_duplicates(map(Sample.of, tar_reader.read_samples(io.BytesIO(data)))))


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
    "skipped files": ["README", "__meta__/x.json", "__keys__", "a.jpg", "a.cls"],
}


@pytest.mark.parametrize("form", [GNU, PAX])
@pytest.mark.parametrize("names", GOOD.values(), ids=GOOD)
def test_good_archives_give_the_samples_of_webdataset(tmp_path: Path, names: list[str], form: int) -> None:
    rng = np.random.default_rng(0)
    path = stored(tmp_path, packed([(name, rng.bytes(rng.integers(0, 3000))) for name in names], form))
    theirs = webdataset.WebDataset(path, shardshuffle=False)
    expected = [Sample(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in theirs]
    assert list(read_shard(path)) == expected
    assert expected


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cc", "Cs"]), min_size=1)
STEMS = WORDS.filter(lambda word: "." not in word and not word.startswith("__"))
EXTENSIONS = WORDS.filter(lambda word: not word.startswith("__") and "." not in (word[0], word[-1]))
FOLDERS = st.lists(WORDS.filter(lambda word: word.strip(".") and not word.startswith("__")), max_size=2)
# Runs of members with one key and different extensions, each followed by names that are no samples.
RUNS = st.tuples(
    st.builds(lambda folders, stem: "/".join([*folders, stem]), FOLDERS, STEMS),
    st.lists(EXTENSIONS, min_size=1, max_size=3, unique_by=str.lower),
    st.lists(st.sampled_from(["README", "__meta__/x.json", "__info__", "a/b"]), max_size=1),
)


@pytest.mark.full
@given(
    st.lists(RUNS, max_size=4, unique_by=lambda run: run[0]), st.sampled_from([GNU, PAX]), st.booleans(), st.randoms()
)
def test_samples_of_random_sound_archives_are_those_of_webdataset(
    runs: list[tuple[str, list[str], list[str]]], form: int, zipped: bool, rng: random.Random
) -> None:
    names = [n for key, extensions, skipped in runs for n in (*(f"{key}.{e}" for e in extensions), *skipped)]
    data = packed([(name, rng.randbytes(rng.randrange(2000))) for name in names], form)
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        file.write(gzip.compress(data) if zipped else data)
        file.flush()
        shards = webdataset.SimpleShardList([file.name, file.name])
        ours, theirs = (
            list(webdataset.DataPipeline(shards, stage)) for stage in (verified_tar, webdataset.tarfile_to_samples())
        )
    assert ours == theirs
    assert [sample["__key__"] for sample in ours] == 2 * [key for key, _, _ in runs]


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=120),
    st.integers(0, 1 << 40),
    st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_LONGNAME]),
    st.sampled_from([GNU, PAX]),
)
def test_headers_are_parsed_as_by_tarfile(name: str, size: int, kind: bytes, form: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    data = info.tobuf(form)
    for block in (data[first : first + 512] for first in range(0, len(data), 512)):
        try:
            expected = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            with pytest.raises(samples.ShardError):
                tar_reader.parse_header(block)
        else:
            found = tar_reader.parse_header(block)
            name = found.name.rstrip("/") if found.type == tarfile.DIRTYPE else found.name
            assert (name, found.size, found.type) == (expected.name, expected.size, expected.type)


def test_hidden_files_directories_and_global_headers_are_skipped() -> None:
    comment = tarfile.TarInfo.create_pax_global_header({"comment": "0" * 40})
    folders: list[Entry] = [(special(name, tarfile.DIRTYPE), b"") for name in ("a", "a.v1", f"{'long' * 40}.v2")]
    data = packed([*folders, ("a/._b.jpg", b"x"), (".DS_Store", b"x"), ("a/b.jpg", b"1")])
    assert read(comment + data) == [Sample("a/b", {"jpg": b"1"})]


REJECTED: dict[str, tuple[list[Entry], str, str]] = {
    "parent folder": ([("../b.jpg", b"x")], "../b", "leaves the folder"),
    "parent folder inside": ([("a/../../b.jpg", b"x")], "a/../../b", "leaves the folder"),
    "absolute": ([("/etc/b.jpg", b"x")], "/etc/b", "leaves the folder"),
    "control": ([("b\n.jpg", b"x")], "b\n", "control characters"),
    "hard link": ([(special("b.jpg", tarfile.LNKTYPE, "a.jpg"), b"")], "b", "a link or a device"),
    "link": ([(special("b.jpg", tarfile.SYMTYPE, "/etc/passwd"), b"")], "b", "a link or a device"),
    "device": ([(special("b.jpg", tarfile.CHRTYPE), b"")], "b", "a link or a device"),
    "link for a label": ([("b.jpg", b"x"), (special("b.cls", tarfile.SYMTYPE, "a.cls"), b"")], "b", "cls: a link"),
    "unknown type": ([(special("b.jpg", b"Q"), b"x")], "b", "unknown type"),
    "same again": ([("a.jpg", b"x"), ("a.cls", b"1")], "a#2", "same key"),
}


@pytest.mark.parametrize(("bad", "key", "reason"), REJECTED.values(), ids=REJECTED)
def test_bad_member_is_rejected_and_its_neighbors_are_kept(bad: list[Entry], key: str, reason: str) -> None:
    first, odd, last = read(packed([("a.jpg", b"1"), ("a.cls", b"1"), *bad, ("c.jpg", b"3")]))
    assert first == Sample("a", {"jpg": b"1", "cls": b"1"})
    assert (odd.key, last) == (key, Sample("c", {"jpg": b"3"}))
    assert odd.rejection is not None
    assert reason in odd.rejection


def test_only_the_first_of_several_samples_with_one_key_is_used() -> None:
    names = ["a.jpg", "a.jpg", "b.jpg", "a.png", "c.jpg", "b.jpg"]
    found = read(packed([(name, str(i).encode()) for i, name in enumerate(names)]))
    assert [s.key for s in found] == ["a", "a#2", "b", "a#3", "c", "b#2"]
    assert [s.files.get("jpg") for s in found if s.rejection is None] == [b"0", b"2", b"4"]


def test_names_that_are_not_utf8_get_printable_keys() -> None:
    (sample,) = read(packed([("caf\udce9.jpg", b"1"), ("caf\udce9.cls", b"2")]))
    assert sample == Sample("caf\\xe9", {"jpg": b"1", "cls": b"2"})


def test_huge_member_is_rejected_without_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_reader, "MAX_SAMPLE_BYTES", 2000)
    entries: list[Entry] = [("a.jpg", b"1"), ("b.jpg", bytes(3000)), ("b.cls", b"2"), ("c.jpg", b"3")]
    first, huge, last = read(packed(entries))
    assert (first.files["jpg"], last.files["jpg"]) == (b"1", b"3")
    assert "more than 2000 bytes" in (huge.rejection or "")
    assert huge.files == {}


def test_sparse_members_of_every_format_are_rejected() -> None:
    old = bytearray(packed([("b.jpg", bytes(512))])[:1024])
    old[156:157] = tarfile.GNUTYPE_SPARSE
    old[482] = 1  # one more block of the map follows
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
    """Return a header with its correct checksum."""
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
    "long name without an end": (extended(b"L", b"abc"), "extended header is damaged"),
    "pax record of no length": (extended(b"x", b"0 path=a\n"), "extended header is damaged"),
    "pax record beyond its header": (extended(b"x", b"999 path=a\n"), "extended header is damaged"),
    "pax size that is negative": (extended(b"x", b"13 size=-100\n"), "a member's size is"),
    "member of absurd size": (extended(b"0", b"", 1 << 60), "truncated"),
    "member of negative size": (extended(b"0", b"", -5), "negative size"),
    "nothing": (b"", "end-of-archive mark"),
    "half a header": (bytes(100), "damaged"),
    "noise": (bytes(range(256)) * 4, "not a tar archive"),
}


@pytest.mark.parametrize(("data", "reason"), BROKEN.values(), ids=BROKEN)
def test_broken_archive_is_an_error_before_memory_is_allocated(tmp_path: Path, data: bytes, reason: str) -> None:
    shard = stored(tmp_path, data + packed([("a.jpg", b"1")]) if data else b"")
    if reason in ("damaged", "end-of-archive mark"):
        shard = stored(tmp_path, data)
    with pytest.raises(UserError, match=reason) as caught:
        list(read_shard(shard))
    assert caught.value.where == shard


def test_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    (path,) = make_shards(tmp_path, 1, 6)
    data = bytearray(Path(path).read_bytes())
    with tarfile.open(path) as archive:
        data[archive.getmembers()[5].offset + 130] ^= 1
    with pytest.raises(UserError, match="damaged"):
        list(read_shard(stored(tmp_path, bytes(data))))


def test_archives_joined_by_cat_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="joined by cat"):
        list(read_shard(stored(tmp_path, packed([("a.jpg", b"1")]) + packed([("b.jpg", b"1")]))))


def test_archive_truncated_anywhere_is_an_error(tmp_path: Path) -> None:
    data = packed([("a.jpg", b"1" * 700), ("a.cls", b"1"), ("b.jpg", b"2")])
    end = len(data.rstrip(b"\0"))
    marked = -(-end // 512) * 512 + 512  # all members, and a first block of zeros
    for cut in range(0, marked, 64):
        with pytest.raises(UserError, match="cannot be read"):
            list(read_shard(stored(tmp_path, data[:cut])))
    for cut in (marked, marked + 512, len(data)):
        assert len(list(read_shard(stored(tmp_path, data[:cut])))) == 2


# Fuzzing: only the damaged samples may be rejected, or the whole shard; no other sample may be lost.


@pytest.fixture(scope="module")
def archive() -> tuple[bytes, list[tarfile.TarInfo]]:
    """Return a small shard of JPEGs with labels, and its members."""
    rng = np.random.default_rng(0)
    names = [(f"s{i}", jpeg(rng)) for i in range(5)]
    data = packed([entry for key, image in names for entry in ((f"{key}.jpg", image), (f"{key}.cls", b"3"))])
    data = data[: len(data.rstrip(b"\0")) // 512 * 512 + 2048]
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        return data, opened.getmembers()


def noise(rng: random.Random, max_bytes: int = 40) -> bytes:
    return rng.randbytes(rng.randint(1, max_bytes))


def flipped(rng: random.Random, data: bytes, start: int, end: int, max_bytes: int = 8) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, max_bytes)):
        changed[rng.randrange(start, end)] ^= rng.randint(1, 255)
    return bytes(changed)


def check_damaged(data: bytes, expected: list[Sample]) -> bool:
    """Return whether a shard is an error; otherwise assert that it has all expected samples in order."""
    try:
        found = [s for s in read(data) if s.rejection is None]
    except samples.ShardError:
        return True
    keys = {s.key for s in expected}
    assert [s for s in found if s.key in keys] == expected
    return False


@pytest.mark.full
def test_damaged_image_affects_no_other_sample(archive: tuple[bytes, list[tarfile.TarInfo]], tmp_path: Path) -> None:
    data, members = archive
    rng = random.Random(1)
    expected = {b.keys[0]: b.images[0] for b in ShardReader(stored(tmp_path, data), ReaderConfig(PLAIN, 1))}
    rejections = 0
    for trial in range(1500):
        hit = members[rng.randrange(0, len(members), 2)]
        reader = ShardReader(
            stored(tmp_path, flipped(rng, data, hit.offset_data, hit.offset_data + hit.size)), ReaderConfig(PLAIN, 1)
        )
        found = {b.keys[0]: b.images[0] for b in reader}
        key = hit.name.removesuffix(".jpg")
        assert found.keys() | {r.key for r in reader.rejected} == expected.keys(), trial
        assert {r.key for r in reader.rejected} <= {key}
        assert all(found[k].equal(expected[k]) for k in expected.keys() - {key})
        rejections += len(reader.rejected)
    assert 0 < rejections < 1500


@pytest.mark.full
def test_flipped_header_breaks_the_shard_or_affects_only_its_sample(
    archive: tuple[bytes, list[tarfile.TarInfo]],
) -> None:
    data, members = archive
    original = read(data)
    rng = random.Random(2)
    broken = 0
    for _ in range(4000):
        hit = rng.choice(members)
        spared = [s for s in original if s.key != hit.name.split(".")[0]]
        broken += check_damaged(flipped(rng, data, hit.offset, hit.offset + 512), spared)
    assert broken > 3900


@pytest.mark.full
def test_forged_header_breaks_the_shard_or_affects_only_its_sample(
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
        broken += check_damaged(forged, [s for s in original if s.key != hit.name.split(".")[0]])
    assert 500 < broken < 3500


@pytest.mark.full
def test_damaged_archives_are_an_error_or_lose_only_damaged_samples(
    archive: tuple[bytes, list[tarfile.TarInfo]],
) -> None:
    data, members = archive
    original = read(data)
    rng = random.Random(4)
    broken = 0
    for trial in range(3000):
        start = rng.randrange(len(data))
        end = min(len(data), start + rng.randint(1, 3000))
        damaged = (start, end)
        if trial % 3 == 0:
            mutated = data[:start] + data[end:]
        elif trial % 3 == 1:
            mutated, damaged = data[:start] + noise(rng, 1500) + data[start:], (start, start + 1)
        else:
            mutated = data[:start] + rng.randbytes(end - start) + data[end:]
        lost = {m.name.split(".")[0] for m in members if overlap(damaged, m)}
        broken += check_damaged(mutated, [s for s in original if s.key not in lost])
    assert broken > 1000


def overlap(damaged: tuple[int, int], member: tarfile.TarInfo) -> bool:
    return damaged[0] < member.offset_data + -(-member.size // 512) * 512 and member.offset < damaged[1]
