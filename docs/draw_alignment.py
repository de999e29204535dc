"""Draw docs/img/alignment.svg: one text under two real tokenizers, computed by persea.

PERSEA_DATA=/folder/with/tokenizers python docs/draw_alignment.py

The picture shows common boundaries, one common event with its sizes, and one impossible token.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from persea.alignment.event_map import build_event_map
from persea.models.loading import ModelSource, load_renderer
from persea.tokenization.vocabulary import Vocabulary

TEXT = " costs 1250 rupiah."
EVENT_AT = " rupiah"  # the boundary before this word is explained below the two rows
CELL, LEFT = 38, 176
WIDTH, HEIGHT = LEFT + CELL * len(TEXT) + 26, 520
STYLE = """<style>
text{font:15px ui-sans-serif,system-ui,sans-serif;fill:#1c2a22}
.m{font-family:ui-monospace,SFMono-Regular,Menlo,monospace;font-size:16px}
.s{font-size:13px;fill:#52625a}.h{font-weight:600}
.bg{fill:#fbfcf9}.t{fill:#dbe7f6;stroke:#5d86b8}.u{fill:#f7e6cf;stroke:#c08a3e}
.e{fill:#cfe5cf;stroke:#3f7d55}.x{fill:none;stroke:#b3402f;stroke-width:2.5}
.c{stroke:#3f7d55;stroke-width:2.5}.n{stroke:#8b9991;stroke-width:1.5;stroke-dasharray:3 4}
.l{stroke:#8b9991;fill:none}.d{fill:#3f7d55}
@media (prefers-color-scheme:dark){text{fill:#e6efe8}.s{fill:#a9b9af}.bg{fill:#17201b}
.t{fill:#1f3450;stroke:#7fa6d6}.u{fill:#49371d;stroke:#d9a55c}.e{fill:#26523a;stroke:#7cc596}
.x{stroke:#ff8a76}.c{stroke:#7cc596}.d{fill:#7cc596}.n,.l{stroke:#6e7f75}}
</style>"""


def split(vocabulary: Vocabulary, text: str) -> list[str]:
    """Return the text of each token; the example has no token inside a character."""
    return [(vocabulary.bytes_W[i] or b"").decode() for i in vocabulary.encode(text)]


def starts(tokens: list[str]) -> list[int]:
    """Return the character at which each token starts."""
    return np.cumsum([0, *map(len, tokens)])[:-1].tolist()


def token_row(tokens: list[str], y: int, style: str) -> list[str]:
    """Draw one tokenizer's tokens over the characters."""
    out = []
    for token, start in zip(tokens, starts(tokens), strict=True):
        x, width = LEFT + start * CELL, len(token) * CELL
        out.append(
            f'<rect class="{style}" x="{x + 2}" y="{y}" width="{width - 4}" height="34" rx="6"/>'
            f'<text class="m" x="{x + width // 2}" y="{y + 22}" text-anchor="middle">'
            f"{token.replace(' ', '␣')}</text>"
        )
    return out


def box(x: int, y: int, width: int, text: str, style: str, below: str = "") -> str:
    """Draw a box with a text inside and one below."""
    centre = x + width // 2
    return (
        f'<rect class="{style}" x="{x}" y="{y}" width="{width}" height="34" rx="6"/>'
        f'<text class="m" x="{centre}" y="{y + 22}" text-anchor="middle">{text}</text>'
        f'<text class="s" x="{centre}" y="{y + 52}" text-anchor="middle">{below}</text>'
    )


def rows(teacher: list[str], student: list[str]) -> list[str]:
    """Draw the text, both rows of tokens and their boundaries."""
    out = ['<text class="h" x="24" y="46">the same bytes</text>']
    for i, character in enumerate(TEXT.replace(" ", "␣")):
        x = LEFT + i * CELL + CELL // 2
        out.append(f'<text class="m s" x="{x}" y="46" text-anchor="middle">{character}</text>')
    for y, who, model in ((92, "teacher", "Gemma 3"), (160, "student", "Llama 3")):
        out.append(f'<text class="h" x="24" y="{y}">{who}</text>')
        out.append(f'<text class="s" x="24" y="{y + 17}">{model}</text>')
    of_teacher, of_student = set(starts(teacher)), set(starts(student))
    for start in sorted(of_teacher | of_student):
        x = LEFT + start * CELL
        if start in of_teacher & of_student:
            out.append(f'<line class="c" x1="{x}" x2="{x}" y1="60" y2="196"/>')
            out.append(f'<circle class="d" cx="{x}" cy="204" r="6"/>')
        else:
            top = 66 if start in of_teacher else 134
            out.append(f'<line class="n" x1="{x}" x2="{x}" y1="{top}" y2="{top + 62}"/>')
    out += token_row(teacher, 78, "t") + token_row(student, 146, "u")
    return [
        *out,
        '<circle class="d" cx="32" cy="233" r="6"/><text x="46" y="238"><tspan class="h">common '
        "boundary:</tspan> both start a token here; KL over common events</text>",
        '<line class="n" x1="622" x2="622" y1="222" y2="242"/>'
        '<text x="634" y="238">only one does: cross-entropy</text>',
    ]


def explanation(num_teacher: int, num_student: int, event: str, examples: tuple[str, str]) -> str:
    """Draw the event at one boundary and the impossible token below the rows."""
    x = LEFT + TEXT.index(EVENT_AT) * CELL
    return "\n".join(
        [
            f'<path class="l" d="M{x} 212V262H26V282"/>',
            f'<text class="h" x="24" y="306">at the boundary before ␣{EVENT_AT.strip()}</text>',
            box(24, 326, 250, examples[0], "t", f"{num_teacher} teacher tokens"),
            '<path class="l" d="M282 343h52"/><path class="d" d="M334 337l10 6-10 6z"/>',
            box(352, 326, 110, event, "e", "one common event"),
            '<path class="l" d="M532 343h-52"/><path class="d" d="M480 337l-10 6 10 6z"/>',
            box(540, 326, 190, examples[1], "u", f"{num_student} student tokens"),
            '<text class="s" x="748" y="340">KL between the sums</text>',
            '<text class="s" x="748" y="358">over the same event</text>',
            box(24, 418, 60, "0", "t"),
            '<path class="x" d="M20 414L88 456M88 414L20 456"/>',
            '<text x="112" y="432"><tspan class="h">Impossible, masked:</tspan> Gemma 3 could '
            "write another 0 here (12500). Llama 3 could not:</text>",
            '<text x="112" y="454">it would write 125|00 and start no token at this place. '
            "The boundary itself excludes the token.</text>",
            f'<text class="s" x="24" y="{HEIGHT - 22}">Real tokenizers. Boundaries, event, its '
            "sizes and the masked token are computed by persea.</text>",
        ]
    )


def main() -> None:
    """Compute everything the picture claims, and write it."""
    data = Path(os.environ["PERSEA_DATA"]) / "tokenizers"
    teacher, student = (
        load_renderer(ModelSource(str(data / name)), name) for name in ("gemma3", "llama3")
    )
    event_map = build_event_map(teacher, student)
    of_teacher, of_student = teacher.vocabulary, student.vocabulary
    first = next(iter(of_student.encode(EVENT_AT)))
    event = event_map.student_event_V[first]
    teachers = np.flatnonzero(event_map.teacher_event_W == event)
    students = np.flatnonzero(event_map.student_event_V == event)
    shown_teacher = [of_teacher.bytes_W[i] for i in teachers]
    shown_student = [of_student.bytes_W[i] for i in students]
    assert {b" r", b" rupiah", b" rakyat"} <= set(shown_teacher)
    assert {b" r", b" rval"} <= set(shown_student)
    mask = event_map.teacher_mask
    assert mask is not None
    (zero,) = of_student.encode("0")
    impossible = mask.impossible_tokens(mask.other.context_id(zero, b"0"))
    assert {of_teacher.bytes_W[i] for i in impossible} == {b"0"}
    label = (of_student.bytes_W[first] or b"").decode().replace(" ", "␣")
    pictures = ("␣r  ␣rupiah  ␣rakyat …", "␣r  ␣rval  …")
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="One text under the tokenizers of Gemma 3 and Llama 3: common boundaries, '
        'one common event and one impossible token">',
        STYLE,
        f'<rect class="bg" width="{WIDTH}" height="{HEIGHT}" rx="12"/>',
        *rows(split(of_teacher, TEXT), split(of_student, TEXT)),
        explanation(len(teachers), len(students), label, pictures),
        "</svg>",
    ]
    target = Path(__file__).resolve().parent / "img" / "alignment.svg"
    target.write_text("\n".join(svg) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
