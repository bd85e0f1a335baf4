"""What ``kubectl kustomize`` makes of our overlays, without kubectl: the few of its features that they use.

A test compares it with the real one where that is installed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "configMapGenerator", "patches"}
MERGED_BY_NAME = {"containers", "env", "volumes", "volumeMounts"}
"""Lists whose items a strategic merge tells apart by name; others are replaced."""
Object = dict[str, Any]


def build(folder: Path) -> list[Object]:
    """The objects of a kustomization, but for the digest in the names of its config maps."""
    said = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(said) - KNOWN:
        raise NotImplementedError(f"{folder}: {unknown}")
    objects: list[Object] = []
    for resource in said.get("resources", []):
        path = folder / resource
        objects += build(path) if path.is_dir() else read(path)
    for generated in said.get("configMapGenerator", []):
        _generate(objects, folder, generated)
    for patch in said.get("patches", []):
        _patch(objects, folder, patch)
    for each in objects:
        if "namespace" in said:
            each["metadata"]["namespace"] = said["namespace"]
        for image in said.get("images", []):
            _rename(each, image)
    return objects


def read(path: Path) -> list[Object]:
    return [each for each in yaml.safe_load_all(path.read_text()) if each]


def _generate(objects: list[Object], folder: Path, said: Object) -> None:
    lines = [line for name in said.get("envs", []) for line in (folder / name).read_text().splitlines()]
    data = dict(line.split("=", 1) for line in [*lines, *said.get("literals", [])])
    if said.get("behavior") == "merge":
        _find(objects, "ConfigMap", said["name"])["data"].update(data)
    else:
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": said["name"]}, "data": data})


def _patch(objects: list[Object], folder: Path, said: Object) -> None:
    if "path" in said:
        for change in read(folder / said["path"]):
            _merge(_find(objects, change["kind"], change["metadata"]["name"]), change)
    else:
        target = _find(objects, said["target"]["kind"], said["target"]["name"])
        changed = jsonpatch.apply_patch(target, yaml.safe_load(said["patch"]))
        target.clear()
        target.update(changed)


def _merge(into: Object, change: Object) -> None:
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif key in MERGED_BY_NAME and key in into:
            named = {item["name"]: item for item in into[key]}
            for item in value:
                if item["name"] in named:
                    _merge(named[item["name"]], item)
                else:
                    into[key].append(copy.deepcopy(item))
        else:
            into[key] = copy.deepcopy(value)


def _rename(each: Object, image: Object) -> None:
    for container in each.get("spec", {}).get("template", {}).get("spec", {}).get("containers", []):
        if container["image"].partition(":")[0] == image["name"]:
            container["image"] = f"{image['newName']}:{image['newTag']}"


def _find(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found
