#!/usr/bin/env bash
# Trains in one process.
#   bash scripts/run_standalone.sh --config F [--resume [DIR]] [key=value ...]
set -u
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
case " $* " in *" --help "* | *" -h "*) sed -n '2,3s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;; esac
prepare_environment || exit $?
exec python -m parallel launch --nproc 1 "$@"
