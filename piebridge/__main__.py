"""The package's commands: `python -m piebridge generate` (cloud side) and `python -m piebridge predict` (use)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import records
from .config import StudyError, load_study


def generate(arguments: argparse.Namespace) -> None:
    """Prune, align and save a family and its router."""
    from .backbones import load_backbone
    from .cloud import generate_family, learn_router
    from .data import load_cloud
    from .router import save_router
    from .subnets import save_family

    study = load_study(arguments.study, arguments.set)
    backbone = load_backbone(study.backbone)
    family, history = generate_family(study, backbone, load_cloud(study))
    save_family(family, arguments.output)
    records.write_table(arguments.output / "alignment.csv", history)
    save_router(learn_router(study, backbone, family), study.router, arguments.output)
    for facts in family.manifest.subnets:
        print(
            f"width {facts.width:.2f}  without {','.join(facts.removed) or '-':18s} {facts.resolution:3d} px  "
            f"MACs {facts.relative_macs:.3f}  latency {facts.relative_latency:.3f}  fidelity {facts.fidelity:.3f}"
        )


def main() -> int:
    """Run a command; bad input ends with a message and status 2."""
    parser = argparse.ArgumentParser(prog="python -m piebridge", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("generate", help=generate.__doc__)
    command.add_argument("study", help="a study of params/, by name or path")
    command.add_argument("--set", default="", help='overrides, for example "cloud.steps=100 seed=1"')
    command.add_argument("--output", type=Path, required=True, help="folder of the family")
    command.set_defaults(run=generate)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except (StudyError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
