# What the module asks AWS for, with a provider that answers with made-up values.

mock_provider "aws" {
  mock_data "aws_iam_policy_document" {
    defaults = { json = "{}" }
  }
  mock_resource "aws_iam_role" {
    defaults = { arn = "arn:aws:iam::111122223333:role/r", unique_id = "AROAEXAMPLE" }
  }
  mock_resource "aws_eip" {
    defaults = { public_ip = "198.51.100.7" }
  }
  mock_resource "aws_ebs_volume" {
    defaults = { id = "vol-0123456789abcdef0" }
  }
  mock_resource "aws_s3_bucket" {
    defaults = { arn = "arn:aws:s3:::bucket" }
  }
}

variables {
  name           = "lab"
  location       = "eu-central-1a"
  operator_cidrs = ["203.0.113.0/24"]
  image          = "ami-0123456789abcdef0"
  image_gpu      = "ami-0fedcba9876543210"
  stoke          = { url = "https://example.org/stoke", sha256 = "0000000000000000000000000000000000000000000000000000000000000000" }
  stoke_cuda     = { url = "https://example.org/stoke-cuda", sha256 = "1111111111111111111111111111111111111111111111111111111111111111" }
  coordinator    = { instance_type = "m7i-flex.large" }
  node_groups = {
    steady = { instance_type = "c7i.xlarge", count = 2, labels = { rack = "a" } }
    spot   = { instance_type = "c7i.xlarge", count = 1, spot = true, disk_gib = 80 }
    gpu    = { instance_type = "g6.xlarge", count = 1, gpu = true }
  }
}

run "only_the_needed_ports_are_open" {
  assert {
    condition = alltrue([for rule in [aws_security_group_rule.coordinator_from_nodes, aws_security_group_rule.coordinator_from_operators[0]] :
      rule.type == "ingress" && rule.protocol == "udp" && rule.from_port == 7878 && rule.to_port == 7878 && rule.security_group_id == aws_security_group.coordinator.id
    ])
    error_message = "the coordinator takes UDP 7878 and nothing else"
  }
  assert {
    condition     = aws_security_group_rule.coordinator_from_nodes.source_security_group_id == aws_security_group.nodes.id && aws_security_group_rule.coordinator_from_nodes.cidr_blocks == null
    error_message = "nodes reach it by their group"
  }
  assert {
    condition     = aws_security_group_rule.coordinator_from_operators[0].cidr_blocks == tolist(["203.0.113.0/24"])
    error_message = "operators reach it from their networks"
  }
  assert {
    condition     = sort([for rule in aws_security_group_rule.nodes_from_nodes : rule.protocol]) == tolist(["tcp", "udp"])
    error_message = "ranks and their commands reach each other by UDP and TCP, by one rule for each"
  }
  assert {
    condition = alltrue([for rule in aws_security_group_rule.nodes_from_nodes :
      rule.type == "ingress" && rule.security_group_id == aws_security_group.nodes.id && rule.self && rule.cidr_blocks == null && rule.from_port == 40000 && rule.to_port == 40999
    ])
    error_message = "from nodes only, at the ports that the sysctl gives them"
  }
  assert {
    condition     = length(aws_security_group_rule.gateway) == 0 && length(aws_security_group_rule.ssh) == 0 && length(aws_security_group_rule.ssh_jump) == 0
    error_message = "nothing else is open unless it is asked for"
  }
  assert {
    condition     = aws_security_group.nodes.ingress == null || length(aws_security_group.nodes.ingress) == 0
    error_message = "groups have no rules of their own"
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
    condition     = aws_security_group_rule.gateway[0].protocol == "tcp" && aws_security_group_rule.gateway[0].to_port == 8400 && aws_security_group_rule.gateway[0].cidr_blocks == tolist(["198.51.100.0/24"])
    error_message = "TCP 8400 from the clients"
  }
  assert {
    condition     = alltrue([for rule in values(aws_security_group_rule.ssh) : rule.from_port == 22 && rule.to_port == 22 && rule.cidr_blocks == tolist(["203.0.113.7/32"])])
    error_message = "SSH from where it is said"
  }
  assert {
    condition     = length(aws_security_group_rule.coordinator_from_operators) == 0 && aws_instance.coordinator.key_name == "lab"
    error_message = "no operators, no rule; and the key is on the machines"
  }
}

run "disks_and_buckets_are_encrypted_and_closed" {
  assert {
    condition     = aws_ebs_volume.data.encrypted && aws_ebs_volume.data.size == 20 && aws_instance.coordinator.root_block_device[0].encrypted
    error_message = "the coordinator's disks are encrypted"
  }
  assert {
    condition = alltrue([for machine in concat(values(aws_instance.node), values(aws_spot_instance_request.node)) :
      one(machine.root_block_device).encrypted && one(machine.metadata_options).http_tokens == "required" && one(machine.metadata_options).http_put_response_hop_limit == 1
    ])
    error_message = "nodes have encrypted disks and IMDSv2"
  }
  assert {
    condition     = alltrue([for bucket in values(aws_s3_bucket.this) : one(one(one(bucket.server_side_encryption_configuration).rule).apply_server_side_encryption_by_default).sse_algorithm == "AES256"])
    error_message = "buckets are encrypted"
  }
  assert {
    condition     = alltrue([for block in values(aws_s3_bucket_public_access_block.this) : block.block_public_acls && block.block_public_policy && block.ignore_public_acls && block.restrict_public_buckets]) && length(aws_s3_bucket_public_access_block.this) == 2
    error_message = "buckets are not public"
  }
  assert {
    condition     = !aws_s3_bucket.this["checkpoints"].force_destroy && aws_s3_bucket.this["join"].force_destroy
    error_message = "a bucket with checkpoints is not destroyed"
  }
}

run "groups_are_what_they_were_asked_to_be" {
  assert {
    condition     = join(" ", keys(aws_instance.node)) == "gpu-0 steady-0 steady-1" && join(" ", keys(aws_spot_instance_request.node)) == "spot-0"
    error_message = "a machine for each of a group, spot ones by request"
  }
  assert {
    condition     = aws_spot_instance_request.node["spot-0"].spot_type == "persistent" && one(aws_spot_instance_request.node["spot-0"].root_block_device).volume_size == 80
    error_message = "a spot machine comes back"
  }
  assert {
    condition     = aws_instance.node["gpu-0"].ami == "ami-0fedcba9876543210" && aws_instance.node["steady-0"].ami == "ami-0123456789abcdef0"
    error_message = "machines with GPU have the image with the driver"
  }
  assert {
    condition     = strcontains(module.bootstrap.nodes["steady-1"], "rack") && strcontains(module.bootstrap.nodes["gpu-0"], "stoke-cuda") && !strcontains(module.bootstrap.nodes["steady-0"], "stoke-cuda")
    error_message = "labels and binaries by group"
  }
  assert {
    condition     = aws_instance.coordinator.private_ip == "10.78.0.10" && output.coordinator_address == "198.51.100.7:7878"
    error_message = "addresses are static"
  }
  assert {
    condition     = length(base64gzip(module.bootstrap.coordinator)) < 16384
    error_message = "AWS takes 16 KiB of user data"
  }
  assert {
    condition     = strcontains(module.bootstrap.coordinator, "nvme-Amazon_Elastic_Block_Store_vol0123456789abcdef0")
    error_message = "the data disk is found by its id"
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
