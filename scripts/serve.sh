#!/usr/bin/env bash
# Serves a PanGu-alpha over HTTP as OpenAI's API does, with a page to try it: the quickstart's model if none is named.
#   bash scripts/serve.sh [--config FILE] [--checkpoint DIR] [--int8] [port=8000 ...]
# All flags: python -m pangu serve --help
set -u
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
case " $* " in
  *" --config "* | *" --config="*) ;;
  *)
    if [ ! -f runs/quickstart/run.yaml ]; then
      echo "error: runs/quickstart/run.yaml: there is no model in this folder yet; run bash scripts/quickstart.sh here, or name a --config" >&2
      exit 2
    fi
    set -- --config runs/quickstart/run.yaml "$@"
    ;;
esac
prepare_environment serve || exit $?
exec python -m pangu serve "$@"
