#!/usr/bin/env bash
# Evaluates a checkpoint on few-shot tasks whose data are in a local folder.
#   bash scripts/run_few_shot.sh --config F --tasks tnews,ocnli,... [--data DIR] [--shots 0|1|few|K]
#                                [--checkpoint DIR] [--limit N] [--nproc P] [--log-samples FILE] [key=value ...]
# --tasks all takes every task whose data are found. All flags: python -m pangu evaluate --help
# An example: bash scripts/run_few_shot.sh --config configs/pangu/2_6b.yaml --tasks all --data data/evaluation --shots few
set -u
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
case " $* " in *" --help "* | *" -h "*) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;; esac
prepare_environment evaluate || exit $?
exec python -m pangu evaluate "$@"
