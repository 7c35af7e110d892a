# Sourced by the other scripts with the extras they need, "" for none: without an argument, $1 would be the script's own.
# Makes .venv when it is missing, unusable or older than pyproject.toml, and enters it.
# Needs only Python 3.10 or later with its venv module; PYTHON names another interpreter than python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="$1"
stamp=".venv/.installed${extras:+-$extras}"
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
if ! recent .venv/bin/python || [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  if ! recent .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    base="${PYTHON:-python3}"
    if ! recent "$base"; then
      found="$("$base" -c 'import sys; print("Python %d.%d" % sys.version_info[:2])' 2>/dev/null || echo missing)"
      echo "$base is $found, and flashtalk needs Python 3.10 or later: PYTHON=python3.12 $0" >&2
      exit 1
    fi
    "$base" -m venv --clear .venv
  fi
  echo "Installing into .venv (once; a few minutes)" >&2
  pip=".venv/bin/python -m pip --disable-pip-version-check install --quiet"
  # PyPI's torch for Linux brings several GB of CUDA. Without a GPU a CPU build serves: first one that pip finds by
  # itself (its settings may name wheels on this machine), then PyTorch's own. Where both fail, the package's own
  # requirement below takes what there is, and tells what is wrong.
  if [ "$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    pytorch="--retries 0 --timeout 10 --index-url https://download.pytorch.org/whl/cpu"
    { $pip torch==2.13.0+cpu || $pip $pytorch torch || $pip torch==2.13.0 || true; } 2>/dev/null
  fi
  $pip -e ".${extras:+[$extras]}"
  touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
