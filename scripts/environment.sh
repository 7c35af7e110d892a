# Sourced by the other scripts: makes .venv when it is missing or older than pyproject.toml, and enters it.
# Needs only Python 3.10 or later with its venv module; PYTHON names another interpreter than python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-}"
stamp=".venv/.installed${extras:+-$extras}"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  echo "Installing into .venv (once; a few minutes)" >&2
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  pip=".venv/bin/python -m pip --disable-pip-version-check install --quiet"
  # The CPU build where the index offers one under this version, before anything asks for a CUDA build.
  .venv/bin/python -c 'import torch' 2>/dev/null || $pip torch==2.13.0 || $pip torch
  $pip -e ".${extras:+[$extras]}"
  touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
