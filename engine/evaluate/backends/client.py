"""HTTP to an OpenAI-compatible server: JSON out, JSON in, tried again when it makes sense. Used by server.py alone.

The standard library's http.client, on purpose: no proxy taken from the environment, no redirect followed (a key is
sent to the address the user gave and nowhere else), one deadline for a whole request. What a server sends is data:
sizes are capped, and its words are shortened and cleaned before they stand in a message.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from engine.errors import BadInputError, ServerError

MOST_BYTES = 10 * 2**20  # of one answer
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before the first retry (then doubled each time), and at most
CONNECT_SECONDS = 10.0
_AGAIN = frozenset({408, 425, 429})  # and every 5xx
_WORDS = 300  # characters of a server's own words in a message


class Refused(ServerError):
    """The server understood and said no (4xx): trying again would not help."""

    def __init__(self, message: str, hint: str, status: int, words: str) -> None:
        super().__init__(message, hint)
        self.status, self.words = status, words


class _Failed(Exception):
    """One try failed; another may not. `wait`: seconds the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(eq=False)
class Client:
    """Requests to one address. Safe for use by several threads; `stop` ends them all.

    key: sent as a bearer token; never part of a message. retries: so many tries after the first.
    Raises BadInputError when the address is not one.
    """

    url: str
    key: str = field(default="", repr=False)
    timeout: float = 300.0
    retries: int = 5
    first_wait: float = FIRST_WAIT

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path.rstrip("/")
        except ValueError as error:
            raise BadInputError(f"server address {_clean(self.url)!r} cannot be read: {error}") from error
        if parts.scheme not in ("http", "https") or not self._host or parts.query or parts.fragment:
            raise BadInputError(
                f"server address {_clean(self.url)!r} should look like http://host:port/v1 or https://host/v1"
            )
        if parts.username is not None or parts.password is not None:
            raise BadInputError(
                "a server address must not hold a user name or password",
                "name an environment variable that holds the key: key_env: MY_KEY",
            )
        self._secure = parts.scheme == "https"
        self._stopped = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at this path under the address."""
        return self._asked("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that answers this one.

        Raises Refused on 4xx (but 408, 425 and 429), ServerError when the last try failed too or `stop` was called.
        """
        return self._asked("POST", path, json.dumps(body).encode())

    def stop(self) -> None:
        """End all requests and waits at once; later ones fail."""
        self._stopped.set()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _asked(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        reason = ""
        for attempt in range(self.retries + 1):
            if self._stopped.is_set():
                break
            try:
                return self._once(method, path, body)
            except _Failed as error:
                reason = str(error)
                if attempt < self.retries:
                    longest = min(LONGEST_WAIT, self.first_wait * 2**attempt)
                    wait = longest * random.uniform(0.5, 1)  # spread, or all threads come back together
                    self._stopped.wait(min(LONGEST_WAIT, max(wait, error.wait or 0)))
        if self._stopped.is_set():
            raise ServerError(f"requests to {self.url} were stopped")
        tries = f"{self.retries + 1} tries" if self.retries else "one try"
        raise ServerError(
            f"{self.url} gave no usable answer in {tries}: {reason}",
            "is it up, and is that its address? Rows that came are kept",
        )

    def _once(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        deadline = time.monotonic() + self.timeout
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=min(CONNECT_SECONDS, self.timeout))
        sock: socket.socket | None = None
        try:
            connection.connect()
            sock = connection.sock  # http.client lets go of it where the server closes after its answer
            sock.settimeout(self.timeout)
            with self._lock:
                self._open.add(sock)
            if self._stopped.is_set():
                raise _Failed("stopped")
            headers = {"Accept": "application/json", "User-Agent": "medmerge"}
            if body is not None:
                headers["Content-Type"] = "application/json"
            if self.key:
                headers["Authorization"] = f"Bearer {self.key}"
            connection.request(method, self._path + path, body, headers)
            response = connection.getresponse()
            data = self._body(sock, response, deadline)
        except TimeoutError as error:
            raise _Failed(f"no answer in {self.timeout:g} s") from error
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise _Failed(f"{type(error).__name__}: {self._own(str(error))}") from error
        finally:
            if sock is not None:
                with self._lock:
                    self._open.discard(sock)
            connection.close()
        return self._read(response, data)

    def _body(self, sock: socket.socket, response: http.client.HTTPResponse, deadline: float) -> bytes:
        """The body, as long as it comes in time and is not too large."""
        parts: list[bytes] = []
        size = 0
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            with contextlib.suppress(OSError):  # closed already where the server closes and all was read
                sock.settimeout(left)
            part = response.read1(65536)
            if not part:
                return b"".join(parts)
            parts.append(part)
            size += len(part)
            if size > MOST_BYTES:
                raise _Failed(f"an answer of more than {MOST_BYTES // 2**20} MB")

    def _read(self, response: http.client.HTTPResponse, data: bytes) -> dict[str, Any]:
        status = response.status
        if status in _AGAIN or status >= 500:
            raise _Failed(
                f"status {status}: {self._words(data)}", _seconds(response.getheader("Retry-After"))
            )
        if status >= 400:
            words = self._words(data)
            hint = "check the server's address, its model name and key_env"
            if status not in (401, 403, 404):
                hint = "the request is one this server does not take; its own words say why"
            raise Refused(f"{self.url} refused the request (status {status}): {words}", hint, status, words)
        if status >= 300:
            raise Refused(
                f"{self.url} redirects (status {status}), which is not followed",
                "give its new address",
                status,
                "",
            )
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise _Failed("an answer that is not JSON") from error
        if not isinstance(found, dict):
            raise _Failed("an answer that is not a JSON object")
        return found

    def _words(self, data: bytes) -> str:
        """What the server says went wrong, short and clean."""
        text = data[: 64 * 1024].decode("utf-8", "replace")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            said = found.get("error", found.get("detail", found.get("message", text)))
            said = said.get("message", said) if isinstance(said, dict) else said
            text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
        return self._own(text) or "no reason given"

    def _own(self, text: str) -> str:
        """Words from outside: without the key, control characters and line breaks, and not long."""
        return _clean(text.replace(self.key, "(key)") if self.key else text)


def key_of(variable: str) -> str:
    """The key in an environment variable ("" when none is named). Raises BadInputError naming the variable."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise BadInputError(
            f"environment variable {variable}, which should hold a server's key, is not set",
            f"set it before the run: export {variable}=...",
        )
    if not key.isascii() or not key.isprintable():
        raise BadInputError(f"environment variable {variable} holds characters that no key has")
    return key


def _clean(text: str) -> str:
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return plain if len(plain) <= _WORDS else plain[:_WORDS] + "..."


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds; its other form, a date, is left to our own waiting."""
    try:
        return max(0.0, float(header or ""))
    except ValueError:
        return None
