"""The package's commands: check, sum up, collect, audit or draw studies, make a family, classify photos."""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import shlex
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from . import records
from .config import Study, load_study, study_folder

if TYPE_CHECKING:
    from .subnets import Family, Manifest


def check(arguments: argparse.Namespace) -> None:
    """Validate a study, its data and weights, and say where its results go."""
    from .data import find_task

    study = load_study(arguments.study, arguments.set)
    _, _, classes, splits = find_task(study)
    sizes = ", ".join(f"{len(indices)} {name}" for name, indices in splits.items())
    print(f"{arguments.study}: {len(classes)} classes, images: {sizes}\nresults go to {study_folder(study)}")
    if study.backbone.name != "embedded":  # that one is made by the study itself
        print(_forecast(study, len(splits["train"]) + len(splits["validation"])))


def _forecast(study: Study, images: int) -> str:
    """What the frozen layers alone would cost on this machine."""
    import torch

    from .backbones import load_backbone
    from .costs import latency
    from .engines import prepare
    from .pet import cut_of

    torch.set_num_threads(study.training.threads or torch.get_num_threads())
    backbone = load_backbone(study.backbone)
    prefix, _ = backbone.cut(cut_of(backbone, study.pet))
    batch = backbone.example(study.training.prefix_batch)
    seconds = images * study.training.epochs * latency(prepare(prefix, "eager", batch), batch, repeats=3)
    return (
        f"what it would cost: the frozen layers take about {seconds:.0f} s in pet ({images} images, "
        f"{study.training.epochs} epochs), and about {study.routing.cost * seconds:.0f} s in piebridge"
    )


def summary(arguments: argparse.Namespace) -> None:
    """Print what a study's runs cost and reached."""
    folder = study_folder(load_study(arguments.study, arguments.set))
    path = folder / "records.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this study has not been run: make study STUDY={arguments.study}")
    table = records.read_table(path)
    device, threads = table[["device", "threads"]].iloc[0]
    print(f"\n{table['study'].iloc[0]} on {device}, {threads} threads\n")
    shown = records.speedups(table)
    print(shown.round({"train_seconds": 1, "test_accuracy": 2, "best_test_accuracy": 2, "points_above_pet": 2,
                       "faster_than_pet": 2, "faster_than_full": 2, "memory_to_pet": 2,
                       "seconds_at_the_limit": 1}).to_string(na_rep="-"))
    best = table["method"].iloc[-1] if "piebridge" not in set(table["method"]) else "piebridge"
    trained = folder / "runs" / f"{best}-seed{table['seed'].iloc[0]}" / "trained.safetensors"
    print(f"\nRecords: {path}\nTrained with {best}: {trained}")
    print(f"Use it: .venv/bin/python -m piebridge predict {trained} photo.jpg")


def collect(arguments: argparse.Namespace) -> None:
    """Write the records of studies that have been run into one folder of CSV files; other studies' rows in it stay."""
    from .collection import collect as collect_runs
    from .collection import has_runs

    overrides = f" SET={shlex.quote(arguments.set)}" if arguments.set else ""
    studies = {}
    for source in arguments.studies:
        study = load_study(source, arguments.set)
        path = source if Path(source).is_file() else f"params/{source}.yaml"
        if has_runs(study) or not arguments.if_run:
            studies[f"make study STUDY={path}{overrides}"] = study
        else:
            print(f"{study.name}: left out, it has not been run")
    if not studies:
        raise ValueError("none of these studies has been run: make studies")
    collect_runs(studies, arguments.output)
    print(f"{', '.join(study.name for study in studies.values())}: collected in {arguments.output}")


def predict(arguments: argparse.Namespace) -> None:
    """Classify photos with the original network and the trained modules of a run."""
    import torch

    from .data import decode
    from .experiment import load_trained

    network, classes, resolution = load_trained(arguments.trained)
    images, _ = decode(arguments.photos, resolution, memory_mib=2**20)
    with torch.inference_mode():
        for photo, image in zip(arguments.photos, images):
            probabilities = network(image[None]).softmax(1)[0]
            best = int(probabilities.argmax())
            print(f"{photo}: {classes[best]} ({100 * probabilities[best]:.1f} %)")


def generate(arguments: argparse.Namespace) -> None:
    """Prune, align and save a family and its router: the cloud side, on one GPU or, under torchrun, on several."""
    from .backbones import load_backbone
    from .cloud import generate_family
    from .data import load_cloud

    study = load_study(arguments.study, arguments.set)
    checkpoint = _alignment_state(arguments.output, study.fingerprint())
    backbone, images = load_backbone(study.backbone), load_cloud(study)
    family, history = generate_family(study, backbone, images, checkpoint)
    _keep_family(arguments.output, study, backbone, images, family, history, "alignment.csv", checkpoint)


def extend(arguments: argparse.Namespace) -> None:
    """Add subnets to a family, or put them in the place of others; all that it has otherwise stays as it is."""
    from .backbones import load_backbone
    from .cloud import extend_family
    from .data import load_cloud
    from .pet import cut_of
    from .subnets import load_family

    study = load_study(arguments.study, arguments.set)
    backbone = load_backbone(study.backbone)
    family = load_family(arguments.family, backbone, cut_of(backbone, study.pet))
    start = hashlib.sha256((arguments.family / "manifest.json").read_bytes()).hexdigest()[:8]
    checkpoint = _alignment_state(arguments.output, f"{study.fingerprint()}-{start}-{arguments.like}")
    images = load_cloud(study)
    family, history = extend_family(study, backbone, images, family, arguments.like, arguments.replace, checkpoint)
    _keep_family(arguments.output, study, backbone, images, family, history, "extension.csv", checkpoint)


def _alignment_state(output: Path, fingerprint: str) -> Path:
    """Where an alignment that is killed is gone on with, by a command that begins with the same."""
    output.parent.mkdir(parents=True, exist_ok=True)
    return output.parent / f".{output.name}-{fingerprint}.alignment.safetensors"


def _keep_family(
    output: Path, study: Study, backbone, images, family: Family, history, history_name: str, checkpoint: Path
) -> None:
    from accelerate import PartialState

    from .checkpoints import Checkpoint
    from .cloud import learn_router
    from .router import save_router
    from .subnets import save_family

    if not PartialState().is_main_process:
        return
    save_family(family, output)
    records.write_table(output / history_name, history)
    save_router(learn_router(study, backbone, family, images.train), study.router, output)
    Checkpoint(checkpoint).remove()
    _print_members(family.manifest)


def measure(arguments: argparse.Namespace) -> None:
    """Measure the latencies of a family again, on this machine, and write them into its manifest."""
    from tqdm import tqdm

    from .subnets import measured_here, write_manifest

    if arguments.processes < 1:
        raise ValueError(f"--processes: {arguments.processes}; it takes one at least")
    study, manifests = load_study(arguments.study, arguments.set), []
    # where a process happens to have its memory makes some members faster and others slower, for as long as it lives
    for _ in tqdm(range(arguments.processes), desc="measuring latencies", unit="process"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            manifests.append(fresh.submit(measured_here, study, arguments.family).result())
    members = []
    for seen in zip(*(manifest.subnets for manifest in manifests)):
        latency = statistics.median(facts.relative_latency for facts in seen)
        members.append(seen[0].model_copy(update={"relative_latency": round(latency, 4)}))
    manifest = manifests[0].model_copy(update={"subnets": tuple(members)})
    write_manifest(manifest, arguments.family)
    _print_members(manifest)


def transfer(arguments: argparse.Namespace) -> None:
    """Train heads on each subnet of a family alone, test them on the original, and write a table."""
    import torch

    from .backbones import load_backbone
    from .data import load_held_out
    from .subnets import load_family
    from .transfer import transfer as measure_transfer

    study = load_study(arguments.study, arguments.set)
    targets = [load_study(target) for target in arguments.targets]
    torch.set_num_threads(study.training.threads or torch.get_num_threads())
    backbone = load_backbone(study.backbone)
    family = load_family(arguments.family, backbone, "head")
    table = measure_transfer(family, backbone, load_held_out(study), targets)
    records.replace_rows(arguments.output, table, "backbone")
    lost = (table["reference_accuracy"] - table["transfer_accuracy"]).rename("points lost")
    shown = table.assign(**{"points lost": lost}).pivot_table(
        index=["backbone", "subnet", "relative_latency", "fidelity_cloud"], columns="dataset", values="points lost")
    print(shown.assign(mean=shown.mean(axis=1)).round(2).to_string())


def audit(arguments: argparse.Namespace) -> None:
    """Train with every way of choosing prefixes and every seed, compare them with PieBridge's, and write a table."""
    from .audit import REFERENCE
    from .audit import audit as measure_routes

    studies, seeds = [load_study(study, arguments.set) for study in arguments.studies], sorted(set(arguments.seeds))
    for study in studies:
        table = measure_routes(study, seeds)
        records.replace_rows(arguments.output, table, "study")
        print(f"\n{study.name}, {len(seeds)} seeds; behind: points below {REFERENCE!r}, 95 % interval\n")
        shown = records.compared(table, REFERENCE).rename(columns={"half_width": "±"})
        print(shown.round({"cost": 3, "test_accuracy": 2, "behind": 2, "±": 2}).to_string(na_rep="-"), flush=True)


def _print_members(manifest: Manifest) -> None:
    for facts in manifest.subnets:
        print(
            f"width {facts.width:.2f}  without {','.join(facts.removed) or '-':18s} {facts.resolution:3d} px  "
            f"stem stride {facts.stem_stride or '-'}  "
            f"MACs {facts.relative_macs:.3f}  latency {facts.relative_latency:.3f}  fidelity {facts.fidelity or 0:.3f}"
        )


def figure(arguments: argparse.Namespace) -> None:
    """Draw accuracy against training time of one study in a table of records."""
    from .figures import accuracy_against_time

    table = records.read_table(arguments.table)
    if arguments.study:
        known = ", ".join(dict.fromkeys(table["study"]))
        table = table[table["study"] == arguments.study]
        if table.empty:
            raise ValueError(f"{arguments.table}: no records of {arguments.study!r}; there are: {known}")
    drawing = accuracy_against_time(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(arguments.output, dpi=130, bbox_inches="tight")


def main() -> int:
    """Run a command; bad input ends with a message and status 2."""
    parser = argparse.ArgumentParser(prog="python -m piebridge", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for function in (check, summary, generate, extend, measure, transfer):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.add_argument("study", help="a study of params/, by name or path")
        command.add_argument("--set", default="", help='overrides, for example "training.epochs=3 seed=1"')
        command.set_defaults(run=function)
        if function in (generate, extend):
            command.add_argument("--output", type=Path, required=True, help="folder that the family is written to")
        if function is extend:
            command.add_argument("--like", type=int, required=True, help="the subnet that new ones are copies of")
            command.add_argument("--replace", type=int, nargs="+", default=[], help="subnets that are left out instead")
        if function in (extend, measure, transfer):
            command.add_argument("--family", type=Path, required=True, help="folder of the family")
        if function is measure:
            command.add_argument("--processes", type=int, default=5, help="what counts is the median of so many")
        if function is transfer:
            command.add_argument("--targets", nargs="+", required=True, help="studies of the target tasks")
            command.add_argument("--output", type=Path, required=True, help="CSV; other backbones' rows in it stay")
    command = commands.add_parser("collect", help=collect.__doc__)
    command.add_argument("studies", nargs="+", metavar="study", help="a study of params/, by name or path")
    command.add_argument("--set", default="", help="overrides that the studies were run with")
    command.add_argument("--output", type=Path, required=True, help="folder of the CSV files")
    command.add_argument("--if-run", action="store_true", help="leave out studies of which there is no run at all")
    command.set_defaults(run=collect)
    command = commands.add_parser("audit", help=audit.__doc__)
    command.add_argument("studies", nargs="+", metavar="study", help="studies of params/, by name or path")
    command.add_argument("--set", default="", help="overrides, of all of them")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="one run a variant and seed")
    command.add_argument("--output", type=Path, required=True, help="CSV; other studies' rows in it stay")
    command.set_defaults(run=audit)
    command = commands.add_parser("predict", help=predict.__doc__)
    command.add_argument("trained", type=Path, help="trained.safetensors of a run")
    command.add_argument("photos", type=Path, nargs="+", help="image files")
    command.set_defaults(run=predict)
    command = commands.add_parser("figure", help=figure.__doc__)
    command.add_argument("table", type=Path, help="a CSV of records")
    command.add_argument("--study", help="the study to draw, by name; needed where the table holds several")
    command.add_argument("--output", type=Path, required=True, help="image file")
    command.set_defaults(run=figure)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
