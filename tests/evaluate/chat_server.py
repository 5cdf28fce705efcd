"""A chat endpoint on loopback that does what a test tells it to, and remembers what it was sent."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

Behave = Callable[[int, str], tuple[int, dict[str, str], str]]  # (request's number, question) -> status, headers, body


def completion(text: str | None, model: str = "judge-2") -> tuple[int, dict[str, str], str]:
    return 200, {}, json.dumps({"model": model, "choices": [{"message": {"role": "assistant", "content": text}}]})


@contextmanager
def chat_server(behave: Behave):
    """Serves in threads; `.requests` are dicts of path, headers, body and the time of arrival; `.url` ends in /v1."""
    requests, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(requests)
                requests.append(dict(path=self.path, headers=self.headers, body=body, at=time.monotonic()))
            status, headers, text = behave(number, body["messages"][-1]["content"])
            try:
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(text.encode()))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:
                pass  # the client went away

        do_GET = do_POST  # what a followed redirect would be

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02))
    thread.start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_address[1]}/v1", requests=requests)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
