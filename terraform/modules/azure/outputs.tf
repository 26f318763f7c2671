# The same in the modules of all clouds (a test compares the names).

output "coordinator_address" {
  description = "HOST:PORT for `stoke login --coordinator`, from outside."
  value       = "${azurerm_public_ip.coordinator.ip_address}:7878"
}

output "checkpoints" {
  description = "URI below which jobs keep their checkpoints."
  value       = "az://${azurerm_storage_container.this["checkpoints"].name}/checkpoints"
}

output "node_identity" {
  description = "Identity of the nodes, for more rights: a role's ARN, a service account's address, a principal's id."
  value       = azurerm_user_assigned_identity.this["node"].principal_id
}

output "nodes" {
  description = "Nodes by name: group and private address."
  value = { for name, node in azurerm_network_interface.node : name => {
    group   = module.bootstrap.node_groups_by_node[name]
    address = node.private_ip_address
  } }
}

output "ansible_inventory" {
  description = "Inventory for Ansible, YAML: `terraform output -raw ansible_inventory > inventory.yml`."
  value = yamlencode({
    all = {
      children = {
        coordinator = { hosts = { "${var.name}-coordinator" = { ansible_host = azurerm_public_ip.coordinator.ip_address, stoke_address = local.coordinator_ip } } }
        nodes = {
          children = { for group in keys(var.node_groups) : group => {
            hosts = { for name, node in azurerm_network_interface.node : name => {
              ansible_host            = node.private_ip_address
              ansible_ssh_common_args = "-o ProxyJump=ubuntu@${azurerm_public_ip.coordinator.ip_address}"
            } if module.bootstrap.node_groups_by_node[name] == group }
          } }
        }
      }
      vars = { ansible_user = "ubuntu" }
    }
  })
}
