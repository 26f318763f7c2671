# A Stoke cluster on Google Cloud, in one zone: network, coordinator, nodes. Storage and rights are in storage.tf, firewalls in firewall.tf.

locals {
  region = replace(var.location, "/-[a-z]$/", "")
  labels = merge(var.tags, { stoke-cluster = var.name })

  coordinator_cidr = cidrsubnet(var.network_cidr, 3, 0)
  nodes_cidr       = cidrsubnet(var.network_cidr, 1, 1)
  coordinator_ip   = google_compute_address.coordinator_private.address
  image_gpu        = coalesce(var.image_gpu, var.image)
  ssh              = var.ssh_public_key == null ? {} : { ssh-keys = "ubuntu:${var.ssh_public_key}" }
  group            = { for node, group in module.bootstrap.node_groups_by_node : node => var.node_groups[group] }
}

module "bootstrap" {
  source         = "../bootstrap"
  stoke          = var.stoke
  stoke_cuda     = var.stoke_cuda
  coordinator_ip = local.coordinator_ip
  advertise      = ["${local.coordinator_ip}:7878", "${google_compute_address.coordinator.address}:7878"]
  checkpoints    = "gs://${google_storage_bucket.this["checkpoints"].name}/checkpoints"
  environment    = {}
  data_device    = "/dev/disk/by-id/google-stoke-data"
  node_groups    = var.node_groups
  enrol = {
    cloud  = "gcp"
    bucket = google_storage_bucket.this["join"].name
  }
}

resource "google_compute_network" "this" {
  name                    = var.name
  auto_create_subnetworks = false
}

resource "google_compute_subnetwork" "coordinator" {
  #checkov:skip=CKV_GCP_26:Flow logs cost money by volume and belong to the project's own policy
  #checkov:skip=CKV_GCP_76:The network has no IPv6
  name                     = "${var.name}-coordinator"
  network                  = google_compute_network.this.id
  region                   = local.region
  ip_cidr_range            = local.coordinator_cidr
  private_ip_google_access = true
}

# Nodes reach the store by Google's own way, without public addresses.
resource "google_compute_subnetwork" "nodes" {
  #checkov:skip=CKV_GCP_26:Flow logs cost money by volume and belong to the project's own policy
  #checkov:skip=CKV_GCP_76:The network has no IPv6
  name                     = "${var.name}-nodes"
  network                  = google_compute_network.this.id
  region                   = local.region
  ip_cidr_range            = local.nodes_cidr
  private_ip_google_access = true
}

# For the binary and the system's updates.
resource "google_compute_router" "this" {
  name    = var.name
  network = google_compute_network.this.id
  region  = local.region
}

resource "google_compute_router_nat" "this" {
  name                               = var.name
  router                             = google_compute_router.this.name
  region                             = local.region
  nat_ip_allocate_option             = "AUTO_ONLY"
  source_subnetwork_ip_ranges_to_nat = "LIST_OF_SUBNETWORKS"

  subnetwork {
    name                    = google_compute_subnetwork.nodes.id
    source_ip_ranges_to_nat = ["ALL_IP_RANGES"]
  }
}

# Addresses and data belong to neither machine: they outlive its replacement.
resource "google_compute_address" "coordinator" {
  name   = "${var.name}-coordinator"
  region = local.region
  labels = local.labels
}

resource "google_compute_address" "coordinator_private" {
  name         = "${var.name}-coordinator-private"
  region       = local.region
  address_type = "INTERNAL"
  subnetwork   = google_compute_subnetwork.coordinator.id
  address      = cidrhost(local.coordinator_cidr, 10)
  labels       = local.labels
}

resource "google_compute_disk" "data" {
  #checkov:skip=CKV_GCP_37:Google's own keys encrypt it; a key of one's own is a policy of the project
  name   = "${var.name}-coordinator-data"
  zone   = var.location
  type   = "pd-balanced"
  size   = var.coordinator.data_disk_gib
  labels = local.labels
}

resource "google_compute_instance" "coordinator" {
  #checkov:skip=CKV_GCP_32:block-project-ssh-keys is set below, in a merge that checkov does not follow
  #checkov:skip=CKV_GCP_38:Google's own keys encrypt the disks; a key of one's own is a policy of the project
  #checkov:skip=CKV_GCP_40:Operators reach it at its static address, as far as operator_cidrs lets them
  name                      = "${var.name}-coordinator"
  zone                      = var.location
  machine_type              = var.coordinator.instance_type
  labels                    = local.labels
  tags                      = ["${var.name}-coordinator"]
  allow_stopping_for_update = true
  metadata = merge(local.ssh, {
    block-project-ssh-keys = "true"
    user-data              = module.bootstrap.coordinator
  })

  boot_disk {
    initialize_params {
      image = var.image
      size  = var.coordinator.disk_gib
      type  = "pd-balanced"
    }
  }
  attached_disk {
    source      = google_compute_disk.data.id
    device_name = "stoke-data"
  }
  network_interface {
    subnetwork = google_compute_subnetwork.coordinator.id
    network_ip = local.coordinator_ip
    access_config {
      nat_ip = google_compute_address.coordinator.address
    }
  }
  service_account {
    email  = google_service_account.this["coordinator"].email
    scopes = ["cloud-platform"]
  }
  shielded_instance_config {
    enable_secure_boot          = true
    enable_vtpm                 = true
    enable_integrity_monitoring = true
  }
}

resource "google_compute_instance" "node" {
  #checkov:skip=CKV_GCP_32:block-project-ssh-keys is set below, in a merge that checkov does not follow
  #checkov:skip=CKV_GCP_38:Google's own keys encrypt the disks; a key of one's own is a policy of the project
  #checkov:skip=CKV_GCP_39:Drivers of GPUs are often not signed; the rest of it is on
  for_each = module.bootstrap.node_groups_by_node

  name                      = "${var.name}-${each.key}"
  zone                      = var.location
  machine_type              = local.group[each.key].instance_type
  labels                    = merge(local.labels, { stoke-group = each.value })
  tags                      = ["${var.name}-node"]
  allow_stopping_for_update = true
  metadata = merge(local.ssh, {
    block-project-ssh-keys = "true"
    user-data              = module.bootstrap.nodes[each.key]
  })

  boot_disk {
    initialize_params {
      image = local.group[each.key].gpu ? local.image_gpu : var.image
      size  = local.group[each.key].disk_gib
      type  = "pd-balanced"
    }
  }
  network_interface {
    subnetwork = google_compute_subnetwork.nodes.id
  }
  # A machine with GPUs cannot move to another host; a spot machine is stopped, and is itself again when it is started.
  scheduling {
    provisioning_model          = local.group[each.key].spot ? "SPOT" : "STANDARD"
    preemptible                 = local.group[each.key].spot
    automatic_restart           = !local.group[each.key].spot
    on_host_maintenance         = local.group[each.key].spot || local.group[each.key].gpu ? "TERMINATE" : "MIGRATE"
    instance_termination_action = local.group[each.key].spot ? "STOP" : null
  }
  service_account {
    email  = google_service_account.this["node"].email
    scopes = ["cloud-platform"]
  }
  shielded_instance_config {
    enable_secure_boot          = !local.group[each.key].gpu
    enable_vtpm                 = true
    enable_integrity_monitoring = true
  }

  depends_on = [google_compute_router_nat.this]
}
