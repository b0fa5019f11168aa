"""Whatever an adapter's directory holds, it is served or refused with one sentence: files made up by hypothesis.

Read by the same code as in the engine's process. What is served generates the tokens of the LoRA alone: whatever
drafts, or is left out, changes none.
"""

import json
import resource
import shutil
import struct
import zlib

import pytest
from engine_fixture import check_baseline, make_engine, request, run, tokens_of
from lookahead_adapters import make_lookahead_adapter

from specserve.adapter_files import CONFIG_FILE, HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE, HISTORY_FILE, WEIGHTS_FILE
from specserve.adapters.lora import LoraAdapter
from specserve.errors import UserError

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

MAX_MIB = 300  # more than before all cases
MAX_MESSAGE = 1000

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["q_proj", ".*", "(", "all-linear", "LORA", "x" * 5000, "a\nb"]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
numbers = st.one_of(st.integers(0, 8), st.sampled_from([-1, 2**31, 2**40, 2**63 - 1, 2**64, 2**70]))
DTYPES = [
    "F32",
    "F16",
    "BF16",
    "F64",
    "I8",
    "I64",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "C64",
    "X9",
    "",
]


def edits_of(raw):
    """Changes of a few bytes of a file, and its ends cut off or added to."""
    flips = st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=6)
    return st.tuples(flips, st.integers(0, len(raw)) | st.just(len(raw)), st.binary(max_size=16)).map(
        lambda edit: _edited(raw, *edit)
    )


def _edited(raw, flips, size, more):
    data = bytearray(raw)
    for at, byte in flips:
        data[at] = byte
    return bytes(data[:size]) + more


def headers_of(raw):
    """A safetensors file whose header is another, over the same data."""
    size = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    names = sorted(set(header) - {"__metadata__"})
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(DTYPES) | scalars,
            "shape": st.lists(numbers, max_size=4) | scalars,
            "data_offsets": st.lists(numbers, min_size=2, max_size=2) | st.lists(numbers, max_size=3) | scalars,
        }
    )
    names_of = st.sampled_from(names) | st.text(max_size=10) | st.sampled_from(["__metadata__", "n" * 3000])
    parts = st.dictionaries(names_of, entry | values, min_size=1, max_size=2)
    one_key = st.tuples(st.sampled_from(names), st.sampled_from(["dtype", "shape", "data_offsets"]))
    small = st.tuples(one_key, st.sampled_from(DTYPES) | st.lists(numbers, max_size=4)).map(
        lambda change: {change[0][0]: {**header[change[0][0]], change[0][1]: change[1]}}
    )
    return (parts | small).map(lambda changes: _with_header({**header, **changes}, data))


def _with_header(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def configs_of(raw):
    config = json.loads(raw)
    keys = st.sampled_from(sorted(config)) | st.text(max_size=10) | st.sampled_from(["k" * 3000])
    changes = st.dictionaries(keys, values, min_size=1, max_size=3)
    return changes.map(lambda changed: json.dumps({**config, **changed}).encode())


def histories_of(raw):
    """With right checksums, so that what is in them is looked at."""
    ids = st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 330), max_size=6)
    text = st.lists(st.integers(0, 8), max_size=30)
    counts = st.tuples(numbers, numbers).filter(lambda pair: max(pair) < 2**32 and min(pair) >= 0)

    def made(parts):
        ids, text, counts = parts
        body = zlib.compress(struct.pack(f"<{len(ids)}I", *ids) + struct.pack(f"<{len(text)}H", *text))
        num_ids, num = counts if counts is not None else (len(ids), len(text))
        return raw[:8] + struct.pack("<IIIII", 1, num_ids, num, len(body), zlib.crc32(body)) + body

    return st.tuples(ids, text, st.none() | counts).map(made)


FILES = {
    CONFIG_FILE: lambda raw: configs_of(raw) | edits_of(raw),
    WEIGHTS_FILE: lambda raw: headers_of(raw) | edits_of(raw),
    HEAD_CONFIG_FILE: lambda raw: configs_of(raw) | edits_of(raw),
    HEAD_WEIGHTS_FILE: lambda raw: headers_of(raw) | edits_of(raw),
    HISTORY_FILE: lambda raw: histories_of(raw) | edits_of(raw),
}


@pytest.fixture(scope="module")
def good(model_dir, tmp_path_factory):
    return make_lookahead_adapter(model_dir, tmp_path_factory.mktemp("fuzzed") / "good", vocab_size=20, state_size=4)


@pytest.fixture(scope="module")
def serving(model_dir, good):
    """An engine, and the tokens of the LoRA with whatever drafts for it."""
    engine = make_engine(model_dir)
    adapter = engine.load_adapter("good", good)
    want = tokens_of(run(engine, [request("a", [5, 6, 7], adapter=adapter.content_hash, max_tokens=8)]))
    yield engine, want
    engine.close()


def check(file, good, serving, num_examples, seed):
    engine, want = serving
    folder = good.parent / f"{file}-{num_examples}"
    shutil.copytree(good, folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"served": 0, "refused": 0}

    @hypothesis.settings(
        max_examples=num_examples, deadline=None, database=None, derandomize=seed is None,
        suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    @hypothesis.given(FILES[file]((good / file).read_bytes()))
    def whatever_it_holds(data):
        (folder / file).write_bytes(data)
        try:
            adapter = engine.adapters.read("fuzzed", folder)
        except UserError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error) and len(str(error)) < MAX_MESSAGE, str(error)[:2000]
            return
        outcomes["served"] += 1
        assert isinstance(adapter, LoraAdapter) and adapter.lookahead is not None
        assert len(adapter.lookahead.error or "") < MAX_MESSAGE, adapter.lookahead.error[:2000]
        if file in (CONFIG_FILE, WEIGHTS_FILE):
            return  # another LoRA
        engine.adapters.register(adapter)
        options = {"adapter": adapter.content_hash, "mode": "fixed", "max_tokens": 8}
        assert tokens_of(run(engine, [request("a", [5, 6, 7], **options)])) == want
        engine.adapters.unload(adapter.content_hash)

    whatever_it_holds()
    assert outcomes["served"] and (outcomes["refused"] or file not in (CONFIG_FILE, WEIGHTS_FILE)), outcomes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + MAX_MIB * 1024
    check_baseline(engine)


@pytest.mark.parametrize("file", FILES)
def test_whatever_a_file_holds_is_served_or_refused(good, serving, file):
    check(file, good, serving, 60, None)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_whatever_a_file_holds_is_served_or_refused_at_length(good, serving, file):
    check(file, good, serving, 1000, 0)
