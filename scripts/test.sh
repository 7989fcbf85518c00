#!/usr/bin/env bash
# Sets up .venv with everything and runs the tests.
#   bash scripts/test.sh [pytest arguments]       for example: -m slow, tests/pangu, -k resume
# Set TEST_WORKERS to the number of processes (2; each takes up to 3 GB; 0 = this process alone).
set -u
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment data serve stream evaluate mindformers export bench test || exit $?
cd "$ROOT" && exec python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder --durations=30 "$@"
