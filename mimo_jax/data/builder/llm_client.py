"""Client of an OpenAI-compatible chat endpoint, with retries, limits, and a cache on disk.

A repeated request is answered from the cache, which survives any stop of the process. Threads and processes may share one cache folder;
if several send the same request at once, only one reaches the endpoint. Nothing but the prompt leaves this machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from mimo_jax import files
from mimo_jax.errors import UserError

URL, KEY, MODEL = "MIMO_LLM_URL", "MIMO_LLM_KEY", "MIMO_LLM_MODEL"
MAX_REPLY_BYTES = 1 << 20  # bytes
_RETRY_STATUSES = {408, 409, 425, 429}  # and 5xx: HTTP statuses after which another attempt may succeed
_FIRST_WAIT, _MAX_WAIT = 0.5, 30.0  # seconds before the second attempt, doubled for each further one


class EndpointError(UserError):
    """The endpoint cannot be used (any longer); the replies so far are in the cache."""


class _AttemptFailedError(Exception):
    """One attempt failed. wait: the seconds that the endpoint asks to wait, 0 if it does not say."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key to another host."""

    def redirect_request(self, *_):
        return None


@dataclass
class ChatClient:
    """url: base of the endpoint, as ".../v1". timeout: seconds per attempt. attempts: maximum per request. concurrency: maximum number of
    simultaneous attempts of this client. max_requests: limit on attempts; max_tokens: limit on the tokens that the endpoint reports
    (or, if it does not, a fourth of the bytes); reaching either raises EndpointError.

    used: counts of "requests", "tokens" and "cached" replies so far."""

    url: str
    model: str
    cache: Path
    key: str = field(default="", repr=False)
    timeout: float = 60.0
    attempts: int = 5
    concurrency: int = 4
    max_requests: int = 10_000
    max_tokens: int = 10_000_000
    answer_tokens: int = 1500  # maximum tokens of a reply
    used: Counter[str] = field(default_factory=Counter)

    def __post_init__(self):
        try:
            parts = urlsplit(self.url)
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # as of "https://[::1/v1" or "https://host:port/v1"
            valid = False
        if not valid:
            raise EndpointError(f"{URL}: give the base of an OpenAI-compatible endpoint, as https://host/v1 (http or https)")
        if parts.username or parts.query or parts.fragment:
            raise EndpointError(f"{URL}: give no user, query or fragment; set the key with {KEY}")
        if not self.model:
            raise EndpointError(f"{MODEL}: is empty; give the name of the model")
        if any(ord(letter) < 33 or ord(letter) > 126 for letter in self.key):
            raise EndpointError(f"{KEY}: contains a blank or a character that no key has")
        self.cache = Path(self.cache)
        self._running = threading.BoundedSemaphore(self.concurrency)
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirect)

    @staticmethod
    def from_environment(cache: str | os.PathLike, **limits) -> ChatClient:
        """The client configured by MIMO_LLM_URL, MIMO_LLM_MODEL and, if the endpoint needs one, MIMO_LLM_KEY. Raises EndpointError."""
        missing = [name for name in (URL, MODEL) if not os.environ.get(name)]
        if missing:
            raise EndpointError(f"{missing[0]}: is not set; --qa llm needs the endpoint in {URL} and the model in {MODEL}")
        return ChatClient(os.environ[URL], os.environ[MODEL], Path(cache), os.environ.get(KEY, ""), **limits)

    def ask(self, key: str, prompt: str) -> str:
        """The reply to a prompt, from the cache if it has `key`, the hash of everything that the reply depends on. Raises EndpointError."""
        path = self.cache / key[:2] / f"{key}.json"
        reply = _read(path)
        if reply is None:
            with _locked(path.parent):
                reply = _read(path)  # another process may have written it meanwhile
                if reply is None:
                    reply = self._request(prompt)
                    _write(path, {"model": self.model, "text": reply})
                    return reply
        with self._lock:
            self.used["cached"] += 1
        return reply

    def _request(self, prompt: str) -> str:
        wait, reason = _FIRST_WAIT, ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(wait, _MAX_WAIT))
                wait *= 2
            try:
                with self._running:
                    self._count_request()
                    return self._attempt(prompt)
            except _AttemptFailedError as failed:
                reason, wait = str(failed), max(wait, failed.wait)
        raise EndpointError(
            f"{URL}: no answer in {self.attempts} attempts ({reason}); replies are cached, run the same command again to resume"
        )

    def _count_request(self) -> None:
        with self._lock:
            for name, limit in (("requests", self.max_requests), ("tokens", self.max_tokens)):
                if self.used[name] >= limit:
                    raise EndpointError(f"the limit of {limit} {name} is reached; replies are cached, raise the limit to resume")
            self.used["requests"] += 1

    def _attempt(self, prompt: str) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": self.answer_tokens}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers)
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                data = b""
                while chunk := response.read1(1 << 16):
                    data += chunk
                    if time.monotonic() > deadline:
                        raise _AttemptFailedError(f"no complete reply within {self.timeout:g} s")
                    if len(data) > MAX_REPLY_BYTES:
                        raise _AttemptFailedError(f"reply of more than {MAX_REPLY_BYTES} bytes")
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in _RETRY_STATUSES or error.code >= 500:
                raise _AttemptFailedError(f"HTTP {error.code}", _seconds(error.headers.get("Retry-After", ""))) from None
            raise EndpointError(f"{URL}: the endpoint refuses the request with HTTP {error.code}; check {URL}, {KEY} and {MODEL}") from None
        except (OSError, ValueError, HTTPException) as error:
            raise _AttemptFailedError(type(error).__name__) from None
        try:
            reply = json.loads(data)
            text = reply["choices"][0]["message"]["content"]
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, LookupError, TypeError, RecursionError):
            raise _AttemptFailedError("a malformed reply") from None
        tokens = (reply.get("usage") or {}).get("total_tokens")
        with self._lock:
            self.used["tokens"] += tokens if isinstance(tokens, int) and tokens > 0 else (len(data) + len(prompt)) // 4
        return text


def cache_key(**parts) -> str:
    """SHA-256 of everything that a reply depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _seconds(text: str) -> float:
    return min(float(text), _MAX_WAIT) if text.isdigit() else 0.0


def _read(path: Path) -> str | None:
    """A cached reply; None if there is none or it cannot be read."""
    try:
        text = json.loads(path.read_text(encoding="utf-8"))["text"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return text if isinstance(text, str) else None


def _write(path: Path, entry: dict) -> None:
    """Write a reply atomically."""
    with files.atomic_write(path, durable=True) as part:
        part.write_text(json.dumps(entry), encoding="utf-8")


@contextmanager
def _locked(folder: Path):
    """Lock a cache folder against other threads and processes; the lock of a killed process is released."""
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder / files.LOCK):
        yield
