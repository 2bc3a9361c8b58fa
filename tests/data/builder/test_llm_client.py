"""An endpoint that misbehaves is borne with, up to a limit; what was paid for is never paid for again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mimo_jax.data.builder import llm_client
from mimo_jax.data.builder.llm_client import ChatClient, EndpointError, cache_key
from tests.data.builder.chat_server import chat_server


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(llm_client, "_FIRST_WAIT", 0.01)


def client_of(chat, folder, **limits) -> ChatClient:
    return ChatClient(chat.url, "parrot", folder, **{"timeout": 5.0, "attempts": 4} | limits)


def echo_slowly(prompt: str) -> str:
    time.sleep(0.04)
    return prompt


def test_what_is_sent_and_what_comes_back(tmp_path):
    with chat_server("hello") as chat:
        client = client_of(chat, tmp_path, key="secret-1")
        assert client.ask("ab12", "say hello") == "hello"
        assert "secret-1" not in repr(client)
    assert chat.headers[0]["Authorization"] == "Bearer secret-1"
    assert chat.asked == [{"model": "parrot", "messages": [{"role": "user", "content": "say hello"}], "temperature": 0, "max_tokens": 1500}]
    assert client.used == {"requests": 1, "tokens": 100}


def test_a_second_time_is_free_even_without_the_endpoint(tmp_path):
    with chat_server("hello") as chat:
        client_of(chat, tmp_path).ask("ab12", "x")
    client = ChatClient("http://127.0.0.1:9/v1", "parrot", tmp_path)
    assert client.ask("ab12", "x") == "hello" and client.used == {"cached": 1}
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [".lock", "ab12.json"]


@pytest.mark.parametrize(
    "bad",
    [500, 503, 429, 408, b"no json", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": 3}}]}', b"[" * 100_000, b"\xff"],
)
def test_transient_failures_are_retried(tmp_path, bad):
    with chat_server(bad, bad, "hello") as chat:
        assert client_of(chat, tmp_path).ask("ab12", "x") == "hello"
        assert len(chat.asked) == 3


def test_a_slow_or_endless_answer_is_given_up(tmp_path):
    with chat_server(60.0, "hello") as chat:
        start = time.monotonic()
        assert client_of(chat, tmp_path, timeout=0.4).ask("ab12", "x") == "hello"
        assert time.monotonic() - start < 30  # waiting for the first reply takes 60 s
    with chat_server(b"x" * (llm_client.MAX_REPLY_BYTES + 1), "hello") as chat:
        assert client_of(chat, tmp_path).ask("cd34", "x") == "hello"


def test_an_answer_that_drips_has_a_deadline(tmp_path):
    listener = socket.create_server(("127.0.0.1", 0))

    def drip():
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            try:
                while True:
                    time.sleep(0.1)
                    connection.sendall(b"x")
            except OSError:
                pass

    with ThreadPoolExecutor() as pool:
        pool.submit(drip)
        client = ChatClient(f"http://127.0.0.1:{listener.getsockname()[1]}", "parrot", tmp_path, timeout=1.0, attempts=1)
        start = time.monotonic()
        with pytest.raises(EndpointError, match=r"no answer in 1 attempts \(no complete reply within 1 s\)"):
            client.ask("ab12", "x")
        assert time.monotonic() - start < 50  # waiting for the whole reply takes 100 s
    listener.close()


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_permanent_failures_are_raised_at_once(tmp_path, status):
    with chat_server(status) as chat:
        with pytest.raises(EndpointError, match=f"HTTP {status}; check MIMO_LLM_URL, MIMO_LLM_KEY and MIMO_LLM_MODEL") as error:
            client_of(chat, tmp_path, key="secret-1").ask("ab12", "x")
        assert len(chat.asked) == 1 and "secret" not in str(error.value)


def test_an_endpoint_that_never_answers_ends_the_run_and_keeps_the_rest(tmp_path):
    with chat_server("hello", 500) as chat:
        client = client_of(chat, tmp_path)
        client.ask("ab12", "x")
        with pytest.raises(EndpointError, match=r"no answer in 4 attempts \(HTTP 500\)"):
            client.ask("cd34", "y")
        assert len(chat.asked) == 5
        assert client.ask("ab12", "x") == "hello"


@pytest.mark.parametrize("limit, message", [({"max_requests": 3}, "limit of 3 requests"), ({"max_tokens": 250}, "limit of 250 tokens")])
def test_limits_hold(tmp_path, limit, message):
    with chat_server("hello") as chat:
        client = client_of(chat, tmp_path, **limit)
        for number in range(3):
            client.ask(f"ab{number}", "x")
        with pytest.raises(EndpointError, match=message):
            client.ask("ab9", "x")
        assert client.ask("ab0", "x") == "hello" and len(chat.asked) == 3


def test_few_at_once_and_one_of_the_same(tmp_path):
    with chat_server(echo_slowly) as chat:
        client = client_of(chat, tmp_path, concurrency=2)
        keys = [cache_key(prompt=number % 12) for number in range(36)]
        with ThreadPoolExecutor(12) as pool:
            replies = list(pool.map(lambda key: client.ask(key, key), keys))
        assert replies == keys
        assert len(chat.asked) == 12 and chat.most_running <= 2 and client.used["cached"] == 24


def test_a_torn_cache_entry_is_asked_for_again(tmp_path):
    with chat_server("hello") as chat:
        client = client_of(chat, tmp_path)
        client.ask("ab12", "x")
        for torn in ("", '{"model": "parr', '{"text": 3}', "[]"):
            (tmp_path / "ab" / "ab12.json").write_text(torn)
            assert client.ask("ab12", "x") == "hello"
        assert len(chat.asked) == 5


def test_a_killed_run_resumes_without_paying_twice(tmp_path):
    code = (
        "import sys\nfrom mimo_jax.data.builder.llm_client import ChatClient, cache_key\n"
        "client = ChatClient(sys.argv[1], 'parrot', sys.argv[2])\n"
        "for number in range(12):\n    print(client.ask(cache_key(n=number), f'prompt {number}'), flush=True)\n"
    )
    with chat_server(echo_slowly) as chat:
        command = [sys.executable, "-c", code, chat.url, str(tmp_path)]
        first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        seen = [first.stdout.readline() for _ in range(4)]
        os.kill(first.pid, signal.SIGKILL)
        first.communicate()
        paid = len(chat.asked)
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert second.returncode == 0, second.stderr
        assert second.stdout.splitlines() == [f"prompt {number}" for number in range(12)] and seen[0] == "prompt 0\n"
        assert paid <= 6 and len(chat.asked) <= 13  # at most the one under way was asked again
        asked = [body["messages"][0]["content"] for body in chat.asked]
        assert [asked.count(f"prompt {number}") for number in range(4)] == [1] * 4
    for path in tmp_path.rglob("*.json"):
        assert json.loads(path.read_text())["model"] == "parrot"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "file:///etc/passwd",
        "ftp://host/v1",
        "host/v1",
        "http://",
        "https://[::1/v1",
        "https://host:port/v1",
        "https://u:w@host",
        "https://a?b",
    ],
)
def test_invalid_urls(tmp_path, url):
    with pytest.raises(EndpointError, match="MIMO_LLM_URL: give "):
        ChatClient(url, "parrot", tmp_path)


def test_the_environment_names_endpoint_and_model(tmp_path, monkeypatch):
    for name in ("MIMO_LLM_URL", "MIMO_LLM_MODEL", "MIMO_LLM_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(EndpointError, match="MIMO_LLM_URL: is not set"):
        ChatClient.from_environment(tmp_path)
    monkeypatch.setenv("MIMO_LLM_URL", "https://host/v1")
    with pytest.raises(EndpointError, match="MIMO_LLM_MODEL: is not set"):
        ChatClient.from_environment(tmp_path)
    monkeypatch.setenv("MIMO_LLM_MODEL", "parrot")
    monkeypatch.setenv("MIMO_LLM_KEY", "word\nX-Other: 1")
    with pytest.raises(EndpointError, match="MIMO_LLM_KEY: contains a blank"):
        ChatClient.from_environment(tmp_path)
    monkeypatch.setenv("MIMO_LLM_KEY", "word")
    client = ChatClient.from_environment(tmp_path, max_requests=3)
    assert (client.url, client.model, client.key, client.max_requests) == ("https://host/v1", "parrot", "word", 3)
