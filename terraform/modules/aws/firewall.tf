# Which packets may come in: UDP 7878 at the coordinator, UDP and TCP between nodes, and what the variables open besides.

resource "aws_security_group" "coordinator" {
  #checkov:skip=CKV2_AWS_5:It is that of the coordinator
  name        = "${var.name}-coordinator"
  description = "Stoke coordinator: QUIC from nodes and operators"
  vpc_id      = aws_vpc.this.id
  tags        = merge(local.tags, { Name = "${var.name}-coordinator" })
}

resource "aws_security_group" "nodes" {
  #checkov:skip=CKV2_AWS_5:It is that of the nodes
  name        = "${var.name}-nodes"
  description = "Stoke nodes: QUIC between ranks"
  vpc_id      = aws_vpc.this.id
  tags        = merge(local.tags, { Name = "${var.name}-nodes" })
}

resource "aws_security_group_rule" "coordinator_from_nodes" {
  security_group_id        = aws_security_group.coordinator.id
  description              = "Control plane, from nodes"
  type                     = "ingress"
  protocol                 = "udp"
  from_port                = 7878
  to_port                  = 7878
  source_security_group_id = aws_security_group.nodes.id
}

resource "aws_security_group_rule" "coordinator_from_operators" {
  count             = length(var.operator_cidrs) > 0 ? 1 : 0
  security_group_id = aws_security_group.coordinator.id
  description       = "Control plane, from operators"
  type              = "ingress"
  protocol          = "udp"
  from_port         = 7878
  to_port           = 7878
  cidr_blocks       = var.operator_cidrs
}

# TCP carries gradients where packets are small, and what PyTorch and others like it say: MASTER_PORT, gloo and NCCL are all in the range that the sysctl gives.
resource "aws_security_group_rule" "nodes_from_nodes" {
  for_each          = toset(["udp", "tcp"])
  security_group_id = aws_security_group.nodes.id
  description       = "Ranks and their commands, from those of other nodes"
  type              = "ingress"
  protocol          = each.value
  from_port         = module.bootstrap.rank_ports.from
  to_port           = module.bootstrap.rank_ports.to
  self              = true
}

# Clusters that are there had a rule for each: between nodes nothing is closed for a moment.
moved {
  from = aws_security_group_rule.nodes_from_nodes
  to   = aws_security_group_rule.nodes_from_nodes["udp"]
}

moved {
  from = aws_security_group_rule.commands_from_nodes
  to   = aws_security_group_rule.nodes_from_nodes["tcp"]
}

resource "aws_security_group_rule" "gateway" {
  count             = length(var.gateway_cidrs) > 0 ? 1 : 0
  security_group_id = aws_security_group.nodes.id
  description       = "Gateways, from clients"
  type              = "ingress"
  protocol          = "tcp"
  from_port         = 8400
  to_port           = 8400
  cidr_blocks       = var.gateway_cidrs
}

resource "aws_security_group_rule" "ssh" {
  #checkov:skip=CKV_AWS_24:The variable refuses 0.0.0.0/0
  for_each          = length(var.ssh_cidrs) > 0 ? { coordinator = aws_security_group.coordinator.id, nodes = aws_security_group.nodes.id } : {}
  security_group_id = each.value
  description       = "SSH"
  type              = "ingress"
  protocol          = "tcp"
  from_port         = 22
  to_port           = 22
  cidr_blocks       = var.ssh_cidrs
}

# The nodes have no public addresses: SSH to them goes over the coordinator.
resource "aws_security_group_rule" "ssh_jump" {
  count                    = length(var.ssh_cidrs) > 0 ? 1 : 0
  security_group_id        = aws_security_group.nodes.id
  description              = "SSH, from the coordinator"
  type                     = "ingress"
  protocol                 = "tcp"
  from_port                = 22
  to_port                  = 22
  source_security_group_id = aws_security_group.coordinator.id
}

resource "aws_security_group_rule" "egress" {
  #checkov:skip=CKV_AWS_382:Machines fetch the binary and updates from anywhere; nothing is let in by it
  for_each          = { coordinator = aws_security_group.coordinator.id, nodes = aws_security_group.nodes.id }
  security_group_id = each.value
  description       = "Out"
  type              = "egress"
  protocol          = "-1"
  from_port         = 0
  to_port           = 0
  cidr_blocks       = ["0.0.0.0/0"]
}
