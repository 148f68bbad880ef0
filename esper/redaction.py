"""Masks secrets in text.

This module owns the three ways to recognize a secret: by the name next to it, by the shape of the
text around it, and by its value once settings have loaded it. It reads no settings and writes no
log. Invariant: ``mask_text`` never returns a value that was given to ``remember_secret``, in any of
the encodings of URLs, JSON and repr.
"""

import functools
import json
import os
import re
import threading
from collections.abc import Iterator
from urllib.parse import quote, quote_plus, unquote, urlsplit

MASK = "***"
MIN_SECRET_CHARS = 6  # shorter values would mask ordinary words; they are recognized by name and shape only

_WORDS = (
    r"pass(?:word|wd|phrase)|(?<!by)(?<!com)pass(?![a-z])|pwd|secret|token|credential|bearer|cookie|authorization|signature"
    r"|(?:api|access|private|auth|encryption|signing)[_-]?key"
)
_SECRET_NAME = re.compile(_WORDS, re.IGNORECASE)
_BARE_NAME = re.compile(r"-{0,2}[A-Za-z][\w.-]{0,63}[:=]?")

_URL_PASSWORD = re.compile(r"(?P<head>[a-z][a-z0-9+.-]{0,30}://[^/\s:@'\"]*:)[^/\s]+(?=@)", re.IGNORECASE)
_PEM = re.compile(r"(?P<head>-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?=-----END|\Z)", re.DOTALL)
_AUTHORIZATION = re.compile(
    r"(?P<head>authorization\\*[\"']?\s*[:=,]\s*(?:[bru]{1,2}(?=[\"']))?)(?:\\*\"[^\"\r\n]*|\\*'[^'\r\n]*|[^\r\n]+)",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<head>\bbearer\s+)[\w.~+/=-]+", re.IGNORECASE)
_BASIC = re.compile(r"(?P<head>\bBasic\s+)(?=\S*[A-Z0-9+/=])[A-Za-z0-9+/=]{8,}")
_NAMED = re.compile(
    rf"""(?P<head>(?:{_WORDS})[\w.-]{{0,64}}  # the name, or its end
        \\*["']?\s*[=:]\s*(?:[bru]{{1,2}}(?=["']))?)   # is
        (?!(?:none|null|true|false)\b)
        (?:
            (?P<slash>\\{{1,8}})(?P<inner>["']).*?(?P=slash)(?P=inner)   # a quoted word in quoted text
          | "(?:\\.|[^"\\])*"?
          | '(?:\\.|[^'\\])*'?
          | [^\s&"'\\][^\s&]*
        )""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_KNOWN_SHAPES = re.compile(r"(?<![\w-])(?:A[KS]IA[A-Z0-9]{16}|gh[pousr]_\w{20,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)")
_CANDIDATE = re.compile(rf"{_WORDS}|://|basic|PRIVATE|A[KS]IA|gh[pousr]_|eyJ", re.IGNORECASE)

_lock = threading.RLock()
_secrets: frozenset[str] = frozenset()
_encodings: tuple[str, ...] = ()  # longest first: one secret may contain another
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


@functools.lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a value with this name is a secret."""
    return _SECRET_NAME.search(name) is not None


def announces_secret(word: str) -> bool:
    """Whether the item after ``word`` is a secret, as in ``["--password", ...]``."""
    return len(word) <= 64 and _BARE_NAME.fullmatch(word) is not None and is_secret_name(word)


def remember_secret(value: str) -> None:
    """Register a secret: from now on ``mask_text`` masks ``value``, and the password in it if it is a URL.

    Values shorter than ``MIN_SECRET_CHARS`` are ignored. A registration lasts as long as the process.
    """
    global _secrets, _encodings
    parts = {p for p in (value, *_passwords_in(value)) if len(p) >= MIN_SECRET_CHARS}
    if parts <= _secrets:
        return
    with _lock:
        _secrets = _secrets | parts
        encodings = {s for secret in _secrets for s in _encodings_of(secret) if len(s) >= MIN_SECRET_CHARS}
        _encodings = tuple(sorted(encodings, key=len, reverse=True))


def mask_values(text: str) -> str:
    """``text`` with all registered secrets masked."""
    for encoding in _encodings:
        if encoding in text:
            text = text.replace(encoding, MASK)
    return text


def mask_text(text: str) -> str:
    """``text`` with registered secrets masked, and everything that looks like a secret.

    Recognized by shape: passwords in URLs, ``password=...``, ``"secret_key": "..."``, Authorization
    headers, bearer tokens, private keys in PEM, and the tokens of well-known services.
    """
    text = mask_values(text)
    if _CANDIDATE.search(text) is None:
        return text
    for shape in (_PEM, _URL_PASSWORD, _AUTHORIZATION, _BEARER, _BASIC, _NAMED):
        text = shape.sub(rf"\g<head>{MASK}", text)
    return _KNOWN_SHAPES.sub(MASK, text)


def _passwords_in(value: str) -> Iterator[str]:
    if "://" in value:
        try:
            password = urlsplit(value).password
        except ValueError:
            return
        if password:
            yield password
            yield unquote(password)


def _encodings_of(secret: str) -> Iterator[str]:
    plain = {secret, quote(secret), quote(secret, safe=""), quote_plus(secret), unquote(secret)}
    for text in plain:
        yield from (text, repr(text)[1:-1], ascii(text)[1:-1], repr(text.encode(errors="replace"))[2:-1])
        for ascii_only in (True, False):
            inner = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
            yield from (inner, json.dumps(inner, ensure_ascii=ascii_only)[1:-1])
        yield json.dumps(repr(text)[1:-1])[1:-1]
