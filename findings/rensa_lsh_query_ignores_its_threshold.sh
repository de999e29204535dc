#!/usr/bin/env bash
# rensa 0.5.0: RMinHashLSH takes a threshold, but query() and the one-shot duplicate flags do not use it.
#
# Guess: an index built with threshold=0.99 returns only near-identical sets.
# Seen: query() returns every set that shares one band, whatever the threshold is; a pair of Jaccard
# similarity .54 is returned (and flagged as duplicate by the one-shot matrix call) at .99 as at .1.
# Only is_similar() compares with the threshold. Filter query()'s results with is_similar() or jaccard().
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check rensa==0.5.0
"$dir/env/bin/python" - <<'PY'
from importlib.metadata import version

from rensa import RMinHash, RMinHashLSH

WORDS = [f"w{i}" for i in range(100)]
OTHER = WORDS[30:] + [f"x{i}" for i in range(30)]  # true Jaccard similarity 70 / 130 = .54


def minhash(words):
    made = RMinHash(num_perm=128, seed=1)
    made.update(words)
    return made


first, second = minhash(WORDS), minhash(OTHER)
print("rensa", version("rensa"), "estimated Jaccard", round(first.jaccard(second), 2))
assert 0.4 < first.jaccard(second) < 0.7
for threshold in (0.1, 0.5, 0.99):
    index = RMinHashLSH(threshold=threshold, num_perm=128, num_bands=32)
    index.insert(7, first)
    found, similar = index.query(second), index.is_similar(first, second)
    matrix = RMinHash.digest_matrix_from_token_sets([WORDS, OTHER], num_perm=128, seed=1)
    flags = RMinHashLSH(
        threshold=threshold, num_perm=128, num_bands=32
    ).query_duplicate_flags_matrix_one_shot(matrix)
    print(f"threshold {threshold}: query {found}, is_similar {similar}, one-shot flags {flags}")
    assert found == [7], "query() now looks at the threshold"
    assert flags == [True, True], "the one-shot flags now look at the threshold"
    assert similar == (first.jaccard(second) >= threshold)
PY
