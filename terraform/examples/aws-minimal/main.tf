# The smallest cluster that shows everything: a coordinator, two nodes that stay, and two that are cheaper and may be stopped.
# Set `region` of the provider by AWS_REGION or here.

terraform {
  required_version = ">= 1.9"
  required_providers {
    aws = { source = "hashicorp/aws", version = ">= 3.39, < 6.0" }
  }
}

provider "aws" {
  region = "eu-central-1"
}

variable "stoke" {
  type = object({ url = string, sha256 = string })
}

variable "operator_cidrs" {
  type = list(string)
}

# Ubuntu 24.04 of Canonical, for the region.
variable "image" {
  type = string
}

module "stoke" {
  source         = "../../modules/aws"
  name           = "stoke-minimal"
  location       = "eu-central-1a"
  operator_cidrs = var.operator_cidrs
  stoke          = var.stoke
  image          = var.image
  coordinator    = { instance_type = "m7i-flex.large" }
  node_groups = {
    steady = { instance_type = "c7i.xlarge", count = 2 }
    spot   = { instance_type = "c7i.xlarge", count = 2, spot = true, labels = { cheap = "yes" } }
  }
}

output "coordinator_address" {
  value = module.stoke.coordinator_address
}

output "checkpoints" {
  value = module.stoke.checkpoints
}

output "ansible_inventory" {
  value = module.stoke.ansible_inventory
}
