"""Validates every manifest here against the schemas of Kubernetes, strictly.

Arguments: what kustomize renders of the base and of the example, where that can be had.
"""

import copy
import glob
import sys

import kubernetes_validate
import yaml

# The oldest release that has all that is used (preStop: sleep), and the newest one known.
RELEASES = ["1.30", "1.37"]


def documents(path):
    with open(path, encoding="utf-8") as file:
        return [one for one in yaml.safe_load_all(file) if one]


def flaw(document):
    """What is wrong with a manifest, if anything is."""
    for release in RELEASES:
        try:
            kubernetes_validate.validate(document, release, strict=True)
        except kubernetes_validate.ValidationError as error:
            return f"{release}: {error}"
    return None


def places(value, path=()):
    """Every object within a manifest whose fields Kubernetes names."""
    if isinstance(value, dict):
        # Keys below these are the writer's own.
        if path and path[-1] in ("data", "labels", "matchLabels", "selector", "annotations"):
            return
        # Quantities.
        if path and path[-1] in ("requests", "limits", "capacity"):
            return
        yield path
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


def misspelt(document, path):
    """A copy with a field that does not exist."""
    wrong = copy.deepcopy(document)
    place = wrong
    for key in path:
        place = place[key]
    place["speck"] = 1
    return wrong


def main():
    written = {}
    for path in sorted(glob.glob("deploy/kubernetes/*/*.yaml")):
        # A kustomization is not sent to Kubernetes; a test compares its list with the files.
        if path.endswith("/kustomization.yaml"):
            continue
        for document in documents(path):
            if wrong := flaw(document):
                sys.exit(f"{path}: {wrong}")
            if path.startswith("deploy/kubernetes/base/"):
                written[document["kind"], document["metadata"]["name"]] = document
            checked = list(places(document))
            for place in checked:
                if flaw(misspelt(document, place)) is None:
                    sys.exit(f"{path}: a wrong field at {place} is not refused")
        print(f"valid: {path}; a wrong field is refused in each of {len(checked)} places")
    for number, path in enumerate(sys.argv[1:]):
        found = documents(path)
        for document in found:
            if wrong := flaw(document):
                sys.exit(f"{path}: {wrong}")
        names = {(one["kind"], one["metadata"]["name"]): one for one in found}
        # The base needs nothing of kustomize: a plain apply of its files does the same.
        if number == 0 and names != written:
            sys.exit("kustomize changes the base")
        print(f"valid as rendered: {len(found)} manifests")


main()
