# Which packets may come in: UDP 7878 at the coordinator, UDP and TCP between nodes, and what the variables open besides. The last rule of each group shuts out the
# rest, also what Azure lets through within a network.

locals {
  coordinator_rules = merge(
    { nodes = { priority = 100, protocol = "Udp", port = "7878", sources = [local.nodes_cidr] } },
    length(var.operator_cidrs) > 0 ? { operators = { priority = 110, protocol = "Udp", port = "7878", sources = var.operator_cidrs } } : {},
    length(var.ssh_cidrs) > 0 ? { ssh = { priority = 120, protocol = "Tcp", port = "22", sources = var.ssh_cidrs } } : {},
  )
  node_rules = merge(
    {
      ranks = { priority = 100, protocol = "Udp", port = "${module.bootstrap.rank_ports.from}-${module.bootstrap.rank_ports.to}", sources = [local.nodes_cidr] }
      # PyTorch and others like it speak TCP: MASTER_PORT, gloo and NCCL are all in the range that the sysctl gives.
      commands = { priority = 130, protocol = "Tcp", port = "${module.bootstrap.rank_ports.from}-${module.bootstrap.rank_ports.to}", sources = [local.nodes_cidr] }
    },
    length(var.gateway_cidrs) > 0 ? { gateway = { priority = 110, protocol = "Tcp", port = "8400", sources = var.gateway_cidrs } } : {},
    # The nodes have no public addresses: SSH to them goes over the coordinator.
    length(var.ssh_cidrs) > 0 ? { ssh = { priority = 120, protocol = "Tcp", port = "22", sources = concat([local.coordinator_cidr], var.ssh_cidrs) } } : {},
  )
}

resource "azurerm_network_security_group" "coordinator" {
  name                = "${var.name}-coordinator"
  resource_group_name = azurerm_resource_group.this.name
  location            = azurerm_resource_group.this.location
  tags                = local.tags
}

resource "azurerm_network_security_group" "nodes" {
  name                = "${var.name}-nodes"
  resource_group_name = azurerm_resource_group.this.name
  location            = azurerm_resource_group.this.location
  tags                = local.tags
}

resource "azurerm_network_security_rule" "coordinator" {
  for_each                    = local.coordinator_rules
  name                        = each.key
  resource_group_name         = azurerm_resource_group.this.name
  network_security_group_name = azurerm_network_security_group.coordinator.name
  priority                    = each.value.priority
  direction                   = "Inbound"
  access                      = "Allow"
  protocol                    = each.value.protocol
  source_port_range           = "*"
  source_address_prefixes     = each.value.sources
  destination_address_prefix  = local.coordinator_cidr
  destination_port_range      = each.value.port
}

resource "azurerm_network_security_rule" "nodes" {
  for_each                    = local.node_rules
  name                        = each.key
  resource_group_name         = azurerm_resource_group.this.name
  network_security_group_name = azurerm_network_security_group.nodes.name
  priority                    = each.value.priority
  direction                   = "Inbound"
  access                      = "Allow"
  protocol                    = each.value.protocol
  source_port_range           = "*"
  source_address_prefixes     = each.value.sources
  destination_address_prefix  = local.nodes_cidr
  destination_port_range      = each.value.port
}

resource "azurerm_network_security_rule" "rest" {
  for_each                    = { coordinator = azurerm_network_security_group.coordinator.name, nodes = azurerm_network_security_group.nodes.name }
  name                        = "rest"
  resource_group_name         = azurerm_resource_group.this.name
  network_security_group_name = each.value
  priority                    = 4096
  direction                   = "Inbound"
  access                      = "Deny"
  protocol                    = "*"
  source_port_range           = "*"
  source_address_prefix       = "*"
  destination_address_prefix  = "*"
  destination_port_range      = "*"
}

resource "azurerm_subnet_network_security_group_association" "coordinator" {
  subnet_id                 = azurerm_subnet.coordinator.id
  network_security_group_id = azurerm_network_security_group.coordinator.id
}

resource "azurerm_subnet_network_security_group_association" "nodes" {
  subnet_id                 = azurerm_subnet.nodes.id
  network_security_group_id = azurerm_network_security_group.nodes.id
}
