# A Stoke cluster on AWS, in one availability zone: network, coordinator, nodes. Storage and rights are in storage.tf, firewalls in firewall.tf.

locals {
  region = replace(var.location, "/[a-z]$/", "")
  tags   = merge(var.tags, { "stoke-cluster" = var.name })

  coordinator_cidr = cidrsubnet(var.network_cidr, 3, 0)
  nodes_cidr       = cidrsubnet(var.network_cidr, 1, 1)
  # The first four addresses of a subnet, and the last, are AWS's.
  coordinator_ip = cidrhost(local.coordinator_cidr, 10)
  image_gpu      = coalesce(var.image_gpu, var.image)
}

module "bootstrap" {
  source         = "../bootstrap"
  stoke          = var.stoke
  stoke_cuda     = var.stoke_cuda
  coordinator_ip = local.coordinator_ip
  advertise      = ["${local.coordinator_ip}:7878", "${aws_eip.coordinator.public_ip}:7878"]
  checkpoints    = "s3://${aws_s3_bucket.this["checkpoints"].bucket}/checkpoints"
  environment    = { AWS_REGION = local.region }
  data_device    = "/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_${replace(aws_ebs_volume.data.id, "-", "")}"
  node_groups    = var.node_groups
  enrol = {
    cloud   = "aws"
    region  = local.region
    bucket  = aws_s3_bucket.this["join"].bucket
    role_id = aws_iam_role.node.unique_id
  }
}

resource "aws_vpc" "this" {
  #checkov:skip=CKV2_AWS_11:Flow logs cost money by volume and belong to the account's own policy
  cidr_block           = var.network_cidr
  enable_dns_support   = true
  enable_dns_hostnames = true
  tags                 = merge(local.tags, { Name = var.name })
}

# Without rules: what is in no group of ours reaches nothing.
resource "aws_default_security_group" "this" {
  vpc_id = aws_vpc.this.id
  tags   = merge(local.tags, { Name = "${var.name}-default" })
}

resource "aws_internet_gateway" "this" {
  vpc_id = aws_vpc.this.id
  tags   = merge(local.tags, { Name = var.name })
}

resource "aws_subnet" "coordinator" {
  vpc_id            = aws_vpc.this.id
  availability_zone = var.location
  cidr_block        = local.coordinator_cidr
  tags              = merge(local.tags, { Name = "${var.name}-coordinator" })
}

resource "aws_subnet" "nodes" {
  vpc_id            = aws_vpc.this.id
  availability_zone = var.location
  cidr_block        = local.nodes_cidr
  tags              = merge(local.tags, { Name = "${var.name}-nodes" })
}

resource "aws_eip" "nat" {
  #checkov:skip=CKV2_AWS_19:It belongs to the NAT gateway below
  vpc  = true
  tags = merge(local.tags, { Name = "${var.name}-nat" })
}

resource "aws_nat_gateway" "this" {
  allocation_id = aws_eip.nat.id
  subnet_id     = aws_subnet.coordinator.id
  tags          = merge(local.tags, { Name = var.name })
  depends_on    = [aws_internet_gateway.this]
}

resource "aws_route_table" "coordinator" {
  vpc_id = aws_vpc.this.id
  tags   = merge(local.tags, { Name = "${var.name}-coordinator" })
}

resource "aws_route" "coordinator" {
  route_table_id         = aws_route_table.coordinator.id
  destination_cidr_block = "0.0.0.0/0"
  gateway_id             = aws_internet_gateway.this.id
}

resource "aws_route_table_association" "coordinator" {
  subnet_id      = aws_subnet.coordinator.id
  route_table_id = aws_route_table.coordinator.id
}

resource "aws_route_table" "nodes" {
  vpc_id = aws_vpc.this.id
  tags   = merge(local.tags, { Name = "${var.name}-nodes" })
}

# For the binary and the system's updates; checkpoints take the endpoint below.
resource "aws_route" "nodes" {
  route_table_id         = aws_route_table.nodes.id
  destination_cidr_block = "0.0.0.0/0"
  nat_gateway_id         = aws_nat_gateway.this.id
}

resource "aws_route_table_association" "nodes" {
  subnet_id      = aws_subnet.nodes.id
  route_table_id = aws_route_table.nodes.id
}

resource "aws_vpc_endpoint" "s3" {
  vpc_id          = aws_vpc.this.id
  service_name    = "com.amazonaws.${local.region}.s3"
  route_table_ids = [aws_route_table.coordinator.id, aws_route_table.nodes.id]
  tags            = merge(local.tags, { Name = var.name })
}

resource "aws_key_pair" "this" {
  count      = var.ssh_public_key == null ? 0 : 1
  key_name   = var.name
  public_key = var.ssh_public_key
  tags       = local.tags
}

# Addresses and data belong to neither machine: they outlive its replacement.
resource "aws_eip" "coordinator" {
  vpc  = true
  tags = merge(local.tags, { Name = "${var.name}-coordinator" })
}

resource "aws_eip_association" "coordinator" {
  allocation_id = aws_eip.coordinator.id
  instance_id   = aws_instance.coordinator.id
}

resource "aws_ebs_volume" "data" {
  #checkov:skip=CKV_AWS_189:The account's key for EBS; a key of one's own is a policy of the account
  availability_zone = var.location
  size              = var.coordinator.data_disk_gib
  type              = "gp3"
  encrypted         = true
  tags              = merge(local.tags, { Name = "${var.name}-coordinator-data" })
}

resource "aws_volume_attachment" "data" {
  device_name = "/dev/sdf"
  volume_id   = aws_ebs_volume.data.id
  instance_id = aws_instance.coordinator.id
}

resource "aws_instance" "coordinator" {
  #checkov:skip=CKV_AWS_126:Detailed monitoring costs money; Prometheus watches the cluster
  #checkov:skip=CKV2_AWS_41:It has a role, by its instance profile
  ami                    = var.image
  instance_type          = var.coordinator.instance_type
  iam_instance_profile   = aws_iam_instance_profile.this["coordinator"].name
  key_name               = one(aws_key_pair.this[*].key_name)
  subnet_id              = aws_subnet.coordinator.id
  private_ip             = local.coordinator_ip
  vpc_security_group_ids = [aws_security_group.coordinator.id]
  ebs_optimized          = true
  user_data_base64       = base64gzip(module.bootstrap.coordinator)

  root_block_device {
    volume_type = "gp3"
    volume_size = var.coordinator.disk_gib
    encrypted   = true
  }
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }
  tags = merge(local.tags, { Name = "${var.name}-coordinator" })
}

resource "aws_instance" "node" {
  #checkov:skip=CKV_AWS_126:Detailed monitoring costs money; Prometheus watches the cluster
  #checkov:skip=CKV2_AWS_41:It has a role, by its instance profile
  for_each = { for node, group in module.bootstrap.node_groups_by_node : node => group if !var.node_groups[group].spot }

  ami                    = local.group[each.key].gpu ? local.image_gpu : var.image
  instance_type          = local.group[each.key].instance_type
  iam_instance_profile   = aws_iam_instance_profile.this["node"].name
  key_name               = one(aws_key_pair.this[*].key_name)
  subnet_id              = aws_subnet.nodes.id
  vpc_security_group_ids = [aws_security_group.nodes.id]
  ebs_optimized          = true
  user_data_base64       = base64gzip(module.bootstrap.nodes[each.key])

  root_block_device {
    volume_type = "gp3"
    volume_size = local.group[each.key].disk_gib
    encrypted   = true
  }
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }
  tags       = merge(local.tags, { Name = "${var.name}-${each.key}", "stoke-group" = each.value })
  depends_on = [aws_route.nodes, aws_route_table_association.nodes]
}

# A persistent request: where AWS takes the machine, it starts another one when there is room, which joins by itself.
resource "aws_spot_instance_request" "node" {
  for_each = { for node, group in module.bootstrap.node_groups_by_node : node => group if var.node_groups[group].spot }

  ami                    = local.group[each.key].gpu ? local.image_gpu : var.image
  instance_type          = local.group[each.key].instance_type
  iam_instance_profile   = aws_iam_instance_profile.this["node"].name
  key_name               = one(aws_key_pair.this[*].key_name)
  subnet_id              = aws_subnet.nodes.id
  vpc_security_group_ids = [aws_security_group.nodes.id]
  ebs_optimized          = true
  user_data_base64       = base64gzip(module.bootstrap.nodes[each.key])
  spot_type              = "persistent"
  wait_for_fulfillment   = true

  root_block_device {
    volume_type = "gp3"
    volume_size = local.group[each.key].disk_gib
    encrypted   = true
  }
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }
  tags       = merge(local.tags, { Name = "${var.name}-${each.key}", "stoke-group" = each.value })
  depends_on = [aws_route.nodes, aws_route_table_association.nodes]
}

# Tags of a request are not its machine's.
resource "aws_ec2_tag" "spot" {
  for_each    = aws_spot_instance_request.node
  resource_id = each.value.spot_instance_id
  key         = "Name"
  value       = "${var.name}-${each.key}"
}

locals {
  group     = { for node, group in module.bootstrap.node_groups_by_node : node => var.node_groups[group] }
  addresses = merge({ for node, machine in aws_instance.node : node => machine.private_ip }, { for node, machine in aws_spot_instance_request.node : node => machine.private_ip })
}
