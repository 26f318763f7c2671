# Turns what the clouds have in common into cloud-init documents: the binary, settings, units, and how nodes join. Makes no resources, knows no secret.

terraform {
  required_version = ">= 1.9"
}

variable "stoke" {
  description = "Binary for the coordinator and nodes without GPU."
  type        = object({ url = string, sha256 = string })
}

variable "stoke_cuda" {
  description = "Binary for nodes with GPU (built with CUDA)."
  type        = object({ url = string, sha256 = string })
  nullable    = true
}

variable "enrol" {
  description = "Settings of stoke-enrol: cloud, and where its store is."
  type        = map(string)
}

variable "enrol_coordinator" {
  description = "What the coordinator has besides in its settings of stoke-enrol."
  type        = map(string)
  default     = {}
}

variable "enrol_node" {
  description = "What nodes have besides."
  type        = map(string)
  default     = {}
}

variable "coordinator_ip" {
  description = "Private address of the coordinator: nodes dial it."
  type        = string
}

variable "advertise" {
  description = "HOST:PORT where the coordinator is reached; the first that the coordinator's own machine reaches comes first."
  type        = list(string)
}

variable "checkpoints" {
  description = "URI below which jobs keep their checkpoints."
  type        = string
}

variable "environment" {
  description = "Environment of the agents: what finds the store. No secrets."
  type        = map(string)
}

variable "data_device" {
  description = "The coordinator's data disk, as a path below /dev that does not change."
  type        = string
}

variable "node_groups" {
  description = "As in the modules of the clouds."
  type        = map(any)
}

locals {
  # Ranks take ports from here: what the firewall lets through between nodes.
  rank_ports = { from = 40000, to = 40999 }

  nodes = merge([
    for group, settings in var.node_groups : {
      for index in range(settings.count) : "${group}-${index}" => { group = group, gpu = settings.gpu, labels = settings.labels }
    }
  ]...)

  executable = { for name in ["stoke-install", "stoke-enrol"] : name => {
    path        = name == "stoke-install" ? "/usr/local/sbin/${name}" : "/usr/local/bin/${name}"
    permissions = "0755"
    content     = file("${path.module}/files/${name}")
  } }
  units = { for file in fileset("${path.module}/files", "*.{service,timer}") : file => {
    path        = "/etc/systemd/system/${file}"
    permissions = "0644"
    content     = file("${path.module}/files/${file}")
  } }

  sysctl = {
    path        = "/etc/sysctl.d/60-stoke.conf"
    permissions = "0644"
    content     = <<-EOT
      net.core.rmem_max = 8388608
      net.core.wmem_max = 8388608
      net.ipv4.ip_local_port_range = ${local.rank_ports.from} ${local.rank_ports.to}
    EOT
  }
  environment = {
    path        = "/etc/stoke/environment"
    permissions = "0644"
    content     = join("", [for key, value in var.environment : "${key}=${value}\n"])
  }
  enrol = { for role, settings in { coordinator = var.enrol_coordinator, node = var.enrol_node } : role => {
    path        = "/etc/stoke/enrol.json"
    permissions = "0644"
    content     = jsonencode(merge(var.enrol, settings, { cluster = "/var/lib/stoke/cluster", node_dir = "/var/lib/stoke-node" }))
  } }
  user = { name = "stoke", system = true, shell = "/usr/sbin/nologin", homedir = "/var/lib/stoke-node", no_create_home = true }

  coordinator = {
    users = ["default", local.user]
    write_files = [
      local.executable["stoke-install"], local.executable["stoke-enrol"],
      local.units["stoke-coordinator.service"], local.units["stoke-enrol.service"], local.units["stoke-enrol.timer"],
      local.sysctl, local.environment, local.enrol["coordinator"],
      {
        path        = "/etc/stoke/stoke.toml"
        permissions = "0644"
        content     = <<-EOT
          dir = "/var/lib/stoke/cluster"
          listen = "0.0.0.0:7878"
          advertise = ${jsonencode(var.advertise)}
          checkpoints = ${jsonencode(var.checkpoints)}
          metrics = "127.0.0.1:9090"
        EOT
      },
    ]
    runcmd = [
      ["sysctl", "--system"],
      ["stoke-install", var.stoke.url, var.stoke.sha256],
      # The disk may be attached after the first boot has begun; systemd waits for it, and makes a file system if there is none.
      ["sh", "-c", "grep -q ' /var/lib/stoke ' /etc/fstab || echo '${var.data_device} /var/lib/stoke ext4 defaults,nofail,x-systemd.makefs,x-systemd.device-timeout=15min 0 2' >>/etc/fstab"],
      ["systemctl", "daemon-reload"],
      ["systemctl", "enable", "--now", "stoke-coordinator.service", "stoke-enrol.timer"],
    ]
  }

  node = { for name, node in local.nodes : name => {
    users = ["default", local.user]
    write_files = [
      local.executable["stoke-install"], local.executable["stoke-enrol"],
      local.units["stoke-node.service"], local.sysctl, local.environment, local.enrol["node"],
      {
        path        = "/etc/stoke/stoke-node.toml"
        permissions = "0644"
        content = join("\n", concat(
          [
            "dir = \"/var/lib/stoke-node\"",
            "coordinator = [\"${var.coordinator_ip}:7878\"]",
            "name = ${jsonencode(name)}",
          ],
          ["[labels]"],
          [for key, value in merge(node.labels, { group = node.group, gpu = tostring(node.gpu) }) : "${jsonencode(key)} = ${jsonencode(value)}"],
          [""],
        ))
      },
    ]
    runcmd = [
      ["sysctl", "--system"],
      ["stoke-install", node.gpu ? var.stoke_cuda.url : var.stoke.url, node.gpu ? var.stoke_cuda.sha256 : var.stoke.sha256],
      ["systemctl", "daemon-reload"],
      ["systemctl", "enable", "--now", "stoke-node.service"],
    ]
  } }
}

output "coordinator" {
  description = "cloud-init document of the coordinator."
  value       = "#cloud-config\n${yamlencode(local.coordinator)}"
}

output "nodes" {
  description = "cloud-init document of each node, by its name."
  value       = { for name, document in local.node : name => "#cloud-config\n${yamlencode(document)}" }
}

output "node_groups_by_node" {
  description = "Which group each node is of, by the node's name."
  value       = { for name, node in local.nodes : name => node.group }
}

output "rank_ports" {
  description = "UDP ports between nodes."
  value       = local.rank_ports
}
