# What the module asks Google for, with a provider that answers with made-up values.

mock_provider "google" {
  mock_resource "google_compute_address" {
    defaults = { address = "198.51.100.7" }
  }
  mock_resource "google_service_account" {
    defaults = { email = "node@example.iam.gserviceaccount.com" }
  }
  mock_data "google_project" {
    defaults = { project_id = "example" }
  }
}

variables {
  name           = "lab"
  location       = "europe-west4-a"
  operator_cidrs = ["203.0.113.0/24"]
  image          = "ubuntu-os-cloud/ubuntu-2404-lts-amd64"
  image_gpu      = "example/ubuntu-2404-nvidia"
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
    condition = alltrue([for rule in [google_compute_firewall.coordinator_from_nodes, google_compute_firewall.coordinator_from_operators[0]] :
      rule.direction == "INGRESS" && length(rule.allow) == 1 && one(rule.allow).protocol == "udp" && join(" ", one(rule.allow).ports) == "7878" && join(" ", rule.target_tags) == "lab-coordinator"
    ])
    error_message = "the coordinator takes UDP 7878 and nothing else"
  }
  assert {
    condition     = join(" ", google_compute_firewall.coordinator_from_nodes.source_tags) == "lab-node" && google_compute_firewall.coordinator_from_nodes.source_ranges == null
    error_message = "nodes reach it by their tag"
  }
  assert {
    condition     = join(" ", google_compute_firewall.coordinator_from_operators[0].source_ranges) == "203.0.113.0/24"
    error_message = "operators reach it from their networks"
  }
  assert {
    condition     = length(google_compute_firewall.nodes_from_nodes.allow) == 2 && { for allow in google_compute_firewall.nodes_from_nodes.allow : allow.protocol => join(" ", allow.ports) } == { tcp = "40000-40999", udp = "40000-40999" }
    error_message = "ranks reach each other by UDP, and their commands by TCP, at the ports that the sysctl gives them"
  }
  assert {
    condition     = join(" ", google_compute_firewall.nodes_from_nodes.source_tags) == "lab-node" && google_compute_firewall.nodes_from_nodes.source_ranges == null && join(" ", google_compute_firewall.nodes_from_nodes.target_tags) == "lab-node"
    error_message = "from nodes only"
  }
  assert {
    condition     = length(google_compute_firewall.gateway) == 0 && length(google_compute_firewall.ssh) == 0 && length(google_compute_firewall.ssh_jump) == 0
    error_message = "nothing else is open unless it is asked for"
  }
  assert {
    condition     = alltrue([for node in values(google_compute_instance.node) : length(one(node.network_interface).access_config) == 0])
    error_message = "nodes have no public address"
  }
}

run "gateways_and_ssh_are_opened_when_they_are_asked_for" {
  variables {
    gateway_cidrs  = ["198.51.100.0/24"]
    ssh_cidrs      = ["203.0.113.7/32"]
    ssh_public_key = "ssh-ed25519 AAAA ada"
    operator_cidrs = []
  }
  assert {
    condition     = join(" ", one(google_compute_firewall.gateway[0].allow).ports) == "8400" && join(" ", google_compute_firewall.gateway[0].source_ranges) == "198.51.100.0/24"
    error_message = "TCP 8400 from the clients"
  }
  assert {
    condition     = join(" ", one(google_compute_firewall.ssh[0].allow).ports) == "22" && join(" ", google_compute_firewall.ssh[0].source_ranges) == "203.0.113.7/32"
    error_message = "SSH from where it is said"
  }
  assert {
    condition     = length(google_compute_firewall.coordinator_from_operators) == 0 && google_compute_instance.coordinator.metadata["ssh-keys"] == "ubuntu:ssh-ed25519 AAAA ada"
    error_message = "no operators, no rule; and the key is on the machines"
  }
}

run "disks_and_buckets_are_closed" {
  assert {
    condition     = google_compute_disk.data.size == 20 && one(google_compute_instance.coordinator.attached_disk).device_name == "stoke-data"
    error_message = "the coordinator's data is on a disk of its own (Google encrypts every disk)"
  }
  assert {
    condition     = length(google_storage_bucket.this) == 2 && alltrue([for bucket in values(google_storage_bucket.this) : bucket.public_access_prevention == "enforced" && bucket.uniform_bucket_level_access])
    error_message = "buckets are not public"
  }
  assert {
    condition     = !google_storage_bucket.this["checkpoints"].force_destroy && google_storage_bucket.this["join"].force_destroy
    error_message = "a bucket with checkpoints is not destroyed"
  }
  assert {
    condition     = strcontains(one(google_storage_bucket_iam_member.node_asks.condition).expression, "/requests/") && google_storage_bucket_iam_member.node_reads_tokens.role == "roles/storage.objectViewer"
    error_message = "nodes write requests and read tokens"
  }
  assert {
    condition     = alltrue([for node in values(google_compute_instance.node) : one(node.shielded_instance_config).enable_vtpm && node.metadata["block-project-ssh-keys"] == "true"])
    error_message = "machines are shielded, and take no keys of the project"
  }
}

run "groups_are_what_they_were_asked_to_be" {
  assert {
    condition     = join(" ", keys(google_compute_instance.node)) == "gpu-0 spot-0 steady-0 steady-1"
    error_message = "a machine for each of a group"
  }
  assert {
    condition     = one(google_compute_instance.node["spot-0"].scheduling).provisioning_model == "SPOT" && one(google_compute_instance.node["spot-0"].scheduling).preemptible && one(google_compute_instance.node["spot-0"].scheduling).instance_termination_action == "STOP"
    error_message = "a spot machine is stopped, and stays"
  }
  assert {
    condition     = one(google_compute_instance.node["steady-0"].scheduling).provisioning_model == "STANDARD" && one(google_compute_instance.node["steady-0"].scheduling).automatic_restart
    error_message = "others are not"
  }
  assert {
    condition     = one(google_compute_instance.node["gpu-0"].scheduling).on_host_maintenance == "TERMINATE" && one(one(google_compute_instance.node["gpu-0"].boot_disk).initialize_params).image == "example/ubuntu-2404-nvidia"
    error_message = "machines with GPU do not move, and have the image with the driver"
  }
  assert {
    condition     = google_compute_instance.node["spot-0"].labels["stoke-group"] == "spot" && one(one(google_compute_instance.node["spot-0"].boot_disk).initialize_params).size == 80
    error_message = "labels and disks by group"
  }
  assert {
    condition     = strcontains(module.bootstrap.nodes["steady-1"], "rack") && strcontains(module.bootstrap.nodes["gpu-0"], "stoke-cuda") && !strcontains(module.bootstrap.nodes["steady-0"], "stoke-cuda")
    error_message = "labels and binaries by group"
  }
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
