"""Fault injection for the cache, longer than the tests run it.

    python bench/chaos_cache.py [rounds] [seed]        (make chaos, about 5 minutes)

- kills: a real capture of the qwen-sapling gets SIGKILL at random moments until it is complete; the
  folder must hold the same bytes as an undisturbed one, and no committed unit may be generated
  twice.
- flips: 500 random bit flips over every kind of file of a capture; `persea cache verify` must find
  each.
- cuts: each kind of file is truncated at 64 places; each must be found.
- power: every state that a power loss may leave, after every prefix of the disk's operations; no
  committed unit may be broken or lost.
- faults: every disk operation fails once, with four errors; the run must exit with code 6 and its
  retry must produce the same bytes.

Writes bench/results/chaos-cache.json.
"""

from __future__ import annotations

import errno
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from persea import storage as store  # noqa: E402
from persea.cache.maintenance import committed_units, verify_cache  # noqa: E402
from persea.errors import StorageError  # noqa: E402
from tests.cache import test_faults as faults  # noqa: E402
from tests.disks import Failing  # noqa: E402

SMALL = [
    "corpus.0.generate=120",
    "corpus.1.generate=40",
    "corpus.2.generate=40",
    "corpus.3.generate=40",
    "corpus.4.generate=40",
    "capture.prompts_per_unit=10",
    "audition.items=20",
    "evaluation.items=5",
]


def start(verb: str, out: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "persea.cli",
        verb,
        str(ROOT / "recipes" / "quickstart.yaml"),
        "--out",
        str(out),
    ]
    return subprocess.Popen(
        command + [part for change in SMALL for part in ("--set", change)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(verb: str, out: Path) -> None:
    run = start(verb, out)
    _, stderr = run.communicate()
    if run.returncode:
        raise SystemExit(f"{verb} failed with {run.returncode}: {stderr.decode()[-2000:]}")


def visible(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for kind in ("units", "commits")
        for p in (folder / kind).glob("*")
        if not p.name.startswith(".")
    }


def kills(place: Path, rounds: int, rng: random.Random) -> dict[str, object]:
    whole, killed = place / "whole", place / "killed"
    for verb in ("check", "audition"):
        finish(verb, whole)
    shutil.copytree(whole, killed)
    begin = time.monotonic()
    finish("capture", whole)
    length, count, lost = time.monotonic() - begin, 0, 0
    while count < rounds:
        before = visible(killed / "capture") if (killed / "capture").is_dir() else {}
        run = start("capture", killed)
        try:
            run.wait(timeout=rng.uniform(length / 4, length))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
        run.communicate()
        after = visible(killed / "capture") if (killed / "capture").is_dir() else {}
        lost += any(
            after.get(name) != sha for name, sha in before.items() if name.startswith("commits")
        )
        if run.returncode == 0:  # finished before the kill: remove some units and continue
            for path in rng.sample(sorted((killed / "capture" / "commits").glob("*.json")), 12):
                path.unlink()
            (killed / "capture" / "done.json").unlink()
            continue
        if run.returncode != -signal.SIGKILL:
            raise SystemExit(f"capture ended with {run.returncode}")
        count += 1
        started = (killed / "capture" / "commits").is_dir()
        print(
            f"kill {count}/{rounds}, "
            f"{len(committed_units(killed / 'capture')) if started else 0} units",
            flush=True,
        )
    finish("capture", killed)
    return {
        "kills": count,
        "equal": visible(whole / "capture") == visible(killed / "capture"),
        "committed_units_touched": lost,
    }


def flips_and_cuts(capture: Path, rng: random.Random, flips: int) -> dict[str, object]:
    """Damage a copy of some units of a finished capture, with their records."""
    files = sorted(
        p for p in capture.rglob("*") if p.is_file() and p.stat().st_size
    )  # an empty list of removed prompts has no byte to flip
    kinds = {"/".join(p.relative_to(capture).parts[:-1]) or p.name for p in files}
    found = 0
    for k in range(flips):
        path = files[k % len(files)] if k % 3 else capture / ("done.json", "summary.json")[k % 2]
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        found += any(f.path == path for f in verify_cache(capture) if not f.is_harmless)
        path.write_bytes(data)
    cuts = cut = 0
    for path in (
        next((capture / "units").glob("*.safetensors")),
        next((capture / "commits").glob("*.json")),
        capture / "done.json",
        capture / "summary.json",
    ):
        data = path.read_bytes()
        for k in range(64):
            path.write_bytes(data[: k * (len(data) - 1) // 63])
            cuts += 1
            cut += any(f.path == path for f in verify_cache(capture) if not f.is_harmless)
        path.write_bytes(data)
    return {
        "kinds": sorted(kinds),
        "flips": flips,
        "flips_found": found,
        "cuts": cuts,
        "cuts_found": cut,
        "sound_again": verify_cache(capture) == [],
    }


def power(place: Path) -> dict[str, int]:
    return dict(faults.sound_after_power_loss(place, faults.recorded(place)))


def failures(place: Path) -> dict[str, object]:
    faults.work(place / "whole")
    whole, fired, refused, equal = faults.visible(place / "whole"), 0, 0, 0
    for error in (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE, errno.EACCES, errno.EDQUOT):
        for lasts in (False, True):
            at = 0
            while True:
                at += 1
                folder, store.DISK = place / "run", Failing(at, error, lasts)
                disk = store.DISK
                try:
                    faults.work(folder)
                except StorageError as told:
                    refused += told.exit_code == 6
                store.DISK = store.Disk()
                if disk.fired:
                    fired += 1
                    faults.work(folder)
                    equal += faults.visible(folder) == whole
                shutil.rmtree(folder)
                if not disk.fired:
                    break
    return {"fired": fired, "refused_with_6": refused, "same_bytes_after": equal}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    rng = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        result: dict[str, object] = {
            "faults": failures(place / "faults"),
            "power": power(place / "disk"),
        }
        print(json.dumps(result), flush=True)
        result["kills"] = kills(place, rounds, rng)
        print(json.dumps(result["kills"]), flush=True)
        result["damage"] = flips_and_cuts(place / "whole" / "capture", rng, 500)
    result["seconds"] = round(time.monotonic() - begin)
    (ROOT / "bench" / "results" / "chaos-cache.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )
    print(json.dumps(result, indent=1))
    damage, killed, lost, failed = (
        result["damage"],
        result["kills"],
        result["power"],
        result["faults"],
    )
    assert (
        isinstance(damage, dict)
        and isinstance(killed, dict)
        and isinstance(lost, dict)
        and isinstance(failed, dict)
    )
    sys.exit(
        not (
            damage["flips"] == damage["flips_found"]
            and damage["cuts"] == damage["cuts_found"]
            and killed["equal"]
            and lost["sound"] == lost["disks"]
            and failed["fired"] == failed["refused_with_6"] == failed["same_bytes_after"] > 400
        )
    )


if __name__ == "__main__":
    main()
