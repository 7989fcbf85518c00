#!/usr/bin/env bash
# Sets up .venv with everything and runs the tests.
#   bash scripts/test.sh [pytest arguments]       for example: -m slow, tests/pangu, -k resume
# Set TEST_WORKERS to the number of processes (each takes up to 3 GB; 0 = this process alone); by default one more than there
# are cores, for many tests wait for others' processes, and not more than the memory takes.
set -u
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment data serve stream evaluate mindformers export bench test || exit $?
fitting=$(awk '/^MemAvailable/ {print int($2 / 3000000)}' /proc/meminfo)
workers=$(($(nproc) + 1))
[ "$workers" -le "$fitting" ] || workers=$((fitting > 1 ? fitting : 1))
unset PYTHONDONTWRITEBYTECODE  # hundreds of commands are started: each would compile what it imports again
cd "$ROOT" && exec python -m pytest -n "${TEST_WORKERS:-$workers}" --dist loadfile --no-loadscope-reorder --durations=30 "$@"
