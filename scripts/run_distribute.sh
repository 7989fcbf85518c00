#!/usr/bin/env bash
# Trains as many processes, on this machine or several.
#   bash scripts/run_distribute.sh [--python PATH] [--no-install] --config F [--nproc P] [--max-restarts N]
#                                  [--hosts FILE | --nodes N --node-rank R --master HOST:PORT]
#                                  [--compile-only] [--resume [DIR]] [key=value ...]
# Several machines: the same command on each, with a file of the machines, or with a --node-rank of its own and the
# address of machine 0. --python runs an interpreter that has the packages; --no-install takes .venv as it is: neither
# asks a registry. Machines that share a disk install one after the other.
# Logs lie in <output.directory>/logs, one a rank. Exit code: that of the first rank that failed.
# An example on one CPU machine:
#   bash scripts/run_distribute.sh --config configs/pangu/tiny.yaml --nproc 2 parallel.data=2
set -u
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
case " $* " in *" --help "* | *" -h "*) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;; esac
words=()
while [ $# -gt 0 ]; do
  case "$1" in
    --python)
      [ $# -gt 1 ] || { echo "error: --python: needs the path of an interpreter" >&2; exit 2; }
      export RUN_PYTHON="$2"
      shift
      ;;
    --python=*) export RUN_PYTHON="${1#--python=}" ;;
    --no-install) export NO_INSTALL=1 ;;
    *) words+=("$1") ;;
  esac
  shift
done
prepare_environment || exit $?
exec "${RUN_PYTHON:-python}" -m parallel launch "${words[@]}"
