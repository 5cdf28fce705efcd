"""The chat client against a real server on loopback that fails in every way it is said to survive."""

import email.utils
import threading
import time
from types import SimpleNamespace

import pytest
from helpers import chat_server, completion

from hps.evaluate import endpoint
from hps.evaluate.endpoint import Endpoint, Reply, retry_after_s

KEY = "sk-test-0123456789-secret"


class Clock:
    """Stands in for the stop event and for `time`: waiting moves it, nothing else does."""

    def __init__(self):
        self.now, self.waits = 100.0, []

    def wait(self, seconds):
        self.now += seconds
        self.waits += [seconds] if seconds else []
        assert len(self.waits) < 100, "waits for ever"
        return False


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def client(url, **changes) -> Endpoint:
    options = dict(key=KEY, max_tokens=50, attempts=4, timeout=30.0, per_minute=0.0, stopped=Clock())
    return Endpoint(url, "judge", **options | changes)


def test_what_is_sent_and_what_comes_back():
    with chat_server(lambda number, text: completion(f"{text} {number}")) as server:
        assert client(server.url).ask("q?") == Reply("q? 0", "judge-2")
        assert client(server.url + "/").ask("q?") == Reply("q? 1", "judge-2")
        assert client(server.url.removesuffix("/v1"), key="").ask("q?").text == "q? 2"
    first, _, last = server.requests
    message = {"role": "user", "content": "q?"}
    assert first["body"] == {"model": "judge", "messages": [message], "temperature": 0, "max_tokens": 50}
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    assert first["headers"]["Authorization"] == f"Bearer {KEY}" and last["headers"]["Authorization"] is None
    with chat_server(lambda number, text: completion(None)) as server:
        assert client(server.url).ask("q").text == ""


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(endpoint, "time", SimpleNamespace(monotonic=lambda: clock.now, time=time.time))
    return clock


def test_retry_after_holds_back_every_request(clock):
    """The next question is not sent before the moment that the answer to another one named."""
    with chat_server(lambda n, text: completion("good") if n else (429, {"Retry-After": "7"}, "slow down")) as server:
        chat = client(server.url, attempts=1, stopped=clock)
        with pytest.raises(ValueError, match="429"):
            chat.ask("a")
        assert chat.ask("b").text == "good" and clock.waits == [7]


def test_retry_after_is_read():
    for header in (None, "-3", "soon", "nan", "", "Wed, 21 Oct 2015 07:28:00 GMT"):
        assert retry_after_s(header) == 0
    assert retry_after_s("7") == 7 and retry_after_s("0.5") == 0.5
    later = email.utils.formatdate(time.time() + 99, usegmt=True)  # of whole seconds
    assert 90 < retry_after_s(later) < 100


def test_a_very_long_hold_ends_the_run_at_once():
    clock = Clock()
    with chat_server(lambda number, text: (429, {"Retry-After": "3600"}, "quota")) as server:
        with pytest.raises(ValueError, match="wait 3600 s .*quota"):
            client(server.url, stopped=clock).ask("q")
    assert len(server.requests) == 1 and clock.waits == []


def test_errors_of_the_server_are_tried_up_to_a_bound():
    """After waits that double up to a bound, with jitter."""
    for status in (408, 409, 425, 429, 500, 502, 503, 504, 529):
        clock = Clock()
        with chat_server(lambda number, text, status=status: (status, {}, "broken")) as server:
            with pytest.raises(ValueError, match=f"9 of 9 attempts.*HTTP {status}: broken"):
                client(server.url, stopped=clock, attempts=9).ask("q")
        shares = [wait / base for wait, base in zip(clock.waits, (1, 2, 4, 8, 16, 32, 60, 60), strict=True)]
        assert len(server.requests) == 9 and len(set(shares)) == 8 and 0.5 <= min(shares) < max(shares) <= 1.5


def test_what_no_second_try_mends_is_tried_once():
    """A redirect that was followed would have brought the key to the other server; a refused question is no failure."""
    with chat_server(lambda number, text: completion("elsewhere")) as other:
        for status in (301, 302, 307, 401, 403, 404, 400, 413, 422):
            moved = {"Location": f"{other.url}/chat/completions"}
            with chat_server(lambda number, text, reply=(status, moved, "no such thing"): reply) as server:
                if status in (400, 413, 422):
                    assert client(server.url).ask("q") == Reply(None, problem=f"HTTP {status}: no such thing")
                else:
                    with pytest.raises(ValueError, match=f"1 of 4 attempts.*HTTP {status}: no such thing"):
                        client(server.url).ask("q")
            assert len(server.requests) == 1
    assert other.requests == []


def test_what_is_no_completion_is_tried_again():
    text = '{"choices": [{"message": {"content": ["x"]}}]}'
    for body in ("<html>", "[]", "{}", '{"choices": []}', text, '{"choices": [{"text": "x"}]}', "[" * 100_000):
        with chat_server(lambda number, _, body=body: completion("good") if number > 4 else (200, {}, body)) as server:
            with pytest.raises(ValueError, match="4 of 4 attempts.*not a chat completion"):
                client(server.url).ask("q")
            assert client(server.url).ask("q").text == "good" and len(server.requests) == 6


def test_half_an_answer_and_a_slow_one_are_tried_again():
    let_go = threading.Event()

    def behave(number, text):
        status, headers, body = completion("good")
        if number == 1:
            let_go.wait(60)
        return status, headers if number else {"Content-Length": "10000", "Connection": "close"}, body

    with chat_server(behave) as server:
        chat = client(server.url, timeout=0.3, attempts=2)
        with pytest.raises(ValueError, match="2 of 2 attempts.*(T|t)ime"):
            chat.ask("q")
        assert chat.ask("q").text == "good" and len(server.requests) == 3
        let_go.set()


def test_requests_of_all_threads_keep_to_the_rate(clock, monkeypatch):
    """30 a minute: each starts two seconds after the one before, failed ones counted."""
    starts = []

    def behave(number, text):
        starts.append(clock.now)
        return completion("good") if number != 1 else (500, {}, "")

    with chat_server(behave) as server:
        chat = client(server.url, per_minute=30.0, stopped=clock)
        monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.001)
        for _ in range(4):
            chat.ask("q")
    assert starts == pytest.approx([100, 102, 104, 106, 108])


def test_a_wrong_key_or_url_is_refused_and_no_secret_shown():
    for key in (KEY + "\n", "two words", "sch\u00f6n-0123456789"):
        with pytest.raises(ValueError, match="--key_variable") as caught:
            client("http://127.0.0.1", key=key)
        assert key.strip()[:8] not in str(caught.value)
    for url in ("host/v1", "ftp://host", "http://", "http://a b", "http://[", "http://host:port"):
        with pytest.raises(ValueError, match="--endpoint: expected"):
            client(url)
    for url in (f"https://me:{KEY}@host/v1", f"https://host/v1?key={KEY}", f"https://host/#{KEY}"):
        with pytest.raises(ValueError, match="--key_variable") as caught:
            client(url)
        assert KEY not in str(caught.value)
