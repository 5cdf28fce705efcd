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
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import quote, urlsplit

RETRIED = {408, 409, 425, 429}  # and all from 500 on, no connection, a broken one, no answer in time
REFUSED = {400, 413, 422}  # this question: too long, or a filter of the server's
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # before the second try and before later ones, give or take half
LONGEST_HOLD_S = 300.0  # that Retry-After may ask for; a daily quota is waited for by starting again
MESSAGE_CHARS = 300  # of a server's message that are shown


class Reply(NamedTuple):
    text: str | None  # None: the judge would not take this question, and `problem` says why
    model: str = ""  # what answered, as the server names it
    problem: str = ""


class _EveryStatus(urllib.request.HTTPErrorProcessor):
    """Hands out every status as it came: a redirect, if followed, would take the key to another host."""

    http_response = https_response = lambda self, request, response: response


@dataclass
class Endpoint:
    """Asks `model` at `url` single questions at temperature 0.

    Raises:
        ValueError: a URL that is none or carries secrets, or a key that cannot stand in a header.
    """

    url: str  # base of the interface as OpenAI's clients take it, say https://host/v1; a bare host gets the /v1
    model: str
    max_tokens: int  # of an answer
    attempts: int  # requests for one question before giving up
    timeout: float  # seconds without a byte from the server
    per_minute: float  # requests of all threads together that start in a minute, 0 for no bound
    key: str = field(default="", repr=False)  # sent as bearer token; empty for none
    stopped: threading.Event = field(default_factory=threading.Event)  # ends the waiting of all threads when set

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            good = False
        if not good or re.search(r"[^!-~]", self.url):
            raise ValueError("--endpoint: expected a URL such as https://host/v1")
        if parts.username is not None or parts.query or parts.fragment:  # not shown: they would be secrets
            raise ValueError("--endpoint: leave name, password and query out of the URL; give --key_variable")
        if re.search(r"[^!-~]", self.key):
            raise ValueError("the key in --key_variable holds a blank or a letter outside ASCII: set it again")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"
        # As a server may repeat it: in JSON, with its slashes escaped or not, in HTML, in a URL.
        quoted = json.dumps(self.key)[1:-1]
        forms = {self.key, quoted, quoted.replace("/", r"\/"), html.escape(self.key), quote(self.key, safe="")}
        self._forms = sorted(forms, key=len, reverse=True)
        self._opener = urllib.request.build_opener(_EveryStatus)
        self._turn = threading.Lock()
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
            status, text, hold_s = self._post(json.dumps(body).encode())
            if status == 200:
                if reply := self._read(text):
                    return reply
                status, text = 0, f"not a chat completion: {text}"
            problem = self._hide(f"HTTP {status}: {text}" if status else text)[:MESSAGE_CHARS]
            if status in REFUSED:
                return Reply(None, problem=problem)
            if hold_s > LONGEST_HOLD_S:
                raise ValueError(f"{self.url} asks to wait {hold_s:.0f} s ({problem}): start again then; it goes on")
            if 0 < status < 500 and status not in RETRIED:
                break
            self._held_until = max(self._held_until, time.monotonic() + hold_s)  # for all threads
            if attempt < self.attempts:  # the jitter keeps threads that failed together from coming back together
                self._sleep(min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S) * random.uniform(0.5, 1.5))
        raise ValueError(
            f"{self.url} failed ({attempt} of {self.attempts} attempts): {problem}. What was answered is kept: "
            "mend the cause and start the same command again"
        )

    def _post(self, body: bytes) -> tuple[int, str, float]:
        """Status, text, and seconds that the server asks to wait; status 0 when no whole answer came."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as reply:
                return reply.status, reply.read().decode(errors="replace"), retry_after_s(reply.headers["Retry-After"])
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
        for form in self._forms if len(self.key) >= 8 else ():
            text = text.replace(form, "[key]")
        return text

    def _wait_for_turn(self) -> None:
        with self._turn:  # one thread waits for the moment, the others for it
            while (wait_s := max(self._free_at, self._held_until) - time.monotonic()) > 0:
                self._sleep(wait_s)
            self._free_at = time.monotonic() + (60.0 / self.per_minute if self.per_minute else 0.0)
        self._sleep(0)

    def _sleep(self, seconds: float) -> None:
        if self.stopped.wait(seconds):
            raise CancelledError


def retry_after_s(header: str | None) -> float:
    """Seconds that a Retry-After header (seconds or a date) asks to wait; 0 for none and for one that says nothing."""
    for read in (float, lambda text: email.utils.parsedate_to_datetime(text).timestamp() - time.time()):
        with suppress(ValueError, OverflowError):
            seconds = read(header or "")
            return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
    return 0.0
