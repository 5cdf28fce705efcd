"""An OpenAI-compatible chat endpoint as a function from a question to an answer: paced, retried, silent about its key.

Standard library only. Threads may share one `Endpoint`. Its key goes into one header and nowhere else.
"""

import email.utils
import html
import http.client
import json
import math
import random
import re
import threading
import time
import urllib.request
from concurrent.futures import CancelledError
from typing import NamedTuple
from urllib.parse import quote, urlsplit

RETRIED = {0, 408, 429, 500, 502, 503, 504}  # 0: no connection, a broken one, or no answer in time
REFUSED = {400, 413, 422}  # this question: too long, or a filter of the server's
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the second try and before later ones, give or take half
LONGEST_HOLD = 300.0  # seconds that Retry-After may ask for; a daily quota is waited for by starting again
SHOWN = 300  # characters of a server's message


class Reply(NamedTuple):
    text: str | None  # None: the judge would not take this question, and `problem` says why
    model: str = ""  # what answered, as the server names it
    problem: str = ""


class _AsItIs(urllib.request.HTTPErrorProcessor):
    """Hands out every status as it came: a redirect, if followed, would take the key to another host."""

    def http_response(self, request: urllib.request.Request, response: http.client.HTTPResponse):
        return response

    https_response = http_response


class Endpoint:
    """Asks `model` at `url` single questions at temperature 0.

    Args:
        url: base of the interface as OpenAI's clients take it, say https://host/v1; a bare host gets the /v1.
        key: sent as bearer token; empty for none.
        attempts: requests for one question before giving up; timeout: seconds without a byte from the server.
        per_minute: requests of all threads together that start in a minute, 0 for no bound.
        stopped: ends the waiting of all threads when set.

    Raises:
        ValueError: a URL that is none or carries secrets, or a key that cannot stand in a header.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str = "",
        max_tokens: int,
        attempts: int,
        timeout: float,
        per_minute: float,
        stopped: threading.Event,
    ):
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            good = False
        if not good or re.search(r"[^!-~]", url):
            raise ValueError("--endpoint: expected a URL such as https://host/v1")
        if parts.username is not None or parts.query or parts.fragment:  # not shown: they would be secrets
            raise ValueError("--endpoint: leave name, password and query out of the URL; give --key_variable")
        if re.search(r"[^!-~]", key):
            raise ValueError("the key in --key_variable holds a blank or a letter outside ASCII: set it again")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"
        self.model, self.max_tokens, self.attempts, self.timeout = model, max_tokens, attempts, timeout
        self._key, self._stopped = key, stopped
        # As a server may repeat it: in JSON, with its slashes escaped or not, in HTML, in a URL.
        quoted = json.dumps(key)[1:-1]
        self._forms = {key, quoted, quoted.replace("/", r"\/"), html.escape(key), quote(key, safe="")}
        self._opener = urllib.request.build_opener(_AsItIs)
        self._turn = threading.Lock()
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._free_at = self._held_until = 0.0  # of time.monotonic()

    def ask(self, question: str) -> Reply:
        """One question, one answer; `text` is None when the server refuses this question (400, 413, 422).

        Raises:
            ValueError: the server is of no use: a status that no second try will mend, or `attempts` failures.
            CancelledError: stopped while waiting.
        """
        message = {"role": "user", "content": question}
        body = {"model": self.model, "messages": [message], "temperature": 0, "max_tokens": self.max_tokens}
        problem, attempt = "", 0
        for attempt in range(1, self.attempts + 1):
            self._wait_for_turn()
            status, text, hold = self._post(json.dumps(body).encode())
            if status == 200:
                if reply := self._read(text):
                    return reply
                status, text = 0, f"not a chat completion: {text}"
            problem = self._hide(f"HTTP {status}: {text}" if status else text)[:SHOWN]
            if status in REFUSED:
                return Reply(None, problem=problem)
            if hold > LONGEST_HOLD:
                raise ValueError(f"{self.url} asks to wait {hold:.0f} s ({problem}): start again then, and it goes on")
            if status not in RETRIED:
                break
            self._held_until = max(self._held_until, time.monotonic() + hold)  # for all threads
            if attempt < self.attempts:  # the jitter keeps threads that failed together from coming back together
                self._sleep(min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * random.uniform(0.5, 1.5))
        raise ValueError(
            f"{self.url} failed ({attempt} of {self.attempts} attempts): {problem}. What was answered is kept: "
            "mend the cause and start the same command again"
        )

    def _post(self, body: bytes) -> tuple[int, str, float]:
        """Status, text, and seconds that the server asks to wait; status 0 when no whole answer came."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as reply:
                return reply.status, reply.read().decode(errors="replace"), retry_after(reply.headers["Retry-After"])
        except (OSError, http.client.HTTPException) as error:
            return 0, f"{type(error).__name__}: {error}", 0.0

    def _read(self, text: str) -> Reply | None:
        try:
            reply = json.loads(text)
            content = reply["choices"][0]["message"]["content"]
            model = str(reply.get("model", ""))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
        return Reply(self._hide(content or ""), self._hide(model)) if isinstance(content, str | None) else None

    def _hide(self, text: str) -> str:
        """The text without the key, should the server repeat it; one of a few letters ("EMPTY") is no secret."""
        for form in sorted(self._forms, key=len, reverse=True) if len(self._key) >= 8 else ():
            text = text.replace(form, "[key]")
        return text

    def _wait_for_turn(self) -> None:
        with self._turn:  # one thread waits for the moment, the others for it
            while (wait := max(self._free_at, self._held_until) - time.monotonic()) > 0:
                self._sleep(wait)
            self._free_at = time.monotonic() + self._gap
        self._sleep(0)

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise CancelledError


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header (seconds or a date) asks to wait; 0 for none and for one that says nothing."""
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header or "").timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
