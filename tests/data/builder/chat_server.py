"""A chat endpoint on loopback with given answers, which counts its requests."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Chat:
    """replies: what is sent in turn, the last one for ever: a text (the content of a good reply), an int (an HTTP status), bytes
    (a body), a float (seconds to wait before the next of them), or a function of the prompt that gives one of these."""

    def __init__(self, replies):
        self.replies, self.asked, self.headers = list(replies), [], []
        self.running = self.most_running = 0
        self.lock = threading.Lock()
        self.url = ""

    def next(self):
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


@contextmanager
def chat_server(*replies):
    """A Chat that runs until the block ends."""
    chat = Chat(replies)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with chat.lock:
                chat.asked.append(body)
                chat.headers.append(dict(self.headers))
                chat.running += 1
                chat.most_running = max(chat.most_running, chat.running)
                reply = chat.next()
            if callable(reply):
                reply = reply(body["messages"][0]["content"])
            while isinstance(reply, float):
                time.sleep(reply)
                with chat.lock:
                    reply = chat.next()
            with chat.lock:
                chat.running -= 1
            try:
                self.answer(reply)
            except OSError:
                pass  # the client had enough

        def answer(self, reply):
            status = reply if isinstance(reply, int) else 200
            if isinstance(reply, str):
                reply = json.dumps({"choices": [{"message": {"content": reply}}], "usage": {"total_tokens": 100}}).encode()
            body = b"no" if isinstance(reply, int) else reply
            self.send_response(status)
            if status == 302:
                self.send_header("Location", chat.url + "/elsewhere")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    chat.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
