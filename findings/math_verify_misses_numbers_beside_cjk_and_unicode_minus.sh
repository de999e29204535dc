#!/usr/bin/env bash
# math-verify 0.9.0: numbers in Japanese, Chinese, Thai or Hindi answers, and a typographic minus.
#
# Guess: a plain "12" is found in any sentence, whatever the language; "−5" (U+2212) is -5.
# Seen: parse() returns [] where a kana, hanzi or hangul letter touches the digits ("答えは12です"), for full-width,
# Thai and Devanagari digits, and for a Unicode minus; verify() of [] is False, so a right answer is graded wrong
# without any error. "7万" (70,000) is read as 7 and equals a gold answer of 7. With a space before the digits
# ("คำตอบคือ 12") the number is found. Whoever grades several languages must read the number first.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check math-verify==0.9.0 \
  latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.13.2 sympy==1.14.0
"$dir/env/bin/python" - <<'PY'
from importlib.metadata import version

from math_verify import parse, verify

print("math-verify", version("math-verify"))
expected = {
    ("12", "The answer is 12."): True,
    ("12", "คำตอบคือ 12"): True,
    ("12", "答えは12です"): False,
    ("12", "答案是12。"): False,
    ("12", "답은12입니다"): False,
    ("12", "答えは１２です"): False,
    ("12", "คำตอบคือ ๑๒"): False,
    ("12", "उत्तर १२ है"): False,
    ("-5", "The answer is −5."): False,
    ("70000", "7万"): False,
    ("7", "7万"): True,
}
for (gold, answer), right in expected.items():
    found = parse(answer)
    seen = verify(parse(gold), found)
    print(f"{gold!r} against {answer!r}: {seen}, parsed {found}")
    assert seen is right, "math-verify reads this in another way now"
PY
