#!/usr/bin/env bash
# Counts the instructions of hot work with callgrind and compares them with benches/instructions.txt: fails when one takes
# over 5 % more. Counts do not depend on how busy the machine is; they do on the compiler, which the baseline names.
#
#   benches/instructions.sh            compare
#   benches/instructions.sh --write    make what is counted now the baseline
set -euo pipefail
cd "$(dirname "$0")/.."

baseline=benches/instructions.txt
limit=5
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

command -v valgrind >/dev/null || {
    printf 'valgrind is missing: apt-get install valgrind\n' >&2
    exit 2
}
# In the profile of releases, whose dependencies are built already where a release was.
cargo build --release --locked -p felucca-bench --bench instructions --message-format=json >"$work/build.json"
program=$(sed -n 's/.*"executable":"\([^"]*\/instructions-[^"]*\)".*/\1/p' "$work/build.json" | tail -n 1)
[ -x "$program" ] || {
    printf 'the benchmark was not built\n' >&2
    exit 2
}
{
    printf '# instructions per record, %s\n' "$(rustc --version)"
    "$program" | while read -r name records; do
        # Always the same processor, as valgrind knows it; addresses and hash seeds do not matter.
        valgrind --tool=callgrind --callgrind-out-file=/dev/null --collect-atstart=no \
            --toggle-collect='*instructions*measured*' "$program" "$name" 2>"$work/log" ||
            { cat "$work/log" >&2 && exit 1; }
        count=$(sed -n 's/.*Collected : \([0-9]*\).*/\1/p' "$work/log")
        [ "${count:-0}" -gt 0 ] || { printf 'nothing was counted for %s\n' "$name" >&2 && exit 1; }
        printf '%s %d\n' "$name" "$((count / records))"
    done
} >"$work/now"

if [ "${1:-}" = --write ]; then
    cp "$work/now" "$baseline"
    cat "$baseline"
    exit
fi
head -n 1 "$baseline" | cmp -s - <(head -n 1 "$work/now") ||
    printf 'another compiler than that of the baseline: differences may not be ours\n' >&2
awk -v limit="$limit" '
    /^#/ { next }
    NR == FNR { base[$1] = $2; next }
    {
        seen[$1] = 1
        if (!($1 in base)) { printf "%-24s %10d  not in the baseline\n", $1, $2; failed = 1; next }
        change = ($2 - base[$1]) * 100 / base[$1]
        worse = change > limit
        printf "%-24s %10d  %+6.1f %%%s\n", $1, $2, change, worse ? "  REGRESSION" : ""
        failed = failed || worse
    }
    END {
        for (name in base) if (!(name in seen)) { printf "%-24s was not counted\n", name; failed = 1 }
        exit failed
    }' "$baseline" "$work/now"
