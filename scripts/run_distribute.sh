#!/usr/bin/env bash
# Trains in several processes, on this machine or several, over msrun.
#   bash scripts/run_distribute.sh --config F [--nodes N --node-rank R --master HOST:PORT --nproc P]
#                                  [--compile-only] [--resume [DIR]] [key=value ...]
# Several machines: run it on each with its own --node-rank and the same --master, the address of machine 0.
# Logs are in <output.directory>/logs, one a rank. Exit code: that of the first rank that failed.
# An example on one CPU machine:
#   bash scripts/run_distribute.sh --config configs/pangu/tiny.yaml --nproc 2 parallel.data=2
set -u
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
case " $* " in *" --help "* | *" -h "*) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;; esac
prepare_environment || exit $?
exec python -m parallel launch "$@"
