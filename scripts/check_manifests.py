"""Checks deploy/kubernetes against the API's schemas and the gateway's own reading of its flags.

usage: python scripts/check_manifests.py [FILE ...]. Run by scripts/check_deploy.sh, whose environment has what this
imports. Prints a line a manifest; the exit status is 1 where any is wrong.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from kubernetes_validate.utils import all_versions
from smg.launch_router import parse_router_args

ROOT = Path(__file__).resolve().parent.parent
OWN_SCHEMAS = {"LeaderWorkerSet": ROOT / "tests" / "deploy" / "leader_worker_set.json"}
"""Of kinds that Kubernetes itself does not have."""

OLDEST = "1.30"
"""The manifests are for this version of Kubernetes and all later ones; checked are this and the newest known."""


def versions() -> list[str]:
    """The versions to check against, or an error where the schemas of the oldest are missing."""
    known = all_versions()
    oldest = [version for version in known if version.startswith(f"{OLDEST}.")]
    if not oldest:
        raise SystemExit(f"kubernetes-validate has no schemas of {OLDEST}, only {', '.join(known)}")
    return [oldest[-1], known[-1]]


def pods_of(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod templates of a kind with a schema of our own, as pods."""
    for name, template in manifest["spec"]["leaderWorkerTemplate"].items():
        if name.endswith("Template"):
            metadata = {"name": name.lower(), **template.get("metadata", {})}
            yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def faults_of(manifest: dict[str, Any], against: list[str]) -> Iterator[str]:
    """What is wrong with a manifest, unknown fields included."""
    plain = [manifest]
    if (own := OWN_SCHEMAS.get(manifest["kind"])) is not None:
        validator = jsonschema.Draft202012Validator(json.loads(own.read_text(encoding="utf-8")))
        for error in validator.iter_errors(manifest):
            yield f"{own.name}: {error.json_path}: {error.message}"
        plain = list(pods_of(manifest))
    for version in against:
        for each in plain:
            try:
                kubernetes_validate.validate(each, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"Kubernetes {version}: {error.json_path}: {error.message}"
    if manifest["kind"] == "Deployment" and manifest["metadata"]["name"] == "gateway":
        yield from faults_of_gateway(manifest["spec"]["template"]["spec"]["containers"][0]["args"])


def faults_of_gateway(arguments: list[str]) -> Iterator[str]:
    """What the gateway itself says to the flags of its container and of its image."""
    entry = re.findall(r"^ENTRYPOINT (\[.*\])$", (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8"), re.M)[-1]
    try:
        parse_router_args([*json.loads(entry)[2:], *arguments])
    except (SystemExit, ValueError) as error:
        yield f"the gateway's flags: {error}"


def main() -> int:
    """Check the files that are named, or all."""
    files = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
    against, wrong = versions(), 0
    for file in files:
        for manifest in yaml.safe_load_all(file.read_text(encoding="utf-8")):
            faults = list(faults_of(manifest, against))
            wrong += bool(faults)
            print(f"{file.name}: {manifest['kind']} {manifest['metadata']['name']}: {'wrong' if faults else 'ok'}")
            for fault in faults:
                print(f"  {fault}")
    print(f"checked against Kubernetes {' and '.join(against)}")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
