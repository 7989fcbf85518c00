#!/usr/bin/env bash
# From nothing to generated Chinese text: sets up .venv, then builds a corpus, trains a vocabulary and a small
# PanGu-alpha, and generates. Run it again and what is finished is not repeated.
#   bash scripts/quickstart.sh [--corpus FILE] [--output DIR] [--steps N] [--bytes 2MB] [--fresh]
#                              [--config FILE] [key=value ...]
set -u
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
case " $* " in *" --help "* | *" -h "*) sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;; esac
prepare_environment || exit $?
exec python -m pangu quickstart "$@"
