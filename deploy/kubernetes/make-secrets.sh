#!/bin/sh
# Writes the three Secrets that a cluster needs at its first start:
#
#     make-secrets.sh DATA OUT [WORKERS]
#
# DATA is what `phalanx init --data DATA` made; OUT is a new directory for the manifests; WORKERS is
# how many workers may join (2). The tokens let nodes in for a day. Run it again into another
# directory when more nodes are to come: identities that exist are not touched by it.
#
# PHALANX names the command where it is not called phalanx.
set -eu
umask 077

if [ "$#" -lt 2 ] || [ "$#" -gt 3 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
data=$1
out=$2
workers=${3:-2}
phalanx=${PHALANX:-phalanx}

# Begins a manifest: name of the Secret, component.
secret() {
    cat <<EOF
apiVersion: v1
kind: Secret
metadata:
  name: $1
  labels:
    app.kubernetes.io/name: phalanx
    app.kubernetes.io/component: $2
    app.kubernetes.io/part-of: phalanx
type: Opaque
data:
EOF
}

# One entry: key, content on standard input.
entry() {
    printf '  %s: %s\n' "$1" "$(base64 | tr -d '\n')"
}

# Each step by itself, for a failure within a pipe is not seen.
coordinator=$("$phalanx" token --data "$data" --role coordinator --uses 2)
worker=$("$phalanx" token --data "$data" --role worker --uses "$workers")
for file in ca.pem ca-key.pem node.pem node-key.pem; do
    if [ ! -s "$data/$file" ]; then
        echo "$data/$file is missing: is $data what phalanx init made?" >&2
        exit 1
    fi
done

mkdir "$out"
{
    secret phalanx-founder coordinator
    for file in ca.pem ca-key.pem node.pem node-key.pem; do
        entry "$file" < "$data/$file"
    done
} > "$out/founder.yaml"
{
    secret phalanx-coordinator-token coordinator
    printf '%s\n' "$coordinator" | entry token
} > "$out/coordinator-token.yaml"
{
    secret phalanx-worker-token worker
    printf '%s\n' "$worker" | entry token
} > "$out/worker-token.yaml"
