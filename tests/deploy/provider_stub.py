"""A provider for Terraform that knows the schema of a real one, and nothing else: what `validate` and mocked tests need where there is no registry.

    provider_stub.py schema PACKAGE.tgz NAME FOLDER...    prints the schema of these resources as JSON (a folder of the package's lib/ is one resource)
    provider_stub.py serve SCHEMA.json                    speaks Terraform's plugin protocol (Terraform starts it so)

The schema comes from the npm packages @cdktf/provider-*, which HashiCorp generated from the providers: names, types, what is required, nesting. They do not say
which optional attributes the provider also computes (COMPUTED names those that the modules read), nor which values are right.
"""

import json
import re
import sys
import tarfile

# Optional attributes that the provider fills in where they are left out, as far as the modules read them.
COMPUTED = {"address", "network_ip", "private_ip", "public_ip", "availability_zone", "project_id", "id"}

SIMPLE = {
    "string": "string", "number": "number", "boolean": "bool", "boolean|cdktf.IResolvable": "bool",
    "string[]": ["list", "string"], "number[]": ["list", "number"], "cdktf.StringMap": ["map", "string"],
    "{[key:string]:string}": ["map", "string"], "{[key:string]:string}|cdktf.IResolvable": ["map", "string"],
    "{[key:string]:boolean|cdktf.IResolvable}|cdktf.IResolvable": ["map", "bool"], "{[key:string]:boolean|cdktf.IResolvable}": ["map", "bool"],
    "{[key:string]:number}": ["map", "number"],
}


def interfaces(text):
    """Each interface: a list of (HCL name, type, optional)."""
    found = {}
    for name, body in re.findall(r"^export interface (\w+)(?: extends [\w.]+)? \{\n(.*?)^\}", text, re.M | re.S):
        fields = re.findall(r"\{@link \S+#(\w+) \w+#\w+\}(?:(?!\*/).)*?\*/\s*readonly \w+(\??): ((?:\{[^}]*\}[^;]*|[^;{]+));", body, re.S)
        found[name] = [(snake, re.sub(r"\s", "", kind).replace(";}", "}"), bool(optional)) for snake, optional, kind in fields]
    return found


def block(known, name):
    attributes, blocks = {}, {}
    for field, kind, optional in known[name]:
        simple = SIMPLE.get(kind)
        if simple is not None:
            attributes[field] = {"type": simple, "required": not optional, "optional": optional, "computed": optional and field in COMPUTED}
            continue
        inner = re.match(r"(\w+)(\[\])?", kind)
        if inner is None or inner[1] not in known:
            raise SystemExit(f"{name}.{field}: what is {kind}?")
        blocks[field] = {"block": block(known, inner[1]), "many": bool(inner[2]), "required": not optional}
    return {"attributes": attributes, "blocks": blocks}


def computed(text, class_name, attributes):
    body = text.split(f"export declare class {class_name} extends", 1)[1]
    getters = dict(re.findall(r"^    get (\w+)\(\): ([^;{]+);", body, re.M))
    for camel, kind in getters.items():
        snake = re.sub(r"(?<!^)([A-Z])", lambda m: "_" + m[1].lower(), camel)
        simple = SIMPLE.get(re.sub(r"\s", "", kind))
        if simple is not None and snake not in attributes and not camel.endswith("Input"):
            attributes[snake] = {"type": simple, "required": False, "optional": False, "computed": True}


def schema(package, provider, folders):
    result = {"provider": None, "resources": {}, "data": {}}
    with tarfile.open(package) as archive:
        read = lambda folder: archive.extractfile(f"package/lib/{folder}/index.d.ts").read().decode()
        for folder in ["provider", *folders]:
            text = read(folder)
            known = interfaces(text)
            config = re.search(r"^export interface (\w+)Config (?:extends|\{)", text, re.M)[1]
            made = block(known, config + "Config")
            kind = re.search(r'tfResourceType = "(\w+)"', text)[1]
            if folder == "provider":
                result["provider"] = made
                continue
            computed(text, config, made["attributes"])
            result["data" if folder.startswith("data-") else "resources"][kind] = made
    return result


def serve(file):
    from tf import provider as base, runner
    from tf.gen import tfplugin_pb2 as pb

    with open(file, encoding="utf-8") as source:
        known = json.load(source)

    def to_block(made):
        attributes = [
            pb.Schema.Attribute(name=name, type=json.dumps(a["type"]).encode(), required=a["required"], optional=a["optional"], computed=a["computed"])
            for name, a in made["attributes"].items()
        ]
        blocks = [
            pb.Schema.NestedBlock(
                type_name=name, block=to_block(b["block"]), nesting=pb.Schema.NestedBlock.LIST,
                min_items=1 if b["required"] else 0, max_items=0 if b["many"] else 1,
            )
            for name, b in made["blocks"].items()
        ]
        return pb.Schema.Block(version=0, attributes=attributes, block_types=blocks)

    to_schema = lambda made: pb.Schema(version=0, block=to_block(made))

    class Servicer(base.ProviderServicer):
        def GetProviderSchema(self, request, context):
            return pb.GetProviderSchema.Response(
                provider=to_schema(known["provider"]),
                provider_meta=pb.Schema(version=0, block=pb.Schema.Block(version=0)),
                resource_schemas={name: to_schema(made) for name, made in known["resources"].items()},
                data_source_schemas={name: to_schema(made) for name, made in known["data"].items()},
            )

        # Terraform has compared names and types with the schema before it asks.
        def ValidateProviderConfig(self, request, context):
            return pb.ValidateProviderConfig.Response()

        def ValidateResourceConfig(self, request, context):
            return pb.ValidateResourceConfig.Response()

        def ValidateDataResourceConfig(self, request, context):
            return pb.ValidateDataResourceConfig.Response()

    class Nothing:
        def full_name(self):
            return "stub"

    base.ProviderServicer = Servicer
    runner.run_provider(Nothing(), sys.argv[:1])


if __name__ == "__main__":
    if sys.argv[1] == "schema":
        json.dump(schema(sys.argv[2], sys.argv[3], sys.argv[4:]), sys.stdout)
    else:
        serve(sys.argv[2])
