"""`fastvlm verify`: the verb."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastvlm_mlx.cli.common import BundlePath, Json, option, print_json
from fastvlm_mlx.errors import GateError, OptionError
from model_export.cli.options import SOURCE, Base, MaxKl, MinAgreement, MinSnr, Revision

if TYPE_CHECKING:
    from fastvlm_mlx.bundle.bundle import Bundle


def verify(
    bundle: BundlePath,
    checkpoint: Annotated[
        str | None,
        option(
            "The checkpoint that the bundle was made from, a directory or a hub id: compare both.",
            group=SOURCE,
            value="CHECKPOINT",
        ),
    ] = None,
    base: Base = None,
    revision: Revision = None,
    min_snr_db: MinSnr = None,
    max_kl_nats: MaxKl = None,
    min_agreement: MinAgreement = None,
    as_json: Json = False,
) -> None:
    """Without its checkpoint a bundle's files, layout and largest values are checked. With it the
    encoder's features, the answers and every tensor are compared as well, as the export did."""
    from fastvlm_mlx.bundle.bundle import Bundle
    from fastvlm_mlx.cli import show
    from model_export.cli import early

    if checkpoint is None and (base or revision):
        raise OptionError("--base or --revision is given without --checkpoint: name that too")
    limits = {
        "min_snr_db": min_snr_db,
        "max_kl_nats": max_kl_nats,
        "min_agreement": min_agreement,
    }
    size = Bundle.open(bundle).config.vision.image_size
    if checkpoint is not None:
        early.check_checkpoint(checkpoint, base=base, revision=revision, image_size=size)
    from model_export.gates.verify import verify as run

    with show.stages() as progress:
        checked, gates = run(bundle, checkpoint, limits, progress, base=base, revision=revision)
    failed = [gate for gate in gates if not gate.passed]
    judged = [gate.to_dict() for gate in gates if not gate.left_out]
    left_out = {gate.name: gate.left_out for gate in gates if gate.left_out}
    if as_json:
        print_json(
            {
                "bundle": str(bundle),
                "files": None if checked.manifest is None else len(checked.files) - 1,
                "layout": checked.layout,
                "gates": judged,
                "gates_left_out": left_out,
                "passed": not failed,
            }
        )
    else:
        if checkpoint is None:
            print_checks(checked)
        if judged:
            show.print_gates(judged)
        for name, why in left_out.items():
            show.note(f"{name} is not judged: {why}")
        if checkpoint is None:
            show.note("give --checkpoint to compare features and answers with the source")
            recorded = (checked.manifest or {}).get("gates") or []
            for gate in recorded:
                if not gate["passed"]:
                    show.note(f"{gate['name']} failed when the bundle was exported")
    if failed:
        raise GateError("; ".join(gate.sentence() for gate in failed) + ": export again")


def print_checks(bundle: Bundle) -> None:
    """Print what was checked before any gate: the files and the layout."""
    from rich.table import Table

    from fastvlm_mlx.bundle.manifest import MANIFEST
    from fastvlm_mlx.cli import show

    files = f"all {len(bundle.files) - 1} have the size and the SHA-256 that {MANIFEST} lists"
    if bundle.manifest is None:
        files = f"not compared, because there is no {MANIFEST}"
    table = Table("checked", "result", box=None, pad_edge=False)
    table.add_row("files", files)
    table.add_row("layout", f"{bundle.layout}: it keeps the rules of the programs that load it")
    show.print_table(table)
