"""Logs: secrets are masked, callers never wait or fail, and lost lines are counted."""

import base64
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr
from support.conditions import wait_until

from esper import redaction
from esper.config import KafkaSecurity, LoggingSettings, PostgresSettings
from esper.logging import MASK, get_logger, logger_factory, redact
from esper.logging.log_entry import LineRenderer, LogEntry
from esper.logging.setup import _QueueHandler
from esper.logging.writer_thread import FileDescriptorSink, LogWriter

FORMATS = ("json", "console")
SECRET = st.text(st.characters(min_codepoint=33, max_codepoint=0x17F, exclude_categories=("C", "Z")), min_size=6)
SECRET = SECRET.map(lambda s: f"Q{s}7")  # so that no line contains it by chance
WORD = st.text(st.sampled_from("abcXYZ019+/_-.~"), min_size=6).map(lambda s: f"Q{s}7")
NAMES = st.sampled_from(
    ["password", "db_passwd", "PWD", "passphrase", "secret_key", "clientSecret", "API-KEY", "apiKey", "token",
     "auth_token", "authorization", "Proxy-Authorization", "aws_secret_access_key", "AccessKey", "privateKey",
     "sasl_plain_password", "ssl_key_password", "credentials", "newPasswordHash", "dbpass", "PGPASSWORD", "Set-Cookie", "X-Amz-Signature", "bearer", "auth_key"]
)  # fmt: skip


@contextmanager
def captured_lines(form: str = "json", **options: Any) -> Iterator[list[str]]:
    """The lines that loggers write in the block; complete at its end."""
    lines: list[str] = []
    renderer = LineRenderer(LoggingSettings.model_validate({"level": "DEBUG", "format": form}), has_colors=False)
    writer = LogWriter(renderer, lambda data: lines.append(data.decode()), **options)
    before, logger_factory.writer = logger_factory.writer, writer
    root = logging.getLogger()
    level, handlers = root.level, root.handlers
    root.setLevel("DEBUG")
    root.handlers = [_QueueHandler()]
    try:
        yield lines
    finally:
        root.handlers = handlers
        root.setLevel(level)
        logger_factory.writer = before
        writer.close(20)


@contextmanager
def restored_secrets() -> Iterator[None]:
    """Forget the secrets registered in the block at its end."""
    before = redaction._secrets, redaction._encodings
    try:
        yield
    finally:
        redaction._secrets, redaction._encodings = before


log = get_logger("esper.test")


# -- by name


@dataclass
class Held:
    password: Any
    user: str = "u"


class Modelled(BaseModel):
    api_key: Any
    user: str = "u"


class Named(NamedTuple):
    token: Any
    user: str = "u"


class SecretRepr:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"SecretRepr(password={self.value!r}, user='u')"


HOLDERS: dict[str, Any] = {
    "dict": lambda name, secret: {name: secret},
    "bytes key": lambda name, secret: {name.encode(): secret},
    "pair": lambda name, secret: (name, secret),
    "arguments": lambda name, secret: ["serve", f"--{name}", secret, "--port", "80"],
    "dataclass": lambda _name, secret: Held(secret),
    "model": lambda _name, secret: Modelled(api_key=secret),
    "tuple with names": lambda _name, secret: Named(secret),
    "repr": lambda _name, secret: SecretRepr(secret),
    "exception": lambda name, secret: ValueError({name: secret}),
    "text": lambda name, secret: f"refused: {name}={secret!r} is old",
    "json text": lambda name, secret: json.dumps({name: secret, "x": 1}),
    "json in json": lambda name, secret: json.dumps(json.dumps({name: secret})),
    "repr of dict": lambda name, secret: repr({"a": 1, name: secret}),
    "bytes": lambda name, secret: json.dumps({name: secret}).encode(),
    "SecretStr": lambda _name, secret: SecretStr(secret),
}
WRAPPERS: dict[str, Any] = {
    "dict": lambda v: {"in": v},
    "list": lambda v: ["a", v],
    "tuple": lambda v: (v, 1),
    "dataclass": lambda v: Held(None, v),
    "model": lambda v: Modelled.model_construct(api_key=None, user=v),
}


@given(
    secret=SECRET,
    name=NAMES,
    holder=st.sampled_from(sorted(HOLDERS)),
    wrappers=st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=5),
    form=st.sampled_from(FORMATS),
)
def test_value_with_secret_name_is_masked(secret: str, name: str, holder: str, wrappers: list[str], form: str) -> None:
    value = HOLDERS[holder](name, secret)
    for wrapper in wrappers:
        value = WRAPPERS[wrapper](value)
    with captured_lines(form) as lines:
        log.info("held", value=value, **{name.replace("-", "_"): secret})
    line = "".join(lines)
    assert MASK in line
    assert_hidden(secret, line)


def assert_hidden(secret: str, line: str) -> None:
    spellings = {secret, repr(secret)[1:-1], ascii(secret)[1:-1], json.dumps(secret)[1:-1]}
    spellings |= {json.dumps(s)[1:-1] for s in tuple(spellings)}
    for spelling in spellings:
        assert spelling not in line


# -- by shape


SHAPES = [
    "postgresql://user:{}@host:5432/db?sslmode=require",
    "amqp://:{}@host",
    "cannot connect to postgresql://u:{}@h/d: timeout",
    "host=h user=u password={} dbname=d",
    "https://h/x?token={}&y=1",
    "https://h/x?X-Amz-Signature={}",
    "Authorization: Bearer {}",
    "Authorization: Basic {}",
    'curl -H "Authorization: Bearer {}" https://h',
    "{{'Authorization': 'Bearer {}', 'x': 1}}",
    "sent authorization: AWS4-HMAC-SHA256 Credential={}, Signature={}",
    "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----",
    'secret_key: "{}"',
    "RCLONE_AUTH_KEY='{}'",
]


@given(secret=WORD, shape=st.sampled_from(SHAPES), way=st.sampled_from(["event", "field", "stdlib", "traceback"]))
def test_text_shaped_like_secret_is_masked(secret: str, shape: str, way: str) -> None:
    secret = secret.replace("/", "_") if "://" in shape else secret
    text = shape.replace("{}", secret)
    with captured_lines() as lines:
        log_text(text, way)
    assert MASK in "".join(lines)
    assert secret not in "".join(lines)


def log_text(text: str, way: str) -> None:
    """Log a text as an event, a field, a standard record or a traceback."""
    if way == "event":
        log.warning(text)
    elif way == "field":
        log.warning("text.logged", value=["x", {"y": text}])
    elif way == "stdlib":
        logging.getLogger("botocore.parsers").warning("said %s", text)
    else:
        try:
            try:
                raise OSError(text)
            except OSError as error:
                raise RuntimeError("no answer") from error
        except RuntimeError:
            log.exception("failed")


@pytest.mark.parametrize(
    "text",
    [
        "setting 's3.secret_key' is missing; set it there or by ESPER_S3__SECRET_KEY",
        "ESPER_S3__SECRET_KEYY (variable): unknown setting 's3.secret_keyy'; did you mean 'secret_key'?",
        "http://127.0.0.1:8080/blueprints",
        "s3://bucket/kernels/abc",
        "passed: 12, bypass: 1, num_passes=3",
        "password=None",
        "Basic arithmetic",
        "kernel.registered sha256=0f3a",
    ],
)
def test_ordinary_text_is_not_masked(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "piece", ["password", "a://:", "authorization:", "-eyJaaaaaaaa.", "\\", 'token="', "-----BEGIN PRIVATE KEY-----"]
)
def test_masking_time_is_linear_in_text_length(piece: str) -> None:
    text = "password=" + piece * (100_000 // len(piece))
    began = time.perf_counter()
    redaction.mask_text(text)
    assert time.perf_counter() - began < 5  # in quadratic time it would be minutes


# -- by value


ENCODINGS: dict[str, Any] = {
    "plain": str,
    "percent": lambda s: quote(s, safe=""),
    "percent, slashes left": quote,
    "form": quote_plus,
    "repr": repr,
    "ascii": ascii,
    "json": json.dumps,
    "bytes": lambda s: repr(s.encode()),
}


@given(
    secret=SECRET,
    encoding=st.sampled_from(sorted(ENCODINGS)),
    way=st.sampled_from(["event", "field", "stdlib", "traceback"]),
    form=st.sampled_from(FORMATS),
)
def test_secret_of_settings_is_masked_in_every_encoding(secret: str, encoding: str, way: str, form: str) -> None:
    with restored_secrets():
        KafkaSecurity.model_validate({"protocol": "SASL_SSL", "username": "u", "password": secret})
        encoded = ENCODINGS[encoding](secret)
        with captured_lines(form) as lines:
            log_text(f"server said <{encoded}> is wrong", way)
        line = "".join(lines)
        assert MASK in line
        assert_hidden(secret, line)
        assert quote(secret, safe="") not in line


@given(password=SECRET)
def test_password_inside_dsn_is_masked(password: str) -> None:
    with restored_secrets():
        PostgresSettings.model_validate({"dsn": f"postgresql://u:{quote(password, safe='')}@h/d"})
        with captured_lines() as lines:
            log_text(f"FATAL: authentication of u with {password} or {quote(password, safe='')} failed", "traceback")
        assert_hidden(password, "".join(lines))
        assert quote(password, safe="") not in "".join(lines)


def test_short_secret_does_not_mask_ordinary_words() -> None:
    with restored_secrets(), captured_lines() as lines:
        KafkaSecurity.model_validate({"protocol": "SASL_SSL", "username": "u", "password": "run"})
        log.info("run.began", password="run", dsn="kafka://u:run@h")
    shown = json.loads("".join(lines))
    assert shown["event"] == "run.began"
    assert (shown["password"], shown["dsn"]) == (MASK, f"kafka://u:{MASK}@h")


def test_basic_credentials_after_header_are_masked() -> None:
    credentials = base64.b64encode(b"user:hunter22").decode()
    assert credentials not in str(redact([("Authorization", f"Basic {credentials}"), f"sent Basic {credentials}"]))


# -- rendering


def test_value_is_copied_at_the_call() -> None:
    changing: dict[str, Any] = {"a": [1], "b": bytearray(b"x")}
    with captured_lines() as lines:
        log.info("changing", value=changing)
        changing["a"].append(2)
        changing["c"] = changing
        changing["b"][0] = 0
    assert json.loads("".join(lines))["value"] == {"a": [1], "b": "x"}


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("hunter22")


@pytest.mark.parametrize("form", FORMATS)
def test_any_value_is_logged_without_raising(form: str) -> None:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    with captured_lines(form) as lines:
        log.info("hostile", value=Hostile(), within=[Hostile()])
        log.info("cyclic", value=cyclic)
        log.info("huge", value=list(range(10**6)), text="x" * 10**6, number=10**5000)
        log.info("odd", nan=float("nan"), lone="\ud800", level=3, event_=b"\xff", none=None)
        log.info("positional %d", "no number")
        log.info({"event": "no text"})
        logging.getLogger("other").warning("%d things", "no number")
        logging.getLogger("other").warning("exception", exc_info=True)
    written = "".join(lines)
    assert "hunter22" not in written
    assert len(written) < 100_000
    if form == "json":
        shown = [json.loads(line) for line in written.splitlines()]
        assert len(shown) == 8
        assert shown[0]["value"] == "<unprintable Hostile>"
        assert shown[3]["nan"] == "nan"
        assert (shown[3]["level"], shown[3]["level_"]) == ("info", 3)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
        max_leaves=30,
    )
)
def test_json_line_is_one_object(value: Any) -> None:
    with captured_lines() as lines:
        log.info("any", value=value)
    text = "".join(lines)
    assert text.count("\n") == 1
    json.loads(text, parse_constant=pytest.fail)


def test_bound_and_contextual_fields_are_logged() -> None:
    from structlog.contextvars import bound_contextvars

    with captured_lines() as lines, bound_contextvars(run="r"):
        log.bind(layer="fc1").info("seed %s", 3, seed=3)
    shown = json.loads("".join(lines))
    assert (shown["event"], shown["run"], shown["layer"], shown["seed"]) == ("seed 3", "r", "fc1", 3)
    assert (shown["level"], shown["logger"]) == ("info", "esper.test")


def test_unconfigured_program_gets_masked_records(caplog: pytest.LogCaptureFixture) -> None:
    assert logger_factory.writer is None
    try:
        raise ValueError("postgresql://u:hunter22@h/d")
    except ValueError:
        log.exception("library.failed", password="hunter22", n=1)
    assert "library.failed" in caplog.text
    assert "n=1" in caplog.text
    assert "ValueError" in caplog.text
    assert "hunter22" not in caplog.text


# -- failures of the output


def entry(n: int) -> LogEntry:
    return LogEntry(0.0, "info", "t", f"e{n}", {})


def test_full_queue_drops_and_logs_the_count_later() -> None:
    is_open, lines = threading.Event(), []

    def slow(data: bytes) -> None:
        assert is_open.wait(20)
        lines.append(data.decode())

    renderer = LineRenderer(LoggingSettings(level="INFO", format="json"), has_colors=False)
    writer = LogWriter(renderer, slow, max_queued=10)
    writer.put(entry(0))
    wait_until(lambda: writer._queue.empty(), 20, "the writer, busy with the first line")
    for n in range(1, 31):
        writer.put(entry(n))  # would block forever if it waited
    assert writer.num_lost == 20
    is_open.set()
    assert writer.flush(20)
    shown = [json.loads(line) for line in "".join(lines).splitlines()]
    assert [e["event"] for e in shown if e["event"] != "log.lost"] == [f"e{n}" for n in range(11)]
    assert [e["n"] for e in shown if e["event"] == "log.lost"] == [20]
    assert writer.num_lost == 0
    writer.close()


def test_failing_sink_counts_lines_as_lost() -> None:
    lines: list[str] = []
    is_full = True

    def disk(data: bytes) -> None:
        if is_full:
            raise OSError(28, "No space left on device")
        lines.append(data.decode())

    writer = LogWriter(lambda e: f"{e.event}{e.fields.get('n', '')}\n", disk)
    for n in range(3):
        writer.put(entry(n))
        assert writer.flush(20)
    assert writer.num_lost == 3
    is_full = False
    writer.put(entry(3))
    writer.close(20)
    assert "".join(lines) == "e3\nlog.lost3\n"
    writer.put(entry(4))  # after close: written on the caller's thread
    assert lines[-1] == "e4\n"


def test_file_descriptor_sink_slow_and_closed() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    data, got = b"x" * 500_000, bytearray()

    def read() -> None:
        while chunk := os.read(reading, 65_536):
            got.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    sink = FileDescriptorSink(writing)
    sink(data)
    os.close(writing)
    reader.join(20)
    assert bytes(got) == data
    os.close(reading)
    with pytest.raises(OSError, match="Bad file descriptor"):
        FileDescriptorSink(reading)(b"x")


def test_many_threads_lose_no_lines() -> None:
    with captured_lines() as lines:
        threads = [
            threading.Thread(target=lambda t=t: [log.info("many", t=t, n=n) for n in range(200)]) for t in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    shown = [json.loads(line) for line in "".join(lines).splitlines()]
    for t in range(8):
        assert [e["n"] for e in shown if e["t"] == t] == list(range(200))
