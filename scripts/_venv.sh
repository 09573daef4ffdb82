# Sourced by the scripts beside it: makes .venv at first use and installs the project into it, again whenever what it needs changes.
# $extras: the extras to install, such as "[test]".
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "metahpo needs Python 3.10 or newer; $python is $("$python" --version 2>&1). Set PYTHON to another one." >&2
  exit 2
}
stamp="$venv/.installed${extras//[^a-z]/-}"
wanted=$(cat "$root/setup.cfg" "$root/pyproject.toml" | cksum)
if [ ! -x "$venv/bin/python" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "Installing metahpo$extras into .venv (the first time this takes some minutes: PyTorch is large)" >&2
  [ -x "$venv/bin/pip" ] || "$python" -m venv --clear "$venv"
  quiet=; [ -t 2 ] || quiet=--quiet
  "$venv/bin/pip" install $quiet --disable-pip-version-check --editable "$root$extras"
  echo "$wanted" >"$stamp"
fi
