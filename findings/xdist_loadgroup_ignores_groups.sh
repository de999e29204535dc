#!/usr/bin/env bash
# pytest-xdist 3.8.0 under pytest 9.2.0: `--dist loadgroup` and the mark xdist_group
#
# Guess: tests with the same xdist_group run in one worker, as pytest-xdist documents.
# Seen: the groups have no effect and nothing says so: the tests of one group run in both workers. Under pytest 9.0.2 they
# run in one. (pytest-xdist writes the group into the private `_nodeid` of a test; pytest 9.2 makes `nodeid` from another
# attribute.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
cat > test_group.py <<'PY'
import os
import time

import pytest


@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("k", range(8))
def test_in_a_group(k):
    time.sleep(0.2)
    with open(os.environ["WORKERS"], "a") as file:
        file.write(os.environ["PYTEST_XDIST_WORKER"] + "\n")
PY
for version in 9.0.2 9.2.0; do
  python3 -m venv "env-$version"
  "env-$version/bin/pip" install -q --disable-pip-version-check "pytest==$version" pytest-xdist==3.8.0
  WORKERS="$dir/workers-$version" "env-$version/bin/python" -m pytest -q -n 2 --dist loadgroup test_group.py > "log-$version"
  echo "pytest $version: 8 tests of one group ran in $(sort -u "workers-$version" | wc -l) worker(s)"
done
[ "$(sort -u workers-9.0.2 | wc -l)" = 1 ]
[ "$(sort -u workers-9.2.0 | wc -l)" = 2 ]
