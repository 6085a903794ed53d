"""The C++ header parser accepts exactly what the safetensors package writes and refuses every broken header by name."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import deserialize, save, save_file

surgery = pytest.importorskip("trsp_fast._surgery", reason="trsp_fast was installed without its C++ extensions")

NUMPY_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "u2", "I16": "i2", "F16": "f2", "U32": "u4", "I32": "i4",
    "F32": "f4", "U64": "u8", "I64": "i8", "F64": "f8", "C64": "c8",
}  # fmt: skip
ITEM_SIZES = {
    **{name: np.dtype(code).itemsize for name, code in NUMPY_DTYPES.items()},
    **{"BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1},
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def split(blob):
    """Header bytes and number of data bytes of a serialised file."""
    (length,) = struct.unpack("<Q", blob[:8])
    return blob[8 : 8 + length], len(blob) - 8 - length


def parse(header, data_bytes):
    return surgery.parse_header(header if isinstance(header, bytes) else json.dumps(header).encode(), data_bytes)


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def accepted_by_safetensors(header, data_bytes):
    try:
        deserialize(struct.pack("<Q", len(header)) + header + bytes(data_bytes))
    except SafetensorError:
        return False
    return True


# --- agreement with the safetensors package ---


def test_real_file(tmp_path):
    arrays = {
        "model.embed.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "scalar": np.array(3, dtype=np.int64),
        "empty": np.zeros((0, 7), dtype=np.float16),
        'naïve "quoted" \\ 层\t😀': np.ones(5, dtype=np.uint8),
    }
    path = tmp_path / "model.safetensors"
    save_file(arrays, path, metadata={"format": "pt", "ключ": "значение"})
    blob = path.read_bytes()
    header, data_bytes = split(blob)
    metadata, tensors = parse(header, data_bytes)

    assert metadata == {"format": "pt", "ключ": "значение"}
    assert {name for name, *_ in tensors} == set(arrays)
    data = blob[8 + len(header) :]
    with safe_open(path, "np") as file:
        for name, dtype, shape, begin, end in tensors:
            array = np.frombuffer(data[begin:end], NUMPY_DTYPES[dtype]).reshape(shape)
            np.testing.assert_array_equal(array, file.get_tensor(name))


@given(
    st.dictionaries(
        TEXT.filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(NUMPY_DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,  # with metadata and no tensor, safetensors 0.8 writes a header it cannot read itself
        max_size=6,
    ),
    st.none() | st.dictionaries(TEXT, TEXT, max_size=3),
)
def test_agrees_on_generated_files(specs, metadata):
    arrays = {name: np.zeros(shape, NUMPY_DTYPES[dtype]) for name, (dtype, shape) in specs.items()}
    parsed_metadata, tensors = parse(*split(save(arrays, metadata)))
    assert parsed_metadata == (metadata or {})
    assert {name: (dtype, list(shape)) for name, dtype, shape, _, _ in tensors} == specs
    ends = [0] + [end for *_, end in tensors]
    assert [begin for *_, begin, _ in tensors] == ends[:-1]


@given(st.data())
def test_agrees_on_damaged_files(data):
    """Whatever the safetensors package refuses, ours refuses; a damaged header never crashes or gives another error."""
    header, data_bytes = split(save({"a": np.zeros(3, np.float32), "b": np.zeros((2, 2), np.int8)}, {"k": "v"}))
    damaged = bytearray(header)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(
            st.sampled_from(b'{}[]",:\\u0129-eE. \x00\xc3\xffab')
        )
    try:
        parse(bytes(damaged), data_bytes)
    except ValueError:
        return
    assert accepted_by_safetensors(bytes(damaged), data_bytes)


@given(st.binary(max_size=64))
def test_random_bytes_are_refused(noise):
    if noise.strip() != b"{}":
        with pytest.raises(ValueError, match="safetensors header"):
            parse(noise, 0)


@pytest.mark.parametrize("dtype", sorted(ITEM_SIZES))
def test_every_dtype(dtype):
    size = ITEM_SIZES[dtype]
    header = json.dumps({"t": tensor(dtype, (3,), (0, 3 * size))}).encode()
    assert accepted_by_safetensors(header, 3 * size)
    assert parse(header, 3 * size) == ({}, [("t", dtype, (3,), 0, 3 * size)])


# --- what is allowed ---


def test_no_tensors():
    assert parse({}, 0) == ({}, [])


def test_trailing_spaces():
    assert parse(json.dumps({"t": tensor()}).encode() + b" " * 4096, 8)[1] == [("t", "F32", (2,), 0, 8)]


def test_order_is_that_of_the_data():
    header = {"late": tensor(offsets=(8, 16)), "empty": tensor(shape=(0,), offsets=(8, 8)), "early": tensor()}
    assert [name for name, *_ in parse(header, 16)[1]] == ["early", "empty", "late"]


@pytest.mark.parametrize(
    ("escaped", "name"),
    [
        (r"\u0041\u00e9\u4e2d", "Aé中"),
        (r"\ud83d\ude00", "😀"),
        (r"\"\\\/\b\f\n\r\t", '"\\/\b\f\n\r\t'),
        (r"\u0000", "\0"),
    ],
)
def test_escapes(escaped, name):
    header = b'{"%s":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}' % escaped.encode()
    assert parse(header, 1)[1] == [(name, "U8", (), 0, 1)]


# --- what is refused: header, bytes of data, words of the message ---

T = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
REFUSED = {
    "empty": ("", 0, "must start with '{'"),
    "leading space": (" {}", 0, "must start with '{'"),
    "not an object": ("[]", 0, "must start with '{'"),
    "cut short": ('{"t":' + T[:-1], 8, "tensor \"t\": expected '}'"),
    "trailing text": ('{"t":' + T + "}x", 8, "after its closing"),
    "trailing comma": ('{"t":' + T + ",}", 8, "expected a string"),
    "nested value": ('{"t":' + "[" * 100_000, 8, "tensor \"t\": expected '{'"),
    "tensor is no object": ('{"t":1}', 0, "tensor \"t\": expected '{'"),
    "unknown dtype": ({"t": tensor("F33")}, 8, 'tensor "t": dtype: "F33" is not'),
    "dtype below a byte": ({"t": tensor("F4")}, 8, 'tensor "t": dtype: "F4" is not'),
    "dtype is no string": ({"t": tensor(1)}, 8, 'tensor "t": dtype: expected a string'),
    "dtype missing": ('{"t":{"shape":[2],"data_offsets":[0,8]}}', 8, 'tensor "t": field dtype is missing'),
    "shape missing": ('{"t":{"dtype":"F32","data_offsets":[0,8]}}', 8, 'tensor "t": field shape is missing'),
    "offsets missing": ('{"t":{"dtype":"F32","shape":[2]}}', 8, 'tensor "t": field data_offsets is missing'),
    "field twice": ('{"t":{"dtype":"F32","dtype":"F32"}}', 8, 'tensor "t": dtype: appears twice'),
    "unknown field": ('{"t":{"color":"red"}}', 8, 'tensor "t": field "color" is none of'),
    "shape overflow": ({"t": tensor(shape=(2**31, 2**31, 2))}, 8, 'tensor "t": shape: .* takes 2\\^63'),
    "negative size": ({"t": tensor(shape=(-2,))}, 8, 'tensor "t": shape: expected a non-negative integer'),
    "fractional size": ({"t": tensor(shape=(2.0,))}, 8, 'tensor "t": shape: a number is not an integer'),
    "exponent": ('{"t":{"shape":[2e0]}}', 8, 'tensor "t": shape: a number is not an integer'),
    "leading zero": ('{"t":{"shape":[02]}}', 8, 'tensor "t": shape: a number has a leading zero'),
    "number of 2^63": ({"t": tensor(shape=(2**63,))}, 8, 'tensor "t": shape: a number is 2\\^63 or more'),
    "number of 2^64": ({"t": tensor(offsets=(0, 2**64))}, 8, 'tensor "t": data_offsets: a number is 2\\^63'),
    "byte count": ({"t": tensor(shape=(3,))}, 8, 'tensor "t": .* hold 8 bytes, but F32 of shape \\[3\\] takes 12'),
    "begin after end": ({"t": tensor(offsets=(8, 0))}, 8, 'tensor "t": data_offsets: \\[8, 0\\] end before'),
    "one offset": ({"t": tensor(offsets=(0,))}, 8, 'tensor "t": data_offsets: has 1 numbers'),
    "three offsets": ({"t": tensor(offsets=(0, 8, 8))}, 8, 'tensor "t": data_offsets: has 3 numbers'),
    "out of data": ({"t": tensor()}, 7, 'tensor "t": data_offsets: \\[0, 8\\] reach past the 7 bytes'),
    "overlap": ({"a": tensor(), "b": tensor(offsets=(4, 12))}, 12, 'tensor "b": data_offsets: \\[4, 12\\] overlap'),
    "hole": ({"a": tensor(), "b": tensor(offsets=(9, 17))}, 17, 'tensor "b": data_offsets: \\[9, 17\\] leave a hole'),
    "hole at the start": ({"t": tensor(offsets=(1, 9))}, 9, 'tensor "t": data_offsets: \\[1, 9\\] leave a hole'),
    "hole at the end": ({"t": tensor()}, 9, "cover 8 of the 9 bytes"),
    "data without tensors": ({}, 1, "cover 0 of the 1 bytes"),
    "name twice": ('{"t":' + T + ',"t":' + T + "}", 8, 'tensor "t": appears twice'),
    "name twice, escaped": ('{"t":' + T + ',"\\u0074":' + T + "}", 8, 'tensor "t": appears twice'),
    "metadata twice": ('{"__metadata__":{},"__metadata__":{}}', 0, "__metadata__ appears twice"),
    "metadata is no object": ({"__metadata__": "pt"}, 0, "__metadata__: expected '{'"),
    "metadata value": ({"__metadata__": {"format": 1}}, 0, "__metadata__: expected a string"),
    "metadata key twice": ('{"__metadata__":{"k":"1","k":"2"}}', 0, '__metadata__: key "k" appears twice'),
    "unfinished string": ('{"t', 0, "a string has no end"),
    "control character": ('{"\n":' + T + "}", 8, "unescaped control character"),
    "unknown escape": (r'{"\x":' + T + "}", 8, "unknown escape"),
    "short escape": (r'{"\u12":' + T + "}", 8, "four hexadecimal digits"),
    "high surrogate alone": (r'{"\ud83d":' + T + "}", 8, "half a surrogate pair"),
    "high surrogate twice": (r'{"\ud83d\ud83d":' + T + "}", 8, "half a surrogate pair"),
    "low surrogate alone": (r'{"\ude00":' + T + "}", 8, "half a surrogate pair"),
    "UTF-8 cut short": (b'{"\xe4\xb8":1}', 8, "not valid UTF-8"),
    "UTF-8 continuation alone": (b'{"\x80":1}', 8, "not valid UTF-8"),
    "UTF-8 overlong": (b'{"\xc0\xaf":1}', 8, "not valid UTF-8"),
    "UTF-8 overlong, three bytes": (b'{"\xe0\x80\xaf":1}', 8, "not valid UTF-8"),
    "UTF-8 surrogate": (b'{"\xed\xa0\x80":1}', 8, "not valid UTF-8"),
    "UTF-8 beyond Unicode": (b'{"\xf4\x90\x80\x80":1}', 8, "not valid UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    header, data_bytes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        parse(header.encode() if isinstance(header, str) else header, data_bytes)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("safetensors header")


def test_message_stays_short_and_printable():
    name = "层\0\n" * 1000
    with pytest.raises(ValueError, match="dtype") as error:
        parse({name: tensor("F33" * 1000, shape=[1] * 1000)}, 8)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


def test_too_long():
    with pytest.raises(ValueError, match="100000000 the format allows"):
        parse(b"{" + b" " * 100_000_000, 0)


def test_many_tensors_in_linear_time():
    count = 50_000
    header = {f"t{i}": tensor(offsets=(8 * i, 8 * i + 8)) for i in reversed(range(count))}
    assert [name for name, *_ in parse(header, 8 * count)[1]] == [f"t{i}" for i in range(count)]
