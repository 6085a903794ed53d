"""The planner of removal on disk, by itself: no hole, every kept byte once, shared where it can be."""

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

surgery = pytest.importorskip("trsp_fast._surgery", reason="trsp_fast was installed without its C++ extensions")


def source(sizes, padding=0, metadata=None):
    """(header, data_bytes) of a file whose tensors t0, t1, ... have these sizes in bytes."""
    entries, offset = {}, 0
    for i, size in enumerate(sizes):
        entries[f"t{i}"] = {"dtype": "U8", "shape": [size], "data_offsets": [offset, offset + size]}
        offset += size
    if metadata:
        entries["__metadata__"] = metadata
    return json.dumps(entries).encode() + b" " * padding, offset


def parsed(target):
    """Entries of a target's header, and the offset of its data."""
    _, head, _, _, _ = target
    (length,) = struct.unpack("<Q", head[:8])
    assert len(head) == 8 + length
    return json.loads(head[8:]), len(head)


plans = st.lists(
    st.tuples(st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=12), st.integers(0, 40)),
    min_size=1,
    max_size=3,
)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(plans, st.sampled_from([0, 8, 16]))
def test_every_kept_byte_lands_once_where_the_header_says(files, block):
    # file i, tensor j: byte k of the data is a number of its own, so a byte in the wrong place is seen
    sources, contents, names = [], [], {}
    for i, (tensors, padding) in enumerate(files):
        header, data_bytes = source([size for size, _ in tensors], padding)
        header = header.replace(b'"t', b'"f%d.t' % i)
        sources.append((header, data_bytes))
        contents.append([("head", i, k) for k in range(8 + len(header))] + [("data", i, k) for k in range(data_bytes)])
        names |= {f"f{i}.t{j}": f"new.{i}.{j}" for j, (_, kept) in enumerate(tensors) if kept}
    seen = set()
    for target in surgery.plan(sources, names, block):
        number, head, size, tensors, ranges = target
        written = [None] * size
        written[: len(head)] = list(head)
        for begin, to, count, shared in ranges:
            assert count > 0
            assert written[to : to + count] == [None] * count, "two ranges overlap"
            written[to : to + count] = contents[number][begin : begin + count]
            if shared:
                assert block
                assert begin % block == to % block == count % block == 0
        assert None not in written, "a hole"
        entries, data = parsed(target)
        assert list(entries) == tensors
        end = 0
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            assert first == end
            end = last
            _, file, tensor = name.split(".")
            old = json.loads(sources[int(file)][0])[f"f{file}.t{tensor}"]
            assert entry["shape"] == old["shape"]
            old_first, old_last = old["data_offsets"]
            assert written[data + first : data + last] == [("data", int(file), k) for k in range(old_first, old_last)]
            seen.add(name)
        assert data + end == size
    assert seen == set(names.values())


@settings(deadline=None, max_examples=300, derandomize=True)
@given(plans)
def test_whole_blocks_are_shared_and_at_most_two_ends_of_a_run_copied(files):
    block = 8
    for tensors, padding in files:
        header, data_bytes = source([size for size, _ in tensors], padding)
        names = {f"t{j}": f"t{j}" for j, (_, kept) in enumerate(tensors) if kept}
        runs, offset, open_run = [], 8 + len(header), False
        for size, kept in tensors:
            if kept and size:
                runs = [*runs[:-1], runs[-1] + size] if open_run else [*runs, size]
            open_run = kept if size else open_run
            offset += size
        ranges = [r for *_, ranges in surgery.plan([(header, data_bytes)], names, block) for r in ranges]
        copied = [count for *_, count, shared in ranges if not shared]
        assert sum(count for _, _, count, _ in ranges) == sum(runs)
        assert len(copied) <= 2 * len(runs)
        assert all(count < 2 * block for count in copied)  # two ends, or a run without a whole block
        # the ratio that can be told beforehand: a run of n bytes has at least n - 2 * (block - 1) in whole blocks
        assert sum(count for *_, count, shared in ranges if shared) >= sum(max(0, n - 2 * (block - 1)) for n in runs)


def test_a_gap_of_whole_blocks_stays_one_file_and_another_gap_starts_a_second():
    header, data_bytes = source([4096, 8192, 4096])
    assert len(surgery.plan([(header, data_bytes)], {"t0": "a", "t2": "b"}, 4096)) == 1
    header, data_bytes = source([4096, 8193, 12000])
    assert len(surgery.plan([(header, data_bytes)], {"t0": "a", "t2": "b"}, 4096)) == 2
    assert len(surgery.plan([(header, data_bytes)], {"t0": "a", "t2": "b"}, 0)) == 1


def test_runs_without_a_whole_block_never_start_a_file():
    header, data_bytes = source([100, 60] * 200)
    names = {f"t{i}": f"t{i}" for i in range(0, 400, 2)}
    assert len(surgery.plan([(header, data_bytes)], names, 4096)) == 1


def test_without_sharing_data_begins_at_a_multiple_of_4096():
    header, data_bytes = source([100, 50, 10])
    ((_, head, size, tensors, ranges),) = surgery.plan([(header, data_bytes)], {"t1": "x", "t2": "y"}, 0)
    assert (len(head), size, tensors) == (4096, 4096 + 60, ["x", "y"])
    assert ranges == [(8 + len(header) + 100, 4096, 60, False)]


def test_a_source_of_which_nothing_stays_has_no_target():
    sources = [source([8]), source([16])]
    assert surgery.plan(sources, {}, 4096) == []
    assert [target[0] for target in surgery.plan([sources[0], sources[1]], {"t0": "a"}, 0)] == [0, 1]


def test_names_and_metadata_survive():
    odd = 'ключ "x"\\\n\t\x01'
    header, data_bytes = source([4], metadata={"format": "pt", odd: odd})
    (target,) = surgery.plan([(header, data_bytes)], {"t0": odd}, 0)
    entries, _ = parsed(target)
    assert entries["__metadata__"] == {"format": "pt", odd: odd}
    assert entries[odd]["shape"] == [4]


def test_a_broken_header_is_refused_here_too():
    with pytest.raises(ValueError, match="must start with"):
        surgery.plan([(b" {}", 0)], {}, 0)


@pytest.mark.parametrize("in_kernel", [False, True])
def test_move_ranges_between_files(tmp_path, in_kernel):
    content = bytes(range(256)) * 40
    (tmp_path / "a").write_bytes(content)
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("w+b") as b:
        moves = [(a.fileno(), b.fileno(), 100, 0, 5000, True), (a.fileno(), b.fileno(), 7000, 5000, 300, False)]
        seen = []
        shared, copied = surgery.move_ranges(moves, 3, lambda *values: seen.append(values), in_kernel)
        assert (tmp_path / "b").read_bytes() == content[100:5100] + content[7000:7300]
    assert shared + copied == 5300
    assert seen[-1] == (shared, copied)


@pytest.mark.parametrize("in_kernel", [False, True])
def test_move_ranges_reports_what_the_system_refuses(tmp_path, in_kernel):
    (tmp_path / "a").write_bytes(b"x" * 100)
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("wb") as b:
        with pytest.raises(OSError, match="Bad file descriptor"):
            surgery.move_ranges([(a.fileno(), a.fileno(), 0, 50, 10, False)], 2, None, in_kernel)
        with pytest.raises(RuntimeError, match="ended early, at byte 100"):
            surgery.move_ranges([(a.fileno(), b.fileno(), 50, 0, 51, False)], 2, None, in_kernel)
