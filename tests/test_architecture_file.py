"""Files of architectures: what is read, what is refused and how, and writing results."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hnas import architecture_file
from hnas.architecture_file import read_accuracies, read_architectures, read_truth, submission
from hnas.base.errors import UserError
from hnas.base.files import read_json, write_json
from hnas.ranking.agreement import read_estimates
from hnas.ranking.costs import read_latency
from hnas.search_space import RESNET48, Architecture

LARGEST = "1558511111111111111111111111111111111111111111111111"
SMALL = "12222" + "3" + "3313000000" + "2212000000" + "5414" + "0" * 12 + "6727000000"
OTHER = "13254" + "2" + "3212120000" + "7161000000" + "4353231353" + "000000" + "2414642400"
CODES = [LARGEST, SMALL, OTHER]


@pytest.fixture
def write(tmp_path):
    """Writes text, bytes or JSON into a file and gives its path."""
    path = tmp_path / "archs"

    def write_content(content):
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_content


def refusal(path, read=read_architectures):
    """The one line that a user is told."""
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and str(path) in message
    return message.replace(str(path), "FILE")


def entries(codes):
    return {f"net{i}": {"acc": 0.0, "arch": code} for i, code in enumerate(codes)}


# --- what is read


@pytest.mark.parametrize("codes", [CODES, CODES[::-1], [OTHER[1:], LARGEST, SMALL[1:]]])
@pytest.mark.parametrize("form", ["organisers", "by code", "list", "commas", "lines", "mixed"])
def test_formats_keep_order_and_codes(write, form, codes):
    content = {
        "organisers": entries(codes),
        "by code": dict.fromkeys(codes, 0.5),
        "list": codes,
        "commas": ",".join(codes),
        "lines": "\n".join(codes) + "\n",
        "mixed": "\r\n\r\n " + ", ".join(codes) + ",\r\n",
    }[form]
    archs = read_architectures(write(content))
    names = {"organisers": ["net0", "net1", "net2"], "by code": codes}
    assert list(archs) == names.get(form, ["arch1", "arch2", "arch3"])
    assert [arch.code for arch in archs.values()] == codes
    assert list(archs.values()) == [Architecture.from_code(code) for code in codes]


@pytest.mark.parametrize("content", [json.dumps(entries(CODES)), LARGEST])
def test_byte_order_mark_is_skipped(write, content):
    archs = read_architectures(write(b"\xef\xbb\xbf" + content.encode()))
    assert archs == read_architectures(write(content))


def test_names_and_other_fields_are_free(write):
    names = ["arch10", "arch2", "", "a name\n", "名", "\ud800"]
    codes = [*CODES, LARGEST[:-1] + "2", LARGEST[:-1] + "3", LARGEST[:-1] + "4"]
    content = {n: {"arch": c, "note": [1, {}]} for n, c in zip(names, codes, strict=True)}
    assert list(read_architectures(write(content))) == names


def test_a_submission_is_read_back_as_it_was(write, tmp_path):
    codes = [OTHER[1:], LARGEST, SMALL[1:]]
    archs = read_architectures(write(entries(codes)))
    output = tmp_path / "new" / "folder" / "submission.json"
    write_json(output, submission(archs, [0.25, 0.5, 0.75]))
    assert list(json.loads(output.read_text()).items()) == [
        ("net0", {"acc": 0.25, "arch": OTHER[1:]}),
        ("net1", {"acc": 0.5, "arch": LARGEST}),
        ("net2", {"acc": 0.75, "arch": SMALL[1:]}),
    ]
    with pytest.raises(ValueError, match="shorter"):
        submission(archs, [0.5, 0.5])


# --- what is refused


@pytest.mark.parametrize("again", [OTHER, SMALL])
def test_a_name_that_stands_twice(write, again):
    fields = [("a", SMALL), ("b", LARGEST), ("a", again)]
    pairs = [f'"{name}": {{"acc": 0, "arch": "{code}"}}' for name, code in fields]
    message = refusal(write("{" + ", ".join(pairs) + "}"))
    assert message == "FILE: entry 3 ('a'): the name stands twice"


@pytest.mark.parametrize("again", [LARGEST, LARGEST[1:]], ids=["52 digits", "51 digits"])
@pytest.mark.parametrize("form", [entries, list, ",".join])
def test_an_architecture_that_stands_twice(write, form, again):
    message = refusal(write(form([SMALL, LARGEST, OTHER, again])))
    names = ("net3", "net1") if form is entries else ("arch4", "arch2")
    assert message == f"FILE: entry 4 ({names[0]!r}): the same architecture as {names[1]!r}"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        *((code, "must be a string of digits") for code in (None, int(LARGEST), [LARGEST], {})),
        *(((LARGEST * 2000)[:n], f"has {n} digits") for n in (1, 50, 53, 100_000)),
        *(
            (SMALL[:20] + x + SMALL[21:], "holds more than digits")
            for x in "x-\n\u00b2\u0663\uff11"
        ),
        (SMALL[:1] + "6" + SMALL[2:], "digit 2 (depth of stage 1) is 6; allowed: 2 to 5"),
        (SMALL[1:-1] + "1", "digit 51 (stage 4, block 5, conv2) is 1; allowed: 0, since"),
        (" " + SMALL, "holds more than digits"),
        ("", "digits"),
    ],
    ids=lambda value: repr(value)[:25],
)
@pytest.mark.parametrize("form", [entries, list])
def test_a_wrong_code(write, form, code, reason):
    message = refusal(write(form([OTHER, code])))
    name = "net1" if form is entries else "arch2"
    assert message.startswith(f"FILE: entry 2 ({name!r}): ") and reason in message
    assert len(message) < 300


@pytest.mark.parametrize(
    "entry",
    ["null", f'"{LARGEST}"', "[]", '{"acc": 0.5}', f'{{"arch": "{LARGEST}", "arch": "{SMALL}"}}'],
)
def test_an_entry_of_the_wrong_form(write, entry):
    message = refusal(write(f'{{"good": {{"arch": "{SMALL}"}}, "bad": {entry}}}'))
    form = '{"acc": 0.0, "arch": "1252..."}'
    assert message == f"FILE: entry 2 ('bad') is not of the form {form}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (" ,\n,", "holds no architectures"),
        ("{}", "holds no architectures"),
        ('"text"', "entry 1 ('arch1'): architecture code '\"text\"' holds more than digits"),
        (LARGEST + ";" + SMALL, "entry 1 ('arch1'): "),
        ('{"arch1": 0.5}', "entry 1 ('arch1'): architecture code 'arch1' holds more than digits"),
        (f'{{"{LARGEST}": 1, "{LARGEST}": 1}}', "the name stands twice"),
        (f'{{"{LARGEST}": 1, "{LARGEST[1:]}": 1}}', "the same architecture as"),
        (f'{{"{LARGEST}": 0.5, "a": {{"acc": 0, "arch": "{SMALL}"}}}}', "is not of the form"),
        (json.dumps(entries(CODES))[:-20], "is not valid JSON"),
        ('{"a":' * 100_000, "is not valid JSON"),
        ("[" * 100_000 + "]" * 100_000, "is not valid JSON"),
        ("[" * 500 + "]" * 500, "entry 1 ('arch1'): architecture code must be a string"),
        ("[" + "1" * 5000 + "]", "is not valid JSON"),
        (json.dumps(CODES).encode("utf-16"), "is not a text file"),
        (b"\x00" * 100, "entry 1 ('arch1'): architecture code '\\x00\\x00"),
    ],
    ids=lambda value: repr(value)[:25],
)
def test_broken_content(write, content, reason):
    assert reason in refusal(write(content))


def test_what_is_no_file_or_too_large(tmp_path):
    assert "No such file" in refusal(tmp_path / "missing.json")
    assert "Is a directory" in refusal(tmp_path)
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, architecture_file.MAX_BYTES + 1)
    assert "is larger than 256 MiB" in refusal(path)


# --- anything at all


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch") / "archs"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(CODES),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("arch"), inner),
)
SPLICED = st.builds(
    lambda form, position, removed, inserted: (
        form[: position % len(form)] + inserted + form[position % len(form) + removed :]
    ),
    st.sampled_from([json.dumps(entries(CODES)).encode(), ",".join(CODES).encode()]),
    st.integers(0, 1000),
    st.integers(0, 4),
    st.binary(max_size=4),
)


@settings(max_examples=300)
@given(
    st.binary()
    | st.text().map(lambda text: text.encode(errors="surrogatepass"))
    | JSON_VALUES.map(lambda value: json.dumps(value).encode())
    | SPLICED
)
def test_any_content_is_read_or_refused_in_one_line(scratch, content):
    scratch.write_bytes(content)
    try:
        archs = read_architectures(scratch)
    except UserError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and str(scratch) in message
    else:
        assert archs and len(set(archs.values())) == len(archs)
        assert all(arch.code.encode() in content for arch in archs.values())


# --- other JSON files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"images": 1, "images": 2}', "the name 'images' stands twice"),
        ('{"a": {"b": [{"images": 1, "images": 1}]}}', "the name 'images' stands twice"),
        ('{"' + "a" * 10**6 + '": 1, "' + "a" * 10**6 + '": 2}', "aaa' stands twice"),
        ('{"images": ' + "1" * 5000 + "}", "4300 digits"),
        ("[1]", "is not what this program saves"),
    ],
    ids=lambda text: text[:20],
)
def test_a_file_that_no_program_wrote_is_refused(write, text, words):
    path = write(text)
    for read in (read_json, read_estimates, read_latency):
        message = refusal(path, read)
        assert words in message and len(message) < 300


# --- writing


def test_what_json_cannot_hold_leaves_the_previous_file(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"b": "名"})
    with pytest.raises(TypeError):
        write_json(path, {"half": list(range(100_000)), "what JSON cannot hold": object()})
    assert json.loads(path.read_text()) == {"b": "名"} and os.listdir(tmp_path) == [path.name]
    with pytest.raises(UserError, match="cannot write .*results.json/below: "):
        write_json(path / "below", {})


# --- accuracies


def test_accuracies_come_with_their_architectures(write):
    values = [0, 71.5, 1e-3]
    content = {
        name: {"se": 1, "acc": value, "arch": code}
        for name, value, code in zip("abc", values, CODES, strict=True)
    }
    archs, accuracies = read_accuracies(write(content))
    assert archs == read_architectures(write(content))
    assert accuracies.dtype == "float64" and accuracies.tolist() == values


@pytest.mark.parametrize(
    "value",
    ["null", "true", '"0.5"', "NaN", "Infinity", "-1e999", "1e308", "1" + "0" * 400, "[1]", "{}"],
)
def test_an_accuracy_that_is_not_a_number(write, value):
    good = f'"good": {{"acc": 0.5, "arch": "{SMALL}"}}'
    path = write(f'{{{good}, "bad": {{"acc": {value}, "arch": "{LARGEST}"}}}}')
    message = refusal(path, read_accuracies)
    assert message.startswith("FILE: entry 2 ('bad'): ")
    assert message.endswith("is no number within +-1e+300") and len(message) < 100
    # Where accuracies are not asked for, they may be anything.
    assert len(read_architectures(path)) == 2
    if value[0] not in "[{":
        path = write(f'{{"{SMALL}": 0.5, "{LARGEST}": {value}}}')
        assert "is no number within +-1e+300" in refusal(path, read_truth)


SHARES, PERCENTS, WEAK = ([start + i * step for i in range(9)] for start, step in (
    (0.9, 0.01), (90, 1), (20, 5)
))  # fmt: skip
TWO_UNITS = [
    [*SHARES, 97.0],  # in percent among shares
    [*PERCENTS, 0.97],  # a share among percents
    [*PERCENTS, 0.4, 0.97],
    [*WEAK, 0, 0.97],
    [*SHARES[:4], *PERCENTS[4:8]],  # half in percent
    [0.5, 0.55, 0.6, 0, 97.0],
    [0.2, 0.25, 0.98, 5.0],
]
ONE_UNIT = [
    SHARES,
    [0.0, 0.004, 0.1, 1.0],
    [*SHARES, 1 + 2e-16],  # a mean that rounding put above 1
    [*PERCENTS, 100 * (1 + 2e-16)],
    [0, *PERCENTS],
    [0.4, 60.5, 70, 72, 75],  # of 256 classes, a network that broke
    [0.1, 0.1, 0, *WEAK],
    [0.1, 0.3, 0.9, 2, 5, 9, 20],  # of a supernet that has just begun
]


@pytest.mark.parametrize("values", [*TWO_UNITS, *ONE_UNIT])
def test_accuracies_are_of_one_unit(write, values):
    archs = RESNET48.sample_distinct(np.random.default_rng(0), len(values))
    path = write(submission(archs, [float(value) for value in values]))
    if values in TWO_UNITS:
        assert "are some shares of 1 and some percent? Give all as" in refusal(path, read_truth)
    else:
        expected = np.array(values) * (100 if max(values) < 1.1 else 1)
        assert list(read_truth(path).values()) == pytest.approx(expected.tolist())


@pytest.mark.parametrize(
    "content",
    [
        f'{{"arch1": {{"arch": "{LARGEST}"}}}}',
        f'{{"arch1": {{"acc": 0.5, "acc": 0.6, "arch": "{LARGEST}"}}}}',
        CODES,
        ",".join(CODES),
    ],
)
def test_one_accuracy_is_needed(write, content):
    message = refusal(write(content), read_accuracies)
    assert "entry 1 ('arch1'): one accuracy is needed" in message
