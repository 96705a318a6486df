#!/bin/bash
# Builds the peers that the tests talk to, from the Go module proxy, once for each version.
#
#   peers.sh BIN-DIRECTORY PEER...
#
# PEER: crictl. Leaves BIN-DIRECTORY/PEER, a link to PEER-VERSION.
set -euo pipefail

cri_tools=v1.36.0
bin=$1
shift
mkdir -p "$bin"

for peer in "$@"; do
    case $peer in
    crictl) version=$cri_tools package=sigs.k8s.io/cri-tools/cmd/crictl module=sigs.k8s.io/cri-tools ;;
    *) echo "peers: no recipe for $peer" >&2; exit 1 ;;
    esac
    if [ ! -x "$bin/$peer-$version" ]; then
        command -v go >/dev/null || { echo "peers: go is missing: install Go 1.26" >&2; exit 1; }
        echo "building $peer $version (about 2 minutes)"
        # A module of our own that requires theirs: `go install pkg@version` asks for a list of versions that a proxy need not have.
        work=$(mktemp -d)
        trap 'rm -rf "$work"' EXIT
        (
            cd "$work"
            go mod init caisson.test/peers 2>/dev/null
            go mod edit -require="$module@$version"
            go build -mod=mod -trimpath -ldflags "-s -w -X $module/pkg/version.Version=$version" -o "$work/$peer" "$package" 2>"$work/log" || {
                cat "$work/log" >&2
                exit 1
            }
        )
        mv "$work/$peer" "$bin/$peer-$version"
    fi
    ln -sfn "$peer-$version" "$bin/$peer"
done
