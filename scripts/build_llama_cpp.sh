#!/usr/bin/env bash
# Build the real llama.cpp, the judge of qjax's GGUF files, from the source that llama-cpp-python carries.
#
#   source <(scripts/build_llama_cpp.sh [PYTHON])     # PYTHON: the interpreter to install for, default .venv/bin/python
#
# Builds only the `llama` target, once, into ${XDG_CACHE_HOME:-~/.cache}/qjax/llama.cpp-VERSION (about 4 minutes of CPU time),
# installs the Python bindings without a library, and prints the line that exports LLAMA_CPP_LIB_PATH.
# Needs a C++ compiler; cmake and ninja come from the package index. Everything but that line goes to standard error.
set -euo pipefail

version=0.3.36
cache=${XDG_CACHE_HOME:-$HOME/.cache}/qjax/llama.cpp-$version
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${1:-$here/.venv/bin/python}
[[ -x $python ]] || python=$(command -v "$python") || { echo "no Python at ${1:-$here/.venv}; run make test-env first" >&2; exit 2; }
PATH=$(cd "$(dirname "$python")" && pwd):$PATH

{
  built=$([[ -f $cache/libllama.so ]] && echo yes || echo no)
  bound=$("$python" -c 'import importlib.metadata as m; print(m.version("llama-cpp-python"))' 2>/dev/null || true)
  if [[ $built = no || $bound != "$version" ]]; then
    "$python" -m pip install -q cmake ninja scikit-build-core
  fi

  if [[ $built = no ]]; then
    command -v c++ || command -v g++ || command -v clang++ || { echo "llama.cpp needs a C++ compiler: install g++ or clang"; exit 2; }
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    "$python" -m pip download -q --no-deps --no-binary=:all: --no-build-isolation -d "$work" "llama-cpp-python==$version"
    mkdir "$work/src"
    tar -xzf "$work"/*.tar.gz -C "$work/src" --strip-components=1
    cmake -S "$work/src/vendor/llama.cpp" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
      -DCMAKE_BUILD_RPATH_USE_ORIGIN=ON -DGGML_NATIVE=OFF -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TOOLS=OFF \
      -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
    cmake --build "$work/build" --target llama
    mkdir -p "$(dirname "$cache")"
    cp -a "$work/build/bin" "$cache.$$" # the rename makes a killed build leave nothing behind
    rm -rf "$cache"
    mv "$cache.$$" "$cache"
  fi

  if [[ $bound != "$version" ]]; then
    CMAKE_ARGS="-DLLAMA_BUILD=OFF" "$python" -m pip install -q --no-build-isolation "llama-cpp-python==$version"
  fi
} >&2

printf 'export LLAMA_CPP_LIB_PATH=%q\n' "$cache"
