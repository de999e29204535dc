#!/usr/bin/env bash
# math-verify 0.9.0: several \boxed answers, LaTeX thousands separators, and scientific notation.
#
# Guess: the last \boxed{} of a solution is its answer; "$1\,000$" is a thousand; "1e3" is a thousand.
# Seen: all boxes of a text become ONE set, so a solution that boxes an intermediate result and then the right answer
# is wrong (and right against a gold set of both); a second box with the same value is harmless.
# "$1\,000$" is 1*0 = 0, and "$2\,500$" is the sum 502; "$1{,}000$" is a thousand. "1e3" is read as 1 in text,
# and as 3*e within dollars, so it equals a gold answer of 1 and not of 1000.
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
    ("7", r"First \boxed{3}, so the answer is \boxed{7}"): False,
    (r"$\{3,7\}$", r"First \boxed{3}, so the answer is \boxed{7}"): True,
    ("7", r"\boxed{7}. Check: \boxed{7}"): True,
    ("1000", r"$1\,000$"): False,
    ("0", r"$1\,000$"): True,
    ("2500", r"$2\,500$"): False,
    ("502", r"$2\,500$"): True,
    ("1000", r"$1{,}000$"): True,
    ("1000", "1e3"): False,
    ("1", "1e3"): True,
    ("1000", "$1e3$"): False,
    ("1000", r"$1\times10^3$"): True,
}
for (gold, answer), right in expected.items():
    found = parse(answer)
    seen = verify(parse(gold), found)
    print(f"{gold!r} against {answer!r}: {seen}, parsed {found}")
    assert seen is right, "math-verify reads this in another way now"
PY
