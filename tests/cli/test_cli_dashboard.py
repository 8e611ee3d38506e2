"""The dashboard in a real browser: events as they come, the density of the next, its fan chart, and tokens."""

import os
from pathlib import Path

import pytest
from served import BROWSER, Browser, Served

for needed in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")

# Pixels of a canvas that are not empty.
INK = "[...document.getElementById('{}').getContext('2d').getImageData(0, 0, 900, 200).data].filter(v => v).length"


def push(served, number):
    body = {"stream": "user 1", "type": f"type-{number % 5}", "time": 1.7e9 + 2.0 * number}
    assert served.call("/push", body)[0] == 200


def test_it_shows_a_stream_live(run, tmp_path):
    with Served(run) as served, Browser() as browser:
        for number in range(3):
            push(served, number)
        browser.open(served.url + "/?stream=user%201")
        browser.wait_for("document.getElementById('status').textContent == 'watching user 1'")
        # What is expected now, before anything new has come.
        browser.wait_for("document.querySelectorAll('#types .bar').length == 5")
        assert browser.value("document.body.dataset.events") == "0"
        empty = browser.value(INK.format("fan"))
        for number in range(3, 15):
            push(served, number)
        browser.wait_for("document.body.dataset.events == '12'")
        assert browser.value("events.map(e => e.type).slice(-3).join()") == "type-2,type-3,type-4"
        assert browser.value("forecasts.length") == 13
        assert browser.value("forecasts.slice(0, -1).every(f => f.gap > 0 && f.low < f.median && f.median < f.high)")
        # The last one waits for its event; the first came 2 s after the one before.
        assert browser.value("forecasts.at(-1).gap") is None
        assert browser.value("forecasts.at(-2).gap") == 2.0
        assert browser.value(INK.format("fan")) > empty
        assert browser.value(INK.format("now")) > 1000
        assert "next event: half of the probability within" in browser.value("document.body.innerText")
        shares = browser.value("[...document.querySelectorAll('#types span:last-child')].length")
        assert shares >= 1
        browser.screenshot(tmp_path / "dashboard.png")
        assert (tmp_path / "dashboard.png").stat().st_size > 10_000
        if keep := os.environ.get("TTR_SCREENSHOT"):
            Path(keep).write_bytes((tmp_path / "dashboard.png").read_bytes())
        assert browser.complaints == []
        # When the service ends, the page says so and does not give up.
        assert served.end()[0] == 0
        browser.wait_for("document.getElementById('status').textContent.includes('trying again')")


def test_names_are_text_and_not_markup(run):
    with Served(run) as served, Browser() as browser:
        name = "<img src=x onerror=document.title='hacked'>"
        assert served.call("/push", {"stream": name, "type": "type-1", "time": 1.0})[0] == 200
        browser.open(served.url + "/")
        browser.value("document.getElementById('stream').focus()")
        browser.wait_for("document.querySelectorAll('#known option').length == 1")
        assert browser.value("document.querySelector('#known option').value") == name
        browser.value(f"document.getElementById('stream').value = {name!r}; document.querySelector('button').click()")
        browser.wait_for("document.querySelectorAll('#types .bar').length == 5")
        assert browser.value("document.title") == "ttr-gpu: live stream"


def test_it_asks_for_a_token(run):
    with Served(run, "--token", "correct-horse", token="correct-horse") as served, Browser() as browser:
        push(served, 0)
        browser.open(served.url + "/?stream=user%201")
        browser.wait_for("document.getElementById('status').textContent.startsWith('authorization: expected')")
        browser.value(
            "document.getElementById('token').value = 'correct-horse'; document.querySelector('button').click()"
        )
        browser.wait_for("document.getElementById('status').textContent == 'watching user 1'")
        browser.wait_for("document.querySelectorAll('#types .bar').length == 5")
