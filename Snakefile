# The graph: a study -> Papermill -> executed notebooks -> records; and from the embedded study's notebooks, the book.
import shlex
import sys
from pathlib import Path

from piebridge.config import load_study, study_folder

STUDY = config.get("study", "params/embedded.yaml")
OVERRIDES = str(config.get("overrides", "") or "")

BIN = Path(sys.executable).parent

study = load_study(STUDY, OVERRIDES)
folder = study_folder(study)
sources = sorted(str(path) for path in Path("piebridge").rglob("*.py"))

ALL = sorted(path.stem for path in Path("notebooks").glob("*.ipynb"))
# A family that exists already needs no notebook that makes one.
WANTED = ALL if study.cloud.family == "generate" else ["01_frozen_layer_cost", "04_end_to_end", "05_results"]
# Each notebook waits for what it reads; 00 comes after what it shows in short.
AFTER = {
    "00_quickstart": ["03_router_training"],
    "02_subnet_generation": ["01_frozen_layer_cost"],
    "03_router_training": ["02_subnet_generation"],
    "04_end_to_end": ["03_router_training", "00_quickstart", "01_frozen_layer_cost"],
    "05_results": ["04_end_to_end"],
}


def executed(name):
    return f"{folder}/notebooks/{name}.ipynb"


rule study:
    input: [executed(name) for name in WANTED]


rule notebook:
    input:
        notebook="notebooks/{name}.ipynb",
        study=STUDY if Path(STUDY).is_file() else f"params/{STUDY}.yaml",
        sources=sources,
        before=lambda wildcards: [executed(name) for name in AFTER.get(wildcards.name, []) if name in WANTED],
    output: f"{folder}/notebooks/{{name}}.ipynb"
    log: f"{folder}/logs/{{name}}.ipynb"
    params: overrides=shlex.quote(OVERRIDES)
    shell:
        # Papermill leaves a partial notebook when it is killed: the output appears only when all cells ran.
        "TQDM_MININTERVAL=5 {sys.executable} -m papermill {input.notebook:q} {log:q} -p study {input.study:q} -p overrides {params.overrides} "
        "--log-output --no-progress-bar --log-level WARNING && cp {log:q} {output:q}"


rule book:
    input:
        notebooks=[executed(name) for name in ALL],
        pages=[str(path) for path in sorted(Path("book").rglob("*")) if path.is_file()],
        records=sorted(str(path) for path in Path("book/records").glob("*")),
        sources=sources,
    output: "_build/html/index.html"
    params: notebooks=f"{folder}/notebooks"
    shell:
        "rm -rf _build/book _build/html && mkdir -p _build/book && cp -r book/. _build/book/ && "
        "cp -r {params.notebooks:q} _build/book/notebooks && "
        "{BIN}/jupyter-book build -q -W -n --keep-going --path-output . _build/book"
