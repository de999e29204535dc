"""The page in a real browser: empty console, no request, no blank page, no overflow on a phone."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from persea.report.page import write_report
from tests.browser import browser, needed
from tests.report.test_page import compared, make_run, scored

LOOKS = {
    "desktop, light": (1200, False, False),
    "desktop, dark": (1200, True, False),
    "phone, light": (360, False, False),
    "phone, dark": (360, True, False),
    "paper": (794, False, True),
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it: languages, efforts, a yardstick, a loss, standard tasks."""
    import json

    from tests.evaluation.test_lm_eval_results import STANDARD

    run = make_run(tmp_path_factory.mktemp("browser") / "avocado")
    path = run / "evaluate" / "evaluation.json"
    value = json.loads(path.read_text())
    value["reference_models"] = ["a-reference-model-of-a-long-name"]
    value["scores"] += [
        scored("a-reference-model-of-a-long-name", skill, 0.97, 200)
        for skill in ("languages", "code", "reasoning", "safety")
    ]
    value["scores"] += [
        scored(name, skill, 0.6, 200, effort="high")
        for name in ("avocado", "gpt-oss")
        for skill in ("code", "reasoning")
    ]
    for s in value["scores"]:
        if (s["model_name"], s["skill"], s["effort"]) == ("avocado", "safety", "none"):
            s.update(scored("avocado", "safety", 0.2, 200))
    path.write_text(json.dumps(compared(value)))
    (run / "results_x.json").write_text(json.dumps(STANDARD))
    return write_report(run, {"avocado": run / "results_x.json"})


def colours(png: bytes) -> int:
    """How many different values the bytes of a PNG's rows have: a blank page has very few."""
    at, packed = 8, b""
    while at < len(png):
        (length,), kind = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        packed += png[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += 12 + length
    return len(set(zlib.decompress(packed)))


def test_a_blank_picture_would_be_seen() -> None:
    def png(rows: bytes) -> bytes:
        body = zlib.compress(rows)
        return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(body)) + b"IDAT" + body + b"0000"

    assert colours(png(b"\0" + b"\xff" * 99)) == 2
    assert colours(png(bytes(range(200)))) == 200


@needed
@pytest.mark.parametrize("look", LOOKS)
def test_the_page_in_a_browser(page: Path, tmp_path: Path, look: str) -> None:
    width, dark, paper = LOOKS[look]
    with browser() as one:
        one.open(page, width, dark, paper)
        height = one.asked("document.documentElement.scrollHeight")
        assert paper or height <= (6 * 900 if width >= 1200 else 8 * 900)  # as it opens
        one.asked("document.querySelectorAll('details').forEach(one => { one.open = true })")
        picture = one.picture(tmp_path / "page.png")
        assert one.complaints() == []
        assert one.requests() == [page.resolve().as_uri()]
        assert colours(picture) > 60
        assert (
            one.asked("document.documentElement.scrollWidth") <= width
        )  # tables scroll in boxes of their own
        assert one.asked(
            "[...document.querySelectorAll('svg.chart')].every(s => "
            "s.getBoundingClientRect().width > 100)"
        )
        assert one.asked(
            "[...document.querySelectorAll('svg.chart')].every(s => "
            "s.querySelector('title') && s.querySelector('desc'))"
        )
        ground = one.asked("getComputedStyle(document.body).backgroundColor")
        assert ground == (
            "rgb(20, 23, 15)" if dark else "rgb(255, 255, 255)" if paper else "rgb(253, 253, 251)"
        )
        if paper:
            assert one.printed(tmp_path / "page.pdf")[:5] == b"%PDF-"


@needed
def test_the_browser_would_tell_a_complaint_and_a_request(tmp_path: Path) -> None:
    """The tests above can fail: a page that does all that ours does not is seen doing it."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<img src='http://127.0.0.1:9/x.png'><div "
        "style='width:900px'>wide</div><script>console.error('oh'); nothing()</script>"
    )
    with browser() as one:
        one.open(bad, 360)
        assert any("oh" in c for c in one.complaints()) and any(
            "nothing" in c for c in one.complaints()
        )
        assert "http://127.0.0.1:9/x.png" in one.requests()
        assert one.asked("document.documentElement.scrollWidth") > 360
