# The same in the modules of all clouds (a test compares the names).

output "coordinator_address" {
  description = "HOST:PORT for `stoke login --coordinator`, from outside."
  value       = "${google_compute_address.coordinator.address}:7878"
}

output "checkpoints" {
  description = "URI below which jobs keep their checkpoints."
  value       = "gs://${google_storage_bucket.this["checkpoints"].name}/checkpoints"
}

output "node_identity" {
  description = "Identity of the nodes, for more rights: a role's ARN, a service account's address, a principal's id."
  value       = google_service_account.this["node"].email
}

output "nodes" {
  description = "Nodes by name: group and private address."
  value = { for name, node in google_compute_instance.node : name => {
    group   = module.bootstrap.node_groups_by_node[name]
    address = node.network_interface[0].network_ip
  } }
}

output "ansible_inventory" {
  description = "Inventory for Ansible, YAML: `terraform output -raw ansible_inventory > inventory.yml`."
  value = yamlencode({
    all = {
      children = {
        coordinator = { hosts = { "${var.name}-coordinator" = { ansible_host = google_compute_address.coordinator.address, stoke_address = local.coordinator_ip } } }
        nodes = {
          children = { for group in keys(var.node_groups) : group => {
            hosts = { for name, node in google_compute_instance.node : name => {
              ansible_host            = node.network_interface[0].network_ip
              ansible_ssh_common_args = "-o ProxyJump=ubuntu@${google_compute_address.coordinator.address}"
            } if module.bootstrap.node_groups_by_node[name] == group }
          } }
        }
      }
      vars = { ansible_user = "ubuntu" }
    }
  })
}
