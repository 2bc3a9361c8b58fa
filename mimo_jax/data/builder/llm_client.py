"""A chat endpoint of the OpenAI form, asked politely and paid once: retries, limits, and a cache on disk.

What is asked twice is answered from the cache, which survives whatever stops the process. Threads and processes may share one
cache folder; of several that ask the same at once, one pays. Nothing but the prompt leaves this machine.
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
LARGEST_REPLY = 1 << 20  # bytes
_AGAIN = {408, 409, 425, 429}  # and 5xx: HTTP statuses that another attempt may mend
_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds before the second attempt, doubled for each further one


class EndpointError(UserError):
    """The endpoint cannot be used, or no more; what was answered so far is in the cache."""


class _Failed(Exception):
    """One attempt; `wait`: the seconds that the endpoint asks for, if it does."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_):
        return None


@dataclass
class ChatClient:
    """url: the endpoint's base, as ".../v1". timeout: seconds of one attempt, whatever the endpoint does. attempts: of one
    request. concurrency: attempts of this client that run at once. max_requests counts attempts, max_tokens those that the
    endpoint says it used (or, where it does not say, a fourth of the bytes); reaching either raises EndpointError.

    used: "requests", "tokens" and "cached" so far."""

    url: str
    model: str
    cache: Path
    key: str = field(default="", repr=False)
    timeout: float = 60.0
    attempts: int = 5
    concurrency: int = 4
    max_requests: int = 10_000
    max_tokens: int = 10_000_000
    answer_tokens: int = 1500  # asked for at most
    used: Counter[str] = field(default_factory=Counter)

    def __post_init__(self):
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EndpointError(f"{URL}: give the base of an OpenAI-compatible endpoint, as https://host/v1; only http and https are used")
        if parts.username or parts.query or parts.fragment:
            raise EndpointError(f"{URL}: give no user, query or fragment; the key stands in {KEY}")
        if not self.model:
            raise EndpointError(f"{MODEL}: is empty; name the model to ask")
        if any(ord(letter) < 33 or ord(letter) > 126 for letter in self.key):
            raise EndpointError(f"{KEY}: holds a blank or a letter that no key has")
        self.cache = Path(self.cache)
        self._running = threading.BoundedSemaphore(self.concurrency)
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirect)

    @staticmethod
    def from_environment(cache: str | os.PathLike, **limits) -> ChatClient:
        """By MIMO_LLM_URL, MIMO_LLM_MODEL and, where the endpoint wants one, MIMO_LLM_KEY. Raises EndpointError."""
        missing = [name for name in (URL, MODEL) if not os.environ.get(name)]
        if missing:
            raise EndpointError(f"{missing[0]}: is not set; --qa llm asks the endpoint and model that {URL} and {MODEL} name")
        return ChatClient(os.environ[URL], os.environ[MODEL], Path(cache), os.environ.get(KEY, ""), **limits)

    def ask(self, key: str, prompt: str) -> str:
        """The reply to a prompt, of the cache if `key`, the hash of all that it depends on, is there. Raises EndpointError."""
        path = self.cache / key[:2] / f"{key}.json"
        reply = _read(path)
        if reply is None:
            with _locked(path.parent):
                reply = _read(path)  # another may have asked meanwhile
                if reply is None:
                    reply = self._request(prompt)
                    _write(path, {"model": self.model, "text": reply})
                    return reply
        with self._lock:
            self.used["cached"] += 1
        return reply

    def _request(self, prompt: str) -> str:
        wait, reason = _WAIT, ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(wait, _LONGEST_WAIT))
                wait *= 2
            try:
                with self._running:
                    self._spend()
                    return self._attempt(prompt)
            except _Failed as failed:
                reason, wait = str(failed), max(wait, failed.wait)
        raise EndpointError(
            f"{URL}: no answer in {self.attempts} attempts ({reason}); what was answered is kept, run the same again to go on"
        )

    def _spend(self) -> None:
        with self._lock:
            for name, most in (("requests", self.max_requests), ("tokens", self.max_tokens)):
                if self.used[name] >= most:
                    raise EndpointError(f"the limit of {most} {name} is spent; what was answered is kept, raise the limit to go on")
            self.used["requests"] += 1

    def _attempt(self, prompt: str) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": self.answer_tokens}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers)
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                data = b""
                while piece := response.read1(1 << 16):
                    data += piece
                    if time.monotonic() > deadline:
                        raise _Failed(f"no whole answer within {self.timeout:g} s")
                    if len(data) > LARGEST_REPLY:
                        raise _Failed(f"answer of more than {LARGEST_REPLY} bytes")
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in _AGAIN or error.code >= 500:
                raise _Failed(f"HTTP {error.code}", _seconds(error.headers.get("Retry-After", ""))) from None
            raise EndpointError(f"{URL}: the endpoint refuses the request with HTTP {error.code}; check {URL}, {KEY} and {MODEL}") from None
        except (OSError, ValueError, HTTPException) as error:
            raise _Failed(type(error).__name__) from None
        try:
            reply = json.loads(data)
            text = reply["choices"][0]["message"]["content"]
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, LookupError, TypeError, RecursionError):
            raise _Failed("a reply of another form") from None
        tokens = (reply.get("usage") or {}).get("total_tokens")
        with self._lock:
            self.used["tokens"] += tokens if isinstance(tokens, int) and tokens > 0 else (len(data) + len(prompt)) // 4
        return text


def cache_key(**parts) -> str:
    """SHA-256 of what a reply depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _seconds(text: str) -> float:
    return min(float(text), _LONGEST_WAIT) if text.isdigit() else 0.0


def _read(path: Path) -> str | None:
    """A cached reply; None where there is none, or none that can be read."""
    try:
        text = json.loads(path.read_text(encoding="utf-8"))["text"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return text if isinstance(text, str) else None


def _write(path: Path, entry: dict) -> None:
    """Whole or not at all."""
    with files.atomic_write(path, durable=True) as part:
        part.write_text(json.dumps(entry), encoding="utf-8")


@contextmanager
def _locked(folder: Path):
    """One at a time of all threads and processes that want a reply of this folder; a killed holder lets go."""
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder / files.LOCK):
        yield
