#!/usr/bin/env bash
# Installs what the test of the page needs through apt, where it is missing: Chromium, its driver, a font with Chinese.
#   bash scripts/browser.sh
# Without it that one test is skipped, and says so.
set -u
if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi
command -v apt-get >/dev/null || { echo "browser.sh: no apt-get here; install chromium and chromedriver by hand" >&2; exit 2; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }
export DEBIAN_FRONTEND=noninteractive
as_root apt-get update -qq >&2 &&
  as_root apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-noto-cjk >&2 ||
  { echo "browser.sh: installing chromium failed; see apt's message above" >&2; exit 2; }
