"""Starts moto's server, which answers as AWS. Usage: moto_aws.py PORT

One thing is mended: a machine whose network interface was made with it has that interface's groups in AWS's answers; moto leaves them empty, and Terraform
would see a difference that is none.
"""

import sys

from moto.ec2.models.instances import Instance
from moto.server import main


def groups(machine):
    # The interface asks the machine in turn: what is its own stands in _group_set.
    interfaces = machine.__dict__.get("nics", {}).values()
    return machine.__dict__.get("own_groups") or [group for interface in interfaces for group in interface._group_set]


Instance.security_groups = property(groups, lambda machine, value: machine.__dict__.__setitem__("own_groups", value))
main(["-H", "127.0.0.1", "-p", sys.argv[1]])
