"""A bulk input, in every form, is checked whole: each bad line has its code and its number."""

from __future__ import annotations

import gzip
import io
import json
import random
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from gristmill.producer.batch import copies, sources
from gristmill.producer.batch.check import CODES, Checked, Rules, check, line_limit
from gristmill.producer.batch.copies import Copies
from gristmill.producer.batch.intake import Intake
from gristmill.producer.batch.records import Shape, read_records
from gristmill.producer.batch.sources import FileName, Form, Packing, open_input
from gristmill.producer.batch.spool import Spool, Spooled
from gristmill.producer.batch.twins import Lines, Twins
from gristmill.schemas.errors import BadInput, FileTooLarge, InvalidRequest, TooManyTasks
from gristmill.schemas.settings import load_settings

GOOD = b'{"prompt": "hello"}\n'
SETTINGS = load_settings(max_payload_bytes=100_000)


class Read:
    """An input that was checked, and its spool."""

    def __init__(self, stack: ExitStack, data: bytes, form: Form = Form.JSONL, **rules: object) -> None:
        self.spool = stack.enter_context(Spool(indexed=True))
        same = stack.enter_context(Twins()) if rules.get("dedupe") else None
        found = Rules(SETTINGS, **rules)  # type: ignore[arg-type]
        records = read_records(io.BytesIO(data), form, line_limit(SETTINGS), found.shape)
        self.checked = check(records, found, self.spool, same)
        self.copies = stack.enter_context(Copies())
        if same is not None:
            self.copies.find(same, self.checked.duplicates)

    @property
    def problems(self) -> list[tuple[int | None, str]]:
        return [(each.line, each.problem.code) for each in self.checked.errors]

    @property
    def rows(self) -> list[Spooled]:
        return [row for row in self.spool.rows() if not row.refused]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def batch_line(custom_id: object = "a", **fields: object) -> bytes:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body} | fields
    return json.dumps(line).encode() + b"\n"


def with_body(**fields: object) -> bytes:
    return batch_line(body={"messages": [{"role": "user", "content": "hi"}]} | fields)


BAD_LINES = [
    (b"nonsense\n", "invalid_json_line"),
    (b'{"prompt": "caf\xe9"}\n', "invalid_json_line"),
    (b'{"prompt": "hi", "max_tokns": 3}\n', "invalid_request"),
    (b'{"prompt": "hi", "max_tokens": 0}\n', "invalid_request"),
    (b'{"prompt": ""}\n', "invalid_request"),
    (b'"hello"\n', "invalid_request"),
    (batch_line(method="GET"), "invalid_method"),
    (batch_line(url="/v1/embeddings"), "url_mismatch"),
    (batch_line(custom_id=None), "invalid_request"),
    (b'{"custom_id": "x", "method": "POST", "url": "/v1/completions"}\n', "missing_required_parameter"),
    (batch_line(body={"prompt": "x"}), "missing_required_parameter"),
    (with_body(modalities=["audio"]), "invalid_request"),
    (with_body(stream=True), "invalid_request"),
    (with_body(structured_outputs={"regex": 7}), "invalid_schema"),
    (b'{"prompt": "' + b"x" * 150_000 + b'"}\n', "invalid_request"),
    (b'{"prompt": "' + b"x" * 10_000_000 + b'"}\n', "invalid_request"),
    (b'{"prompt": "hi", "model": "other"}\n', "model_not_found"),
    (b'{"custom_id": "first", "prompt": "hi"}\n', "duplicate_custom_id"),
    (b'{"custom_id": "", "prompt": "hi"}\n', "invalid_request"),
    (b'{"custom_id": 0, "prompt": "hi"}\n', "invalid_request"),
]


@pytest.mark.parametrize(("line", "code"), BAD_LINES)
def test_a_bad_line_has_its_code_and_its_number(stack: ExitStack, line: bytes, code: str) -> None:
    first = b'{"custom_id": "first", "prompt": "hello"}\n'
    read = Read(stack, first + b"\n" + line + GOOD, models=frozenset({"mine"}))
    assert read.problems == [(3, code)]
    assert (read.checked.rows, read.checked.invalid) == (2, 1)
    assert code in CODES


def test_the_first_errors_are_told_by_line_whatever_they_are(stack: ExitStack) -> None:
    data = b"".join(b'{"custom_id": "%d", "prompt": "p"}\n' % (n % 50) for n in range(99)) + b"bad\n"
    read = Read(stack, b"bad\n" + data, max_errors=20)
    assert read.problems == [(1, "invalid_json_line"), *((n, "duplicate_custom_id") for n in range(52, 71))]
    assert (read.checked.rows, read.checked.invalid) == (50, 51)
    assert "'0' is that of line 2" in read.checked.errors[1].error.message
    assert [place in read.checked.duplicates for place in (50, 51, 99, 100)] == [False, True, True, False]


def test_rows_that_name_different_models_are_caught(stack: ExitStack) -> None:
    read = Read(stack, b'{"prompt": "a"}\n{"prompt": "b", "model": "m"}\n{"prompt": "c", "model": "n"}\n')
    assert read.checked.model == "m"
    assert read.problems == [(3, "model_not_found")]
    assert "model 'n' is not that of line 2 ('m')" in read.checked.errors[0].error.message


def test_a_limit_of_rows_and_one_of_bytes_end_the_reading(stack: ExitStack) -> None:
    with pytest.raises(TooManyTasks, match="line 4"):
        Read(stack, GOOD * 9, max_rows=3)
    with pytest.raises(FileTooLarge, match="line"):
        Read(stack, GOOD * 9, max_bytes=100)


def test_what_an_input_says_decides_its_digest_and_its_form_does_not(stack: ExitStack) -> None:
    lines = b'{"custom_id":"a","prompt":"p","max_tokens":3}\n'
    table = b"custom_id,prompt,max_tokens\na,p,3\n"
    assert Read(stack, lines).checked.digest != Read(stack, lines + lines.replace(b"a", b"b")).checked.digest
    assert Read(stack, b"\xef\xbb\xbf" + lines.strip()).checked.digest == Read(stack, lines).checked.digest
    (row,), (cell,) = Read(stack, lines).rows, Read(stack, table, Form.CSV).rows
    assert (row.body, row.custom_id) == (cell.body, cell.custom_id)


# ---- tables


def test_a_column_or_a_template_becomes_the_prompt(stack: ExitStack) -> None:
    table = b'id,text,lang,max_tokens\n7,"two\nlines",de,5\n\n8,{x},fr,\n9,,fr,\n'
    shape = Shape(
        template="Into {lang}: {text} {{!}}",
        id_column="id",
        chat=True,
        system="Be short.",
        field_columns=("max_tokens",),
    )
    read = Read(stack, table, Form.CSV, shape=shape)
    first, second = (json.loads(row.body) for row in read.rows)
    assert [message["content"] for message in first["messages"]] == ["Be short.", "Into de: two\nlines {!}"]
    assert second["messages"][1]["content"] == "Into fr: {x} {!}", "a cell is no template"
    assert first["sampling"]["max_tokens"] == 5
    assert [(row.line, row.custom_id) for row in read.rows] == [(2, "7"), (5, "8")]
    assert read.problems == [(6, "invalid_request")]


def test_columns_of_a_table_made_for_something_else_are_no_fields_unless_named(stack: ExitStack) -> None:
    table = b"custom_id,question,n,model,user\na,Why?,6,gpt-9,ann\n"
    shapes = (Shape(prompt_column="question"), Shape(prompt_column="question", field_columns=("n",)))
    plain, named = (Read(stack, table, Form.CSV, shape=shape).rows[0] for shape in shapes)
    assert (plain.custom_id, json.loads(plain.body)["prompt"]) == ("a", "Why?")
    assert "n" not in json.loads(plain.body).get("sampling", {})
    assert json.loads(named.body)["sampling"]["n"] == 6
    with pytest.raises(InvalidRequest, match="'colour' is no field of a request; those are "):
        Shape(prompt_column="question", field_columns=("colour",))


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("a,b,c", "invalid_request"),
        ('"never closed', "invalid_json_line"),
        ("caf\udce9,x", "invalid_json_line"),
        ("long," + 70_000 * "x", "invalid_request"),
    ],
)
def test_a_bad_row_of_a_table_has_its_line(stack: ExitStack, line: str, code: str) -> None:
    table = f"prompt,custom_id\nok,1\n{line}\n".encode(errors="surrogateescape")
    assert Read(stack, table, Form.CSV).problems == [(3, code)]


@pytest.mark.parametrize("end", ["", 'ok,"5"\n', '"6",7\n'])
def test_a_stray_quote_costs_its_own_line_and_is_named_by_it(stack: ExitStack, end: str) -> None:
    """The lines up to the next quote, or all that were left, went with it and were not told of."""
    data = f'prompt,custom_id\nok,1\n"stray,2\nok,3\n\n"two\nlines",4\n{end}'.encode()
    read = Read(stack, data, Form.CSV)
    assert [row.line for row in read.rows] == [2, 4, 6, *([8] if end else [])]
    (refusal,) = read.checked.errors
    assert (refusal.line, refusal.problem.code) == (3, "invalid_json_line")
    assert "a quote that is opened in this line would end in or after line 6" in refusal.error.message
    never = Read(stack, b'prompt\n"stray\nok\n' + b"x" * 700_000 + b"\nok\n", Form.CSV)
    assert [line for line, _ in never.problems] == [2, 4]
    assert [row.line for row in never.rows] == [3, 5]


def test_a_stray_quote_that_another_one_closes_costs_no_line_between_them(stack: ExitStack) -> None:
    """What they quoted was a cell: one error for the row, and the lines inside were counted nowhere."""
    data = b'prompt,custom_id\nok,1\n"stray,2\nok,3\nok,4\nok,5\nend"\nok,6\n'
    read = Read(stack, data, Form.CSV)
    assert [row.line for row in read.rows] == [2, 4, 5, 6, 8]
    assert [line for line, _ in read.problems] == [3, 7]
    assert "1 cells and the head has 2; a quote that is opened in this line ends in line 7" in (
        read.checked.errors[0].error.message
    )


@pytest.mark.parametrize(
    ("shape", "head", "missing"),
    [
        (
            Shape(),
            "question,lang",
            "no column 'prompt' or 'messages'; it has question, lang; --prompt-column",
        ),
        (Shape(chat=True), "question,lang", "no column 'prompt'; it has question, lang; --prompt-column"),
        (Shape(prompt_column="q"), "question,lang", "no column 'q'; it has question, lang"),
        (Shape(template="{question} {x}"), "question,lang", "no column 'x'"),
        (Shape(prompt_column="question", id_column="id"), "question,lang", "no column 'id'"),
        (Shape(prompt_column="q"), ",".join(f"c{n}" for n in range(50)), "c19 and 30 more;"),
    ],
)
def test_a_column_that_is_missing_is_told_once(
    stack: ExitStack, shape: Shape, head: str, missing: str
) -> None:
    width = head.count(",")
    with pytest.raises(InvalidRequest) as refused:
        Read(stack, f"{head}\n{',' * width}\nwhy{',' * width}\n".encode(), Form.CSV, shape=shape)
    assert missing in refused.value.message


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n \n", b"\n\n"])
@pytest.mark.parametrize("form", [Form.JSONL, Form.CSV])
def test_an_input_of_nothing_but_a_mark_and_blank_lines_is_empty(
    stack: ExitStack, data: bytes, form: Form
) -> None:
    data = data.replace(b" ", b"") if form is Form.CSV else data
    checked = Read(stack, data, form).checked
    assert (checked.rows, checked.invalid) == (0, 0)


def test_a_line_of_a_table_that_never_ends_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "in.csv.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'prompt\nok\n"two\nlines"\n')
        for _ in range(8):
            file.write(b"x" * (1 << 20))
        file.write(b"\nok\n")
    name = FileName.of(str(path))
    tracemalloc.start()
    try:
        with open_input(name, SETTINGS) as file:
            found = list(read_records(file, name.form, 100_000))
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()
    assert [number for number, _ in found] == [2, 3, 5, 6]
    assert isinstance(found[2][1], BadInput)
    assert found[3][1] == {"prompt": "ok"}


def test_half_a_surrogate_pair_in_a_cell_is_a_bad_row(stack: ExitStack) -> None:
    cell = '"[{""role"": ""user"", ""content"": ""\\ud800""}]"'
    assert Read(stack, f"messages,n\n{cell},1\n".encode(), Form.CSV).problems == [(2, "invalid_request")]


@pytest.mark.parametrize("template", ["{0.x}", "{a!r}", "{a:>9}", "{", "{}"])
def test_a_template_is_columns_and_nothing_else(template: str) -> None:
    if template == "{0.x}":
        with pytest.raises(InvalidRequest, match="not there"):
            Shape(template=template).fields({"0": "a"})
        return
    with pytest.raises(InvalidRequest, match="template"):
        Shape(template=template)


def test_parquet_is_read_a_few_rows_at_a_time(stack: ExitStack, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    unread = pyarrow.array([b"\xff"] * 3000, pyarrow.binary()).cast(pyarrow.string(), safe=False)
    asked = {"question": [f"q{n}" for n in range(3000)], "top_k": [None, 5, 6] * 1000}
    parquet.write_table(pyarrow.table(asked | {"unread": unread}), tmp_path / "in.parquet")
    name = FileName.of(str(tmp_path / "in.parquet"))
    with open_input(name, SETTINGS) as file:
        shape = Shape(prompt_column="question")
        spool = stack.enter_context(Spool())
        records = read_records(file, name.form, 1000, shape)
        found = check(records, Rules(SETTINGS, shape=shape), spool, None)
    assert (found.rows, found.invalid) == (3000, 0)
    last = list(spool.rows())[-1]
    assert (last.line, json.loads(last.body)["prompt"]) == (3000, "q2999")
    with open_input(name, SETTINGS) as file, pytest.raises(InvalidRequest, match="it has question, top_k"):
        next(read_records(file, name.form, 1000))
    (tmp_path / "in.parquet").write_bytes(b"nothing of the kind")
    with open_input(name, SETTINGS) as file, pytest.raises(BadInput, match="Parquet"):
        check(read_records(file, name.form, 1000), Rules(SETTINGS), spool, None)


# ---- packed files


def packed(packing: Packing, data: bytes) -> bytes:
    if packing is Packing.GZIP:
        return gzip.compress(data)
    zstandard = pytest.importorskip("zstandard")
    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize(("suffix", "packing"), [(".gz", Packing.GZIP), (".zst", Packing.ZSTD)])
def test_a_packed_file_is_read_whole_or_refused(tmp_path: Path, suffix: str, packing: Packing) -> None:
    noise = random.Random(5).randbytes(50_000).hex().encode()
    path = tmp_path / f"in.jsonl{suffix}"
    whole = packed(packing, GOOD * 5000) + packed(packing, noise)
    path.write_bytes(whole)
    name = FileName.of(str(path))
    assert (name.form, name.packing) == (Form.JSONL, packing)
    with open_input(name, SETTINGS) as file:
        assert file.read() == GOOD * 5000 + noise
    for broken in (whole[:-10_000], b"plain text that is not packed"):
        path.write_bytes(broken)
        with pytest.raises(BadInput, match="not whole"), open_input(name, SETTINGS) as file:
            file.read()


def test_a_small_file_that_unpacks_to_a_large_one_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zstandard = pytest.importorskip("zstandard")
    monkeypatch.setattr(sources, "ZSTD_BYTES", 128)
    packer, path = zstandard.ZstdCompressor(level=19).compressobj(), tmp_path / "in.zst"
    path.write_bytes(b"".join(packer.compress(bytes(1 << 20)) for _ in range(32)) + packer.flush())
    assert path.stat().st_size < 2_000
    tracemalloc.start()
    try:
        with open_input(FileName.of(str(path)), SETTINGS) as file:
            assert sum(map(len, iter(lambda: file.read(1 << 20), b""))) == 1 << 25
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "form", "packing"),
    [
        ("-", Form.JSONL, Packing.NONE),
        ("s3://b/x.CSV.GZ", Form.CSV, Packing.GZIP),
        ("a.tsv", Form.TSV, Packing.NONE),
        ("dir.csv/a.parquet", Form.PARQUET, Packing.NONE),
        ("a.txt.zst", Form.JSONL, Packing.ZSTD),
    ],
)
def test_a_name_says_what_is_in_it(name: str, form: Form, packing: Packing) -> None:
    assert (FileName.of(name).form, FileName.of(name).packing) == (form, packing)


# ---- rows that say the same


def test_twins_are_found_on_disk_as_a_set_would_find_them(stack: ExitStack) -> None:
    draw = random.Random(11)
    drawn = [b"%d" % draw.randrange(30_000) for _ in range(60_000)]
    first: dict[bytes, int] = {}
    wanted = {(place, first[key]) for place, key in enumerate(drawn) if first.setdefault(key, place) != place}
    twins = stack.enter_context(Twins())
    for place, key in enumerate(drawn):
        twins.add(key, place)
    found = list(twins.pairs())
    assert len(found) == len(wanted)
    assert set(found) == wanted


def test_finding_copies_takes_two_files_however_many_there_are(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was 256 and one for each 100,000 copies; a shell may allow a process 256 in all."""
    monkeypatch.setattr(copies, "CHUNK_PAIRS", 1000)
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    twins, found, half = stack.enter_context(Twins()), stack.enter_context(Copies()), 35_000
    for place in range(2 * half):
        twins.add(b"%d" % (place % half), place)
    found.find(twins, Lines())
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) <= before + 2
    assert all(found.of(place) == [place + half] for place in range(half))


def test_a_row_that_asks_for_the_same_is_a_copy(stack: ExitStack) -> None:
    def line(n: int, prompt: str, **more: object) -> bytes:
        return json.dumps({"custom_id": f"r{n}", "prompt": prompt} | more).encode() + b"\n"

    data = line(0, "a") + line(1, "b") + b"bad\n" + line(2, "a", metadata={"k": "v"}) + line(3, "a", seed=1)
    read = Read(stack, data + line(4, "b") + line(5, "a"), dedupe=True)
    ordinals = range(read.spool.count)
    assert {leader: read.copies.of(leader) for leader in ordinals} == {
        **{ordinal: [] for ordinal in ordinals},
        0: [3, 6],
        1: [5],
    }
    assert [read.spool.at(n).custom_id for n in (3, 6)] == ["r2", "r5"]
    assert [ordinal in read.copies for ordinal in ordinals] == [n in (3, 5, 6) for n in ordinals]


def test_a_refused_row_leads_no_copies_and_is_none(stack: ExitStack) -> None:
    rows = [("x", "other"), ("x", "a"), ("y", "a"), ("y", "a"), ("z", "a")]
    data = b"".join(json.dumps({"custom_id": i, "prompt": p}).encode() + b"\n" for i, p in rows)
    read = Read(stack, data, dedupe=True)
    assert read.problems == [(2, "duplicate_custom_id"), (4, "duplicate_custom_id")]
    assert [read.copies.of(n) for n in range(5)] == [[], [], [4], [], []]


def test_the_spool_gives_back_what_it_was_given_also_out_of_turn(stack: ExitStack) -> None:
    spool = stack.enter_context(Spool(indexed=True))
    rows = [Spooled(n + 1, f"ü{n}", b"{%d}" % n * (n % 7), n % 3 == 0, n, 2.0 * n, n) for n in range(500)]
    for row in rows:
        spool.add(row)
    draw = random.Random(3)
    for row, given in zip(spool.rows(), rows, strict=True):
        assert row == given
        other = draw.randrange(500)
        assert spool.at(other) == rows[other]


def test_a_set_of_lines_counts_each_once() -> None:
    lines = Lines()
    for line in (9, 70_000, 9, 1):
        lines.add(line)
    assert (lines.count, 9 in lines, 8 in lines, 70_000 in lines, 10**9 in lines) == (
        3,
        True,
        False,
        True,
        False,
    )


def test_a_program_may_say_what_a_line_may_and_no_more() -> None:
    with Intake(Rules(SETTINGS)) as intake:
        line = json.loads(batch_line())
        said = [line, {"prompt": "p", "stop": ("x",)}, {"prompt": "p", "max_tokns": 3}]
        found = intake.take_requests([*said, {"prompt": "\ud800"}, {"prompt": object()}, {"prompt": b"p"}])
        assert (found.rows, [each.line for each in found.errors]) == (2, [3, 4, 5, 6])
        assert [each.problem.code for each in found.errors] == ["invalid_request", *["invalid_json_line"] * 3]


def test_an_empty_input_has_neither_rows_nor_errors(stack: ExitStack) -> None:
    found: Checked = Read(stack, b"\n\n  \n").checked
    assert (found.rows, found.invalid) == (0, 0)
