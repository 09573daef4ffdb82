# Sourced by the scripts beside it: makes .venv at first use and installs the project into it, again whenever what it
# needs changes. $extras: the extras to install, such as "[test]".
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
stamp="$venv/.installed${extras//[^a-z]/-}"
# The folder too: a virtual environment that was copied or moved still runs the code of the old place.
wanted=$(printf '%s' "$root" | cat - "$root/setup.cfg" "$root/pyproject.toml" "$root/scripts/install_learn2learn" | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 || [ "$(cat "$venv/.root" 2>/dev/null)" != "$root" ]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
      echo "metahpo needs Python 3.10 or newer; $python is $("$python" --version 2>&1). Set PYTHON to another one." >&2
      exit 2
    }
    "$python" -m venv --clear "$venv"
    echo "$root" >"$venv/.root"
  fi
  echo "Installing metahpo$extras into .venv (the first time this takes some minutes: PyTorch is large)" >&2
  quiet=; [ -t 2 ] || quiet=--quiet
  "$venv/bin/python" -m pip install $quiet --disable-pip-version-check --editable "$root$extras"
  if [[ $extras == *interop* ]]; then
    # It takes a C compiler, which not everyone has.
    if ! "$root/scripts/install_learn2learn" "$venv/bin/python" >&2; then
      [ -z "${CI:-}" ] || exit 1
      echo "learn2learn could not be installed; the tests that need it are skipped" >&2
    fi
  fi
  echo "$wanted" >"$stamp"
fi
