# A storage account with containers for checkpoints and for join tokens, and who may do what with them.

locals {
  # 3 to 24 letters and digits, and unique in the world.
  account = substr("${replace(var.name, "-", "")}${sha256("${data.azurerm_client_config.this.subscription_id}/${var.name}/${var.location}")}", 0, 24)

  # The identities' rights: container => identity => role.
  rights = {
    node_checkpoints    = { container = "checkpoints", identity = "node", role = "Storage Blob Data Contributor" }
    node_asks           = { container = "join-requests", identity = "node", role = "Storage Blob Data Contributor" }
    node_reads_tokens   = { container = "join-tokens", identity = "node", role = "Storage Blob Data Reader" }
    coordinator_answers = { container = "join-requests", identity = "coordinator", role = "Storage Blob Data Contributor" }
    coordinator_gives   = { container = "join-tokens", identity = "coordinator", role = "Storage Blob Data Contributor" }
  }
}

data "azurerm_client_config" "this" {}

resource "azurerm_storage_account" "this" {
  #checkov:skip=CKV_AZURE_33:There are no queues
  #checkov:skip=CKV_AZURE_206:Checkpoints are not replicated to another region: they would cost more than to compute them again
  #checkov:skip=CKV_AZURE_59:Reached by service endpoints of the two subnets; network_rules shut out the rest
  #checkov:skip=CKV2_AZURE_1:Azure's own keys encrypt it; a key of one's own is a policy of the subscription
  #checkov:skip=CKV2_AZURE_33:Service endpoints of the two subnets instead of a private endpoint
  #checkov:skip=CKV2_AZURE_38:Deleted is deleted: tokens and pruned checkpoints must not be kept
  #checkov:skip=CKV2_AZURE_40:shared_access_key_enabled is false
  #checkov:skip=CKV2_AZURE_41:There are no SAS tokens without shared keys
  name                             = local.account
  resource_group_name              = azurerm_resource_group.this.name
  location                         = azurerm_resource_group.this.location
  account_tier                     = "Standard"
  account_replication_type         = "ZRS"
  min_tls_version                  = "TLS1_2"
  https_traffic_only_enabled       = true
  allow_nested_items_to_be_public  = false
  shared_access_key_enabled        = false
  default_to_oauth_authentication  = true
  cross_tenant_replication_enabled = false
  tags                             = local.tags
}

# By the resource of the account's own, so that Terraform's machine is not shut out before it has made the containers.
resource "azurerm_storage_account_network_rules" "this" {
  storage_account_id         = azurerm_storage_account.this.id
  default_action             = "Deny"
  bypass                     = ["AzureServices"]
  virtual_network_subnet_ids = [azurerm_subnet.coordinator.id, azurerm_subnet.nodes.id]
  depends_on                 = [azurerm_storage_container.this]
}

resource "azurerm_storage_container" "this" {
  #checkov:skip=CKV2_AZURE_21:Read logs are the subscription's policy
  for_each              = toset(["checkpoints", "join-requests", "join-tokens"])
  name                  = each.key
  storage_account_id    = azurerm_storage_account.this.id
  container_access_type = "private"
}

resource "azurerm_storage_management_policy" "this" {
  storage_account_id = azurerm_storage_account.this.id
  rule {
    name    = "join"
    enabled = true
    filters {
      prefix_match = ["join-requests/", "join-tokens/"]
      blob_types   = ["blockBlob"]
    }
    actions {
      base_blob {
        delete_after_days_since_creation_greater_than = 1
      }
    }
  }
}

resource "azurerm_user_assigned_identity" "this" {
  for_each            = toset(["coordinator", "node"])
  name                = "${var.name}-${each.key}"
  resource_group_name = azurerm_resource_group.this.name
  location            = azurerm_resource_group.this.location
  tags                = local.tags
}

# Nodes of a cluster share an identity: one could read a token that another waits for, and gain what it has already, a node's identity.
resource "azurerm_role_assignment" "this" {
  for_each             = local.rights
  scope                = azurerm_storage_container.this[each.value.container].id
  role_definition_name = each.value.role
  principal_id         = azurerm_user_assigned_identity.this[each.value.identity].principal_id
  principal_type       = "ServicePrincipal"
}
