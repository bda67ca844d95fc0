#!/usr/bin/env bash
# Installs FFCV into the environment of a Python: scripts/ffcv.sh [PYTHON], by default .venv/bin/python.
#
# FFCV is compiled here, against OpenCV and libturbojpeg. As root apt-get installs both; without root the same Debian
# packages are unpacked into the environment and linked by path, so nothing is left to set up when the program runs.
# Runs again safely wherever it was interrupted, and ends at once when FFCV is there.
set -euo pipefail

python=${1:-$(dirname "$0")/../.venv/bin/python}
packages=(libopencv-core-dev libopencv-imgproc-dev libturbojpeg0-dev)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

say() { printf '%s\n' "$*"; }
stop() {
  say "scripts/ffcv.sh: $*" >&2
  exit 1
}

main() {
  if works; then
    say "FFCV is installed"
    return
  fi
  "$python" -c 'import torch' 2>/dev/null ||
    stop "no torch in $python: run scripts/venv.sh first, or name a Python that has it"
  [ "$(uname -s)" = Linux ] || stop "FFCV is for Linux: use --loader resident or --loader workers"
  has_python_headers || packages+=("$("$python" -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])')")
  command -v g++ >/dev/null || packages+=(g++)
  if libraries_are_described && has_python_headers; then
    say "Building FFCV with the OpenCV that pkg-config knows"
  elif ! command -v apt-get >/dev/null; then
    stop "no apt-get here: install OpenCV 4, libturbojpeg, their headers, pkg-config and g++, then run it again"
  elif [ "$(id -u)" = 0 ]; then
    say "Installing ${packages[*]} with apt-get"
    apt_install || { apt-get update -qq && apt_install; } || stop "apt-get could not install ${packages[*]}"
    describe_libraries ""
  else
    command -v g++ >/dev/null || stop "no C++ compiler: ask for g++ (apt-get install g++, as root), then run it again"
    unpack_libraries
  fi
  say "Building FFCV (half a minute)"
  install_ffcv || stop "FFCV could not be built, pip says above why; --loader resident and workers do without it"
  works || stop "FFCV was built but cannot be imported: run $python -c 'import ffcv' to see why"
}

# Without Numba's compiler, which takes seconds to start.
works() { NUMBA_DISABLE_JIT=1 "$python" -c 'import ffcv, PIL' >/dev/null 2>&1; }

has_python_headers() {
  "$python" -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' 2>/dev/null
}

libraries_are_described() { pkg-config --exists opencv4 libturbojpeg 2>/dev/null && command -v g++ >/dev/null; }

apt_install() {
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -qq -y --no-install-recommends \
    "${packages[@]}" >/dev/null
}

# apt-get names what is missing here and may be asked by anyone; only unpacking into the system needs root.
unpack_libraries() {
  local folder missing multiarch=/usr/lib/$(g++ -print-multiarch)
  folder=$("$python" -c 'import sys; print(sys.prefix)')/ffcv-libraries
  say "Unpacking OpenCV and libturbojpeg into $folder (you are not root)"
  missing=$(apt-get install --simulate --no-install-recommends "${packages[@]}" 2>/dev/null | sed -n 's/^Inst \([^ ]*\).*/\1/p') ||
    stop "apt-get does not know ${packages[*]}: run apt-get update as root, or install them"
  mkdir -p "$folder" "$build/packages"
  # shellcheck disable=SC2086  # a list of package names
  (cd "$build/packages" && apt-get download -qq ${missing:-${packages[@]}}) ||
    stop "apt-get could not download the packages: ask for them to be installed: ${packages[*]}"
  for package in "$build"/packages/*.deb; do dpkg -x "$package" "$folder"; done
  # A library that is installed was not downloaded, but the link to build against was.
  find "$folder$multiarch" -maxdepth 1 -xtype l | while read -r link; do
    ln -sf "$multiarch/$(readlink "$link")" "$link"
  done
  describe_libraries "$folder"
  # The older DT_RPATH, because it also holds for the libraries that these libraries need. Debian would link lapack
  # and blas into the folder above theirs after unpacking.
  local paths=$folder$multiarch:$folder$multiarch/lapack:$folder$multiarch/blas:$folder${multiarch#/usr}
  export LDFLAGS="-Wl,--disable-new-dtags,-rpath,$paths -L$folder$multiarch"
  export CFLAGS="-I$folder/usr/include $(printf -- '-I%s ' "$folder"/usr/include/python3*)"
}

# FFCV asks pkg-config for all of OpenCV, 690 MB in Debian, and uses two modules of it: this answers in its place, with
# a header that includes those two. $1: the folder that the packages lie in, empty for the system's.
describe_libraries() {
  mkdir -p "$build/opencv2"
  printf '#include <opencv2/%s.hpp>\n' core imgproc >"$build/opencv2/opencv.hpp"
  cat >"$build/pkg-config" <<END
#!/bin/sh
case "\$*" in
*opencv*) echo "-I$build -I$1/usr/include/opencv4 -lopencv_imgproc -lopencv_core" ;;
*) echo "-I$1/usr/include -lturbojpeg" ;;
esac
END
  chmod +x "$build/pkg-config"
}

# --no-deps: FFCV names opencv-python, which needs a display's libraries, and packages that only its benchmarks use.
# --no-cache-dir: a cached build could be linked to the libraries of another environment.
install_ffcv() {
  pip_install numba opencv-python-headless pillow tqdm &&
    PATH=$build:$PATH pip_install --no-deps --no-cache-dir --no-binary ffcv "ffcv>=1.0.2" || return
  # An import that is not used, of a module that Python 3.12 no longer has.
  sed -i '/^from distutils.log import warn$/d' \
    "$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/ffcv/pipeline/graph.py"
}

# PIP_USER=0: `user = true` in someone's pip.conf is an error inside an environment. All other settings of pip hold.
pip_install() { PIP_USER=0 "$python" -m pip install -qq --disable-pip-version-check "$@"; }

main
