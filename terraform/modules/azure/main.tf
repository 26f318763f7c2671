# A Stoke cluster on Azure, in one region and one proximity placement group: network, coordinator, nodes. Storage and rights are in storage.tf, firewalls in
# firewall.tf.

locals {
  tags  = merge(var.tags, { stoke-cluster = var.name })
  group = { for node, group in module.bootstrap.node_groups_by_node : node => var.node_groups[group] }

  coordinator_cidr = cidrsubnet(var.network_cidr, 3, 0)
  nodes_cidr       = cidrsubnet(var.network_cidr, 1, 1)
  coordinator_ip   = cidrhost(local.coordinator_cidr, 10)

  image     = zipmap(["publisher", "offer", "sku", "version"], split(":", var.image))
  image_gpu = zipmap(["publisher", "offer", "sku", "version"], split(":", coalesce(var.image_gpu, var.image)))
}

module "bootstrap" {
  source         = "../bootstrap"
  stoke          = var.stoke
  stoke_cuda     = var.stoke_cuda
  coordinator_ip = local.coordinator_ip
  advertise      = ["${local.coordinator_ip}:7878", "${azurerm_public_ip.coordinator.ip_address}:7878"]
  checkpoints    = "az://${azurerm_storage_container.this["checkpoints"].name}/checkpoints"
  environment = {
    AZURE_STORAGE_ACCOUNT_NAME = azurerm_storage_account.this.name
    AZURE_CLIENT_ID            = azurerm_user_assigned_identity.this["node"].client_id
  }
  data_device = "/dev/disk/azure/scsi1/lun10"
  node_groups = var.node_groups
  enrol = {
    cloud   = "azure"
    account = azurerm_storage_account.this.name
  }
  enrol_coordinator = { client_id = azurerm_user_assigned_identity.this["coordinator"].client_id }
  enrol_node        = { client_id = azurerm_user_assigned_identity.this["node"].client_id }
}

resource "azurerm_resource_group" "this" {
  name     = var.name
  location = var.location
  tags     = local.tags
}

resource "azurerm_virtual_network" "this" {
  name                = var.name
  resource_group_name = azurerm_resource_group.this.name
  location            = azurerm_resource_group.this.location
  address_space       = [var.network_cidr]
  tags                = local.tags
}

resource "azurerm_subnet" "coordinator" {
  name                            = "coordinator"
  resource_group_name             = azurerm_resource_group.this.name
  virtual_network_name            = azurerm_virtual_network.this.name
  address_prefixes                = [local.coordinator_cidr]
  service_endpoints               = ["Microsoft.Storage"]
  default_outbound_access_enabled = false
}

resource "azurerm_subnet" "nodes" {
  name                            = "nodes"
  resource_group_name             = azurerm_resource_group.this.name
  virtual_network_name            = azurerm_virtual_network.this.name
  address_prefixes                = [local.nodes_cidr]
  service_endpoints               = ["Microsoft.Storage"]
  default_outbound_access_enabled = false
}

# For the binary and the system's updates.
resource "azurerm_public_ip" "nat" {
  name                = "${var.name}-nat"
  resource_group_name = azurerm_resource_group.this.name
  location            = azurerm_resource_group.this.location
  allocation_method   = "Static"
  sku                 = "Standard"
  tags                = local.tags
}

resource "azurerm_nat_gateway" "this" {
  name                = var.name
  resource_group_name = azurerm_resource_group.this.name
  location            = azurerm_resource_group.this.location
  sku_name            = "Standard"
  tags                = local.tags
}

resource "azurerm_nat_gateway_public_ip_association" "this" {
  nat_gateway_id       = azurerm_nat_gateway.this.id
  public_ip_address_id = azurerm_public_ip.nat.id
}

resource "azurerm_subnet_nat_gateway_association" "nodes" {
  subnet_id      = azurerm_subnet.nodes.id
  nat_gateway_id = azurerm_nat_gateway.this.id
}

resource "azurerm_proximity_placement_group" "this" {
  name                = var.name
  resource_group_name = azurerm_resource_group.this.name
  location            = azurerm_resource_group.this.location
  tags                = local.tags
}

# Addresses and data belong to neither machine: they outlive its replacement.
resource "azurerm_public_ip" "coordinator" {
  name                = "${var.name}-coordinator"
  resource_group_name = azurerm_resource_group.this.name
  location            = azurerm_resource_group.this.location
  allocation_method   = "Static"
  sku                 = "Standard"
  tags                = local.tags
}

resource "azurerm_network_interface" "coordinator" {
  #checkov:skip=CKV_AZURE_119:Operators reach it at its static address, as far as operator_cidrs lets them
  name                           = "${var.name}-coordinator"
  resource_group_name            = azurerm_resource_group.this.name
  location                       = azurerm_resource_group.this.location
  accelerated_networking_enabled = true
  tags                           = local.tags

  ip_configuration {
    name                          = "primary"
    subnet_id                     = azurerm_subnet.coordinator.id
    private_ip_address_allocation = "Static"
    private_ip_address            = local.coordinator_ip
    public_ip_address_id          = azurerm_public_ip.coordinator.id
  }
}

resource "azurerm_managed_disk" "data" {
  #checkov:skip=CKV_AZURE_93:Azure's own keys encrypt it; a key of one's own is a policy of the subscription
  name                          = "${var.name}-coordinator-data"
  resource_group_name           = azurerm_resource_group.this.name
  location                      = azurerm_resource_group.this.location
  storage_account_type          = "Premium_LRS"
  create_option                 = "Empty"
  disk_size_gb                  = var.coordinator.data_disk_gib
  public_network_access_enabled = false
  network_access_policy         = "DenyAll"
  tags                          = local.tags
}

resource "azurerm_virtual_machine_data_disk_attachment" "data" {
  managed_disk_id    = azurerm_managed_disk.data.id
  virtual_machine_id = azurerm_linux_virtual_machine.coordinator.id
  lun                = 10
  # The journal must be on the disk when it says so.
  caching = "None"
}

resource "azurerm_linux_virtual_machine" "coordinator" {
  #checkov:skip=CKV_AZURE_97:Encryption at host must be enabled for the subscription first; disks are encrypted by Azure
  name                            = "${var.name}-coordinator"
  resource_group_name             = azurerm_resource_group.this.name
  location                        = azurerm_resource_group.this.location
  size                            = var.coordinator.instance_type
  proximity_placement_group_id    = azurerm_proximity_placement_group.this.id
  network_interface_ids           = [azurerm_network_interface.coordinator.id]
  admin_username                  = "ubuntu"
  disable_password_authentication = true
  allow_extension_operations      = false
  provision_vm_agent              = true
  custom_data                     = base64gzip(module.bootstrap.coordinator)
  tags                            = local.tags

  dynamic "admin_ssh_key" {
    for_each = var.ssh_public_key == null ? [] : [var.ssh_public_key]
    content {
      username   = "ubuntu"
      public_key = admin_ssh_key.value
    }
  }
  identity {
    type         = "UserAssigned"
    identity_ids = [azurerm_user_assigned_identity.this["coordinator"].id]
  }
  os_disk {
    caching              = "ReadWrite"
    storage_account_type = "Premium_LRS"
    disk_size_gb         = max(30, var.coordinator.disk_gib)
  }
  source_image_reference {
    publisher = local.image.publisher
    offer     = local.image.offer
    sku       = local.image.sku
    version   = local.image.version
  }
  lifecycle {
    precondition {
      condition     = var.ssh_public_key != null
      error_message = "Azure makes no machine without ssh_public_key."
    }
  }
}

resource "azurerm_network_interface" "node" {
  for_each                       = module.bootstrap.node_groups_by_node
  name                           = "${var.name}-${each.key}"
  resource_group_name            = azurerm_resource_group.this.name
  location                       = azurerm_resource_group.this.location
  accelerated_networking_enabled = true
  tags                           = local.tags

  ip_configuration {
    name                          = "primary"
    subnet_id                     = azurerm_subnet.nodes.id
    private_ip_address_allocation = "Dynamic"
  }
}

resource "azurerm_linux_virtual_machine" "node" {
  #checkov:skip=CKV_AZURE_97:Encryption at host must be enabled for the subscription first; disks are encrypted by Azure
  for_each                        = module.bootstrap.node_groups_by_node
  name                            = "${var.name}-${each.key}"
  resource_group_name             = azurerm_resource_group.this.name
  location                        = azurerm_resource_group.this.location
  size                            = local.group[each.key].instance_type
  proximity_placement_group_id    = local.group[each.key].spot ? null : azurerm_proximity_placement_group.this.id
  network_interface_ids           = [azurerm_network_interface.node[each.key].id]
  admin_username                  = "ubuntu"
  disable_password_authentication = true
  allow_extension_operations      = false
  provision_vm_agent              = true
  custom_data                     = base64gzip(module.bootstrap.nodes[each.key])
  tags                            = merge(local.tags, { stoke-group = each.value })
  # A spot machine is stopped, and is itself again when it is started.
  priority        = local.group[each.key].spot ? "Spot" : "Regular"
  eviction_policy = local.group[each.key].spot ? "Deallocate" : null
  max_bid_price   = local.group[each.key].spot ? -1 : null

  dynamic "admin_ssh_key" {
    for_each = var.ssh_public_key == null ? [] : [var.ssh_public_key]
    content {
      username   = "ubuntu"
      public_key = admin_ssh_key.value
    }
  }
  identity {
    type         = "UserAssigned"
    identity_ids = [azurerm_user_assigned_identity.this["node"].id]
  }
  os_disk {
    caching              = "ReadWrite"
    storage_account_type = "Premium_LRS"
    disk_size_gb         = max(30, local.group[each.key].disk_gib)
  }
  source_image_reference {
    publisher = (local.group[each.key].gpu ? local.image_gpu : local.image).publisher
    offer     = (local.group[each.key].gpu ? local.image_gpu : local.image).offer
    sku       = (local.group[each.key].gpu ? local.image_gpu : local.image).sku
    version   = (local.group[each.key].gpu ? local.image_gpu : local.image).version
  }

  depends_on = [azurerm_subnet_nat_gateway_association.nodes, azurerm_nat_gateway_public_ip_association.this]
}
