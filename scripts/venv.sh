#!/usr/bin/env bash
# Makes .venv and installs the package into it; `scripts/venv.sh dev` adds what the tests need.
#
# Needs Python 3.10 or newer (PYTHON=... names another than python3) and runs again safely wherever it was interrupted:
# what is there is kept, and the stamps that make looks at are written last.
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:-}
system_python=${PYTHON:-python3}
venv=.venv
python=$venv/bin/python
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf '%s\n' "$*"; }
stop() {
  say "scripts/venv.sh: $*" >&2
  exit 1
}

main() {
  check_python
  "$python" -m pip --version >/dev/null 2>&1 || make_venv
  if on_linux && ! has_nvidia_gpu; then install_cpu_torch; fi
  say "Installing reat-fast${extra:+ and what its tests need}"
  pip_install --editable ".${extra:+[$extra]}"
  if [ "$extra" = dev ]; then
    install_triton
    install_compared
    install_loaders
    install_browser
  fi
  touch "$venv/installed" ${extra:+"$venv/installed-$extra"}
}

check_python() {
  command -v "$system_python" >/dev/null ||
    stop "no $system_python: install Python 3.10 or newer (Debian, Ubuntu: apt-get install python3)"
  "$system_python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    stop "$("$system_python" --version) is too old: name a Python 3.10 or newer, as in: make train PYTHON=python3.12"
}

# --clear, because half an environment cannot be told from a whole one whose Python is gone.
make_venv() {
  say "Making $venv with $("$system_python" --version)"
  if has_ensurepip || install_ensurepip; then
    "$system_python" -m venv --clear "$venv"
  elif ! { "$system_python" -m venv --clear --without-pip "$venv" && borrow_pip; }; then
    stop "this Python cannot make environments: apt-get install $(venv_package) (as root), then run make again"
  fi
}

# Debian and Ubuntu keep this part of Python in a package of its own.
has_ensurepip() { "$system_python" -c 'import ensurepip, venv' 2>/dev/null; }

venv_package() { "$system_python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'; }

install_ensurepip() {
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
  say "Installing $(venv_package) with apt-get"
  apt_install "$(venv_package)" || { apt-get update -qq && apt_install "$(venv_package)"; } || return 1
  has_ensurepip
}

apt_install() { DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$1" >/dev/null; }

# Without root, Debian's own pip wheel can still be unpacked, and it installs itself.
borrow_pip() {
  local folder=$PWD/$venv/pip wheel
  mkdir "$folder"
  (cd "$folder" && apt-get download -qq python3-pip-whl && dpkg -x python3-pip-whl_*.deb .) || return 1
  wheel=$(echo "$folder"/usr/share/python-wheels/pip-*.whl)
  "$python" "$wheel/pip" install --quiet --no-index --no-deps "$wheel"
  rm -rf "$folder"
}

on_linux() { [ "$(uname -s)" = Linux ]; }

has_nvidia_gpu() { nvidia-smi -L >/dev/null 2>&1 || [ -n "$(ls /proc/driver/nvidia/gpus 2>/dev/null)" ]; }

# PIP_USER=0: `user = true` in someone's pip.conf is an error inside an environment. All other settings of pip hold.
pip_install() { PIP_USER=0 "$python" -m pip install -qq --disable-pip-version-check "$@"; }

# --no-deps: only torch is looked up in the second index; an unreachable one is left after some seconds, once.
install_cpu_torch() {
  "$python" -m pip show --quiet torch 2>/dev/null && return
  say "No NVIDIA GPU found: installing the CPU build of PyTorch (about 200 MB)"
  local quick=(--no-deps --retries 1 --timeout 10) log
  log=$(pip_install "${quick[@]}" --constraint constraints-cpu.txt --extra-index-url "$cpu_index" torch 2>&1) ||
    log+=$'\n'$(pip_install "${quick[@]}" --index-url "$cpu_index" torch 2>&1) ||
    say "$log" "No CPU build found: the default index decides, and may send gigabytes of CUDA libraries"
}

# Without Triton the interpreter tests are skipped, which is honest only where there is no Triton.
install_triton() {
  "$python" -c 'import triton' 2>/dev/null && return
  pip_install --no-deps --constraint constraints-cpu.txt triton && return
  [ "$(uname -sm)" != "Linux x86_64" ] || stop "Triton is needed for the interpreter tests"
  say "No Triton for this machine: the interpreter tests will be skipped"
}

# What the tests compare with. --no-deps: both would replace this torch by one with CUDA and torchvision.
install_compared() { pip_install scipy requests pyyaml && pip_install --no-deps torchattacks timm; }

# The tests run every loader where it can be: FFCV is compiled here, DALI is 270 MB of wheels for Linux on x86-64.
install_loaders() {
  scripts/ffcv.sh "$python" || say "Without FFCV its tests will be skipped"
  [ "$(uname -sm)" = "Linux x86_64" ] || return 0
  say "Installing NVIDIA DALI (about 270 MB)"
  pip_install --editable ".[dali]" || say "Without DALI its tests will be skipped"
}

# Reports are opened in a real browser; only root can install one.
install_browser() {
  command -v chromium chromium-browser google-chrome >/dev/null && return
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
    { say "No Chromium: the tests that open reports in it will be skipped" && return; }
  say "Installing Chromium with apt-get"
  apt_install chromium || { apt-get update -qq && apt_install chromium; } ||
    say "Without Chromium the tests that open reports in it will be skipped"
}

main
