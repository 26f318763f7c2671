# The same in the modules of all clouds (a test compares the names).

output "coordinator_address" {
  description = "HOST:PORT for `stoke login --coordinator`, from outside."
  value       = "${aws_eip.coordinator.public_ip}:7878"
}

output "checkpoints" {
  description = "URI below which jobs keep their checkpoints."
  value       = "s3://${aws_s3_bucket.this["checkpoints"].bucket}/checkpoints"
}

output "node_identity" {
  description = "Identity of the nodes, for more rights: a role's ARN, a service account's address, a principal's id."
  value       = aws_iam_role.node.arn
}

output "nodes" {
  description = "Nodes by name: group and private address."
  value = { for name, address in local.addresses : name => {
    group   = module.bootstrap.node_groups_by_node[name]
    address = address
  } }
}

output "ansible_inventory" {
  description = "Inventory for Ansible, YAML: `terraform output -raw ansible_inventory > inventory.yml`."
  value = yamlencode({
    all = {
      children = {
        coordinator = { hosts = { "${var.name}-coordinator" = { ansible_host = aws_eip.coordinator.public_ip, stoke_address = local.coordinator_ip } } }
        nodes = {
          children = { for group in keys(var.node_groups) : group => {
            hosts = { for name, address in local.addresses : name => {
              ansible_host            = address
              ansible_ssh_common_args = "-o ProxyJump=ubuntu@${aws_eip.coordinator.public_ip}"
            } if module.bootstrap.node_groups_by_node[name] == group }
          } }
        }
      }
      vars = { ansible_user = "ubuntu" }
    }
  })
}
