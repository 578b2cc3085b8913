#!/usr/bin/env bash
# Installs servers that Felucca is compared with: install.sh [redis] [jetstream] [kafka] [rabbitmq], all of them without a name.
# Debian's packages come with apt-get; what Debian does not have goes into the folder that felucca-bench searches.
set -euo pipefail

NATS_VERSION=v2.12.3
here=$(cd "$(dirname "$0")" && pwd)
folder=${XDG_CACHE_HOME:-$HOME/.cache}/felucca-bench

apt_install() {
    local as_root=
    [ "$(id -u)" = 0 ] || as_root=sudo
    $as_root apt-get update -q
    # What is installed is to be started by felucca-bench, not by the system.
    $as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -q -y --no-install-recommends "$@"
}

[ $# -gt 0 ] || set -- redis jetstream kafka rabbitmq
for peer; do
    case $peer in
    redis) command -v redis-server >/dev/null || apt_install redis-server ;;
    rabbitmq) [ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] || apt_install rabbitmq-server ;;
    jetstream)
        mkdir -p "$folder/bin"
        GOBIN=$folder/bin go install "github.com/nats-io/nats-server/v2@$NATS_VERSION"
        ;;
    kafka)
        command -v java >/dev/null && command -v mvn >/dev/null || apt_install default-jdk-headless maven
        work=$(mktemp -d)
        cp "$here/kafka/pom.xml" "$work/"
        rm -rf "$folder/kafka"
        (cd "$work" && mvn -q -B dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$folder/kafka")
        rm -rf "$work"
        mkdir -p "$folder/bin"
        cp "$here/kafka/kafka-server" "$folder/bin/"
        ;;
    *)
        printf 'unknown peer: %s\n' "$peer" >&2
        exit 2
        ;;
    esac
done
