# The smallest cluster that shows everything: a coordinator, two nodes that stay, and two that are cheaper and may be stopped.

terraform {
  required_version = ">= 1.9"
  required_providers {
    azurerm = { source = "hashicorp/azurerm", version = ">= 4.9, < 5.0" }
  }
}

provider "azurerm" {
  features {}
  # The account has no shared keys.
  storage_use_azuread = true
}

variable "stoke" {
  type = object({ url = string, sha256 = string })
}

variable "operator_cidrs" {
  type = list(string)
}

variable "ssh_public_key" {
  type = string
}

module "stoke" {
  source         = "../../modules/azure"
  name           = "stoke-minimal"
  location       = "westeurope"
  operator_cidrs = var.operator_cidrs
  ssh_public_key = var.ssh_public_key
  stoke          = var.stoke
  image          = "Canonical:ubuntu-24_04-lts:server:latest"
  coordinator    = { instance_type = "Standard_D2s_v5" }
  node_groups = {
    steady = { instance_type = "Standard_F4s_v2", count = 2 }
    spot   = { instance_type = "Standard_F4s_v2", count = 2, spot = true, labels = { cheap = "yes" } }
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
