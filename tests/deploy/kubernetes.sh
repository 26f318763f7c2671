#!/usr/bin/env bash
# Checks the Helm chart, the Kustomize overlays and the Argo template, and runs the scripts of their pods against a real coordinator.
# Needs the binary (STOKE_BIN, default target/release/stoke), kubectl (for kustomize; no cluster), curl, jq and openssl.
# --write: writes the files of kubernetes/kustomize that come from the chart.
set -euo pipefail
# shellcheck source=tests/deploy/common.sh
. "$(dirname "$0")/common.sh"

needs_stoke
apt_install jq jq
apt_install curl curl
for command in kubectl openssl; do
    command -v $command >/dev/null || die "$command is not installed"
done
venv=$(python_env deploy-kubernetes "${PYTHON:-python3}" helm-python-sdk==0.2.2 kubernetes-validate==1.37.0 PyYAML==6.0.3)
export STOKE_BIN
exec "$venv/bin/python" "$ROOT/tests/deploy/kubernetes.py" "$@"
