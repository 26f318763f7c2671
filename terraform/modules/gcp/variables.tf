# The same in the modules of all clouds (a test compares them); only what the values mean differs.

variable "name" {
  description = "Name of the cluster: names of resources begin with it."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,18}[a-z0-9]$", var.name))
    error_message = "Use 3 to 20 of a-z, 0-9 and -, beginning with a letter and not ending with -."
  }
}

variable "location" {
  description = "Where the machines are, close together: an availability zone of AWS (eu-central-1a), a zone of Google (europe-west4-a), a region of Azure (westeurope)."
  type        = string
}

variable "network_cidr" {
  description = "Addresses of the cluster's network; the first eighth is the coordinator's subnet, the second half the nodes'."
  type        = string
  default     = "10.78.0.0/20"
  validation {
    condition     = can(cidrnetmask(var.network_cidr)) && try(tonumber(split("/", var.network_cidr)[1]) <= 24, false)
    error_message = "Use an IPv4 network of at least 256 addresses, such as 10.78.0.0/20."
  }
}

variable "operator_cidrs" {
  description = "Who may reach the coordinator from outside (UDP 7878), to submit and look. Everyone needs a certificate of the cluster besides."
  type        = list(string)
  default     = []
  validation {
    condition     = alltrue([for cidr in var.operator_cidrs : can(cidrnetmask(cidr)) && cidr != "0.0.0.0/0"])
    error_message = "Use IPv4 networks, and not 0.0.0.0/0."
  }
}

variable "ssh_cidrs" {
  description = "Who may use SSH. Empty: nobody, and no port is open."
  type        = list(string)
  default     = []
  validation {
    condition     = alltrue([for cidr in var.ssh_cidrs : can(cidrnetmask(cidr)) && cidr != "0.0.0.0/0"])
    error_message = "Use IPv4 networks, and not 0.0.0.0/0."
  }
}

variable "ssh_public_key" {
  description = "Public key for SSH, in OpenSSH's form. Azure makes no machine without one."
  type        = string
  default     = null
}

variable "gateway_cidrs" {
  description = "Who may reach the gateways of nodes (TCP 8400), where models are served. Agents listen on the loopback until they are given an address and tokens."
  type        = list(string)
  default     = []
  validation {
    condition     = alltrue([for cidr in var.gateway_cidrs : can(cidrnetmask(cidr)) && cidr != "0.0.0.0/0"])
    error_message = "Use IPv4 networks, and not 0.0.0.0/0."
  }
}

variable "stoke" {
  description = "The binary: an https URL that the machines can read without credentials, and its SHA-256."
  type        = object({ url = string, sha256 = string })
  validation {
    condition     = startswith(var.stoke.url, "https://") && can(regex("^[0-9a-f]{64}$", var.stoke.sha256))
    error_message = "The URL begins with https://, and sha256 has 64 hexadecimal digits."
  }
}

variable "stoke_cuda" {
  description = "The binary for groups with GPU, built with CUDA."
  type        = object({ url = string, sha256 = string })
  default     = null
  validation {
    condition     = var.stoke_cuda == null ? true : startswith(var.stoke_cuda.url, "https://") && can(regex("^[0-9a-f]{64}$", var.stoke_cuda.sha256))
    error_message = "The URL begins with https://, and sha256 has 64 hexadecimal digits."
  }
}

variable "image" {
  description = "Image of the machines: Ubuntu 24.04 (or another with systemd, cloud-init, Python 3 and glibc 2.36). AWS: an AMI's id; Google: an image or family; Azure: PUBLISHER:OFFER:SKU:VERSION."
  type        = string
}

variable "image_gpu" {
  description = "Image of groups with GPU: the same, with NVIDIA's driver."
  type        = string
  default     = null
}

variable "coordinator" {
  description = "The coordinator's machine, and its data disk, which outlives the machine."
  type = object({
    instance_type = string
    disk_gib      = optional(number, 20)
    data_disk_gib = optional(number, 20)
  })
  validation {
    condition     = var.coordinator.data_disk_gib >= 10 && var.coordinator.disk_gib >= 10
    error_message = "Disks have at least 10 GiB."
  }
}

variable "node_groups" {
  description = "Groups of equal nodes, by name. spot: cheaper, and may be stopped at any time; jobs go on without such a node."
  type = map(object({
    instance_type = string
    count         = number
    spot          = optional(bool, false)
    gpu           = optional(bool, false)
    labels        = optional(map(string), {})
    disk_gib      = optional(number, 50)
  }))
  validation {
    condition = alltrue([for name, group in var.node_groups :
      can(regex("^[a-z][a-z0-9]{0,9}$", name)) && group.count >= 0 && group.count <= 500 && floor(group.count) == group.count && group.disk_gib >= 20
    ])
    error_message = "Names of groups have 1 to 10 of a-z and 0-9, beginning with a letter; counts are whole numbers up to 500; disks have at least 20 GiB."
  }
  validation {
    condition     = alltrue([for group in var.node_groups : !contains(keys(group.labels), "group") && !contains(keys(group.labels), "gpu")])
    error_message = "The labels group and gpu are set by the module."
  }
  validation {
    condition     = alltrue([for group in var.node_groups : !group.gpu || var.stoke_cuda != null && var.image_gpu != null])
    error_message = "A group with GPU needs stoke_cuda and image_gpu."
  }
}

variable "tags" {
  description = "Tags (labels, on Google) of all resources."
  type        = map(string)
  default     = {}
}
