# Buckets for checkpoints and for join tokens, and who may do what with them.

data "google_project" "this" {}

locals {
  # What conditions of rights call the objects of the join bucket.
  join_objects = "projects/_/buckets/${google_storage_bucket.this["join"].name}/objects"
}

resource "google_storage_bucket" "this" {
  #checkov:skip=CKV_GCP_62:Access logs are the project's policy
  #checkov:skip=CKV_GCP_78:A manifest is never replaced, and tokens must not be kept: old versions would be waste
  for_each                    = toset(["checkpoints", "join"])
  name                        = "${data.google_project.this.project_id}-${var.name}-${each.key}"
  location                    = upper(local.region)
  labels                      = local.labels
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  # Checkpoints are results: a bucket that has some is not destroyed. Requests and tokens are nothing.
  force_destroy = each.key == "join"

  lifecycle_rule {
    condition {
      age = 1
    }
    action {
      type = "AbortIncompleteMultipartUpload"
    }
  }
  # Deleted is deleted: neither tokens nor pruned checkpoints are kept for a week.
  soft_delete_policy {
    retention_duration_seconds = 0
  }
  dynamic "lifecycle_rule" {
    for_each = each.key == "join" ? [1] : []
    content {
      condition {
        age = 1
      }
      action {
        type = "Delete"
      }
    }
  }
}

resource "google_service_account" "this" {
  for_each     = toset(["coordinator", "node"])
  account_id   = "${var.name}-${each.key == "node" ? "node" : "head"}"
  display_name = "Stoke ${each.key} of ${var.name}"
}

resource "google_storage_bucket_iam_member" "coordinator_sees_requests" {
  bucket = google_storage_bucket.this["join"].name
  role   = "roles/storage.objectUser"
  member = "serviceAccount:${google_service_account.this["coordinator"].email}"
}

# Nodes of a cluster share an account: one could read a token that another waits for, and gain what it has already, a node's identity.
resource "google_storage_bucket_iam_member" "node_asks" {
  bucket = google_storage_bucket.this["join"].name
  role   = "roles/storage.objectUser"
  member = "serviceAccount:${google_service_account.this["node"].email}"
  condition {
    title      = "requests"
    expression = "resource.name.startsWith(\"${local.join_objects}/requests/\")"
  }
}

resource "google_storage_bucket_iam_member" "node_reads_tokens" {
  bucket = google_storage_bucket.this["join"].name
  role   = "roles/storage.objectViewer"
  member = "serviceAccount:${google_service_account.this["node"].email}"
  condition {
    title      = "tokens"
    expression = "resource.name.startsWith(\"${local.join_objects}/tokens/\") || resource.type == \"storage.googleapis.com/Bucket\""
  }
}

resource "google_storage_bucket_iam_member" "node_checkpoints" {
  bucket = google_storage_bucket.this["checkpoints"].name
  role   = "roles/storage.objectUser"
  member = "serviceAccount:${google_service_account.this["node"].email}"
}
