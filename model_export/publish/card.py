"""The model card of a bundle on the Hugging Face hub, made from its manifest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import ModelCardData

from fastvlm_mlx.bundle.files import shown_bytes
from fastvlm_mlx.bundle.manifest import MANIFEST, gate_cells
from fastvlm_mlx.bundle.quantization import Format
from fastvlm_mlx.errors import BundleError

APPLE_LICENSE = "apple-amlr"
APPLE_LICENSE_LINK = "https://github.com/apple/ml-fastvlm/blob/main/LICENSE_MODEL"
# A name is certainly a hub id if the checkpoint was downloaded, or if it is one of Apple's.
DOWNLOADED = re.compile(r"([\w.-]+/[\w.-]+)@[0-9a-f]{40}")
APPLES = re.compile(r"(apple/FastVLM-[\w.-]+)(?:@.*)?")
# The identifiers of licences that the hub knows, from the page on licences of its documentation. It
# calls any other licence `other` and wants its name.
HUB_LICENSES = frozenset(
    """afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
    bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0
    epl-2.0 etalab-2.0 eupl-1.1 gemma gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr
    llama2 llama3 llama3.1 llama3.2 llama3.3 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1
    openrail openrail++ osl-3.0 pddl postgresql unknown unlicense wtfpl zlib""".split()  # noqa: SIM905
)


def model_card(manifest: Mapping[str, Any], repository: str, revision: str | None = None) -> str:
    """Write README.md of `repository`: the hub's metadata in YAML, then the text.

    Args:
        manifest: as `Bundle.open` has read it.
        repository: `owner/name`, for the commands that the card shows.
        revision: the branch that the bundle is on, if not the main one.

    Raises:
        BundleError: the manifest lacks something that an export writes.
    """
    try:
        metadata = _metadata(manifest).to_yaml()
        sections = [
            _head(manifest, repository),
            _facts(manifest),
            _gates(manifest, repository),
            _usage(manifest, repository, revision),
            _license_section(manifest),
            _versions(manifest),
        ]
    # Anybody may have edited the manifest, and what its reader did not check fails here.
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{MANIFEST} is not whole, its card can't be written ({type(error).__name__}: {error}):"
            " export the checkpoint again"
        ) from error
    return f"---\n{metadata}\n---\n" + "\n\n".join(sections) + "\n"


def _metadata(manifest: Mapping[str, Any]) -> ModelCardData:
    source, mlx = manifest["source"], manifest["layout"] == "mlx"
    quantized = any(manifest["llm"]["formats"].values())
    bases = [base for link in _chain(source) if (base := _hub_id(link["name"]))]
    tags = ["fastvlm", "fastvithd", "mlx"] + ([] if mlx else ["coreml"])
    data: dict[str, Any] = {
        **_license(manifest),
        "base_model": bases[0] if bases else None,
        "library_name": "mlx" if mlx else "fastvlm-mlx",
        "pipeline_tag": "image-text-to-text",
        "tags": tags + ([f"{manifest['llm']['bits']}-bit"] if quantized else []),
    }
    if quantized and _hub_id(source["name"]):
        data["base_model_relation"] = "quantized"
    return ModelCardData(**data)


def _license(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Choose the hub's `license`, `license_name` and `license_link`.

    What is made of Apple's weights is under Apple's licence, whatever a fine-tune says of itself. A
    source that states no licence is taken to be made of them.
    """
    stated = str(manifest["source"]["license"]).strip("\"' ")
    made_of = [str(link["name"]) for link in _chain(manifest["source"])]
    if APPLE_LICENSE in stated.lower() or any(APPLES.fullmatch(name) for name in made_of):
        return {"license": APPLE_LICENSE, "license_link": APPLE_LICENSE_LINK}
    if stated.lower() in HUB_LICENSES:
        return {"license": stated.lower()}
    name = re.sub(r"[^a-z0-9.]+", "-", stated.lower()).strip("-.") or "not-stated"
    files = sorted(file for file in manifest["files"] if file.startswith("LICENSE"))
    link = {"license_link": files[0]} if files else {}
    return {"license": "other", "license_name": name, **link}


def _chain(source: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the source, then the base that it is a fine-tune of, and so on."""
    yield source
    if "base" in source:
        yield from _chain(source["base"])


def _hub_id(name: str) -> str | None:
    match = DOWNLOADED.fullmatch(name) or APPLES.fullmatch(name)
    return match.group(1) if match else None


def _head(manifest: Mapping[str, Any], repository: str) -> str:
    kind = (
        "A FastVLM all in MLX"
        if manifest["layout"] == "mlx"
        else "A FastVLM in the layout of Apple's demo app, its encoder in Core ML and its language "
        "model in MLX"
    )
    compared = manifest.get("converted_from")
    against = f"the {compared['layout']} bundle it was converted from" if compared else "it"
    verdict = (
        "Every gate of the export passed."
        if manifest["gates_passed"]
        else "**It failed a gate of the export**: see the table of gates."
    )
    research = (
        "\n\n**For research only**: Apple's licence extends to what is made of its weights."
        if _license(manifest)["license"] == APPLE_LICENSE
        else ""
    )
    return (
        f"# {repository.partition('/')[2]}\n\n{kind}, exported from "
        f"`{_line(manifest['source']['name'])}` by fastvlm-mlx "
        f"{_line(manifest['versions']['fastvlm-mlx'])} and compared with {against}. "
        f"{verdict}{research}"
    )


def _facts(manifest: Mapping[str, Any]) -> str:
    encoder, llm = manifest["encoder"], manifest["llm"]
    rows = [
        ("source" if i == 0 else "base", f"`{_line(link['name'])}`, {_line(link['kind'])}")
        for i, link in enumerate(_chain(manifest["source"]))
    ]
    rows += [
        ("layout", manifest["layout"]),
        (
            "encoder",
            f"FastViTHD in {encoder['precision']}: {encoder['image_size']}×{encoder['image_size']} "
            f"pixels → {encoder['tokens_per_image']} tokens of {encoder['channels']:,} channels; "
            f"{shown_bytes(encoder['bytes'])}",
        ),
    ]
    if "deployment_target" in encoder:
        rows.append(("runs from", encoder["deployment_target"]))
    forms = Counter(str(Format(**form)) for form in llm["formats"].values() if form)
    form = ", ".join(f"{name} ({n} matrices)" for name, n in forms.most_common())
    if len(forms) < 2:
        form = next(iter(forms), llm["dtype"])
    method = llm.get("calibration", {}).get("method", "rtn")
    if method != "rtn":
        form += f" by {method.upper()}"
    sizes = f"{llm['parameters']:,} parameters, {shown_bytes(llm['bytes'])}"
    rows.append(("language model", f"{form}: {llm['bits_per_weight']:g} bits per weight, {sizes}"))
    if forms:
        rows.append(("not quantized", f"{llm['dtype']}{_left(llm['left_unquantized'])}"))
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    return _table(["", ""], [*rows, ("all files", shown_bytes(total))])


def _left(reasons: Mapping[str, str]) -> str:
    """List the matrices that were not quantized after the reason for it; where they are many, count
    them."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(f"`{name}`")
    return "".join(
        f"; {reason} ({', '.join(of) if len(of) <= 4 else f'{len(of)} matrices'})"
        for reason, of in names.items()
    )


def _gates(manifest: Mapping[str, Any], repository: str) -> str:
    table = _table(["gate", "measured", "limit", ""], map(gate_cells, manifest["gates"]))
    name = repository.partition("/")[2]
    against = "the bundle converted" if "converted_from" in manifest else "the source"
    return (
        f"## What was checked\n\n{table}\n\nMeasured on these files against {against}: encoder "
        "features in signal-to-noise ratio, answers to questions about images in KL divergence "
        f"of the next token. `{MANIFEST}` holds every file's SHA-256 and the source's; `fastvlm "
        f"verify {name} --checkpoint …` repeats the figures."
    )


def _usage(manifest: Mapping[str, Any], repository: str, revision: str | None) -> str:
    name = repository.partition("/")[2]
    branch = f" --revision {revision}" if revision else ""
    text = f"""## How to run it

In a clone of fastvlm-mlx (on a Mac `pip install .` is enough):

```console
$ pip install ".[export]"
$ hf download {repository}{branch} --local-dir {name}
$ fastvlm generate {name} --image photo.jpg --prompt "Describe the image."
```

```python
import fastvlm_mlx

model = fastvlm_mlx.load("{name}")
print(model.generate("photo.jpg", "Describe the image.").text)
```"""
    if manifest.get("fits_unmodified_app"):
        text += f"""

In the demo app of [apple/ml-fastvlm](https://github.com/apple/ml-fastvlm), before it is built in
Xcode:

```console
$ fastvlm install {name} path/to/ml-fastvlm/app
```"""
    if manifest.get("fits_unmodified_mlx_vlm"):
        text += f"""

With mlx-vlm:

```console
$ python -m mlx_vlm generate --model {name} --image photo.jpg --prompt "Describe the image."
```"""
    return text


def _license_section(manifest: Mapping[str, Any]) -> str:
    stated = _line(manifest["source"]["license"])
    text = f"## Licence\n\nOf the source: {stated}."
    if _license(manifest)["license"] != APPLE_LICENSE:
        return text
    return (
        f"{text} Apple releases FastVLM's weights [for research]({APPLE_LICENSE_LINK}) "
        f"({APPLE_LICENSE}), which extends to this bundle."
    )


def _versions(manifest: Mapping[str, Any]) -> str:
    tools = ", ".join(f"{_line(k)} {_line(v)}" for k, v in manifest["versions"].items())
    return f"## Made with\n\n{tools}."


def _table(head: list[str], rows: Any) -> str:
    cells = [head, ["---"] * len(head), *([_line(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _line(text: object) -> str:
    """Make text safe for a table of Markdown: it stays in its line, its cell and its `code`."""
    return " ".join(str(text).split()).replace("|", "\\|")
