"""A service in a process of its own, and a browser that looks at it."""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

from command_line import start

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Served:
    """`ttr-gpu serve` on a port of its own; `end()` asks it to end."""

    def __init__(self, *arguments, token=None):
        self.process = start("serve", *arguments, "--port", "0")
        line = self.process.stdout.readline()
        found = re.match(r"serving on (http://\S+) ", line)
        assert found, (line, self.process.stderr.read() if self.process.poll() is not None else "")
        self.url, self.said, self.token = found[1], line, token

    def call(self, path, value=None, *, method=None, token=None):
        """(status, answer): JSON in, JSON out."""
        headers = {"Content-Type": "application/json"}
        if token or self.token:
            headers["Authorization"] = f"Bearer {token or self.token}"
        body = None if value is None else json.dumps(value).encode()
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read().decode()
                return answer.status, json.loads(text) if text.startswith("{") else text
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def end(self, number=signal.SIGTERM):
        """(exit code, stdout, stderr) after a signal; that kernels had to be compiled is no complaint."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        lines = [line for line in err.splitlines(keepends=True) if not line.startswith("compiling kernels")]
        return self.process.returncode, out, "".join(lines)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


class Browser:
    """Chromium without a window, told what to do over a pipe (Chrome DevTools Protocol)."""

    def __init__(self):
        self._profile = tempfile.mkdtemp()
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()

        def hand_over():
            # Chromium reads commands from 3 and answers on 4. Copies first: 3 and 4 may be among the pipes themselves.
            reading, writing = os.dup(to_read), os.dup(to_write)
            os.dup2(reading, 3)
            os.dup2(writing, 4)

        self._process = subprocess.Popen(
            [
                BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                "--disable-background-networking", "--window-size=1000,1000", "--remote-debugging-pipe",
                f"--user-data-dir={self._profile}", "about:blank",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=hand_over, close_fds=False,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._number, self._rest, self._session = 0, b"", None
        self.complaints = []
        pages = [each for each in self._ask("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        attached = self._ask("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._ask(f"{domain}.enable")
        # A page without a window is never in front, and would not be told of a focus.
        self._ask("Emulation.setFocusEmulationEnabled", enabled=True)

    def open(self, url):
        self._ask("Page.navigate", url=url)
        self.wait_for("document.readyState == 'complete' && location.protocol == 'http:'")

    def value(self, script):
        """Of a JavaScript expression in the page."""
        result = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, script, seconds=30):
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not (value := self.value(script)):
            assert time.monotonic() < end, f"{script} is still {value}; {self.value('document.body.innerText')}"
            time.sleep(0.1)
        return value

    def screenshot(self, path):
        import base64

        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"]))

    def _ask(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            told = answer.get("params", {})
            if answer.get("method") == "Runtime.exceptionThrown" or told.get("entry", {}).get("level") == "error":
                self.complaints.append(told)

    def _next(self):
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], 60)
            part = os.read(self._read, 1 << 16) if ready else b""
            assert part, "the browser says nothing"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.suppress(OSError, AssertionError):
            self._session = None
            self._ask("Browser.close")
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        shutil.rmtree(self._profile, ignore_errors=True)
