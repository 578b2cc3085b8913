#!/bin/sh
# Breaks the engine on purpose, one patch of this folder at a time, and asks whether the model test notices: each must make
# it fail. Prints a table of the patches with the seed that found each. Works on a copy of the committed tree.
#
#   tests/mutants/run.sh [CASES] [PATCH…]
#
# CASES: seeds to try before a mutant counts as not found, default 1000. MUTANTS_TARGET_DIR keeps what was built.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
repository=$(git -C "$here" rev-parse --show-toplevel)
cases=${1:-1000}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- "$here"/*.patch

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git -C "$repository" archive HEAD | tar -x -C "$copy"
git -C "$copy" init -q
export CARGO_TARGET_DIR="${MUTANTS_TARGET_DIR:-$copy/target}"

missed=0
echo '| Mutant | Found by |'
echo '|---|---|'
for patch in "$@"; do
    patch=$(realpath "$patch")
    name=$(basename "$patch" .patch)
    git -C "$copy" apply "$patch" || { echo "| \`$name\` | the patch does not fit any more |"; missed=1; continue; }
    log="$copy/$name.log"
    if ! (cd "$copy" && cargo test -q -p felucca-tests --test engine_model --no-run) > "$log" 2>&1; then
        echo "| \`$name\` | does not compile |"; missed=1
    elif (cd "$copy" && FELUCCA_MODEL_CASES=$cases cargo test -q -p felucca-tests --test engine_model) > "$log" 2>&1
    then
        echo "| \`$name\` | NOT FOUND in $cases seeds |"; missed=1
    else
        found=$(sed -n 's/^seed \([0-9]*\): \(.\{0,100\}\).*/seed \1: \2/p' "$log" | head -n 1)
        echo "| \`$name\` | ${found:-the run, without a seed} |"
    fi
    git -C "$copy" apply --reverse "$patch"
done
exit $missed
