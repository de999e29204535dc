"""A program cannot fake a pass: with patches, exits, signals, or objects of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from persea.errors import MissingRequirementError
from persea.tasks.sandbox.run_tests import ProgramOutcome, run_tests
from persea.tasks.sandbox.sandbox import Sandbox, SandboxLimits, open_sandbox


@pytest.fixture(scope="module")
def box() -> Sandbox:
    try:
        return replace(
            open_sandbox(), limits=SandboxLimits(cpu_s=1, wall_s=2.5, memory_bytes=256 << 20)
        )
    except MissingRequirementError as error:
        pytest.skip(f"no sandbox on this machine: {error}")


TESTS = "assert add(2, 3) == 5\nassert add(20, 30) == 50"

RIGHT = {
    "plain": "def add(a, b): return a + b",
    "a lambda": "add = lambda a, b: a + b",
    "a class": "class Add:\n    def __call__(self, a, b): return a + b\nadd = Add()",
    "with a library": "from operator import add",
    "noise": "print('PASSED')\ndef add(a, b):\n    print('x' * 1000)\n    return a + b",
    "a subclass of int": "class N(int): pass\ndef add(a, b): return N(a + b)",
}
FAKED = {
    "wrong": "def add(a, b): return a - b",
    "leaves with 0": "import os\nos._exit(0)",
    "leaves with 0 when asked": "import os\ndef add(a, b): os._exit(0)",
    "sys.exit at import": "import sys\nsys.exit(0)",
    "sys.exit when asked": "import sys\ndef add(a, b): sys.exit(0)",
    "equal to everything": "class E:\n    def __eq__(self, other): return True\ndef add(a, b): "
    "return E()",
    "an int equal to everything": "class E(int):\n    def __eq__(self, other): return True\n    "
    "__hash__ = int.__hash__\ndef add(a, b): return E(0)",
    "a list equal to everything": "class E(list):\n    def __eq__(self, other): return True\ndef "
    "add(a, b): return E()",
    "patches equality": "import builtins, operator\noperator.eq = lambda a, b: True\ndef add(a, "
    "b): return 0",
    "patches AssertionError": "import builtins\nbuiltins.AssertionError = type('Never', (Exception,"
    "), {})\ndef add(a, b): return 0",
    "raises AssertionError's child": "class A(Exception): pass\ndef add(a, b): raise A",
    "raises KeyboardInterrupt": "def add(a, b): raise KeyboardInterrupt",
    "walks frames": """
import sys
def add(a, b):
    f = sys._getframe()
    while f:
        for name in list(f.f_globals):
            if 'nonce' in name or 'verdict' in name:
                f.f_globals[name] = 'passed'
        f = f.f_back
    return 0""",
    "writes a verdict to every descriptor": """
import os
def add(a, b):
    for fd in range(64):
        try:
            os.write(fd, b'["", "passed", ""]')
        except OSError:
            pass
    return 0""",
    "answers before it is asked": "import os\nfor _ in range(9): os.write(3, (12).to_bytes(4, "
    "'big') + b'{\"value\": 1}')\ndef add(a, b): return 0",
    "patches the packing": "import sys\ng = sys._getframe(1).f_globals\ng['pack'] = lambda *a: "
    "['kept', 0]\ndef add(a, b): return 0",
    "sends no JSON": "import os\nos.write(3, (4).to_bytes(4, 'big') + b'oops')\ndef add(a, b): "
    "return 5",
    "sends a giant": "def add(a, b): return 'x' * (5 << 20)",
    "nests deeply": "def add(a, b):\n    v = []\n    for _ in range(100_000): v = [v]\n    return "
    "v",
    "not a number": "def add(a, b): return float('nan')",
    "a generator": "def add(a, b): yield a + b",
    "defines nothing": "pass",
    "no Python": "def add(a, b): return",
    "broken": "def add(a, b) return a + b",
    "kills everybody": "import os\ndef add(a, b):\n    os.kill(-1, 9)\n    return 5",
    "None": "def add(a, b): pass",
    "a NUL": "def add(a, b): return '\\0'\0",
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_pass(box: Sandbox, name: str):
    trial = run_tests(box, RIGHT[name], TESTS)
    assert trial.outcome is ProgramOutcome.PASSED, trial


@pytest.mark.parametrize("name", FAKED)
def test_no_other_program_passes(box: Sandbox, name: str):
    trial = run_tests(box, FAKED[name], TESTS)
    assert trial.outcome in (ProgramOutcome.WRONG, ProgramOutcome.RAISED), trial


def test_a_program_cannot_end_a_tests_loop_early(box: Sandbox):
    trial = run_tests(
        box, "def good(x): raise StopIteration", "assert all(map(good, [1, 2]))", ["good"]
    )
    assert (trial.outcome, "StopIteration" in trial.reason) == (ProgramOutcome.RAISED, True)


def test_a_module_that_tests_use_is_not_the_programs(box: Sandbox):
    """`math` and `sys` in tests that import nothing are the library's, and a function of the
    program's may be called as Python's own."""
    faked = (
        "class math:\n    isclose = lambda *a: True\n"
        "class sys:\n    getsizeof = lambda *a: 0\ndef add(a, b): return 0"
    )
    assert (
        run_tests(box, faked, "assert math.isclose(add(1, 2), 3)").outcome is ProgramOutcome.WRONG
    )
    assert (
        run_tests(box, faked, "assert add((1,), 0) == sys.getsizeof((1,))").outcome
        is ProgramOutcome.WRONG
    )
    assert (
        run_tests(box, RIGHT["plain"], "assert math.isclose(add(1, 2), 3)").outcome
        is ProgramOutcome.PASSED
    )
    assert (
        run_tests(
            box,
            "def sum(a, b): return a - b\ndef kinds(x, t): return [v for v in x if type(v) == t]",
            "assert sum(3, 2) == 1\nassert kinds([1, 'a'], int) == [1]",
            ["sum"],
        ).outcome
        is ProgramOutcome.PASSED
    )


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "def add(a, b):\n    while True: pass",
        "import time\ndef add(a, b): time.sleep(100)",
    ],
)
def test_no_answer_in_time(box: Sandbox, program: str):
    assert run_tests(box, program, TESTS).outcome is ProgramOutcome.TIMEOUT


PROGRAM = """
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
def total(pairs): return sum(p.a + p.b for p in pairs)
def apply(f, x): return f(x)
def twice(x): return 2 * x
def squares(n): return (k * k for k in range(n))
def half(x):
    if x % 2: raise ValueError('odd')
    return x // 2
def words(): return {'é': (1, {2, 3}, b'z', 1j, None)}
unit = Pair(1, 1)
"""
MANY_TESTS = """
import math
assert total([Pair(1, 2), Pair(3, 4), unit]) == 12
assert apply(twice, 4) == 8
assert list(squares(4)) == [0, 1, 4, 9]
assert math.isclose(half(4), 2.0)
assert words() == {'é': (1, {2, 3}, b'z', 1j, None)}
assert twice(x=2) == 4
assert Pair(1, 2) != Pair(1, 2)
try:
    half(3)
except ValueError as error:
    assert str(error) == 'odd'
else:
    assert False
def check(candidate):
    for k in range(3):
        assert candidate(k) == 2 * k
check(twice)
"""


def test_tests_see_what_they_need(box: Sandbox):
    trial = run_tests(box, PROGRAM, MANY_TESTS)
    assert trial.outcome is ProgramOutcome.PASSED, trial


@pytest.mark.parametrize(
    ("tests", "outcome"),
    [
        ("import os\nos._exit(0)", ProgramOutcome.NO_VERDICT),
        ("assert add(", ProgramOutcome.RAISED),
        ("raise SystemExit", ProgramOutcome.NO_VERDICT),
        ("assert 1 == 2, 'no'", ProgramOutcome.WRONG),
    ],
)
def test_broken_tests_pass_nothing(box: Sandbox, tests: str, outcome: ProgramOutcome):
    trial = run_tests(box, RIGHT["plain"], tests)
    assert trial.outcome is outcome
    assert trial.reason
