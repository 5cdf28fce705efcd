"""A browser for the tests of pages, without a package for it."""

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request


class Browser:
    """Headless Chromium by the WebDriver protocol (W3C), which is JSON over HTTP: the standard library speaks it."""

    def __init__(self, folder):
        command = [shutil.which("chromedriver"), "--port=0"]
        self.driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
        assert self.driver.stdout
        ready = r"successfully on port (\d+)"
        port = next(found[1] for line in self.driver.stdout if (found := re.search(ready, line)))
        self.url = f"http://127.0.0.1:{port}/session"
        self.downloads = folder / "downloads"
        self.downloads.mkdir()
        flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-component-update"
        flags += f" disable-background-networking disable-sync user-data-dir={folder / 'profile'}"
        chromium = {
            "binary": shutil.which("chromium"),
            "args": [f"--{flag}" for flag in flags.split()],
            "prefs": {"download.default_directory": str(self.downloads)},
            "browserStartupTimeout": 600_000,
        }  # ms; a busy machine took two minutes
        wanted = {
            "goog:chromeOptions": chromium,
            "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"},
            "unhandledPromptBehavior": "accept",
            "timeouts": {"script": 60_000},
        }
        try:
            session = self.send("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self.driver.terminate()
            raise
        self.url += f"/{session['sessionId']}"

    def send(self, verb, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=verb)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever the environment names
        try:
            with direct.open(request, timeout=900) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def quit(self):
        self.send("DELETE", "")
        self.driver.terminate()
        self.driver.wait()

    def open(self, path):
        self.send("POST", "/url", {"url": path.as_uri()})

    def open_fresh(self, path):
        """A page as on its first visit: nothing is stored, no request and no message stands from before."""
        self.open(path)
        self.js("localStorage.clear()")
        self.requests()
        self.log("browser")
        self.open(path)

    def js(self, script, *args):
        return self.send("POST", "/execute/sync", {"script": f"return {script}", "args": args})

    def press(self, key):
        self.js("void document.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0]}))", key)

    def enter(self, id, text):
        """What typing a text into a field, or choosing it, does."""
        script = "Object.assign(document.getElementById(arguments[0]), {value: arguments[1]})"
        for event in ("input", "change"):
            self.js(f"{script}.dispatchEvent(new Event('{event}'))", id, text)

    def text(self, id):
        return self.js(f"document.getElementById('{id}').innerText")

    def focused(self):
        return self.js("document.activeElement.id")

    def log(self, kind):
        return self.send("POST", "/se/log", {"type": kind})

    def requests(self):
        """Addresses asked for since the last call, by anything that the browser shows."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def downloaded(self, name):
        for _ in range(100):
            if (path := self.downloads / name).exists():
                return path
            self.js("new Promise(done => setTimeout(done, 100))")
        raise AssertionError(f"no {name} among {list(self.downloads.iterdir())}")
