#!/usr/bin/env bash
# Run all tests with the Python given, in two processes beside each other, which take about as long on two cores.
# One runs the tests in Triton's interpreter, which need a process of their own, and then the slow ones; the other
# runs the rest. What the first says comes after the second.
set -uo pipefail
python=$1
# Threads of two processes on the same cores wait for each other at the end of every small sum: the work of a
# training is then many times what it is with one thread, which the tests' tiny networks do not miss.
export OMP_NUM_THREADS=1

interpreted_and_slow() {
  trap 'kill $(jobs -p) 2> /dev/null; exit 1' TERM
  TRITON_INTERPRET=1 "$python" -m pytest -p no:cacheprovider -m interpreter &
  wait $!
  local interpreted=$?
  "$python" -m pytest -p no:cacheprovider -m "slow and not interpreter" &
  wait $!
  local slow=$?
  return $((interpreted || slow))
}

said=$(mktemp)
interpreted_and_slow > "$said" 2>&1 &
beside=$!
trap 'kill "$beside" 2> /dev/null; rm -f "$said"' EXIT
"$python" -m pytest -m "not slow and not interpreter"
rest=$?
wait "$beside"
first=$?
cat "$said"
exit $((rest || first))
