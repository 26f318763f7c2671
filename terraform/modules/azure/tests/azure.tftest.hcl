# What the module asks Azure for, with a provider that answers with made-up values.

mock_provider "azurerm" {
  mock_resource "azurerm_public_ip" {
    defaults = { ip_address = "198.51.100.7" }
  }
  mock_data "azurerm_client_config" {
    defaults = { subscription_id = "00000000-0000-0000-0000-000000000000" }
  }
}

variables {
  name           = "lab"
  location       = "westeurope"
  operator_cidrs = ["203.0.113.0/24"]
  ssh_public_key = "ssh-ed25519 AAAA ada"
  image          = "Canonical:ubuntu-24_04-lts:server:latest"
  image_gpu      = "example:nvidia:ubuntu:latest"
  stoke          = { url = "https://example.org/stoke", sha256 = "0000000000000000000000000000000000000000000000000000000000000000" }
  stoke_cuda     = { url = "https://example.org/stoke-cuda", sha256 = "1111111111111111111111111111111111111111111111111111111111111111" }
  coordinator    = { instance_type = "small" }
  node_groups = {
    steady = { instance_type = "large", count = 2, labels = { rack = "a" } }
    spot   = { instance_type = "large", count = 1, spot = true, disk_gib = 80 }
    gpu    = { instance_type = "gpu", count = 1, gpu = true }
  }
}

run "only_the_needed_ports_are_open" {
  assert {
    condition = join(" ", keys(azurerm_network_security_rule.coordinator)) == "nodes operators" && alltrue([for rule in values(azurerm_network_security_rule.coordinator) :
      rule.access == "Allow" && rule.direction == "Inbound" && rule.protocol == "Udp" && rule.destination_port_range == "7878"
    ])
    error_message = "the coordinator takes UDP 7878 and nothing else"
  }
  assert {
    condition     = join(" ", azurerm_network_security_rule.coordinator["nodes"].source_address_prefixes) == "10.78.8.0/21" && join(" ", azurerm_network_security_rule.coordinator["operators"].source_address_prefixes) == "203.0.113.0/24"
    error_message = "from nodes and operators"
  }
  assert {
    condition     = { for name, rule in azurerm_network_security_rule.nodes : name => rule.protocol } == { commands = "Tcp", ranks = "Udp" }
    error_message = "ranks reach each other by UDP, and their commands by TCP, and nothing else is open"
  }
  assert {
    condition = alltrue([for rule in values(azurerm_network_security_rule.nodes) :
      rule.access == "Allow" && rule.direction == "Inbound" && rule.destination_port_range == "40000-40999" && join(" ", rule.source_address_prefixes) == "10.78.8.0/21" && rule.destination_address_prefix == "10.78.8.0/21"
    ])
    error_message = "from nodes only, at the ports that the sysctl gives them"
  }
  assert {
    condition     = length(azurerm_network_security_rule.rest) == 2 && alltrue([for rule in values(azurerm_network_security_rule.rest) : rule.access == "Deny" && rule.source_address_prefix == "*" && rule.protocol == "*" && rule.priority == 4096])
    error_message = "the rest is shut out, also from within the network"
  }
}

run "gateways_and_ssh_are_opened_when_they_are_asked_for" {
  variables {
    gateway_cidrs  = ["198.51.100.0/24"]
    ssh_cidrs      = ["203.0.113.7/32"]
    operator_cidrs = []
  }
  assert {
    condition     = azurerm_network_security_rule.nodes["gateway"].destination_port_range == "8400" && azurerm_network_security_rule.nodes["gateway"].protocol == "Tcp" && join(" ", azurerm_network_security_rule.nodes["gateway"].source_address_prefixes) == "198.51.100.0/24"
    error_message = "TCP 8400 from the clients"
  }
  assert {
    condition     = azurerm_network_security_rule.coordinator["ssh"].destination_port_range == "22" && join(" ", azurerm_network_security_rule.coordinator["ssh"].source_address_prefixes) == "203.0.113.7/32" && join(" ", keys(azurerm_network_security_rule.coordinator)) == "nodes ssh"
    error_message = "SSH from where it is said; no operators, no rule"
  }
}

run "disks_and_stores_are_closed" {
  assert {
    condition     = azurerm_managed_disk.data.disk_size_gb == 20 && azurerm_managed_disk.data.network_access_policy == "DenyAll" && azurerm_virtual_machine_data_disk_attachment.data.caching == "None"
    error_message = "the coordinator's data is on a disk of its own, without a cache (Azure encrypts every disk)"
  }
  assert {
    condition     = !azurerm_storage_account.this.shared_access_key_enabled && azurerm_storage_account.this.https_traffic_only_enabled && !azurerm_storage_account.this.allow_nested_items_to_be_public && azurerm_storage_account.this.min_tls_version == "TLS1_2"
    error_message = "the account has no keys, no plain HTTP and nothing public"
  }
  assert {
    condition     = azurerm_storage_account_network_rules.this.default_action == "Deny" && can(regex("^[a-z0-9]{24}$", azurerm_storage_account.this.name))
    error_message = "reached from the two subnets only"
  }
  assert {
    condition = { for name, right in azurerm_role_assignment.this : name => right.role_definition_name } == {
      coordinator_answers = "Storage Blob Data Contributor"
      coordinator_gives   = "Storage Blob Data Contributor"
      node_asks           = "Storage Blob Data Contributor"
      node_checkpoints    = "Storage Blob Data Contributor"
      node_reads_tokens   = "Storage Blob Data Reader"
    }
    error_message = "nodes write requests and checkpoints, and read tokens"
  }
  assert {
    condition     = alltrue([for machine in concat(values(azurerm_linux_virtual_machine.node), [azurerm_linux_virtual_machine.coordinator]) : machine.disable_password_authentication && !machine.allow_extension_operations && one(machine.identity).type == "UserAssigned"])
    error_message = "machines have no passwords and no extensions"
  }
}

run "groups_are_what_they_were_asked_to_be" {
  assert {
    condition     = join(" ", keys(azurerm_linux_virtual_machine.node)) == "gpu-0 spot-0 steady-0 steady-1"
    error_message = "a machine for each of a group"
  }
  assert {
    condition     = azurerm_linux_virtual_machine.node["spot-0"].priority == "Spot" && azurerm_linux_virtual_machine.node["spot-0"].eviction_policy == "Deallocate" && one(azurerm_linux_virtual_machine.node["spot-0"].os_disk).disk_size_gb == 80
    error_message = "a spot machine is stopped, and stays"
  }
  assert {
    condition     = azurerm_linux_virtual_machine.node["steady-0"].priority == "Regular" && azurerm_linux_virtual_machine.node["steady-0"].eviction_policy == null
    error_message = "others are not"
  }
  assert {
    condition     = one(azurerm_linux_virtual_machine.node["gpu-0"].source_image_reference).offer == "nvidia" && one(azurerm_linux_virtual_machine.node["steady-0"].source_image_reference).offer == "ubuntu-24_04-lts"
    error_message = "machines with GPU have the image with the driver"
  }
  assert {
    condition     = azurerm_linux_virtual_machine.node["spot-0"].tags["stoke-group"] == "spot" && strcontains(module.bootstrap.nodes["steady-1"], "rack") && strcontains(module.bootstrap.nodes["gpu-0"], "stoke-cuda")
    error_message = "labels, tags and binaries by group"
  }
  assert {
    condition     = one(azurerm_network_interface.coordinator.ip_configuration).private_ip_address == "10.78.0.10" && azurerm_public_ip.coordinator.allocation_method == "Static"
    error_message = "addresses are static"
  }
}

run "a_machine_without_a_key_is_refused" {
  command = plan
  variables {
    ssh_public_key = null
  }
  expect_failures = [azurerm_linux_virtual_machine.coordinator]
}

run "inventory_names_every_machine" {
  assert {
    condition     = join(" ", keys(yamldecode(output.ansible_inventory).all.children.nodes.children.steady.hosts)) == "steady-0 steady-1"
    error_message = "nodes by group"
  }
  assert {
    condition     = yamldecode(output.ansible_inventory).all.children.coordinator.hosts["lab-coordinator"].ansible_host == "198.51.100.7"
    error_message = "the coordinator by its public address"
  }
}

run "a_gpu_group_without_its_binary_is_refused" {
  command = plan
  variables {
    stoke_cuda = null
  }
  expect_failures = [var.node_groups]
}

run "the_whole_internet_is_no_operator" {
  command = plan
  variables {
    operator_cidrs = ["0.0.0.0/0"]
  }
  expect_failures = [var.operator_cidrs]
}

run "wrong_names_and_sums_are_refused" {
  command = plan
  variables {
    name        = "Lab"
    stoke       = { url = "http://example.org/stoke", sha256 = "00" }
    node_groups = { "a-b" = { instance_type = "c7i.xlarge", count = 1 } }
  }
  expect_failures = [var.name, var.stoke, var.node_groups]
}
