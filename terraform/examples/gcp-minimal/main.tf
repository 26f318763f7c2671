# The smallest cluster that shows everything: a coordinator, two nodes that stay, and two that are cheaper and may be stopped.

terraform {
  required_version = ">= 1.9"
  required_providers {
    google = { source = "hashicorp/google", version = ">= 6.0, < 8.0" }
  }
}

provider "google" {
  project = var.project
}

variable "project" {
  type = string
}

variable "stoke" {
  type = object({ url = string, sha256 = string })
}

variable "operator_cidrs" {
  type = list(string)
}

module "stoke" {
  source         = "../../modules/gcp"
  name           = "stoke-minimal"
  location       = "europe-west4-a"
  operator_cidrs = var.operator_cidrs
  stoke          = var.stoke
  image          = "ubuntu-os-cloud/ubuntu-2404-lts-amd64"
  coordinator    = { instance_type = "e2-standard-2" }
  node_groups = {
    steady = { instance_type = "n2-standard-4", count = 2 }
    spot   = { instance_type = "n2-standard-4", count = 2, spot = true, labels = { cheap = "yes" } }
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
