#!/usr/bin/env bash
# Run all tests with the Python given. Those in Triton's interpreter need a process of their own:
# it runs beside the others, which mostly use one core, and what it says comes after them.
set -uo pipefail
python=$1
said=$(mktemp)
TRITON_INTERPRET=1 "$python" -m pytest -p no:cacheprovider -m interpreter > "$said" 2>&1 &
beside=$!
trap 'kill "$beside" 2> /dev/null; rm -f "$said"' EXIT
"$python" -m pytest -m "not interpreter"
plain=$?
wait "$beside"
interpreted=$?
cat "$said"
exit $((plain || interpreted))
