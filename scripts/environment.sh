# Sourced by the other scripts: makes .venv with pinned packages, once.
#   prepare_environment [extra ...]     extras of setup.py, none = the core
# Set PYTHON to choose the interpreter (3.10 or 3.11).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.10 python3; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return 0
    fi
  done
  echo "error: Python 3.10 or 3.11 with venv is needed (found: $(python3 --version 2>&1 | head -1));" \
    "install python3.11 and python3.11-venv, or 'pip install uv && uv python install 3.11', and set PYTHON to it" >&2
  return 2
}

prepare_environment() {
  local extras="" sum extra python missing="" stamp="$ROOT/.venv/.installed"
  sum="$(cat "$ROOT/setup.py" "$ROOT/scripts/constraints.txt" | cksum | tr ' ' '-')"
  for extra in core "$@"; do
    grep -qxF "$sum $extra" "$stamp" 2>/dev/null || missing="$missing $extra"
  done
  if [ -n "$missing" ]; then
    python="$(find_python)" || return 2
    [ -x "$ROOT/.venv/bin/python" ] || "$python" -m venv "$ROOT/.venv" || return 2
    extras="$(printf '%s\n' "$@" | paste -sd, -)"
    echo "installing packages into .venv (once) ..." >&2
    "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      -c "$ROOT/scripts/constraints.txt" -e "$ROOT${extras:+[$extras]}" >&2 || {
      echo "error: installing packages failed; see pip's message above" >&2
      return 2
    }
    for extra in core "$@"; do echo "$sum $extra" >>"$stamp"; done
  fi
  # glibc gives large blocks back to the kernel at every step otherwise; keeping them saves page faults.
  export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-8589934592}"
  export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
  export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-536870912}"
  export GLOG_v="${GLOG_v:-3}"
  export PATH="$ROOT/.venv/bin:$PATH"
  export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
}
