#!/bin/sh
# Builds the compiled core with AddressSanitizer in a folder of its own and runs its unit tests
# there. PYTHON: the interpreter of an environment with the test dependencies (default: .venv's).
# Arguments: the tests to run, as paths from the root (default: those of the compiled core).
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
case $python in */*) python=$(CDPATH='' cd -- "$(dirname -- "$python")" && pwd)/${python##*/} ;; esac
[ $# -gt 0 ] || set -- tests/unit/load tests/unit/ring tests/unit/test_prefix.py \
    tests/unit/test_pick.py tests/unit/openai/prompt_scan \
    tests/unit/test_core_hammer.py tests/unit/test_journal.py tests/unit/openai/test_usage.py \
    tests/unit/gateway/test_journal.py \
    tests/unit/gateway/test_prefix_cache.py tests/unit/openai/test_body_scan.py tests/unit/gateway/relay \
    tests/unit/gateway/test_hold_comments.py tests/unit/gateway/test_hold_errors.py \
    tests/unit/gateway/test_cors.py \
    tests/unit/gateway/test_proxy.py tests/unit/gateway/test_large_bodies.py \
    tests/unit/gateway/test_attempts.py tests/unit/gateway/test_ejection.py \
    tests/unit/gateway/test_moves.py tests/unit/gateway/test_draining.py \
    tests/unit/gateway/test_chaos.py tests/unit/gateway/test_model_names.py \
    tests/unit/gateway/test_metering.py tests/unit/gateway/test_credentials.py \
    tests/unit/test_key_table.py tests/unit/openai/test_usage_option.py \
    tests/unit/gateway/realtime \
    tests/unit/gateway/test_compressed_bodies.py tests/unit/gateway/uploads tests/unit/loadtest/test_sse.py \
    tests/unit/loadtest/test_streams.py tests/fuzz

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
mkdir "$work/kubeai"
cp "$root/setup.py" "$root/pyproject.toml" "$work/"
cp -r "$root/tests" "$work/tests"
(cd "$root" && find kubeai -name '*.py' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.pyi' |
    tar -cf - -T -) | tar -xf - -C "$work"
cd "$work"
KUBEAI_SANITIZE=address "$python" setup.py -q build_ext --inplace

# Without the preload the sanitizer refuses to start inside a plain interpreter. Leaks are not
# looked for: the interpreter itself ends with plenty. pymalloc would hide what it hands out, and
# pytest must not capture the descriptor that the sanitizer reports on.
LD_PRELOAD=$(gcc -print-file-name=libasan.so) \
ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:strict_init_order=1 \
PYTHONMALLOC=malloc PYTHONPATH="$work" KUBEAI_ASAN=1 \
    "$python" -m pytest -q -n 2 --dist loadfile --timeout 300 --capture=sys "$@"
