# Which packets may come in: UDP 7878 at the coordinator, UDP and TCP between nodes, and what the variables open besides. Everything else is denied by Google.

resource "google_compute_firewall" "coordinator_from_nodes" {
  name        = "${var.name}-coordinator-from-nodes"
  description = "Control plane, from nodes"
  network     = google_compute_network.this.id
  direction   = "INGRESS"
  source_tags = ["${var.name}-node"]
  target_tags = ["${var.name}-coordinator"]
  allow {
    protocol = "udp"
    ports    = ["7878"]
  }
}

resource "google_compute_firewall" "coordinator_from_operators" {
  count         = length(var.operator_cidrs) > 0 ? 1 : 0
  name          = "${var.name}-coordinator-from-operators"
  description   = "Control plane, from operators"
  network       = google_compute_network.this.id
  direction     = "INGRESS"
  source_ranges = var.operator_cidrs
  target_tags   = ["${var.name}-coordinator"]
  allow {
    protocol = "udp"
    ports    = ["7878"]
  }
}

resource "google_compute_firewall" "nodes_from_nodes" {
  name        = "${var.name}-nodes-from-nodes"
  description = "Ranks and their commands, from those of other nodes"
  network     = google_compute_network.this.id
  direction   = "INGRESS"
  source_tags = ["${var.name}-node"]
  target_tags = ["${var.name}-node"]
  allow {
    protocol = "udp"
    ports    = ["${module.bootstrap.rank_ports.from}-${module.bootstrap.rank_ports.to}"]
  }
  # PyTorch and others like it speak TCP: MASTER_PORT, gloo and NCCL are all in the range that the sysctl gives.
  allow {
    protocol = "tcp"
    ports    = ["${module.bootstrap.rank_ports.from}-${module.bootstrap.rank_ports.to}"]
  }
}

resource "google_compute_firewall" "gateway" {
  count         = length(var.gateway_cidrs) > 0 ? 1 : 0
  name          = "${var.name}-gateway"
  description   = "Gateways, from clients"
  network       = google_compute_network.this.id
  direction     = "INGRESS"
  source_ranges = var.gateway_cidrs
  target_tags   = ["${var.name}-node"]
  allow {
    protocol = "tcp"
    ports    = ["8400"]
  }
}

resource "google_compute_firewall" "ssh" {
  count         = length(var.ssh_cidrs) > 0 ? 1 : 0
  name          = "${var.name}-ssh"
  description   = "SSH"
  network       = google_compute_network.this.id
  direction     = "INGRESS"
  source_ranges = var.ssh_cidrs
  target_tags   = ["${var.name}-coordinator", "${var.name}-node"]
  allow {
    protocol = "tcp"
    ports    = ["22"]
  }
}

# The nodes have no public addresses: SSH to them goes over the coordinator.
resource "google_compute_firewall" "ssh_jump" {
  count       = length(var.ssh_cidrs) > 0 ? 1 : 0
  name        = "${var.name}-ssh-jump"
  description = "SSH, from the coordinator"
  network     = google_compute_network.this.id
  direction   = "INGRESS"
  source_tags = ["${var.name}-coordinator"]
  target_tags = ["${var.name}-node"]
  allow {
    protocol = "tcp"
    ports    = ["22"]
  }
}
