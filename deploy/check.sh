#!/usr/bin/env bash
# Checks what lies in this folder as far as a machine without a cluster can: every manifest against
# Kubernetes' own schemas, strictly; kustomizations by kubectl and units by systemd where those are
# installed. Wrong copies of all of them must be refused: a check that cannot fail is none.
#
# Needs python3 with venv and pip for the schemas; they are installed below target/ once.
set -euo pipefail
cd "$(dirname "$0")/.."

version=1.37.0
venv="$PWD/target/tools/kubernetes-validate-$version"
if [ ! -e "$venv/installed" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
        "kubernetes-validate==$version"
    touch "$venv/installed"
fi
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

rendered=()
if command -v kubectl > "$scratch/where"; then
    for folder in base example; do
        kubectl kustomize "deploy/kubernetes/$folder" > "$scratch/$folder.yaml"
        rendered+=("$scratch/$folder.yaml")
    done
fi
"$venv/bin/python" deploy/check_manifests.py "${rendered[@]}"

# Without the binary, which is not where the units expect it, and without a complaint about keys
# that are newer than the systemd that verifies: 254 brought the growing pause between restarts.
units() {
    mkdir -p "$scratch/units"
    for unit in deploy/systemd/*.service; do
        sed -e 's#^ExecStart=[^ ]*#ExecStart=/bin/true#' -e "$1" "$unit" \
            > "$scratch/units/${unit##*/}"
    done
    systemd-analyze verify "$scratch"/units/*.service > "$scratch/said" 2>&1 || return 1
    ! grep -v "Unknown key .*'Restart\(Steps\|MaxDelaySec\)'" "$scratch/said"
}
if command -v systemd-analyze > "$scratch/where"; then
    units ''
    for wrong in 's/^LimitNOFILE/LimitNFILE/' 's/^KillMode=.*/KillMode=gently/'; do
        if units "$wrong" > "$scratch/refusal"; then
            echo "systemd takes units that are wrong: $wrong"
            exit 1
        fi
    done
    echo "valid: deploy/systemd"
fi

sh -n deploy/kubernetes/make-secrets.sh
