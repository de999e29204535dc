"""Write the tables between their marks in docs/results.md, and two charts, from the result lines.

The prose around the tables is written by hand.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Line: TypeAlias = Mapping[str, Any]
DRAWS = 2000
LARGER = (
    "cross-entropy",
    "events",
    "events + masks",
    "strict everywhere",
)  # methods that larger students run too: sizes xs-wide and xs-wider
NAMES = {
    "sft": "SFT on teacher samples",
    "strict": "strict, 1:1 positions",
    "strict everywhere": "strict, all common boundaries",
    "uld": "ULD",
    "gold": "GOLD (TRL)",
    "bpm": "longest prefix (BPM)",
    "chunk": "plain span likelihood",
}
TERMS = {"completion": "partial tokens", "chunk": "span likelihood"}  # in names of event methods
CONTINUED_ON = {"own": "on-policy"}  # other values of `on` are written as they are


def method_name(method: str) -> str:
    """Return the name of a method in the tables; the result lines keep their own."""
    if method in NAMES:
        return NAMES[method]
    for key, term in TERMS.items():
        method = method.replace(key, term)
    return method


def display_name(line: Line) -> str:
    """Return the method and, where it is a choice, the kind of distributions."""
    kind = line["rows"]
    if kind in ("none", "full") and line["method"] != "events":
        return method_name(line["method"])
    rest = " + rest" if kind.startswith("top-k") and not kind.endswith("renormalised") else ""
    return f"{method_name(line['method'])}, {kind}{rest}"


def runs_by_label(lines: Iterable[Line], **want: object) -> dict[str, list[Line]]:
    """Return test lines with these values, by method, distributions and share (if several)."""
    out: dict[tuple[str, float], list[Line]] = {}
    for line in lines:
        if line["part"] == "test" and all(line[k] == v for k, v in want.items()):
            out.setdefault((display_name(line), line["share"]), []).append(line)
    names = Counter(name for name, _ in out)
    return {
        name + (f" ({share:g})" if names[name] > 1 else ""): own
        for (name, share), own in out.items()
    }


def domains_of(found: Mapping[str, Sequence[Line]]) -> list[str]:
    """Return the domains of some runs, in the order of their world."""
    return list(next(iter(found.values()))[0]["bits_per_byte"]) if found else []


def pages_of(lines: Sequence[Line]) -> dict[str, np.ndarray]:
    """Return domain -> [pages, 2]: bits (mean over seeds) and bytes of every held-out page."""
    return {
        d: np.mean([np.array(line["pages"][d], float) for line in lines], 0)
        for d in lines[0]["pages"]
    }


def compare_paired_results(
    ours: Sequence[Line], theirs: Sequence[Line], seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Return ours - theirs in bits per byte, by domain and 'mean': (value, low, high).

    95 % intervals over resampled pages, the same for both.
    """
    a, b = pages_of(ours), pages_of(theirs)
    rng, draws, out = np.random.default_rng(seed), [], {}
    for d in a:
        n = len(a[d])
        at = rng.integers(0, n, (DRAWS, n))
        size = a[d][at, 1].sum(1)
        drawn = (a[d][at, 0].sum(1) - b[d][at, 0].sum(1)) / size
        draws.append(drawn)
        value = float((a[d][:, 0].sum() - b[d][:, 0].sum()) / a[d][:, 1].sum())
        out[d] = (value, *(float(x) for x in np.quantile(drawn, (0.025, 0.975))))
    mean = np.mean(draws, 0)
    out["mean"] = (
        float(np.mean([out[d][0] for d in a])),
        *(float(x) for x in np.quantile(mean, (0.025, 0.975))),
    )
    return out


def mean_and_half_range(values: Sequence[float], places: int = 3) -> str:
    """Return the mean, and half the range over the seeds."""
    half = (max(values) - min(values)) / 2
    return f"{np.mean(values):.{places}f}" + (f" ±{half:.{places}f}" if len(values) > 1 else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *rows))


def main_table(lines: Sequence[Line], size: str, regime: str) -> str:
    """Return the methods of one regime at length 1, best first.

    Mean and each domain, calibration, cost, and the paired difference to cross-entropy.
    """
    found = runs_by_label(lines, size=size, regime=regime, length=1.0)
    plain, domains = found.get("cross-entropy"), domains_of(found)
    rows = []
    for name, own in sorted(
        found.items(), key=lambda kv: float(np.mean([line["mean"] for line in kv[1]]))
    ):
        versus = (
            difference_over_common_seeds(own, plain) if plain and name != "cross-entropy" else ""
        )
        rows.append(
            [
                name,
                f"{own[0]['share']:g}" if own[0]["share"] else "",
                str(len(own)),
                mean_and_half_range([line["mean"] for line in own]),
                versus,
                *(f"{np.mean([line['bits_per_byte'][d] for line in own]):.3f}" for d in domains),
                f"{np.mean([line['calibration'] for line in own]):.3f}",
                f"{np.mean([line['cpu_per_step'] for line in own]):.3f}",
            ]
        )
    return table(
        [
            "method, distributions",
            "share",
            "seeds",
            "mean",
            "minus cross-entropy (95 % over pages)",
            *domains,
            "ECE",
            "CPU s/step",
        ],
        rows,
    )


def difference_over_common_seeds(own: Sequence[Line], other: Sequence[Line]) -> str:
    """Return the difference over the seeds that both have."""
    both = {line["seed"] for line in own} & {line["seed"] for line in other}
    if not both:
        return ""
    value, low, high = compare_paired_results(
        [line for line in own if line["seed"] in both],
        [line for line in other if line["seed"] in both],
    )["mean"]
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def pairwise_table(lines: Sequence[Line], size: str, ours: str, regime: str = "unlimited") -> str:
    """Return the differences between `ours` and every other method, by domain.

    `*` marks a 95 % interval that excludes zero.
    """
    found = runs_by_label(lines, size=size, regime=regime, length=1.0)
    domains, rows = domains_of(found), []
    for name, own in found.items():
        both = {line["seed"] for line in own} & {line["seed"] for line in found[ours]}
        if name == ours or not both:
            continue
        gaps = compare_paired_results(
            [x for x in found[ours] if x["seed"] in both], [x for x in own if x["seed"] in both]
        )
        cells = []
        for d in (*domains, "mean"):
            value, low, high = gaps[d]
            cells.append(f"{value:+.3f}" + ("" if low <= 0 <= high else " *"))
        means = [{x["seed"]: x["mean"] for x in side} for side in (found[ours], own)]
        rows.append(
            (
                gaps["mean"][0],
                [
                    name,
                    *cells,
                    " / ".join(f"{means[0][k] - means[1][k]:+.3f}" for k in sorted(both)),
                ],
            )
        )
    return table(
        [f"{ours} minus ...", *domains, "mean", "mean by seed"], [r for _, r in sorted(rows)]
    )


def equal_quality_table(lines: Sequence[Line], size: str) -> str:
    """Return how many of cross-entropy's tokens reach each method's quality at length 1.

    Runs with their own schedules, log-linear between them.
    """
    rows = []
    for regime in ("unlimited", "limited"):
        plain = [
            x
            for x in lines
            if x["part"] == "test"
            and x["size"] == size
            and x["regime"] == regime
            and x["method"] == "cross-entropy"
        ]
        lengths = sorted({x["length"] for x in plain})
        curve = [
            (n, float(np.mean([x["mean"] for x in plain if x["length"] == n]))) for n in lengths
        ]
        for name, own in runs_by_label(lines, size=size, regime=regime, length=1.0).items():
            reached = float(np.mean([x["mean"] for x in own]))
            rows.append(
                [regime, name, str(len(own)), f"{reached:.3f}", token_factor(curve, reached)]
            )
        for length in sorted(
            {
                x["length"]
                for x in lines
                if x["part"] == "test" and x["size"] == size and x["regime"] == regime
            }
            - {1.0}
        ):
            for name, own in runs_by_label(lines, size=size, regime=regime, length=length).items():
                if own[0]["method"] != "cross-entropy":
                    reached = float(np.mean([x["mean"] for x in own]))
                    rows.append(
                        [
                            regime,
                            f"{name}, length {length:g}",
                            str(len(own)),
                            f"{reached:.3f}",
                            token_factor(
                                [(n / length, v) for n, v in curve if n >= length], reached
                            ),
                        ]
                    )
        rows.append(
            [
                regime,
                "cross-entropy by length (length: bits)",
                "",
                "",
                ", ".join(f"{n:g}: {v:.3f}" for n, v in curve),
            ]
        )
    return table(
        [
            "regime",
            "method, distributions",
            "seeds",
            "bits per byte",
            "tokens cross-entropy needs, as a factor",
        ],
        rows,
    )


def larger_table(lines: Sequence[Line], shapes: Mapping[str, str]) -> str:
    """Return gain over cross-entropy and token savings by student width, with the same teachers.

    shapes: size -> its description.
    """
    rows = []
    for size, words in shapes.items():
        found = runs_by_label(lines, size=size, regime="unlimited", length=1.0)
        plain = [
            x
            for x in lines
            if x["part"] == "test"
            and x["size"] == size
            and x["regime"] == "unlimited"
            and x["method"] == "cross-entropy"
        ]
        curve = [
            (n, float(np.mean([x["mean"] for x in plain if x["length"] == n])))
            for n in sorted({x["length"] for x in plain})
        ]
        if not plain:
            continue
        for name, own in found.items():
            method, own_way = (
                own[0]["method"],
                (own[0]["share"], own[0]["rows"]) == (0.7, "sampled .01"),
            )
            if method not in LARGER or (method.startswith("events") and not own_way):
                continue
            versus = (
                difference_over_common_seeds(own, found["cross-entropy"])
                if own[0]["method"] != "cross-entropy"
                else ""
            )
            reached = float(np.mean([x["mean"] for x in own]))
            rows.append(
                [
                    words,
                    f"{own[0]['rate']:g}",
                    name,
                    str(len(own)),
                    mean_and_half_range([x["mean"] for x in own]),
                    versus,
                    token_factor(curve, reached) if versus else "1",
                ]
            )
        rows.append(
            [
                words,
                "",
                "cross-entropy by length (length: bits)",
                "",
                ", ".join(f"{n:g}: {v:.3f}" for n, v in curve),
                "",
                "",
            ]
        )
    head = (
        "student",
        "learning rate",
        "method, distributions",
        "seeds",
        "mean",
        "minus cross-entropy (95 % over pages)",
        "tokens cross-entropy needs, as a factor",
    )
    return table(head, rows)


def extension_table(lines: Sequence[Line], sizes: Mapping[str, str]) -> str:
    """Return bits per byte by number of added tokens, method and length.

    sizes: size -> number of added tokens.
    """
    rows, domains = [], list[str]()
    for size, more in sizes.items():
        for length in sorted(
            {x["length"] for x in lines if x["size"] == size and x["part"] == "test"}
        ):
            for name, own in runs_by_label(lines, size=size, length=length).items():
                domains = domains_of({name: own})
                text = sum(x["bytes"] for x in own)
                costs = (
                    [
                        f"{sum(x['tokens'] for x in own) / text:.3f}",
                        f"{text / len(own) / 1000:.0f}",
                        mean_and_half_range([x["cpu_per_step"] * x["steps"] for x in own], 1),
                    ]
                    if text
                    else ["", "0", "0"]
                )
                rows.append(
                    [
                        more,
                        name,
                        f"{own[0]['rate']:g}" if text else "",
                        f"{length:g}",
                        str(len(own)),
                        *costs,
                        mean_and_half_range([x["mean"] for x in own]),
                        *(f"{np.mean([x['bits_per_byte'][d] for x in own]):.3f}" for d in domains),
                    ]
                )
    head = (
        "added tokens",
        "method, distributions",
        "learning rate",
        "length",
        "seeds",
        "tokens per byte",
        "kB of text",
        "CPU s",
        "mean",
    )
    return table([*head, *domains], rows)


def onpolicy_table(lines: Sequence[Line]) -> str:
    """Return the continued students by their data.

    Bits per byte on real text; bits per byte of teacher and student on the student's text.
    Differences to "text" over common seeds, 95 % over resampled windows, the same for both.
    """
    found: dict[str, dict[int, Line]] = {}
    for line in lines:
        if line["part"] == "test":
            found.setdefault(line["on"], {})[line["seed"]] = line
    rows = []
    for on, own in found.items():
        text = found.get("text", {})
        both = sorted(own.keys() & text.keys())
        gap = (
            reverse_kl_difference([own[k] for k in both], [text[k] for k in both])
            if both and on != "text"
            else ""
        )
        means = [
            mean_and_half_range([x[key] for x in own.values()])
            for key in ("mean", "taught", "self")
        ]
        rows.append(
            [
                CONTINUED_ON.get(on, on),
                f"{next(iter(own.values()))['rate']:g}" if on != "none" else "",
                str(len(own)),
                *means,
                mean_and_half_range([x["taught"] - x["self"] for x in own.values()]),
                gap,
                f"{np.mean([x['calibration'] for x in own.values()]):.3f}",
                f"{np.mean([x['tokens'] for x in own.values()]) / 1000:.0f}",
            ]
        )
    return table(
        [
            "continued training on",
            "learning rate",
            "seeds",
            "real text",
            "rollouts: teacher",
            "rollouts: student",
            "reverse KL per byte",
            "minus that of `text` (95 % over windows)",
            "ECE",
            "thousand tokens",
        ],
        rows,
    )


def reverse_kl_difference(ours: Sequence[Line], theirs: Sequence[Line], seed: int = 0) -> str:
    """Return the difference of reverse KL per byte, over windows that every run of both
    continued.
    """
    kept = [
        k
        for k in range(len(ours[0]["continued"]))
        if all(x["continued"][k] for x in (*ours, *theirs))
    ]
    sides = [
        np.array([[x["continued"][k] for k in kept] for x in some], float)
        for some in (ours, theirs)
    ]
    at = np.random.default_rng(seed).integers(0, len(kept), (DRAWS, len(kept)))

    def rate(side_SK3: np.ndarray, which: np.ndarray) -> np.ndarray:
        taught, own, size = (side_SK3[:, which, k].sum(-1) for k in range(3))
        return np.asarray(((taught - own) / size).mean(0))

    value = float(np.subtract(*(rate(side, np.arange(len(kept))) for side in sides)))
    low, high = np.quantile(np.subtract(*(rate(side, at) for side in sides)), (0.025, 0.975))
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def token_factor(curve: Sequence[tuple[float, float]], reached: float) -> str:
    if reached > curve[0][1] + 1e-9:
        return "< 1" if curve[0][0] >= 1 else f"< {curve[0][0]:g}"
    for (n0, v0), (n1, v1) in itertools.pairwise(curve):
        if v1 <= reached <= v0:
            part = (v0 - reached) / (v0 - v1) if v0 > v1 else 0.0
            return f"{math.exp(math.log(n0) + part * (math.log(n1) - math.log(n0))):.1f}"
    best = min(curve, key=lambda nv: nv[1])
    return f"not reached: best {best[1]:.3f} at factor {best[0]:g}"


def searches_table(lines: Sequence[Line], size: str) -> str:
    """Return everything measured on dev: learning rates and shares, half a length, one seed."""
    rows = [
        [display_name(x), *(f"{x[k]:g}" for k in ("length", "rate", "share")), f"{x['mean']:.3f}"]
        for x in lines
        if x["part"] == "dev" and x["size"] == size
    ]
    return table(
        ["method, distributions", "length", "learning rate", "share", "dev bits per byte"],
        sorted(rows),
    )


def teachers_table(record: Mapping[str, Any]) -> str:
    rows = [
        [
            who,
            f"{t['non_embedding'] / 1e6:.2f} M",
            f"{t['tokens'] / 1e6:.2f} M",
            str(t["cpu_seconds"]),
            ", ".join(f"{d} {v:.2f}" for d, v in t["bits_per_byte"].items()),
        ]
        for who, t in record.items()
    ]
    return table(
        [
            "teacher",
            "parameters without embeddings",
            "training tokens",
            "CPU s",
            "held-out bits per byte in its domains",
        ],
        rows,
    )


def gradients_table(record: Mapping[str, Any]) -> str:
    rows = [
        [student, kind, *(f"{m:.3f} ±{s:.3f}" for m, s in (values["cosine"], values["norm_ratio"]))]
        for student, kinds in record.items()
        for kind, values in kinds.items()
    ]
    return table(
        [
            "student",
            "span likelihood term",
            "cosine with the events' gradient",
            "norm / norm of the events' gradient",
        ],
        rows,
    )


def write_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Write each table between its marks. A mark that is not in the page is an error."""
    text = page.read_text()
    for name, body in tables.items():
        text, n = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda m, body=body: f"{m[1]}{body}\n{m[2]}",
            text,
            flags=re.DOTALL,
        )  # type: ignore[misc]
        if n != 1:
            raise SystemExit(f"{page}: {n} places for the table {name}")
    page.write_text(text)


# --- charts ---


def axis(low: float, high: float, a: float, b: float) -> Callable[[float], float]:
    return lambda value: a + (b - a) * (value - low) / (high - low)


def dot_plot(title: str, rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Draw a dot and an interval per method; the line at zero is cross-entropy."""
    low, high = min(0.0, *(r[2] for r in rows)), max(0.0, *(r[3] for r in rows))
    pad = (high - low) * 0.05
    x = axis(low - pad, high + pad, 330, 730)
    body, bottom = (
        [f'<text x="8" y="18" font-weight="bold">{escape(title)}</text>'],
        40 + 22 * len(rows),
    )
    body.append(f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="30" y2="{bottom}" stroke="#888"/>')
    for k, (name, value, a, b) in enumerate(rows):
        y = 44 + 22 * k
        body.append(
            f'<text x="8" y="{y + 4}">{escape(name)}</text>'
            f'<line x1="{x(a):.1f}" x2="{x(b):.1f}" y1="{y}" y2="{y}" stroke="#246"/>'
            f'<circle cx="{x(value):.1f}" cy="{y}" r="4" fill="#246"/>'
            f'<text x="738" y="{y + 4}">{value:+.3f}</text>'
        )
    return svg(800, bottom + 8, body)


def line_chart(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Draw bits per byte on dev against tokens, with the method's name at the end of its line."""
    points = [p for line in series.values() for p in line]
    x = axis(math.log(min(p[0] for p in points)), math.log(max(p[0] for p in points)), 60, 520)
    y = axis(min(p[1] for p in points), max(p[1] for p in points), 330, 40)
    colours = ("#246", "#c40", "#283", "#a3a", "#777", "#b80", "#08a", "#844", "#000", "#7c0")
    body = [f'<text x="8" y="18" font-weight="bold">{escape(title)}</text>']
    for value in np.linspace(min(p[1] for p in points), max(p[1] for p in points), 5):
        body.append(
            f'<text x="8" y="{y(value) + 4:.1f}">{value:.2f}</text><line x1="50" x2="520" '
            f'y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#eee"/>'
        )
    for tokens in np.geomspace(
        min(p[0] for p in points), max(p[0] for p in points), 4
    ):  # evenly spaced: the labels of two lines would overlap
        body.append(
            f'<text x="{x(math.log(tokens)):.1f}" y="352" text-anchor="end">'
            f"{tokens / 1000:.0f} k</text>"
        )
    placed: list[float] = []
    for k, (name, line) in enumerate(
        sorted(series.items(), key=lambda kv: kv[1][-1][1], reverse=True)
    ):
        path = " ".join(f"{x(math.log(n)):.1f},{y(v):.1f}" for n, v in line)
        at = y(line[-1][1])
        at = max([at, *(p + 15 for p in placed if p > at - 15)])
        placed.append(at)
        colour = colours[k % len(colours)]
        body.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<text x="528" y="{at + 4:.1f}" fill="{colour}">{escape(name)}</text>'
        )
    return svg(820, 392, body)


def svg(width: int, height: int, body: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="13">'
        f'<rect width="{width}" height="{height}" fill="#fff"/>{"".join(body)}</svg>\n'
    )
