# Sourced by the other scripts: makes .venv with pinned packages, once.
#   prepare_environment [extra ...]     extras of setup.py, none = the core
# Set PYTHON to choose the interpreter (3.10 or 3.11) that .venv is made of.
# NO_INSTALL=1 takes what is installed in .venv and asks no registry; RUN_PYTHON=PATH runs that interpreter instead.

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
  if [ -n "${RUN_PYTHON:-}" ] || [ -n "${NO_INSTALL:-}" ]; then
    use_python "${RUN_PYTHON:-$ROOT/.venv/bin/python}"
    return
  fi
  # Machines that share a disk would install into one folder at once.
  exec 9>"$ROOT/.venv.lock" && flock 9
  install_packages "$@" 9>&-
  local code=$?
  exec 9>&-
  [ $code -eq 0 ] || return $code
  use_python "$ROOT/.venv/bin/python"
}

install_packages() {
  local extras="" sum extra python missing="" compile="" stamp="$ROOT/.venv/.installed"
  sum="$(cat "$ROOT/setup.py" "$ROOT/scripts/constraints.txt" | cksum | tr ' ' '-')"
  for extra in core "$@"; do
    grep -qxF "$sum $extra" "$stamp" 2>/dev/null || missing="$missing $extra"
  done
  if [ -n "$missing" ]; then
    python="$(find_python)" || return 2
    [ -x "$ROOT/.venv/bin/python" ] || "$python" -m venv "$ROOT/.venv" || return 2
    extras="$(printf '%s\n' "$@" | paste -sd, -)"
    echo "installing packages into .venv (once) ..." >&2
    # The main job imports a small part of MindSpore: only the bytecode of that is written.
    [ $# -gt 0 ] || compile="--no-compile"
    "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check $compile \
      -c "$ROOT/scripts/constraints.txt" -e "$ROOT${extras:+[$extras]}" >&2 || {
      echo "error: installing packages failed; see pip's message above" >&2
      return 2
    }
    env -u PYTHONDONTWRITEBYTECODE GLOG_v=3 "$ROOT/.venv/bin/python" -c "import mindspore" >/dev/null 2>&1
    for extra in core "$@"; do echo "$sum $extra" >>"$stamp"; done
  fi
}

use_python() {
  if ! [ -x "$1" ]; then
    echo "error: no interpreter at $1; give --python the path of one that has the packages, or leave --no-install out" >&2
    return 2
  fi
  export PATH="$(cd "$(dirname "$1")" && pwd):$PATH"
  # glibc gives large blocks back to the kernel at every step otherwise; keeping them saves page faults.
  export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-8589934592}"
  export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
  export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-536870912}"
  export GLOG_v="${GLOG_v:-3}"
  export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
}
